package ring

import (
	"encoding/binary"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lsd-ceph/lsd/librbd/ring/ringtest"
)

// keeper is a Handler that completes nothing by itself.
type keeper struct{ handled, back []*IO }

func (k *keeper) Handle(io *IO)   { k.handled = append(k.handled, io) }
func (k *keeper) TakeBack(io *IO) { k.back = append(k.back, io) }

// turn has a turn of the reactor run to its end.
func (k *rig) turn(fn func()) {
	k.t.Helper()
	call(k.t, k.r, fn)
	call(k.t, k.r, func() {})
}

// none fails if there is a completion.
func (k *rig) none() {
	k.t.Helper()
	if done, ok := k.client.Take(); ok {
		k.t.Errorf("a completion: %+v", done)
	}
}

// TestRules has a client break each rule, and looks that nothing more is taken from it,
// that this is told once, and that what is under way goes on.
func TestRules(t *testing.T) {
	const mib = 1 << 20
	type req = ringtest.Request
	// Tag 1 is under way, tag 2 has ended with a time, tag 3 without.
	for name, tt := range map[string]struct {
		req  req
		want string
	}{
		"no operation":         {req{Op: 0}, "no such operation"},
		"unknown operation":    {req{Op: 8}, "no such operation"},
		"unknown flag":         {req{Op: ringtest.Flush, Flags: 2}, "unknown flags"},
		"flag of another":      {req{Op: ringtest.Write, Flags: ringtest.Decided, Length: 512}, "unknown flags"},
		"empty compare":        {req{Op: ringtest.CompareAndWrite}, "too long, or empty"},
		"long compare":         {req{Op: ringtest.CompareAndWrite, Length: mib - 4095}, "too long, or empty"},
		"sectors of a compare": {req{Op: ringtest.CompareAndWrite, Offset: 511, Length: mib - 4096, Data: 511}, "too long, or empty"},
		"compare not aligned":  {req{Op: ringtest.CompareAndWrite, Length: 512, Data: 512}, "does not lie"},
		"half a compare":       {req{Op: ringtest.CompareAndWrite, Length: 512, Data: MinData - 4096}, "not in the data area"},
		"compare over the end": {req{Op: ringtest.CompareAndWrite, Length: 4608, Data: MinData - 3*4096}, "not in the data area"},
		"compare outside":      {req{Op: ringtest.CompareAndWrite, Length: 512, Data: 1<<64 - 4096}, "not in the data area"},
		"compare flags":        {req{Op: ringtest.CompareAndWrite, Flags: 4, Length: 512}, "unknown flags"},
		"reserved":             {req{Op: ringtest.Flush, Zero: 1}, "must be zero"},
		"tag":                  {req{Op: ringtest.Flush, Tag: 8}, "tag 8 of 8"},
		"great tag":            {req{Op: ringtest.Flush, Tag: 1<<32 - 1}, "tag 4294967295 of 8"},
		"tag under way":        {req{Op: ringtest.Flush, Tag: 1}, "tag 1 is under way"},
		"empty read":           {req{Op: ringtest.Read}, "too long, or empty"},
		"long read":            {req{Op: ringtest.Read, Length: mib + 1}, "too long, or empty"},
		"long write":           {req{Op: ringtest.Write, Length: 1 << 63}, "too long, or empty"},
		"overflow":             {req{Op: ringtest.Write, Offset: 1<<64 - 512, Length: 1024}, "beyond"},
		"very far":             {req{Op: ringtest.Write, Offset: 1 << 63, Length: 512}, "beyond"},
		"data not aligned":     {req{Op: ringtest.Write, Length: 512, Data: 512}, "does not lie"},
		"data not as in image": {req{Op: ringtest.Write, Offset: 7, Length: 505, Data: 8}, "does not lie"},
		"data outside":         {req{Op: ringtest.Write, Length: 512, Data: MinData}, "not in the data area"},
		"data far outside":     {req{Op: ringtest.Read, Length: 512, Data: 1<<64 - 4096}, "not in the data area"},
		"data over the end":    {req{Op: ringtest.Read, Length: 4097, Data: MinData - 4096}, "not in the data area"},
		"sector over the end":  {req{Op: ringtest.Read, Offset: 511, Length: 3586, Data: MinData - 4096 + 511}, "not in the data area"},
		"empty discard":        {req{Op: ringtest.Discard}, "too long, or empty"},
		"long discard":         {req{Op: ringtest.Discard, Length: 1<<30 + 512}, "too long, or empty"},
		"part of a sector":     {req{Op: ringtest.Discard, Length: 100}, "whole sectors"},
		"from inside a sector": {req{Op: ringtest.WriteZeroes, Offset: 100, Length: 512}, "whole sectors"},
		"discard of data":      {req{Op: ringtest.Discard, Length: 512, Data: 4096}, "no data"},
		"flush of a range":     {req{Op: ringtest.Flush, Length: 512}, "no range"},
		"flush of data":        {req{Op: ringtest.Flush, Data: 4096}, "no data"},
		"late and under way":   {req{Op: ringtest.TooLate, Tag: 1}, "tag 1 is under way"},
		"late without a time":  {req{Op: ringtest.TooLate, Tag: 3}, "had no time"},
		"late and never used":  {req{Op: ringtest.TooLate, Tag: 4}, "had no time"},
		"late with flags":      {req{Op: ringtest.TooLate, Tag: 2, Flags: ringtest.FUA}, "must be zero"},
		"late with a range":    {req{Op: ringtest.TooLate, Tag: 2, Length: 1}, "must be zero"},
	} {
		t.Run(name, func(t *testing.T) {
			h := &keeper{}
			k := newRig(t, 8, h)
			k.client.Submit(req{Op: ringtest.Flush, Tag: 1}, req{Op: ringtest.Flush, Tag: 2}, req{Op: ringtest.Flush, Tag: 3})
			k.turn(func() {})
			call(t, k.r, func() {
				h.handled[1].CompleteUntil(0, time.Second)
				h.handled[2].Complete(0)
			})
			k.wait()
			k.wait()
			k.client.Submit(tt.req, req{Op: ringtest.Flush, Tag: 7})
			select {
			case err := <-k.broken:
				if !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%v, which does not say %q", err, tt.want)
				}
			case <-time.After(patience):
				t.Fatal("nothing was broken")
			}
			if k.c.Err() == nil {
				t.Error("no error")
			}
			k.client.Submit(req{Op: ringtest.Flush, Tag: 0})
			k.turn(k.client.Wake)
			call(t, k.r, func() {
				if len(h.handled) != 3 || len(h.back) != 0 || k.c.Busy() != 1 {
					t.Errorf("%d requests, %d taken back, %d under way", len(h.handled), len(h.back), k.c.Busy())
				}
				h.handled[0].Complete(syscall.EIO)
			})
			if done := k.wait(); done != (ringtest.Completion{Tag: 1, Res: -int64(syscall.EIO)}) {
				t.Errorf("%+v", done)
			}
			if len(k.broken) != 0 {
				t.Error("told twice")
			}
		})
	}
}

