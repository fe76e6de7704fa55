package inproc

import (
	"bytes"
	"context"
	"sync/atomic"
)

const (
	// PieceSize is the most that a Writer writes at one time, in bytes.
	PieceSize = 1 << 20
	// pieces is how many pieces a Writer has under way, so that the store is kept busy.
	pieces = 16
	// zeroBlock is the size of the blocks of zeroes that a sparse Writer leaves out, in bytes.
	zeroBlock = 4096
)

// A Writer writes pieces to an image, several at one time: but one that is not beyond all
// before it when these are written. Its methods are one goroutine's. It is to be stopped
// before the image is closed.
type Writer struct {
	im     *Image
	sparse bool
	ctx    context.Context // ends with the first error, which is its cause
	stop   context.CancelCauseFunc
	free   chan []byte // buffers that nobody has
	end    uint64      // of what is being written
	wrote  atomic.Uint64
}

// NewWriter returns a writer to im. With sparse nothing may be in the image yet where it
// writes: blocks of zeroes are left out.
func NewWriter(ctx context.Context, im *Image, sparse bool) *Writer {
	w := &Writer{im: im, sparse: sparse, free: make(chan []byte, pieces)}
	w.ctx, w.stop = context.WithCancelCause(ctx)
	for range pieces {
		w.free <- nil
	}
	return w
}

// Buffer returns a buffer of PieceSize bytes once there is one. It is the caller's until it is
// given to Write or Return. It fails if a piece could not be written.
func (w *Writer) Buffer() ([]byte, error) {
	select {
	case b := <-w.free:
		if w.ctx.Err() != nil {
			w.free <- b
			return nil, context.Cause(w.ctx)
		}
		if b == nil {
			b = make([]byte, PieceSize)
		}
		return b, nil
	case <-w.ctx.Done():
		return nil, context.Cause(w.ctx)
	}
}

// Return gives back a buffer.
func (w *Writer) Return(b []byte) { w.free <- b[:cap(b)] }

// Write writes b, which is the beginning of a buffer and of whole sectors, at the byte off. It
// does not wait for that; Wait tells if it has failed.
func (w *Writer) Write(b []byte, off uint64) error {
	if err := w.after(off); err != nil {
		w.Return(b)
		return err
	}
	w.end = off + uint64(len(b))
	go func() {
		if err := w.write(b, off); err != nil {
			w.stop(err)
		}
		w.Return(b)
	}()
	return nil
}

// after waits for what is being written unless off is beyond it. The caller has a buffer.
func (w *Writer) after(off uint64) error {
	if off >= w.end {
		return nil
	}
	return w.drain(pieces - 1)
}

// drain waits until n buffers are free, which are those that the caller does not have.
func (w *Writer) drain(n int) error {
	all := make([][]byte, 0, n)
	for range n {
		all = append(all, <-w.free)
	}
	for _, b := range all {
		w.free <- b
	}
	w.end = 0
	return context.Cause(w.ctx)
}

// write writes a piece, or of a sparse one what is not zeroes.
func (w *Writer) write(b []byte, off uint64) error {
	for len(b) > 0 {
		n := len(b)
		if w.sparse {
			skip := 0
			if skip, n = dataIn(b); skip > 0 {
				b, off = b[skip:], off+uint64(skip)
			}
			if n == 0 {
				return nil
			}
		}
		if err := w.im.WriteAt(w.ctx, b[:n], off); err != nil {
			return err
		}
		w.wrote.Add(uint64(n))
		b, off = b[n:], off+uint64(n)
	}
	return nil
}

// zeroes is a block of them.
var zeroes [zeroBlock]byte

// dataIn returns how many bytes of whole blocks of zeroes b begins with, and how many others
// follow before the next of these.
func dataIn(b []byte) (skip, n int) {
	zero := func(at int) bool {
		return bytes.Equal(b[at:min(at+zeroBlock, len(b))], zeroes[:min(zeroBlock, len(b)-at)])
	}
	for skip < len(b) && zero(skip) {
		skip += zeroBlock
	}
	skip = min(skip, len(b))
	end := skip
	for end < len(b) && !zero(end) {
		end += zeroBlock
	}
	return skip, min(end, len(b)) - skip
}

// Wait waits until all is written that Write was given, and returns the first error. The
// caller has no buffer.
func (w *Writer) Wait() error { return w.drain(pieces) }

// Discard makes n bytes from off on read as zeroes, both of whole sectors, after all that was
// written before. The caller has no buffer.
func (w *Writer) Discard(off, n uint64) error {
	if off < w.end {
		if err := w.Wait(); err != nil {
			return err
		}
	}
	return w.im.Discard(w.ctx, off, n)
}

// Wrote returns how many bytes have been written.
func (w *Writer) Wrote() uint64 { return w.wrote.Load() }

// Stop ends it: what Write has begun is given up if it is not done. The caller has no buffer.
func (w *Writer) Stop() {
	w.stop(errClosed)
	_ = w.drain(pieces)
}
