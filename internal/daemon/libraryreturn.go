package daemon

import (
	"context"
	"fmt"
	"sync"
)

// livingHandles are the handles of which something may still be under way. A client whose
// connection has ended while the daemon lives comes back at once: what it had submitted must have
// ended before it submits it anew, or it would take effect twice, the second time behind what came
// later; and only then does the last ring say which of its compare and writes had been decided.
type livingHandles struct {
	mu    sync.Mutex
	ended map[uint64]chan struct{} // by number, closed when the handle has ended; guarded by mu
}

// add notes a handle, before its client learns its number.
func (l *livingHandles) add(h *handle) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended == nil {
		l.ended = make(map[uint64]chan struct{})
	}
	l.ended[h.number] = make(chan struct{})
}

// remove notes that nothing of a handle is under way any more, nor will be.
func (l *livingHandles) remove(h *handle) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.ended[h.number])
	delete(l.ended, h.number)
}

// await waits until there is no handle of the number.
func (l *livingHandles) await(ctx context.Context, number uint64) error {
	l.mu.Lock()
	ended := l.ended[number]
	l.mu.Unlock()
	if ended == nil {
		return nil
	}
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("what the client had under way before does not end: %w", context.Cause(ctx))
	}
}
