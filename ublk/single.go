package ublk

import (
	"encoding/binary"

	"github.com/lsd-ceph/lsd/internal/uring"
)

// single is the carrier of one tag: a command waits in the kernel for each request, which
// with the result becomes the next one (UBLK_U_IO_FETCH_REQ,
// UBLK_U_IO_COMMIT_AND_FETCH_REQ). It is their Completer.
type single struct {
	t *tag
	// cmd is the struct ublksrv_io_cmd to send next. Only the result changes.
	cmd [sizeofIOCmd]byte
}

// newSingles returns the carriers of all tags.
func newSingles(tags []tag) []carrier {
	all := make([]single, len(tags))
	list := make([]carrier, len(tags))
	for i := range tags {
		t, s := &tags[i], &all[i]
		s.t, t.via, list[i] = t, s, s
		binary.NativeEndian.PutUint16(s.cmd[0:], t.io.Queue)
		binary.NativeEndian.PutUint16(s.cmd[2:], t.io.Tag)
	}
	return list
}

// offer implements carrier.
func (s *single) offer() error {
	d := s.t.d
	binary.NativeEndian.PutUint64(s.cmd[8:], s.t.addr)
	d.ring.Command(d.char, d.c.number(ioFetchReq), s.cmd[:], nil, s)
	return nil
}

// commit implements carrier.
func (s *single) commit(t *tag) {
	d := t.d
	binary.NativeEndian.PutUint32(s.cmd[4:], uint32(t.res))
	if t.inTime {
		d.ring.CommandBefore(d.char, d.opCommit, s.cmd[:], nil, s)
		return
	}
	d.ring.Command(d.char, d.opCommit, s.cmd[:], nil, s)
}

// idle implements carrier.
func (s *single) idle() bool { return !s.t.busy }

// Complete implements uring.Completer: the kernel has given the tag a request,
// or has given the tag back for good.
func (s *single) Complete(res int32, _ uint32) {
	t := s.t
	inTime := t.inTime
	t.inTime = false
	switch {
	case inTime && uring.TooLate(res):
		t.late()
	case res != resOK:
		t.d.ended(res)
	default:
		t.arrived()
	}
}
