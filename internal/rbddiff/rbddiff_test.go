package rbddiff

import (
	"bytes"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
)

// item is a record with its data.
type item struct {
	Record
	data string
}

// readAll reads a file to its end.
func readAll(r io.Reader) (h Header, items []item, err error) {
	rd, err := NewReader(r)
	if err != nil {
		return h, nil, err
	}
	for {
		rec, err := rd.Next()
		if err == io.EOF {
			return rd.Header(), items, nil
		}
		if err != nil {
			return rd.Header(), items, err
		}
		data, err := io.ReadAll(rd)
		if err != nil {
			return rd.Header(), items, err
		}
		items = append(items, item{rec, string(data)})
	}
}

// whole is a file with one of each record, byte for byte as rbd writes it.
const whole = "rbd diff v1\n" +
	"f\x02\x00\x00\x00s1" + "t\x03\x00\x00\x00two" + "s\x00\x10\x00\x00\x00\x00\x00\x00" +
	"w\x05\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00abc" +
	"z\x00\x02\x00\x00\x00\x00\x00\x00\x00\x0e\x00\x00\x00\x00\x00\x00" + "e"

func TestBytes(t *testing.T) {
	var b bytes.Buffer
	w, err := NewWriter(&b, Header{From: "s1", To: "two", Size: 4096})
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{w.Data(5, []byte("abc")), w.Data(7, nil), w.Zero(4096, 0), w.Zero(512, 4096-512), w.Close()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if b.String() != whole {
		t.Errorf("got\n%q, want\n%q", b.String(), whole)
	}
	h, items, err := readAll(strings.NewReader(whole + "what follows is not read"))
	want := []item{{Record{5, 3, false}, "abc"}, {Record{512, 3584, true}, ""}}
	if err != nil || h != (Header{"s1", "two", 4096}) || !reflect.DeepEqual(items, want) {
		t.Errorf("read %+v, %+v, %v", h, items, err)
	}
}

// TestRoundTrip: what has been written is read, in whatever pieces it comes and is read.
func TestRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		h := Header{Size: 1 << 20}
		if rng.IntN(2) > 0 {
			h.From = strings.Repeat("f", 1+rng.IntN(maxName))
		}
		if rng.IntN(2) > 0 {
			h.To = "to"
		}
		var b bytes.Buffer
		w, err := NewWriter(&b, h)
		if err != nil {
			t.Fatal(err)
		}
		var want []item
		for range rng.IntN(20) {
			n := 1 + rng.Uint64N(h.Size/4)
			rec := Record{rng.Uint64N(h.Size - n + 1), n, rng.IntN(2) > 0}
			if rec.Zero {
				want = append(want, item{Record: rec})
				err = w.Zero(rec.Offset, n)
			} else {
				p := bytes.Repeat([]byte{byte(rng.Uint32())}, int(n))
				want = append(want, item{rec, string(p)})
				err = w.Data(rec.Offset, p)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		got, items, err := readAll(iotest.HalfReader(bytes.NewReader(b.Bytes())))
		if err != nil || got != h || !reflect.DeepEqual(items, want) {
			t.Fatalf("header %+v, want %+v; %d records, want %d; %v", got, h, len(items), len(want), err)
		}
		skipAll(t, b.Bytes(), want)
	}
}

// skipAll goes through the records of a file and reads a part of their data, or none.
func skipAll(t *testing.T, b []byte, want []item) {
	r, err := NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	for k, x := range want {
		rec, err := r.Next()
		if err != nil || rec != x.Record {
			t.Fatalf("record %d: %+v, %v, want %+v", k, rec, err, x.Record)
		}
		if k%2 == 0 && !x.Zero {
			p := make([]byte, min(rec.Length, 1+uint64(k)))
			if _, err := io.ReadFull(r, p); err != nil || string(p) != x.data[:len(p)] {
				t.Fatalf("data of record %d: %v", k, err)
			}
		}
	}
	for range 2 {
		if _, err := r.Next(); err != io.EOF {
			t.Fatalf("after the last: %v", err)
		}
	}
}

// TestCut: a file that ends anywhere before its end is not taken for a whole one.
func TestCut(t *testing.T) {
	for n := range len(whole) {
		_, _, err := readAll(strings.NewReader(whole[:n]))
		if !errors.Is(err, io.ErrUnexpectedEOF) || !errors.Is(err, ErrFormat) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
	r, err := NewReader(strings.NewReader(whole[:len(whole)-20]))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Next(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Next(); !errors.Is(err, io.ErrUnexpectedEOF) { // the data before are skipped
		t.Errorf("skipping: %v", err)
	}
}

func TestDamaged(t *testing.T) {
	const start = "rbd diff v1\ns\x00\x10\x00\x00\x00\x00\x00\x00"
	const far = "\xff\xff\xff\xff\xff\xff\xff\xff"
	for _, x := range []struct{ file, want string }{
		{"rbd diff v2\n", "does not begin"},
		{"QFI\xfb and so on", "does not begin"},
		{"rbd diff v1\ne", "size"},
		{"rbd diff v1\nw" + far + far, "size"},
		{start + start[12:], "two records"},
		{"rbd diff v1\nf\x00\x00\x00\x00", "0 bytes"},
		{"rbd diff v1\nt\xff\xff\xff\xff", "4294967295 bytes"},
		{start + "x", "'x'"},
		{start + "z" + far + "\x01\x00\x00\x00\x00\x00\x00\x00e", "beyond"},
		{start + "w\x01\x00\x00\x00\x00\x00\x00\x00" + far, "beyond"},
		{start + "w\x00\x00\x00\x00\x00\x00\x00\x00\x01\x10\x00\x00\x00\x00\x00\x00", "beyond"},
		{whole[:len(whole)-1] + "s\x00\x20\x00\x00\x00\x00\x00\x00e", "among its data"},
	} {
		if _, _, err := readAll(strings.NewReader(x.file)); !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%q: %v, want %q", x.file, err, x.want)
		}
	}
	// A record of no length is passed over.
	_, items, err := readAll(strings.NewReader(start + "w\x00\x10\x00\x00\x00\x00\x00\x00" + strings.Repeat("\x00", 8) + "e"))
	if err != nil || len(items) > 0 {
		t.Errorf("of no length: %v, %v", items, err)
	}
}

// TestReadError: an error of what is read from is passed on, and stays.
func TestReadError(t *testing.T) {
	bad := errors.New("bad disk")
	r, err := NewReader(io.MultiReader(strings.NewReader(whole[:50]), iotest.ErrReader(bad)))
	for err == nil {
		_, err = r.Next()
	}
	if !errors.Is(err, bad) || errors.Is(err, ErrFormat) {
		t.Fatal(err)
	}
	if _, err := r.Next(); !errors.Is(err, bad) {
		t.Error(err)
	}
}

func TestWriterRefuses(t *testing.T) {
	if _, err := NewWriter(io.Discard, Header{To: strings.Repeat("x", maxName+1)}); err == nil {
		t.Error("a long name was taken")
	}
	w, err := NewWriter(io.Discard, Header{Size: 100})
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{w.Data(98, []byte("abc")), w.Zero(math.MaxUint64, 2), w.Zero(0, 101)} {
		if err == nil {
			t.Error("a record beyond the size was taken")
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.Zero(0, 1); err == nil {
		t.Error("a record after the end was taken")
	}
}

// FuzzReader: whatever is in a file, the reader ends, and takes no memory for what is not
// there. What it takes is the same once written and read again.
func FuzzReader(f *testing.F) {
	f.Add([]byte(whole))
	f.Add([]byte(whole[:60]))
	f.Add([]byte("rbd diff v1\nf\xff\x0f\x00\x00"))
	f.Add([]byte("rbd diff v1\ns\xff\xff\xff\xff\xff\xff\xff\xffw\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\x7f"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, items, err := readAll(bytes.NewReader(b))
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Fatal(err)
			}
			return
		}
		var again bytes.Buffer
		w, err := NewWriter(&again, h)
		for _, x := range items {
			if x.Length == 0 || x.Offset+x.Length > h.Size || !x.Zero && uint64(len(x.data)) != x.Length {
				t.Fatalf("record %+v with %d bytes, of %d", x.Record, len(x.data), h.Size)
			}
			if x.Zero {
				err = errors.Join(err, w.Zero(x.Offset, x.Length))
			} else {
				err = errors.Join(err, w.Data(x.Offset, []byte(x.data)))
			}
		}
		if err := errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
		h2, items2, err := readAll(&again)
		if err != nil || h2 != h || !reflect.DeepEqual(items2, items) {
			t.Fatalf("written and read again: %+v, %v", h2, err)
		}
	})
}