// TestReservedBytes: what is beyond an entry's fields is zero.
func TestReservedBytes(t *testing.T) {
	for i := 32; i < 64; i++ {
		k := newRig(t, 8, &keeper{})
		k.client.Queue(ringtest.Request{Op: ringtest.Flush})
		k.client.Entry(0)[i] = 1
		k.client.Publish(1)
		select {
		case <-k.broken:
		case <-time.After(patience):
			t.Errorf("byte %d may be anything", i)
		}
	}
}

// TestFirstVersion: a ring of the first version has no compare and write, and does not count
// changes.
func TestFirstVersion(t *testing.T) {
	k := newRigOf(t, MinVersion, 8, &keeper{})
	k.c.Memory().Changed()
	if n := k.client.Changes(); k.client.Version != 1 || n != 0 {
		t.Errorf("version %d, %d changes", k.client.Version, n)
	}
	k.client.Submit(ringtest.Request{Op: ringtest.CompareAndWrite, Length: 512})
	if err := <-k.broken; err == nil || !strings.Contains(err.Error(), "no such operation") {
		t.Errorf("compare and write: %v", err)
	}
}

// TestCompareAndWrite looks at what a handler gets of one, at what the client is told of it, and
// that a decision outlives the reactor.
func TestCompareAndWrite(t *testing.T) {
	h := &keeper{}
	k := newRig(t, 64, h)
	const tag, data = 37, MinData - 2*4096*255
	q := ringtest.Request{Op: ringtest.CompareAndWrite, Flags: ringtest.FUA, Tag: tag, Offset: 4096, Length: 255 * 4096, Data: data}
	k.client.Submit(q)
	k.turn(func() {})
	call(t, k.r, func() {
		io := h.handled[0]
		if len(io.Buf) != 255*4096 || &io.Buf[0] != &k.c.m.data[data] || io.Decided || !io.FUA || io.Op != OpCompareAndWrite {
			t.Errorf("%d bytes, %v, decided: %v", len(io.Buf), io.Op, io.Decided)
		}
		if c := io.Compare; len(c) != 255*4096 || cap(c) != len(c) || &c[len(c)-1] != &k.c.m.data[MinData-1] {
			t.Errorf("%d bytes to compare", len(c))
		}
		io.Mismatch(4711)
	})
	if done := k.wait(); done != (ringtest.Completion{Tag: tag, Res: -int64(syscall.EILSEQ), At: 4711}) || k.client.Decided(tag) {
		t.Errorf("%+v", done)
	}
	q.Offset, q.Length, q.Data = 511, 2, 511
	k.client.Submit(q)
	k.turn(func() {})
	call(t, k.r, func() {
		io := h.handled[1]
		if len(io.Compare) != 2 || &io.Compare[0] != &k.c.m.data[4096+511] || len(io.Data()) != 2 || io.Decided {
			t.Errorf("%+v", io)
		}
		io.Decide()
	})
	if !k.client.Decided(tag) || k.client.Decided(tag-1) || k.client.Decided(tag+1) {
		t.Error("the client does not see what has been decided")
	}
	k.r.Post(func() { panic("boom") })
	await(t, k.r.Done(), "the reactor's end")
	next := &keeper{}
	k.serve(next)
	call(t, k.r, func() {
		h.handled[1].Decide() // of the dead
		if io := next.handled[0]; !io.Decided {
			t.Error("the next reactor does not know what has been decided")
		} else {
			io.CompleteUntil(0, 1)
		}
	})
	k.wait()
	k.client.Submit(ringtest.Request{Op: ringtest.TooLate, Tag: tag})
	k.turn(func() {})
	call(t, k.r, func() { next.back[0].Complete(0) })
	k.wait()
	for _, flags := range []uint8{0, ringtest.Decided} {
		q.Flags = flags
		k.client.Submit(q)
		k.turn(func() {})
		call(t, k.r, func() {
			io := next.handled[len(next.handled)-1]
			if io.Decided != (flags != 0) {
				t.Errorf("flags %d: decided: %v", flags, io.Decided)
			}
			io.Complete(0)
		})
		k.wait()
	}
}

