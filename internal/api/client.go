package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// ErrNoDaemon is matched when no daemon listens on the socket.
var ErrNoDaemon = errors.New("no lsdd answers")

// A Client talks to the daemon behind one socket.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient returns a client for the daemon at socket; it does not connect yet.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	return &Client{socket, &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// Version asks which daemon answers.
func (c *Client) Version(ctx context.Context) (v Version, err error) {
	return v, c.get(ctx, PathVersion, &v)
}

// Features asks what the kernel's ublk driver can do.
func (c *Client) Features(ctx context.Context) (f Features, err error) {
	return f, c.get(ctx, PathFeatures, &f)
}

// Images returns what is attached, by device number.
func (c *Client) Images(ctx context.Context) (list []Image, err error) {
	return list, c.get(ctx, PathImages, &list)
}

// Image returns one attached image.
func (c *Client) Image(ctx context.Context, id int) (im Image, err error) {
	return im, c.get(ctx, imagePath(id), &im)
}

// Attach makes a device and returns it once it is there.
func (c *Client) Attach(ctx context.Context, r AttachRequest, progress func(Progress)) (im Image, err error) {
	return im, c.stream(ctx, PathImages, r, progress, &im)
}

// ReadCache tells what the read cache is and does.
func (c *Client) ReadCache(ctx context.Context) (v ReadCache, err error) {
	return v, c.get(ctx, PathReadCache, &v)
}

// Detach removes a device.
func (c *Client) Detach(ctx context.Context, id int, r DetachRequest, progress func(Progress)) (d Done, err error) {
	return d, c.stream(ctx, imagePath(id)+"/detach", r, progress, &d)
}

// Flush brings everything that the image has acknowledged into the store.
func (c *Client) Flush(ctx context.Context, id int, progress func(Progress)) error {
	return c.stream(ctx, imagePath(id)+"/flush", struct{}{}, progress, nil)
}

// Refresh has the image look at what somebody else has asked of it in its store, such as
// a snapshot, and do that.
func (c *Client) Refresh(ctx context.Context, id int, progress func(Progress)) error {
	return c.stream(ctx, imagePath(id)+"/refresh", struct{}{}, progress, nil)
}

// Resize gives an attached image another size.
func (c *Client) Resize(ctx context.Context, id int, r ResizeRequest, progress func(Progress)) (im Image, err error) {
	return im, c.stream(ctx, imagePath(id)+"/resize", r, progress, &im)
}

// Flatten moves what an attached image has in objects of its ancestors into objects of its own.
// It is paused when ctx ends.
func (c *Client) Flatten(ctx context.Context, id int, progress func(Progress)) (f Flattened, err error) {
	return f, c.stream(ctx, imagePath(id)+"/flatten", struct{}{}, progress, &f)
}

// RollBack makes an attached image, whose device nobody has open, what it was at a snapshot.
func (c *Client) RollBack(ctx context.Context, id int, r RollbackRequest, progress func(Progress)) (im Image, err error) {
	return im, c.stream(ctx, imagePath(id)+"/rollback", r, progress, &im)
}

// Reclaim has the daemon reclaim in the background what a removed image was made of. It
// returns when that is written down.
func (c *Client) Reclaim(ctx context.Context, r ReclaimRequest) error {
	return c.stream(ctx, PathReclaim, r, nil, nil)
}

// Shutdown ends the daemon.
func (c *Client) Shutdown(ctx context.Context, r ShutdownRequest, progress func(Progress)) (d Done, err error) {
	return d, c.stream(ctx, PathShutdown, r, progress, &d)
}

func imagePath(id int) string { return PathImages + "/" + strconv.Itoa(id) }

func (c *Client) get(ctx context.Context, path string, v any) error {
	resp, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		return fmt.Errorf("the daemon's answer makes no sense: %w", err)
	}
	return nil
}

func (c *Client) stream(ctx context.Context, path string, in any, progress func(Progress), out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	resp, err := c.do(ctx, http.MethodPost, path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	err = receive(resp.Body, progress, out)
	if errors.Is(err, errCut) && ctx.Err() != nil {
		return errors.New("interrupted while the daemon was at it: look at lsdctl list")
	}
	return err
}

// do sends a request and returns the answer, or the error that it holds.
func (c *Client) do(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://lsdd"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(ctx, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	var m message
	if err := json.NewDecoder(resp.Body).Decode(&m); err != nil || m.Error == "" {
		return nil, fmt.Errorf("the daemon answers %s: is it of another version?", resp.Status)
	}
	return nil, errors.New(m.Error)
}

// explain says what a failure to reach the daemon means.
func (c *Client) explain(ctx context.Context, err error) error {
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("lsdd at %s does not answer: see its log; if it hangs, kill -9 it and start it again: nothing is lost", c.socket)
	case ctx.Err() != nil:
		return fmt.Errorf("interrupted while waiting for lsdd at %s", c.socket)
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("%w at %s: start it with systemctl start lsd, lsdd --supervise, or lsdctl add", ErrNoDaemon, c.socket)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("no permission for %s: only root may talk to lsdd", c.socket)
	}
	return fmt.Errorf("lsdd at %s: %w", c.socket, errors.Unwrap(err))
}
