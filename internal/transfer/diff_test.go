package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/engine"
	"github.com/lsd-ceph/lsd/internal/inproc"
	"github.com/lsd-ceph/lsd/internal/racetest"
	"github.com/lsd-ceph/lsd/internal/rbddiff"
)

// piece is a record of a diff; zeroes if it has no data.
type piece struct {
	off, n uint64
	data   []byte
}

// diffOf returns a file with those records.
func diffOf(t *testing.T, h rbddiff.Header, pieces ...piece) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := rbddiff.NewWriter(&b, h)
	for _, p := range pieces {
		if err == nil && p.data != nil {
			err = w.Data(p.off, p.data)
		} else if err == nil {
			err = w.Zero(p.off, p.n)
		}
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// randomDiff returns a file of changes to disk, which becomes what they lead to. Records are
// of bytes, in any order, and may overlap.
func randomDiff(t *testing.T, rng *rand.Rand, h rbddiff.Header, disk []byte) (file, after []byte) {
	t.Helper()
	after = append(bytes.Clone(disk[:min(len(disk), int(h.Size))]), make([]byte, max(int(h.Size)-len(disk), 0))...)
	var pieces []piece
	for range 30 {
		off := rng.Uint64N(h.Size)
		n := 1 + rng.Uint64N(min(h.Size-off, []uint64{100, 5000, 3 << 20}[rng.IntN(3)]))
		if rng.IntN(2) == 0 {
			off, n = off&^4095, (n+4095)&^4095
			n = min(n, h.Size-off)
		}
		p := piece{off: off, n: n}
		if rng.IntN(3) > 0 {
			p.data = make([]byte, n)
			for i := range p.data {
				p.data[i] = byte(rng.Uint32())
			}
			copy(after[off:], p.data)
		} else {
			clear(after[off:][:n])
		}
		pieces = append(pieces, p)
	}
	return diffOf(t, h, pieces...), after
}

func apply(t *testing.T, st backend.Store, id uuid.UUID, file []byte, force bool) error {
	t.Helper()
	_, err := ApplyDiff(t.Context(), st, id, bytes.NewReader(file), force, quiet())
	return err
}

// blank makes an empty image.
func blank(t *testing.T, st backend.Store, size uint64) uuid.UUID {
	t.Helper()
	id, err := engine.Create(t.Context(), st, "disk", engine.CreateOptions{Size: size, ObjectSize: engine.MinObjectSize})
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func snapshots(t *testing.T, st backend.Store, id uuid.UUID) (names []string) {
	t.Helper()
	list, err := engine.Snapshots(t.Context(), st, id)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list {
		names = append(names, s.Name)
	}
	return names
}

// padded returns a disk in whole blocks.
func padded(disk []byte) []byte {
	return append(bytes.Clone(disk), make([]byte, int(wholeBlocks(uint64(len(disk)), 0))-len(disk))...)
}

// TestApplyChain: diffs that follow one another, with sizes that go up and down, give all the
// states, and each fits the image after the one before alone.
func TestApplyChain(t *testing.T) {
	racetest.Slow(t)
	rng := rand.New(rand.NewPCG(1, 1))
	st := mem.New()
	id := blank(t, st, 4<<20)
	sizes := []uint64{5 << 20, 9<<20 + 700, 3<<20 + 512, 3<<20 + 512, 12 << 20}
	var disk []byte
	var files, states [][]byte
	for i, size := range sizes {
		h := rbddiff.Header{To: fmt.Sprint("s", i), Size: size}
		if i > 0 {
			h.From = fmt.Sprint("s", i-1)
		}
		var file []byte
		file, disk = randomDiff(t, rng, h, disk)
		if d, err := CheckDiff(bytes.NewReader(file)); err != nil || d.Header != h {
			t.Fatalf("%+v, %v", d, err)
		}
		if err := apply(t, st, id, file, false); err != nil {
			t.Fatalf("%d: %v", i, err)
		}
		mustHave(t, st, id, uint64(len(padded(disk))), disk)
		files, states = append(files, file), append(states, disk)
		if err := apply(t, st, id, file, false); !errors.Is(err, engine.ErrSnapshotExists) {
			t.Errorf("%d: applied twice: %v", i, err)
		}
	}
	mustBeClean(t, st, "disk")
	// All once more, after each rollback from the state that the image has come to.
	for _, i := range []int{1, 3, 0} {
		name := fmt.Sprint("s", i)
		if err := engine.Rollback(t.Context(), st, id, name, engine.RollbackOptions{}); err != nil {
			t.Fatal(err)
		}
		mustHave(t, st, id, uint64(len(padded(states[i]))), states[i])
		next := fmt.Sprint("s", i+1)
		if err := engine.RemoveSnapshot(t.Context(), st, id, next); err != nil {
			t.Fatal(err)
		}
		if err := apply(t, st, id, files[i+1], false); err != nil {
			t.Fatalf("after rollback to %s: %v", name, err)
		}
		mustHave(t, st, id, uint64(len(padded(states[i+1]))), states[i+1])
	}
	mustBeClean(t, st, "disk")
}

// TestApplyMoved: where data has come to another place since the snapshot, as by the cleaner,
// and is the same, the image is what the diff begins with.
func TestApplyMoved(t *testing.T) {
	racetest.Slow(t)
	st := mem.New()
	id := blank(t, st, 4<<20)
	disk := contents(4<<20, 1)
	first := diffOf(t, rbddiff.Header{To: "s0", Size: 4 << 20}, piece{off: 0, n: 4 << 20, data: disk})
	if err := apply(t, st, id, first, false); err != nil {
		t.Fatal(err)
	}
	rewrite := func(p []byte) {
		im, err := inproc.Open(t.Context(), st, id, quiet().inprocOptions())
		if err == nil {
			err = im.WriteAt(t.Context(), p, 0)
		}
		if err == nil {
			err = im.Close(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	next := diffOf(t, rbddiff.Header{From: "s0", To: "s1", Size: 4 << 20}, piece{off: 0, n: 4096})
	other := bytes.Clone(disk)
	other[3<<20] ^= 1
	rewrite(other)
	if err := apply(t, st, id, next, false); !errors.Is(err, ErrOtherState) {
		t.Errorf("other data: %v", err)
	}
	rewrite(disk)
	if err := apply(t, st, id, next, false); err != nil {
		t.Fatal(err)
	}
	clear(disk[:4096])
	mustHave(t, st, id, 4<<20, disk)
}

// TestApplyEnd: what is beyond a disk that has become smaller, in its last block, is gone, and
// does not come back when it grows.
func TestApplyEnd(t *testing.T) {
	racetest.Slow(t)
	for _, size := range []uint64{1<<20 + 1, 1<<20 + 512, 1<<20 + 1000, 1<<20 + 4095} {
		st := mem.New()
		id := blank(t, st, 2<<20)
		disk := bytes.Repeat([]byte{7}, 2<<20)
		for _, file := range [][]byte{
			diffOf(t, rbddiff.Header{To: "s0", Size: 2 << 20}, piece{off: 0, n: 2 << 20, data: disk}),
			diffOf(t, rbddiff.Header{From: "s0", To: "s1", Size: size}),
			diffOf(t, rbddiff.Header{From: "s1", To: "s2", Size: 2 << 20}),
		} {
			if err := apply(t, st, id, file, false); err != nil {
				t.Fatal(err)
			}
		}
		mustHave(t, st, id, 2<<20, disk[:size])
	}
}

// TestApplyRefused: what does not fit changes nothing.
func TestApplyRefused(t *testing.T) {
	racetest.Slow(t)
	st := mem.New()
	id := blank(t, st, 4<<20)
	write := func(b byte) {
		im, err := inproc.Open(t.Context(), st, id, quiet().inprocOptions())
		if err != nil {
			t.Fatal(err)
		}
		if err := im.WriteAt(t.Context(), bytes.Repeat([]byte{b}, 4096), 8192); err != nil {
			t.Fatal(err)
		}
		if err := im.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	data := piece{off: 0, data: []byte("data")}
	write(1)
	for want, h := range map[string]rbddiff.Header{
		"the image is not what the diff begins with: it does not begin with a snapshot, and there is data in the image": {Size: 4 << 20},
		"the diff begins with the snapshot s1: no such snapshot":                                                        {From: "s1", Size: 4 << 20},
		"the diff is of a disk of 0 bytes: an image must have at least one block":                                       {},
		`a snapshot of the diff: bad snapshot name "a b": it is made of A-Z a-z 0-9 . _ : + ~ -`:                        {To: "a b", Size: 4 << 20},
	} {
		pieces := []piece{data}
		if h.Size == 0 {
			pieces = nil
		}
		if err := apply(t, st, id, diffOf(t, h, pieces...), false); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if _, err := engine.CreateSnapshot(t.Context(), st, id, "s1", engine.SnapshotOptions{}); err != nil {
		t.Fatal(err)
	}
	from := diffOf(t, rbddiff.Header{From: "s1", To: "s2", Size: 4 << 20}, data)
	write(2)
	if err := apply(t, st, id, from, false); !errors.Is(err, ErrOtherState) || !strings.HasSuffix(err.Error(), "it has been written to since the snapshot s1") {
		t.Error(err)
	}
	if err := engine.Rollback(t.Context(), st, id, "s1", engine.RollbackOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := engine.Grow(t.Context(), st, id, 5<<20); err != nil {
		t.Fatal(err)
	}
	if err := apply(t, st, id, from, false); !errors.Is(err, ErrOtherState) || !strings.HasSuffix(err.Error(), "it has had another size since the snapshot s1") {
		t.Error(err)
	}
	if got := snapshots(t, st, id); len(got) != 1 {
		t.Errorf("snapshots: %q", got)
	}
	want := make([]byte, 5<<20)
	copy(want[8192:], bytes.Repeat([]byte{1}, 4096))
	mustHave(t, st, id, 5<<20, want)
	if err := apply(t, st, id, from, true); err != nil {
		t.Error(err)
	}
	copy(want, "data")
	mustHave(t, st, id, 4<<20, want[:4<<20])

	im, err := inproc.Open(t.Context(), st, id, quiet().inprocOptions())
	if err != nil {
		t.Fatal(err)
	}
	var owned *engine.OwnedError
	if err := apply(t, st, id, diffOf(t, rbddiff.Header{From: "s2", Size: 4 << 20}), true); !errors.As(err, &owned) {
		t.Errorf("applied to what somebody has: %v", err)
	}
	if err := im.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestApplyTooLarge: nothing is changed for a size that the image cannot have, and the message
// does not say that something was.
func TestApplyTooLarge(t *testing.T) {
	st := mem.New()
	id := blank(t, st, 4<<20)
	for _, size := range []uint64{16 << 40, engine.MaxSize + 1, 1<<64 - 1} {
		file := diffOf(t, rbddiff.Header{Size: size})
		if err := apply(t, st, id, file, false); err == nil || errors.As(err, new(*PartError)) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	mustHave(t, st, id, 4<<20, nil)
}

// TestApplyCut: of a file that is cut off the message says so; a rollback brings the image
// back, and so does to apply all of it.
func TestApplyCut(t *testing.T) {
	racetest.Slow(t)
	rng := rand.New(rand.NewPCG(3, 1))
	st := mem.New()
	id := blank(t, st, 4<<20)
	first, disk := randomDiff(t, rng, rbddiff.Header{To: "s0", Size: 4 << 20}, nil)
	if err := apply(t, st, id, first, false); err != nil {
		t.Fatal(err)
	}
	second, after := randomDiff(t, rng, rbddiff.Header{From: "s0", To: "s1", Size: 6 << 20}, disk)
	for _, n := range []int{len(second) / 3, len(second) / 2, len(second) - 1} {
		if _, err := CheckDiff(bytes.NewReader(second[:n])); !errors.Is(err, rbddiff.ErrFormat) {
			t.Errorf("%d bytes: %v", n, err)
		}
		var part *PartError
		if err := apply(t, st, id, second[:n], false); !errors.As(err, &part) || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("%d bytes: %v", n, err)
		}
		if err := apply(t, st, id, second, false); !errors.Is(err, ErrOtherState) {
			t.Errorf("%d bytes: %v", n, err)
		}
		if err := engine.Rollback(t.Context(), st, id, "s0", engine.RollbackOptions{}); err != nil {
			t.Fatal(err)
		}
		mustHave(t, st, id, 4<<20, disk)
	}
	if err := apply(t, st, id, second[:len(second)/2], false); err == nil {
		t.Fatal("it was not cut")
	}
	if err := apply(t, st, id, second, true); err != nil {
		t.Fatal(err)
	}
	mustHave(t, st, id, 6<<20, after)
	mustBeClean(t, st, "disk")
	if got := snapshots(t, st, id); len(got) != 2 {
		t.Errorf("snapshots: %q", got)
	}
}

// TestApplyKilled: a process may die at any operation: the diff applied again by force is as
// if it had been applied once.
func TestApplyKilled(t *testing.T) {
	step := 8
	if testing.Short() {
		step = 24
	}
	for n := 1; n < 80; n += step {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(uint64(n), 1))
			st := mem.New()
			id := blank(t, st, 4<<20)
			first, disk := randomDiff(t, rng, rbddiff.Header{To: "s0", Size: 4 << 20}, nil)
			if err := apply(t, st, id, first, false); err != nil {
				t.Fatal(err)
			}
			second, after := randomDiff(t, rng, rbddiff.Header{From: "s0", To: "s1", Size: 3 << 20}, disk)
			_, err := ApplyDiff(t.Context(), dying(st, n, n%16 == 1), id, bytes.NewReader(second), false, quiet())
			if err == nil {
				t.Logf("it ends with fewer operations")
			}
			err = apply(t, st, id, second, true)
			if errors.Is(err, engine.ErrSnapshotExists) {
				err = nil
			}
			if err != nil {
				t.Fatal(err)
			}
			mustHave(t, st, id, 3<<20, after)
			mustBeClean(t, st, "disk")
			if got := snapshots(t, st, id); len(got) != 2 {
				t.Errorf("snapshots: %q", got)
			}
		})
	}
}

func TestInterruptible(t *testing.T) {
	r, w := io.Pipe()
	defer w.Close()
	ctx, stop := context.WithCancelCause(t.Context())
	in := Interruptible(ctx, r)
	go func() { _, _ = w.Write([]byte("abc")) }()
	b := make([]byte, 3)
	if _, err := io.ReadFull(in, b); err != nil || string(b) != "abc" {
		t.Errorf("%q, %v", b, err)
	}
	enough := errors.New("enough")
	stop(enough)
	if _, err := in.Read(b); !errors.Is(err, enough) {
		t.Error(err)
	}
}
