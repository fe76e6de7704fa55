package writelog

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// testPool lends what it has.
type testPool struct {
	t    *testing.T
	free [][]byte
	lent map[*byte]bool
}

// newTestPool returns a pool of mem.
func newTestPool(t *testing.T, mem []byte) *testPool {
	p := &testPool{t: t, lent: map[*byte]bool{}}
	for ; len(mem) > 0; mem = mem[SegmentSize:] {
		p.free = append(p.free, mem[:SegmentSize:SegmentSize])
	}
	return p
}

func (p *testPool) Lend() []byte {
	n := len(p.free)
	if n == 0 {
		return nil
	}
	b := p.free[n-1]
	p.free = p.free[:n-1]
	p.lent[&b[0]] = true
	return b
}

func (p *testPool) Return(b []byte) {
	if !p.lent[&b[0]] || len(b) != SegmentSize {
		p.t.Fatal("the pool gets back what it has not lent")
	}
	delete(p.lent, &b[0])
	p.free = append(p.free, b)
}

// TestMirror: whatever is lent, a segment that is needed keeps its memory, which is no other's; what
// is not in the store stays as long as the pool lends; what is beyond the log's own goes back when it
// is in the store; and all of it at the end.
func TestMirror(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	mem := make([]byte, 7*SegmentSize)
	for range 300 {
		own, total := 1+rng.IntN(3), rng.IntN(5)
		pool := newTestPool(t, mem[own*SegmentSize:(own+total)*SegmentSize])
		m := newMirror(mem[:own*SegmentSize], pool)
		next := rng.Uint64N(4)
		needed := m.start(next) + rng.Uint64N(SegmentSize) // a position
		stored := needed
		for range 200 {
			switch rng.IntN(4) {
			case 0:
				needed += rng.Uint64N(m.start(next) - min(needed, m.start(next)) + 1)
			case 1:
				stored += rng.Uint64N(m.start(next) - min(stored, m.start(next)) + 1)
				m.shrink(min(needed, stored))
				if n := m.next - m.first; n > uint64(own) && m.start(m.first+1) <= min(needed, stored) {
					t.Fatalf("%d segments have memory, of which %d are enough", n, own)
				}
			default:
				first, free := m.first, len(pool.free)
				if !m.grow(next, needed, stored) {
					if len(m.spare) > 0 || free > 0 || m.first == m.next || m.start(m.first+1) <= needed {
						t.Fatal("no memory, and there is some")
					}
					continue
				}
				if free > 0 && m.first > first && m.start(m.first) > stored {
					t.Fatal("what is not in the store has lost its memory, and the pool has some")
				}
				binary.NativeEndian.PutUint64(m.bytes(m.start(next), 8), next)
				next++
			}
			checkMirror(t, &m, next, needed)
			if len(pool.lent)+len(pool.free) != total {
				t.Fatal("the pool has lost memory")
			}
			if n := m.next - m.first; n > uint64(own+total) {
				t.Fatalf("%d segments have memory, of %d and %d", n, own, total)
			}
		}
		m.clear()
		if len(pool.lent) > 0 || len(m.spare) != own || m.first != m.next {
			t.Fatalf("%d segments are lent still, and %d of its own are free", len(pool.lent), len(m.spare))
		}
	}
}

// checkMirror fails unless each segment has what it was given, and those have one that are needed.
func checkMirror(t *testing.T, m *mirror, next, needed uint64) {
	t.Helper()
	if m.first < m.next && (m.next != next || m.start(m.first) > needed) {
		t.Fatalf("what is from %d on is needed, and memory is from segment %d to %d, before %d", needed, m.first, m.next, next)
	}
	for n := m.first; n < m.next; n++ {
		if got := binary.NativeEndian.Uint64(m.bytes(m.start(n), 8)); got != n {
			t.Fatalf("segment %d has the memory of %d", n, got)
		}
	}
}
