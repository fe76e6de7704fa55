package daemon

import (
	"context"
	"fmt"
	"net/http"
	"strconv"

	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/ublk"
)

// serveDetach removes a device: one that is attached here, or, with force, one
// that nobody serves and no record knows, as is left when a state directory is
// lost. Without that its users would wait until the host is rebooted.
func (d *Daemon) serveDetach(w http.ResponseWriter, r *http.Request) {
	id, err := strconv.Atoi(r.PathValue("id"))
	if err != nil {
		refuse(w, http.StatusBadRequest, fmt.Errorf("%q is not a device's number", r.PathValue("id")))
		return
	}
	var q api.DetachRequest
	stream(w, r, &q, func(ctx context.Context, p func(api.Progress)) (any, error) {
		if a := d.find(id); a != nil {
			return a.detach(ctx, q, p)
		}
		return d.removeOrphan(ctx, id, q.Force)
	})
}

func (d *Daemon) removeOrphan(ctx context.Context, id int, force bool) (api.Done, error) {
	unknown := fmt.Errorf("%s is not attached here: see lsdctl list", deviceName(id))
	k, err := d.kernel()
	if err != nil {
		return api.Done{}, unknown
	}
	ctx, stop := context.WithTimeout(ctx, deviceTimeout)
	defer stop()
	switch info, err := k.Info(ctx, id); {
	case err != nil:
		return api.Done{}, unknown
	case info.State == ublk.StateLive:
		return api.Done{}, fmt.Errorf("/dev/ublkb%d is not attached here: process %d serves it", id, info.ServerPID)
	case !force:
		return api.Done{}, fmt.Errorf("/dev/ublkb%d is not attached here, and nobody serves it: lsdctl del %d --force removes it, its users get errors", id, id)
	}
	if err := k.Delete(ctx, id); err != nil {
		return api.Done{}, fmt.Errorf("/dev/ublkb%d: %w", id, err)
	}
	d.logger.Warn("removed a device that nobody served", "device", fmt.Sprintf("/dev/ublkb%d", id))
	return api.Done{Remarks: []string{"nobody served it; a write log of its image, if it had one, is where it was"}}, nil
}
