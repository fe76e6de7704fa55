package engine

import (
	"testing"
	"time"
)

// TestKeptBuffers: a buffer is used again where it is large enough, and no more are kept than are
// allowed, nor any once they are dropped.
func TestKeptBuffers(t *testing.T) {
	s := NewShared(Limits{})
	p := &s.buffers
	if p.take(1) != nil {
		t.Error("a buffer out of nothing")
	}
	small, large := make([]byte, 4096), make([]byte, 1<<20)
	p.give(small)
	p.give(large)
	if b := p.take(1 << 20); len(b) != 1<<20 || &b[0] != &large[0] {
		t.Errorf("%d bytes, which are not those that were given", len(b))
	}
	if b := p.take(4097); b != nil {
		t.Errorf("a buffer of %d bytes for 4097", cap(b))
	}
	if b := p.take(100); len(b) != 100 || &b[0] != &small[0] {
		t.Errorf("%d bytes, which are not those that were given", len(b))
	}
	const most = maxKeptBuffers >> 20 // of 1 MiB
	for range most + 5 {
		p.give(make([]byte, 1<<20))
	}
	if p.kept != most<<20 || len(p.free) != most {
		t.Errorf("%d buffers of %d bytes are kept", len(p.free), p.kept)
	}
	p.give(make([]byte, 8<<20))
	if b := p.take(8 << 20); b == nil || p.kept != (most-8)<<20 {
		t.Errorf("small buffers keep a large one from being kept: %d bytes", p.kept)
	}
	s.DropBuffers(time.Hour)
	if p.kept == 0 {
		t.Error("what was used just now is dropped")
	}
	s.DropBuffers(0)
	if p.kept != 0 || p.take(1) != nil {
		t.Errorf("%d bytes are kept", p.kept)
	}
}