// TestDecidedFirst: of all Conns that a reactor takes over, what had been decided is started before
// what had not, and the rest of each in its order.
func TestDecidedFirst(t *testing.T) {
	var first [2]*keeper
	var rigs [2]*rig
	for i := range rigs {
		first[i] = &keeper{}
		rigs[i] = newRig(t, 8, first[i])
		q := ringtest.Request{Op: ringtest.CompareAndWrite, Length: 512}
		for q.Tag = range uint32(4) {
			rigs[i].client.Submit(q)
		}
		rigs[i].turn(func() {})
		call(t, rigs[i].r, func() { first[i].handled[1+i].Decide() })
		rigs[i].r.Post(func() { panic("boom") })
		await(t, rigs[i].r.Done(), "the reactor's end")
	}
	r := newReactor(t)
	var order []*IO
	h := handler{handle: func(io *IO) { order = append(order, io) }}
	call(t, r, func() {
		g := NewGroup(r)
		g.Hook(Hooking{rigs[0].c, h}, Hooking{rigs[1].c, h})
		for _, k := range rigs {
			k.r, k.g = r, g
		}
		want := []struct {
			tag uint32
			of  int
		}{{1, 0}, {2, 1}, {0, 0}, {2, 0}, {3, 0}, {0, 1}, {1, 1}, {3, 1}}
		if len(order) != len(want) {
			t.Fatalf("%d requests", len(order))
		}
		for i, w := range want {
			if io := order[i]; io.Tag != w.tag || io.s.c != rigs[w.of].c || io.Decided != (i < 2) {
				t.Errorf("%d is tag %d, decided: %v; want tag %d of %d", i, io.Tag, io.Decided, w.tag, w.of)
			}
			order[i].Complete(0)
		}
	})
}

