package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"strconv"
	"time"

	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/internal/peercred"
)

// maxRequest bounds the body of a request.
const maxRequest = 1 << 20

// handler returns what the socket answers.
func (d *Daemon) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+api.PathVersion, func(w http.ResponseWriter, _ *http.Request) {
		reply(w, api.Version{Version: d.cfg.Version, PID: os.Getpid(), Host: d.cfg.Host, StateDir: d.cfg.StateDir, Started: d.started})
	})
	mux.HandleFunc("GET "+api.PathFeatures, d.serveFeatures)
	mux.HandleFunc("GET "+api.PathReadCache, func(w http.ResponseWriter, _ *http.Request) { reply(w, d.readCache.describe()) })
	mux.HandleFunc("GET "+api.PathImages, func(w http.ResponseWriter, r *http.Request) {
		reply(w, d.describeAll(r.Context()))
	})
	mux.HandleFunc("GET "+api.PathImages+"/{id}", d.about(func(w http.ResponseWriter, r *http.Request, a *attachment) {
		reply(w, a.describe(r.Context()))
	}))
	mux.HandleFunc("POST "+api.PathImages, func(w http.ResponseWriter, r *http.Request) {
		q := api.AttachRequest{ID: -1}
		stream(w, r, &q, func(ctx context.Context, p func(api.Progress)) (any, error) { return d.attach(ctx, q, p) })
	})
	mux.HandleFunc("POST "+api.PathImages+"/{id}/flush", d.about(func(w http.ResponseWriter, r *http.Request, a *attachment) {
		stream(w, r, &struct{}{}, func(ctx context.Context, p func(api.Progress)) (any, error) { return api.Done{}, a.flush(ctx, p) })
	}))
	mux.HandleFunc("POST "+api.PathImages+"/{id}/refresh", d.about(func(w http.ResponseWriter, r *http.Request, a *attachment) {
		stream(w, r, &struct{}{}, func(ctx context.Context, p func(api.Progress)) (any, error) { return api.Done{}, a.refresh(ctx, p) })
	}))
	mux.HandleFunc("POST "+api.PathImages+"/{id}/resize", d.about(func(w http.ResponseWriter, r *http.Request, a *attachment) {
		var q api.ResizeRequest
		stream(w, r, &q, func(ctx context.Context, p func(api.Progress)) (any, error) { return a.resize(ctx, q, p) })
	}))
	mux.HandleFunc("POST "+api.PathImages+"/{id}/flatten", d.about(func(w http.ResponseWriter, r *http.Request, a *attachment) {
		stream(w, r, &struct{}{}, func(ctx context.Context, p func(api.Progress)) (any, error) { return a.flatten(ctx, p) })
	}))
	mux.HandleFunc("POST "+api.PathImages+"/{id}/rollback", d.about(func(w http.ResponseWriter, r *http.Request, a *attachment) {
		var q api.RollbackRequest
		stream(w, r, &q, func(ctx context.Context, p func(api.Progress)) (any, error) { return a.rollBack(ctx, q, nil, p) })
	}))
	mux.HandleFunc("POST "+api.PathImages+"/{id}/detach", d.serveDetach)
	mux.HandleFunc("POST "+api.PathShutdown, func(w http.ResponseWriter, r *http.Request) {
		var q api.ShutdownRequest
		stream(w, r, &q, func(ctx context.Context, p func(api.Progress)) (any, error) { return d.shutdown(ctx, q, p) })
	})
	mux.HandleFunc("POST "+api.PathReclaim, func(w http.ResponseWriter, r *http.Request) {
		var q api.ReclaimRequest
		stream(w, r, &q, func(context.Context, func(api.Progress)) (any, error) { return api.Done{}, d.reclaim.ask(q) })
	})
	mux.Handle("GET /metrics", d.metrics())
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.Handle("/debug/pprof/block", newBlockProfile())
	mux.Handle("/debug/pprof/mutex", newMutexProfile())
	return onlyOwner(mux)
}

type peerKey struct{}

// withPeer notes who is at the other end of a connection.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	cred, err := peercred.Of(uc)
	if err != nil {
		return ctx
	}
	return context.WithValue(ctx, peerKey{}, cred.Uid)
}

// isOwner reports whether a user is root, or the daemon's own.
func isOwner(uid uint32) bool { return uid == 0 || int(uid) == os.Geteuid() }

