package engine

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
)

// model is what an image must be, as far as its client can know: a state that is
// in the store, and all writes since, in their order. A cell is
// one block of the image; its content is the number of the write that wrote it,
// 0 for zeroes.
type model struct {
	base    []uint64 // content of each cell before history
	current []uint64 // after all of history
	pending []int32  // writes of each cell that have not completed
	history []modelWrite
	acked   int // history[:acked] have completed, all of them
	durable int // history[:durable] were covered by a flush that completed
	stored  int // history[:stored] were in the store when Destage said so
	proved  int // history[:proved] were durable when a later write began that completed

	// Once another host owns the image.
	lost bool // it does
	late int  // history[:late] were acknowledged, one of them after that
	kept int  // history[:kept] are what that host found; -1: not known yet
}

// modelWrite is a write, or a part of a large one that is atomic by itself.
type modelWrite struct {
	n       uint64
	cell    uint64
	cells   uint64
	zero    bool
	done    bool
	durable int // model.durable when it was submitted
}

func (h *modelWrite) value() uint64 {
	if h.zero {
		return 0
	}
	return h.n
}

func (h *modelWrite) covers(cell uint64) bool { return h.cell <= cell && cell < h.cell+h.cells }

func newModel(state []uint64) *model {
	return &model{base: state, current: slices.Clone(state), pending: make([]int32, len(state)), kept: -1}
}

// recovered returns the model of the image after a recovery that found the first
// k writes, of which the last ones may only be in the log still.
func (m *model) recovered(k int) *model {
	stored := min(m.stored, k)
	n := newModel(m.base)
	for i, h := range m.history[:k] {
		if i == stored {
			n.base = slices.Clone(n.current)
		}
		if i < stored {
			for c := h.cell; c < h.cell+h.cells; c++ {
				n.current[c] = h.value()
			}
			continue
		}
		n.add(h)
	}
	if k == stored {
		n.base = slices.Clone(n.current)
	}
	for i := range n.history {
		n.history[i].done, n.history[i].durable = true, 0
	}
	clear(n.pending)
	n.acked, n.durable, n.proved = k-stored, k-stored, max(min(m.proved, k)-stored, 0)
	return n
}

// add enters a write and returns its place in history.
func (m *model) add(h modelWrite) int {
	h.durable = m.durable
	m.history = append(m.history, h)
	for c := h.cell; c < h.cell+h.cells; c++ {
		m.current[c] = h.value()
		m.pending[c]++
	}
	return len(m.history) - 1
}

// complete notes that the writes from first to last have completed.
func (m *model) complete(first, last int, fua bool) error {
	for i := first; i <= last; i++ {
		h := &m.history[i]
		h.done = true
		m.proved = max(m.proved, h.durable)
		for c := h.cell; c < h.cell+h.cells; c++ {
			m.pending[c]--
		}
	}
	for m.acked < len(m.history) && m.history[m.acked].done {
		m.acked++
	}
	if fua {
		m.durable = max(m.durable, last+1)
	}
	return m.promised(last+1, "a write was acknowledged")
}

// promised notes that the first n writes were promised to the client, which must
// not happen once another host owns the image, unless that host has them.
func (m *model) promised(n int, what string) error {
	if !m.lost {
		return nil
	}
	m.late = max(m.late, n)
	return m.checkLate(what)
}

func (m *model) checkLate(what string) error {
	if m.kept >= 0 && m.late > m.kept {
		return fmt.Errorf("%s after another host had taken the image over: %d writes were promised, that host has %d", what, m.late, m.kept)
	}
	return nil
}

// mayBe reports whether a cell may be read as v by a read that was submitted when
// acked writes were: as it was then, or as a write that was not complete then
// left it.
func (m *model) mayBe(cell, v uint64, acked int) bool {
	for i := len(m.history) - 1; i >= 0; i-- {
		if h := &m.history[i]; h.covers(cell) {
			if h.value() == v {
				return true
			}
			if i < acked {
				return false
			}
		}
	}
	return m.base[cell] == v
}

// nearest returns the number of writes, at least floor, after which the state was
// most like got, where it is known, and in how many cells it was not: the greatest such
// number.
func (m *model) nearest(got []uint64, floor int) (writes, differ int) {
	state := slices.Clone(m.base)
	for i := range state {
		if state[i] != got[i] && got[i] != unread {
			differ++
		}
	}
	writes, least := 0, differ
	if floor > 0 {
		least = len(got) + 1
	}
	for i := range m.history {
		h := &m.history[i]
		v := h.value()
		for c := h.cell; c < h.cell+h.cells; c++ {
			if got[c] == unread {
				continue
			}
			if state[c] != got[c] {
				differ--
			}
			state[c] = v
			if v != got[c] {
				differ++
			}
		}
		if i+1 >= floor && differ <= least {
			writes, least = i+1, differ
		}
	}
	return writes, least
}

// match returns the greatest number of writes, at least floor, after which the
// state was got, or -1.
func (m *model) match(got []uint64, floor int) int {
	if k, differ := m.nearest(got, floor); differ == 0 {
		return k
	}
	return -1
}

// matchWithin is match with a greatest number of writes.
func (m *model) matchWithin(got []uint64, floor, ceiling int) int {
	first := *m
	first.history = m.history[:ceiling]
	return first.match(got, floor)
}

// describe says how a state differs from what it must be, for people.
func (m *model) describe(got []uint64) string {
	k, differ := m.nearest(got, 0)
	state := slices.Clone(m.base)
	for _, h := range m.history[:k] {
		for c := h.cell; c < h.cell+h.cells; c++ {
			state[c] = h.value()
		}
	}
	for c := range state {
		if state[c] != got[c] {
			return fmt.Sprintf("it differs in %d cells from that after %d; cell %d is of write %d instead of %d", differ, k, c, got[c], state[c])
		}
	}
	return fmt.Sprintf("it is the state after %d writes", k)
}

// fill stamps each sector of p, which is at the given sector, with a write's
// number.
func fill(p []byte, n, sector uint64) {
	for i := 0; i < len(p); i += SectorSize {
		copy(p[i:], pattern[:])
		binary.LittleEndian.PutUint64(p[i:], n)
		binary.LittleEndian.PutUint64(p[i+8:], sector)
		sector++
	}
}

// pattern is what a stamped sector holds beside the numbers.
var pattern = func() (p [SectorSize]byte) {
	for i := range p {
		p[i] = byte(i*7 + i>>8)
	}
	return p
}()

// stamp returns the number of the write that p, which is at the given sector,
// holds; all of it must come from the same one.
func stamp(p []byte, sector uint64) (uint64, error) {
	n := binary.LittleEndian.Uint64(p)
	for i := 0; i < len(p); i += SectorSize {
		s := p[i : i+SectorSize]
		at, rest := sector, pattern[16:]
		if n == 0 {
			at, rest = 0, zeroes[16:]
		}
		if binary.LittleEndian.Uint64(s) != n || binary.LittleEndian.Uint64(s[8:]) != at || !bytes.Equal(s[16:], rest) {
			return 0, fmt.Errorf("sector %d holds what was never written there: numbers %d at %d, in a block that begins with write %d",
				sector, binary.LittleEndian.Uint64(s), binary.LittleEndian.Uint64(s[8:]), n)
		}
		if n != 0 {
			sector++
		}
	}
	return n, nil
}

var zeroes [SectorSize]byte