// TestTell: a client that sleeps is woken for what it was told, and not otherwise.
func TestTell(t *testing.T) {
	k := newRig(t, 8, &keeper{})
	k.c.Memory().Changed()
	if n := k.client.Changes(); n != 1 {
		t.Errorf("%d changes", n)
	}
	k.client.Sleep()
	if k.client.Woken(20*time.Millisecond) == nil {
		t.Error("it is woken for nothing")
	}
	call(t, k.r, func() { k.g.Tell(k.c) })
	if err := k.client.Woken(patience); err != nil {
		t.Error(err)
	}
}

// TestTail: a tail that is further than the queue is long is none.
func TestTail(t *testing.T) {
	for _, tail := range []uint32{9, 1 << 31, 1<<32 - 1} {
		k := newRig(t, 8, &keeper{})
		k.client.Publish(tail)
		select {
		case <-k.broken:
		case <-time.After(patience):
			t.Errorf("tail %d is believed", tail)
		}
	}
}

// TestRanges looks at what a handler gets of requests at the limits.
func TestRanges(t *testing.T) {
	for _, tt := range []struct {
		req           ringtest.Request
		sector        uint64
		sectors       uint32
		first, length int // of Data in Buf
	}{
		{ringtest.Request{Op: ringtest.Write, Offset: 0, Length: 1}, 0, 1, 0, 1},
		{ringtest.Request{Op: ringtest.Read, Offset: 511, Length: 2, Data: 4096 + 511}, 0, 2, 511, 2},
		{ringtest.Request{Op: ringtest.Read, Offset: 1<<20 + 1, Length: 1 << 20, Data: 1}, 2048, 2049, 1, 1 << 20},
		{ringtest.Request{Op: ringtest.Write, Offset: 511, Length: 1 << 20, Data: 511}, 0, 2049, 511, 1 << 20},
		{ringtest.Request{Op: ringtest.Write, Offset: 1 << 40, Length: 4096, Data: MinData - 4096}, 1 << 31, 8, 0, 4096},
		{ringtest.Request{Op: ringtest.Write, Offset: 1<<63 - 512, Length: 512}, 1<<54 - 1, 1, 0, 512},
		{ringtest.Request{Op: ringtest.Discard, Offset: 512, Length: 1 << 30}, 1, 1 << 21, 0, 0},
		{ringtest.Request{Op: ringtest.WriteZeroes, Flags: ringtest.FUA, Offset: 1 << 20, Length: 512}, 2048, 1, 0, 0},
		{ringtest.Request{Op: ringtest.Flush}, 0, 0, 0, 0},
	} {
		got := make(chan IO, 1)
		k := newRig(t, 8, handler{handle: func(io *IO) {
			got <- *io
			io.Complete(0)
		}})
		k.client.Submit(tt.req)
		k.wait()
		io := <-got
		if io.Op != Op(tt.req.Op) || io.FUA != (tt.req.Flags == ringtest.FUA) || io.Offset != tt.req.Offset || io.Length != tt.req.Length {
			t.Errorf("%+v is %+v", tt.req, io)
		}
		if io.Sector != tt.sector || io.Sectors != tt.sectors {
			t.Errorf("%+v is of sectors %d+%d, want %d+%d", tt.req, io.Sector, io.Sectors, tt.sector, tt.sectors)
		}
		if tt.length == 0 {
			if io.Buf != nil || io.Data() != nil {
				t.Errorf("%+v has data", tt.req)
			}
			continue
		}
		if len(io.Buf) != int(tt.sectors)*sectorSize || cap(io.Buf) != len(io.Buf) || &io.Buf[0] != &k.c.m.data[int(tt.req.Data)-tt.first] {
			t.Errorf("%+v has a buffer of %d bytes, in another place", tt.req, len(io.Buf))
		}
		if d := io.Data(); len(d) != tt.length || &d[0] != &io.Buf[tt.first] {
			t.Errorf("%+v has data of %d bytes", tt.req, len(d))
		}
	}
}