// onlyOwner refuses everybody but root and the daemon's own user: the socket's
// mode says the same, but can be changed by mistake.
func onlyOwner(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		uid, ok := r.Context().Value(peerKey{}).(uint32)
		if !ok || !isOwner(uid) {
			refuse(w, http.StatusForbidden, errors.New("only root may talk to lsdd"))
			return
		}
		h.ServeHTTP(w, r)
	})
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // an error means that the client is gone
}

func refuse(w http.ResponseWriter, code int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = api.NewSender(w, func() {}).Error(err)
}

// about finds the attachment that a request is about.
func (d *Daemon) about(fn func(http.ResponseWriter, *http.Request, *attachment)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		id, err := strconv.Atoi(r.PathValue("id"))
		if err != nil {
			refuse(w, http.StatusBadRequest, fmt.Errorf("%q is not a device's number", r.PathValue("id")))
			return
		}
		a := d.find(id)
		if a == nil {
			refuse(w, http.StatusNotFound, fmt.Errorf("%s is not attached here: see lsdctl list", deviceName(id)))
			return
		}
		fn(w, r, a)
	}
}

// stream answers a request, decoded into q, by a stream.
func stream(w http.ResponseWriter, r *http.Request, q any, work func(context.Context, func(api.Progress)) (any, error)) {
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(q); err != nil {
		refuse(w, http.StatusBadRequest, fmt.Errorf("the request makes no sense: %w", err))
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	rc := http.NewResponseController(w)
	out := api.NewSender(w, func() { _ = rc.Flush() })
	var last time.Time
	v, err := work(r.Context(), func(p api.Progress) {
		if now := time.Now(); now.Sub(last) >= 100*time.Millisecond {
			last = now
			_ = out.Progress(p) // a client that is gone ends the context
		}
	})
	if err != nil {
		_ = out.Error(err)
		return
	}
	_ = out.Result(v)
}

// flush brings everything that the image has acknowledged into the store.
func (a *attachment) flush(ctx context.Context, progress func(api.Progress)) error {
	return a.withDisk(func(dk *disk) error { return dk.destage(ctx, progress) })
}

// refresh has the image do what somebody else has asked of it in its store.
func (a *attachment) refresh(ctx context.Context, progress func(api.Progress)) error {
	return a.withDisk(func(dk *disk) error { return dk.refresh(ctx, progress) })
}

// withDisk does something with the disk, which must be open.
func (a *attachment) withDisk(do func(*disk) error) error {
	dk := a.getDisk()
	if dk == nil {
		a.mu.Lock()
		defer a.mu.Unlock()
		return fmt.Errorf("%s is not open (%s)", a.name(), errText(a.err))
	}
	if err := do(dk); err != nil {
		return fmt.Errorf("%s: %w", a.name(), err)
	}
	return nil
}

// withImage is withDisk where the image must be open as well: of one that could not be taken
// up the disk serves errors.
func (a *attachment) withImage(do func(*disk) error) error {
	return a.withDisk(func(dk *disk) error {
		if dk.image == nil {
			a.mu.Lock()
			defer a.mu.Unlock()
			return fmt.Errorf("its image is not open (%s)", errText(a.err))
		}
		return do(dk)
	})
}

// shutdown ends the daemon for a client.
func (d *Daemon) shutdown(ctx context.Context, q api.ShutdownRequest, progress func(api.Progress)) (api.Done, error) {
	setDefault(&q.Timeout, d.cfg.ExitTimeout)
	req := exitRequest{detach: q.Detach, timeout: q.Timeout, progress: progress, done: make(chan []string, 1)}
	select {
	case d.exit <- req:
	case <-d.ctx.Done():
		return api.Done{}, errEnding
	case <-ctx.Done():
		return api.Done{}, ctx.Err()
	}
	return api.Done{Remarks: <-req.done}, nil
}

func (d *Daemon) serveFeatures(w http.ResponseWriter, _ *http.Request) {
	k, err := d.kernel()
	if err != nil {
		refuse(w, http.StatusServiceUnavailable, err)
		return
	}
	f, err := k.Features()
	if err != nil {
		refuse(w, http.StatusServiceUnavailable, err)
		return
	}
	reply(w, Features(f))
}