// TestTooLate takes a completion to be late, twice.
func TestTooLate(t *testing.T) {
	var back int
	k := newRig(t, 8, handler{
		handle: func(io *IO) { io.CompleteUntil(0, 5*time.Second) },
		takeBack: func(io *IO) {
			if io.Op != OpWrite || io.Tag != 2 || io.Length != 100 || len(io.Buf) != 512 {
				t.Errorf("taken back: %+v", io)
			}
			if back++; back == 1 {
				io.CompleteUntil(0, 6*time.Second)
				return
			}
			io.Complete(syscall.EIO)
		},
	})
	k.client.Submit(ringtest.Request{Op: ringtest.Write, Tag: 2, Length: 100})
	for _, want := range []ringtest.Completion{
		{Tag: 2, Flags: 1, Until: 5 * time.Second},
		{Tag: 2, Flags: 1, Until: 6 * time.Second},
		{Tag: 2, Res: -int64(syscall.EIO)},
	} {
		if done := k.wait(); done != want {
			t.Errorf("%+v, want %+v", done, want)
		}
		if want.Flags != 0 {
			k.client.Submit(ringtest.Request{Op: ringtest.TooLate, Tag: 2})
		}
	}
	if len(k.broken) != 0 {
		t.Error(<-k.broken)
	}
}

// TestCompletedTwice: that is the handler's mistake, and ends the reactor.
func TestCompletedTwice(t *testing.T) {
	k := newRig(t, 8, handler{handle: func(io *IO) { io.Complete(0); io.Complete(0) }})
	k.client.Submit(ringtest.Request{Op: ringtest.Flush})
	await(t, k.r.Done(), "the reactor's end")
	if err := k.r.Err(); err == nil || !strings.Contains(err.Error(), "completed twice") {
		t.Error(err)
	}
}

// FuzzRing plays a client that writes what it likes. The server must neither panic nor
// give a handler what breaks the rules, write anywhere but where it may, or complete
// what is not under way.
func FuzzRing(f *testing.F) {
	r := newReactor(f)
	var g *Group
	call(f, r, func() { g = NewGroup(r) })

	flush := append([]byte{0, ringtest.Flush}, make([]byte, 63)...)
	read := append([]byte{0, ringtest.Read, 0, 0, 0, 3}, make([]byte, 59)...)
	binary.LittleEndian.PutUint64(read[17:], 4096)
	compare := append([]byte{0, ringtest.CompareAndWrite, ringtest.Decided, 0, 0, 5}, make([]byte, 59)...)
	binary.LittleEndian.PutUint64(compare[17:], 4096)
	late := append([]byte{0, ringtest.TooLate, 0, 0, 0, 3}, make([]byte, 59)...)
	for _, seed := range [][]byte{
		flush, read, compare, append(compare, 4, 0, 0), append(read, late...), append(append(read, 4, 0, 1), late...), append(flush, flush...),
		{1, 255, 255, 255, 255}, {2, 64, 9, 0, 0, 0}, {2, 128, 9, 0, 0, 0}, {2, 192, 1, 1, 1, 1, 3, 4, 0, 0},
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		m := newMemory(t, 8, MinData)
		h := &suspicious{t: t, m: m}
		c := NewConn(m, nil)
		client := newClient(t, m)
		call(t, r, func() { g.Hook(Hooking{c, h}) })
		runScript(t, r, h, client, script)
		gone := make(chan struct{})
		call(t, r, func() {
			if c.Busy() != len(h.busy) {
				t.Errorf("%d requests are under way, of which the handler has %d", c.Busy(), len(h.busy))
			}
			g.Unhook(c, func() { close(gone) })
			for len(h.busy) > 0 {
				h.complete(0, 0)
			}
		})
		await(t, gone, "the end of the session")
		if n := len(m.cq); len(h.told) <= n {
			for i, want := range h.told {
				if m.cq[i] != want {
					t.Errorf("completion %d is %x, want %x", i, m.cq[i], want)
				}
			}
			for i := len(h.told); i < n; i++ {
				if m.cq[i] != [cqeWords]uint64{} {
					t.Errorf("completion %d is %x", i, m.cq[i])
				}
			}
		}
		if string(m.mem[:4]) != magic || m.sq[0] != h.first {
			t.Error("the client's memory was written to")
		}
	})
}

// runScript carries out what the script says, each step in a turn of its own.
func runScript(t *testing.T, r interface{ Call(func()) error }, h *suspicious, client *ringtest.Client, script []byte) {
	next := func(n int) []byte {
		p := make([]byte, n)
		script = script[copy(p, script):]
		return p
	}
	var tail uint32
	for len(script) > 0 {
		switch next(1)[0] % 5 {
		case 0: // an entry
			copy(client.Entry(tail), next(64))
			if tail&7 == 0 {
				h.first = h.m.sq[0]
			}
			tail++
			client.Publish(tail)
		case 1: // a tail
			tail = binary.LittleEndian.Uint32(next(4))
			client.Publish(tail)
		case 2: // any word of the header behind what does not change
			p := next(5)
			at := 64 + int(p[0])*4%576
			binary.LittleEndian.PutUint32(h.m.mem[at:], binary.LittleEndian.Uint32(p[1:]))
		case 3: // anywhere in the entries, after they have been submitted
			p := next(3)
			client.Entry(uint32(p[0]))[p[1]%64] = p[2]
			h.first = h.m.sq[0]
		case 4: // a completion
			p := next(2)
			if err := r.Call(func() { h.complete(p[0], time.Duration(p[1])) }); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Call(func() {}); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Call(func() {}); err != nil {
		t.Fatal(err)
	}
}

// suspicious is a Handler that checks what it gets.
type suspicious struct {
	t     *testing.T
	m     *Memory
	busy  []*IO
	told  [][cqeWords]uint64
	timed [8]bool
	first [sqeWords]uint64 // what the client has put into the first entry
}

func (h *suspicious) Handle(io *IO) { h.take(io); h.timed[io.Tag] = false }

func (h *suspicious) TakeBack(io *IO) {
	if !h.timed[io.Tag] {
		h.t.Errorf("taken back, without a time: %+v", io)
	}
	h.timed[io.Tag] = false
	h.take(io)
}

func (h *suspicious) take(io *IO) {
	for _, other := range h.busy {
		if other.Tag == io.Tag {
			h.t.Errorf("tag %d twice", io.Tag)
		}
	}
	h.busy = append(h.busy, io)
	end := io.Offset + io.Length
	ok := io.Tag < 8 && end >= io.Offset && io.Sector == io.Offset/512 && uint64(io.Sectors) == (end+511)/512-io.Sector
	switch io.Op {
	case OpCompareAndWrite:
		ok = ok && uint64(len(io.Compare)) == io.Length && cap(io.Compare) == len(io.Compare) && io.Sectors <= 255*8
		clear(io.Compare)
		if io.Length%2 == 0 {
			io.Decide()
		}
		fallthrough
	case OpRead, OpWrite:
		ok = ok && io.Length > 0 && io.Length <= 1<<20 && h.inside(io)
		clear(io.Buf)
	case OpDiscard, OpWriteZeroes:
		ok = ok && io.Buf == nil && io.Length > 0 && io.Length <= 1<<30 && end%512 == 0 && io.Offset%512 == 0
	case OpFlush:
		ok = ok && io.Buf == nil && end == 0
	default:
		ok = false
	}
	if !ok {
		h.t.Errorf("%+v", io)
	}
}

// inside reports whether the request's buffer lies in the data area, where it must.
func (h *suspicious) inside(io *IO) bool {
	if len(io.Buf) != int(io.Sectors)*512 || cap(io.Buf) != len(io.Buf) {
		return false
	}
	for at := 0; at+len(io.Buf) <= len(h.m.data); at += align {
		if &h.m.data[at] == &io.Buf[0] {
			return true
		}
	}
	return false
}

// complete completes one of what is under way, if there is something.
func (h *suspicious) complete(which uint8, until time.Duration) {
	if len(h.busy) == 0 {
		return
	}
	i := int(which) % len(h.busy)
	io := h.busy[i]
	h.busy = append(h.busy[:i], h.busy[i+1:]...)
	e := [cqeWords]uint64{uint64(io.Tag)}
	if until == 0 {
		io.Complete(0)
	} else {
		h.timed[io.Tag] = true
		e[0], e[2] = e[0]|1<<32, uint64(until)
		io.CompleteUntil(0, until)
	}
	h.told = append(h.told, e)
}
