package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"unicode/utf8"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

var id = uuid.MustParse("00112233-4455-6677-8899-aabbccddeeff")

// messages are one of each, with every field set, and the bytes of some.
var messages = []struct {
	m    Message
	want string // "" where it is not written out
}{
	{&HelloRequest{Low: 1, High: 2, Program: "qemu"}, "\x01\x00\x00\x00\x02\x00\x00\x00\x04\x00\x00\x00qemu"},
	{&HelloResult{Version: 1, Entries: 1024, Data: 64 << 20, Daemon: "v1"},
		"\x01\x00\x00\x00\x00\x04\x00\x00\x00\x00\x00\x04\x00\x00\x00\x00\x02\x00\x00\x00v1"},
	{&OpenRequest{Store: "s", Image: "im", Snapshot: "sn", Number: 5, Flags: OpenReadOnly | OpenAgain, Entries: 128, Data: 4 << 20, ID: id},
		"\x01\x00\x00\x00s\x02\x00\x00\x00im\x02\x00\x00\x00sn\x05\x00\x00\x00\x00\x00\x00\x00\x05\x00\x00\x00" +
			"\x80\x00\x00\x00\x00\x00\x40\x00\x00\x00\x00\x00" + string(id[:])},
	{&OpenRequest{Flags: OpenAgain | OpenInstead, ID: id, Instead: 9},
		strings.Repeat("\x00", 20) + "\x0c\x00\x00\x00" + strings.Repeat("\x00", 12) + string(id[:]) + "\x09\x00\x00\x00\x00\x00\x00\x00"},
	{&OpenResult{StatResult: StatResult{ID: id, Name: "im", Size: 1 << 30, Block: 512, ObjectSize: 8 << 20}, Entries: 128, Data: 4 << 20, Flags: OpenedReadOnly, Number: 9},
		string(id[:]) + "\x02\x00\x00\x00im\x00\x00\x00\x40\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x80\x00\x00\x00\x00\x00" +
			"\x80\x00\x00\x00\x00\x00\x40\x00\x00\x00\x00\x00\x01\x00\x00\x00\x09\x00\x00\x00\x00\x00\x00\x00"},
	{&StatResult{ID: id, Name: "im", Size: 1 << 30, Block: 4096, ObjectSize: 1 << 20}, ""},
	{&CreateRequest{Store: "s", Image: "im", Size: 3, ObjectSize: 4},
		"\x01\x00\x00\x00s\x02\x00\x00\x00im\x03\x00\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00"},
	{&CreateResult{ID: id}, string(id[:])},
	{&RemoveRequest{Store: "s", Image: "im"}, "\x01\x00\x00\x00s\x02\x00\x00\x00im"},
	{&ListRequest{Store: "s", After: "im"}, "\x01\x00\x00\x00s\x02\x00\x00\x00im"},
	{&ListResult{More: true, Images: []ListedImage{{Name: "a", ID: id}, {Name: "b"}}},
		"\x01\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00a" + string(id[:]) + "\x01\x00\x00\x00b" + string(make([]byte, 16))},
	{&RenameRequest{Store: "s", Image: "im", Name: "n"}, "\x01\x00\x00\x00s\x02\x00\x00\x00im\x01\x00\x00\x00n"},
	{&TrashMoveRequest{Store: "s", Image: "im", Keep: 3}, "\x01\x00\x00\x00s\x02\x00\x00\x00im\x03\x00\x00\x00\x00\x00\x00\x00"},
	{&TrashListRequest{Store: "s", After: id}, "\x01\x00\x00\x00s" + string(id[:])},
	{&TrashList{More: true, Images: []TrashedImage{{ID: id, Name: "im", Moved: 1, Until: -2}}},
		"\x01\x00\x00\x00\x01\x00\x00\x00" + string(id[:]) + "\x02\x00\x00\x00im\x01\x00\x00\x00\x00\x00\x00\x00\xfe\xff\xff\xff\xff\xff\xff\xff"},
	{&TrashRemoveRequest{Store: "s", Image: "im", Force: true}, "\x01\x00\x00\x00s\x02\x00\x00\x00im\x01\x00\x00\x00"},
	{&TrashRestoreRequest{Store: "s", Image: "im", Name: "n"}, "\x01\x00\x00\x00s\x02\x00\x00\x00im\x01\x00\x00\x00n"},
	{&TrashPurgeRequest{Store: "s", At: -1}, "\x01\x00\x00\x00s\xff\xff\xff\xff\xff\xff\xff\xff"},
	{&ResizeRequest{Size: 7, Shrink: true}, "\x07\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00"},
	{&SizeResult{Size: 7}, "\x07\x00\x00\x00\x00\x00\x00\x00"},
	{&SnapshotRequest{Name: "sn"}, "\x02\x00\x00\x00sn"},
	{&RenameSnapshotRequest{Snapshot: "sn", Name: "n"}, "\x02\x00\x00\x00sn\x01\x00\x00\x00n"},
	{&SnapshotList{Snapshots: []ListedSnapshot{{Number: 1, Size: 2, Made: -3, Name: "sn"}}},
		"\x01\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\xfd\xff\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00sn"},
	{&CloneRequest{Store: "s", Image: "im", Snapshot: "sn", Number: 5, Name: "n"},
		"\x01\x00\x00\x00s\x02\x00\x00\x00im\x02\x00\x00\x00sn\x05\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00n"},
	{&CloneResult{ID: id, ObjectSize: 8 << 20}, string(id[:]) + "\x00\x00\x80\x00\x00\x00\x00\x00"},
	{&ParentResult{ID: id, Name: "im", Snapshot: "sn", Number: 5, Overlap: 6, Flags: ParentUnnamed},
		string(id[:]) + "\x02\x00\x00\x00im\x02\x00\x00\x00sn\x05\x00\x00\x00\x00\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00"},
	{&ChildrenRequest{After: id, Flags: ChildrenDeep}, string(id[:]) + "\x01\x00\x00\x00"},
	{&ChildrenResult{More: true, Children: []ListedChild{{ListedImage{Name: "a", ID: id}, ChildRemoved}}},
		"\x01\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00a" + string(id[:]) + "\x01\x00\x00\x00"},
	{&DiffRequest{From: "sn", Number: 5, Offset: 6, Length: 7, Flags: DiffWhole, Most: 8},
		"\x02\x00\x00\x00sn\x05\x00\x00\x00\x00\x00\x00\x00\x06\x00\x00\x00\x00\x00\x00\x00\x07\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x08\x00\x00\x00"},
	{&DiffResult{Next: 9, Ranges: []DiffRange{{Offset: 1, Length: 2, Exists: true}}},
		"\x09\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00"},
	{&CopyRequest{Store: "s", Image: "im", Flags: CopyDeep}, "\x01\x00\x00\x00s\x02\x00\x00\x00im\x01\x00\x00\x00"},
	{&MetadataRequest{Key: "k"}, "\x01\x00\x00\x00k"},
	{&Metadatum{Key: "k", Value: "va"}, "\x01\x00\x00\x00k\x02\x00\x00\x00va"},
	{&MetadataResult{Value: "va"}, "\x02\x00\x00\x00va"},
	{&ListMetadataRequest{After: "k", Most: 5}, "\x01\x00\x00\x00k\x05\x00\x00\x00"},
	{&MetadataList{More: true, Metadata: []Metadatum{{"a", "b"}, {"c", ""}}},
		"\x01\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00a\x01\x00\x00\x00b\x01\x00\x00\x00c\x00\x00\x00\x00"},
	{&LockRequest{Exclusive: true, Cookie: "c", Tag: "t"}, "\x01\x00\x00\x00\x01\x00\x00\x00c\x01\x00\x00\x00t"},
	{&UnlockRequest{Cookie: "c"}, "\x01\x00\x00\x00c"},
	{&BreakLockRequest{Client: "x", Cookie: "c"}, "\x01\x00\x00\x00x\x01\x00\x00\x00c"},
	{&LockList{Exclusive: true, Tag: "t", Lockers: []Locker{{"x", "c", "h", -1}}},
		"\x01\x00\x00\x00\x01\x00\x00\x00t\x01\x00\x00\x00\x01\x00\x00\x00x\x01\x00\x00\x00c\x01\x00\x00\x00h\xff\xff\xff\xff\xff\xff\xff\xff"},
	{&TimesResult{Created: 1, Modified: 2, Accessed: 3}, "\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00"},
	{&FeaturesResult{Features: FeatureLayering | FeatureFastDiff}, "\x11\x00\x00\x00\x00\x00\x00\x00"},
	{&SwitchFeaturesRequest{Features: FeatureExclusiveLock | FeatureObjectMap, On: true}, "\x0c\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00"},
	{&WatcherList{Owned: true, Host: "h", Watchers: []Watcher{{"a", 1, 2}}},
		"\x01\x00\x00\x00\x01\x00\x00\x00h\x01\x00\x00\x00\x01\x00\x00\x00a\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00"},
	{&Progress{Done: 1, Total: 2}, "\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00"},
	{&status{res: -5, text: "x"}, "\xfb\xff\xff\xff\xff\xff\xff\xff\x01\x00\x00\x00x"},
}

// empty returns a message of the same type without anything in it.
func empty(m Message) Message { return reflect.New(reflect.TypeOf(m).Elem()).Interface().(Message) }

func TestMessages(t *testing.T) {
	for _, tt := range messages {
		t.Run(reflect.TypeOf(tt.m).Elem().Name(), func(t *testing.T) {
			b, err := Append(nil, tt.m)
			if err != nil || tt.want != "" && string(b) != tt.want {
				t.Fatalf("%q, %v, want %q", b, err, tt.want)
			}
			got := empty(tt.m)
			if err := Parse(append(b, "what a later version has"...), got); err != nil || !reflect.DeepEqual(got, tt.m) {
				t.Errorf("%+v, %v, want %+v", got, err, tt.m)
			}
			for n := range b {
				if err := Parse(b[:n], empty(tt.m)); !errors.Is(err, ErrPayload) {
					t.Errorf("of %d bytes the first %d: %v", len(b), n, err)
				}
			}
		})
	}
}

func TestLongNames(t *testing.T) {
	m := &SnapshotRequest{Name: strings.Repeat("n", MaxName)}
	b, err := Append(nil, m)
	if err != nil || Parse(b, &SnapshotRequest{}) != nil {
		t.Errorf("the longest name: %v", err)
	}
	m.Name += "n"
	if _, err := Append(nil, m); !errors.Is(err, ErrTooLong) {
		t.Errorf("appended: %v", err)
	}
	b = append(binary.LittleEndian.AppendUint32(nil, uint32(len(m.Name))), m.Name...)
	if err := Parse(b, &SnapshotRequest{}); !errors.Is(err, ErrPayload) {
		t.Errorf("parsed: %v", err)
	}
}

// TestCounts: a count that the payload cannot hold makes no list.
func TestCounts(t *testing.T) {
	for _, n := range []uint32{1, 1 << 20, 1 << 31, 1<<32 - 1} {
		b := binary.LittleEndian.AppendUint32(nil, n)
		b = append(b, make([]byte, minListedSnapshot-1)...)
		var list SnapshotList
		if err := Parse(b, &list); !errors.Is(err, ErrPayload) || list.Snapshots != nil {
			t.Errorf("%d elements: %v", n, err)
		}
	}
}

// TestListFits: what Add takes fits into a frame, and it takes nearly all that would.
func TestListFits(t *testing.T) {
	var list ListResult
	long := strings.Repeat("n", MaxName)
	for list.Add(ListedImage{Name: long, ID: id}) {
	}
	b, err := AppendResult(nil, &list)
	if err != nil || len(b) > MaxPayload || len(b) < MaxPayload-MaxName-minListedImage || !list.More {
		t.Errorf("%d bytes, more is %t, %v", len(b), list.More, err)
	}
}

// TestChildrenFit is TestListFits for clones.
func TestChildrenFit(t *testing.T) {
	var list ChildrenResult
	long := strings.Repeat("n", MaxName)
	for list.Add(ListedChild{ListedImage: ListedImage{Name: long, ID: id}}) {
	}
	b, err := AppendResult(nil, &list)
	if err != nil || len(b) > MaxPayload || len(b) < MaxPayload-MaxName-minListedChild || !list.More {
		t.Errorf("%d bytes, more is %t, %v", len(b), list.More, err)
	}
}

// TestMetadataFits is the same for metadata.
func TestMetadataFits(t *testing.T) {
	var list MetadataList
	long := strings.Repeat("v", MaxValue/4)
	for list.Add(Metadatum{"k", long}) {
	}
	b, err := AppendResult(nil, &list)
	if err != nil || len(b) > MaxPayload || len(b) < MaxPayload-len(long)-minMetadatum-1 || !list.More {
		t.Errorf("%d bytes, more is %t, %v", len(b), list.More, err)
	}
}

// TestDiffFits: as many ranges as it is said to hold fit into a frame, and no more.
func TestDiffFits(t *testing.T) {
	b, err := AppendResult(nil, &DiffResult{Ranges: make([]DiffRange, MaxDiffRanges)})
	if err != nil || len(b) > MaxPayload || len(b)+diffRange <= MaxPayload {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

func TestResults(t *testing.T) {
	b, err := AppendResult(nil, &SizeResult{Size: 9})
	if err != nil {
		t.Fatal(err)
	}
	var got SizeResult
	if err := ParseResult(b, &got); err != nil || got.Size != 9 {
		t.Errorf("%+v, %v", got, err)
	}
	if b, err = AppendResult(nil, nil); err != nil || ParseResult(b, nil) != nil {
		t.Errorf("%q, %v", b, err)
	}
	var e *Error
	err = ParseResult(AppendError(nil, syscall.EBUSY, "two\nlines \xff"), &got)
	if !errors.As(err, &e) || !errors.Is(err, syscall.EBUSY) || err.Error() != "two lines \ufffd" {
		t.Errorf("%v", err)
	}
	if err := ParseResult(AppendError(nil, syscall.EBUSY, ""), nil); err.Error() != syscall.EBUSY.Error() {
		t.Errorf("an error without a text: %v", err)
	}
	err = ParseResult(AppendError(nil, syscall.EIO, strings.Repeat("é", MaxName)), nil)
	if !errors.As(err, &e) || len(e.Text) != MaxName || !utf8.ValidString(e.Text) {
		t.Errorf("a long error: %v", err)
	}
	for _, res := range []int64{1, -4096, -1 << 63} {
		b, _ := Append(nil, &status{res: res})
		if err := ParseResult(b, nil); !errors.Is(err, ErrPayload) {
			t.Errorf("the result %d: %v", res, err)
		}
	}
}

func TestSnapshotNumber(t *testing.T) {
	if n := SnapshotNumber(uuid.MustParse("f0000000-0000-0001-0000-000000000000")); n != 0x7000000000000001 {
		t.Errorf("%#x", n)
	}
}

func TestTypes(t *testing.T) {
	for typ, want := range map[Type]string{
		Open: "open", RenameSnapshot.Result(): "result of rename a snapshot",
		RollBack.Progress(): "progress of roll back", TrashPurge: "purge the trash", 99: "type 99", 0xc001: "type 49153",
	} {
		if typ.String() != want {
			t.Errorf("%#x is %q, want %q", uint16(typ), typ, want)
		}
	}
}

func frame(t testing.TB, f Frame) []byte {
	t.Helper()
	b, err := f.Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestFrames(t *testing.T) {
	// By the document, and by an implementation of CRC32C that is not this one's.
	want := "LRBD\x01\x00\x02\x80\x03\x00\x00\x00\x1b\x0f\x5f\xff\x08\x07\x06\x05\x04\x03\x02\x01abc"
	if b := frame(t, Frame{Type: Open.Result(), Number: 0x0102030405060708, Payload: []byte("abc")}); string(b) != want {
		t.Errorf("% x", b)
	}
	var buf bytes.Buffer
	w := NewWriter(&buf)
	frames := []Frame{
		{Type: Hello, Number: 1, Payload: []byte("one")},
		{Type: Close.Result(), Number: 1<<64 - 1, Payload: []byte{}},
		{Type: List, Payload: bytes.Repeat([]byte{7}, MaxPayload)},
	}
	for _, f := range frames {
		if err := w.Write(f); err != nil {
			t.Fatal(err)
		}
	}
	r := NewReader(iotest.HalfReader(&buf))
	for _, want := range frames {
		if got, err := r.Read(); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%v %d, %v", got.Type, len(got.Payload), err)
		}
	}
	if _, err := r.Read(); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
	if err := w.Write(Frame{Payload: make([]byte, MaxPayload+1)}); !errors.Is(err, ErrTooLong) {
		t.Errorf("too long: %v", err)
	}
}

// TestDamage: any bit of a frame matters, and any end of the connection in it.
func TestDamage(t *testing.T) {
	good := frame(t, Frame{Type: Open, Number: 5, Payload: []byte("abc")})
	for i := range 8 * len(good) {
		b := bytes.Clone(good)
		b[i/8] ^= 1 << (i % 8)
		_, err := NewReader(bytes.NewReader(b)).Read()
		switch {
		case i/8 == 4 || i/8 == 5:
			if !errors.Is(err, ErrVersion) {
				t.Errorf("bit %d: %v", i, err)
			}
		case !errors.Is(err, ErrFrame) && !errors.Is(err, io.ErrUnexpectedEOF):
			t.Errorf("bit %d: %v", i, err)
		}
	}
	for n := 1; n < len(good); n++ {
		if _, err := NewReader(bytes.NewReader(good[:n])).Read(); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	long := bytes.Clone(good)
	binary.LittleEndian.PutUint32(long[8:], MaxPayload+1)
	if _, err := NewReader(bytes.NewReader(long)).Read(); !errors.Is(err, ErrFrame) {
		t.Errorf("too long: %v", err)
	}
}

// TestAnnounced: a header alone takes no memory for its payload.
func TestAnnounced(t *testing.T) {
	b := frame(t, Frame{Type: Open, Payload: make([]byte, MaxPayload)})[:HeaderSize+1]
	r := NewReader(bytes.NewReader(b))
	if _, err := r.Read(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(err)
	}
	if n := r.buf.Cap(); n > 64<<10 {
		t.Errorf("a buffer of %d bytes", n)
	}
}

// pair returns the two ends of a connection.
func pair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); s.Close() })
	return c.(*net.UnixConn), s.(*net.UnixConn)
}

// inode returns what fd is open on.
func inode(t testing.TB, fd int) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// TestFiles sends descriptors with frames that the socket does not take at once.
func TestFiles(t *testing.T) {
	a, b := pair(t)
	if err := a.SetWriteBuffer(4096); err != nil {
		t.Fatal(err)
	}
	var files [3]*os.File
	var fds []int
	for i := range files {
		f, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files[i] = f
		fds = append(fds, int(f.Fd()))
	}
	big := bytes.Repeat([]byte("x"), 300<<10)
	done := make(chan error, 1)
	go func() {
		done <- errors.Join(
			NewWriter(a).Write(Frame{Type: Open.Progress(), Number: 4}),
			WriteWithFiles(a, Frame{Type: Open.Result(), Number: 4, Payload: big}, fds...),
			WriteWithFiles(a, Frame{Type: Close.Result(), Number: 5}, fds[1]),
		)
	}()
	for i, want := range []struct {
		typ Type
		fds []int
	}{{Open.Progress(), nil}, {Open.Result(), fds}, {Close.Result(), fds[1:2]}} {
		f, got, err := ReadWithFiles(b)
		if err != nil || f.Type != want.typ || len(got) != len(want.fds) {
			t.Fatalf("frame %d: %v with %v, %v", i, f.Type, got, err)
		}
		for j, fd := range got {
			if inode(t, fd) != inode(t, want.fds[j]) {
				t.Errorf("frame %d: descriptor %d is another file", i, j)
			}
			if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("frame %d: descriptor %d survives an exec", i, j)
			}
			unix.Close(fd)
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestUnwantedFiles: descriptors that come to a Reader are not kept.
func TestUnwantedFiles(t *testing.T) {
	a, b := pair(t)
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	if err := WriteWithFiles(a, Frame{Type: Hello}, p[1]); err != nil {
		t.Fatal(err)
	}
	unix.Close(p[1])
	if _, err := NewReader(b).Read(); err != nil {
		t.Fatal(err)
	}
	// Nobody has the pipe's other end any more.
	fds := []unix.PollFd{{Fd: int32(p[0]), Events: unix.POLLIN}}
	if _, err := unix.Poll(fds, 0); err != nil || fds[0].Revents&unix.POLLHUP == 0 {
		t.Errorf("the descriptor is open: %#x, %v", fds[0].Revents, err)
	}
}

// FuzzMessages: what can be parsed is the same when it is written and parsed again, and
// takes no memory that its bytes are not worth.
func FuzzMessages(f *testing.F) {
	for i, tt := range messages {
		b, err := Append(nil, tt.m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(i), b)
		f.Add(uint8(i), bytes.Repeat([]byte{0xff}, len(b)))
	}
	f.Fuzz(func(t *testing.T, kind uint8, b []byte) {
		like := messages[int(kind)%len(messages)].m
		m := empty(like)
		err := Parse(b, m)
		if err != nil {
			if !errors.Is(err, ErrPayload) {
				t.Fatal(err)
			}
			return
		}
		out, err := Append(nil, m)
		if err != nil || len(out) > len(b) {
			t.Fatalf("%d bytes of %d, %v", len(out), len(b), err)
		}
		again := empty(like)
		if err := Parse(out, again); err != nil || !reflect.DeepEqual(m, again) {
			t.Fatalf("%+v, %v, was %+v", again, err, m)
		}
	})
}

// FuzzResult: a result is an error, or one of the errnos, and parsing it does not panic.
func FuzzResult(f *testing.F) {
	f.Add(AppendError(nil, syscall.ENOENT, "no such image"))
	b, err := AppendResult(nil, &SizeResult{Size: 1})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		err := ParseResult(b, &SizeResult{})
		var e *Error
		switch {
		case errors.As(err, &e):
			if e.Errno == 0 || e.Errno > 4095 {
				t.Errorf("errno %d", e.Errno)
			}
		case err != nil && !errors.Is(err, ErrPayload):
			t.Error(err)
		}
	})
}

// FuzzFrames: what the Reader accepts is what a Writer writes.
func FuzzFrames(f *testing.F) {
	good := frame(f, Frame{Type: Open, Number: 5, Payload: []byte("abc")})
	f.Add(good)
	f.Add(append(good, good...))
	f.Add(good[:HeaderSize])
	long := bytes.Clone(good)
	binary.LittleEndian.PutUint32(long[8:], 1<<31)
	f.Add(long)
	f.Fuzz(func(t *testing.T, b []byte) {
		// What the checksum hides is looked at too.
		fixed := bytes.Clone(b)
		if len(b) >= HeaderSize {
			n := min(uint64(binary.LittleEndian.Uint32(b[8:])), uint64(len(b)-HeaderSize))
			binary.LittleEndian.PutUint32(fixed[12:], checksum(b[:HeaderSize], b[HeaderSize:HeaderSize+n]))
		}
		for _, b := range [][]byte{b, fixed} {
			r := NewReader(bytes.NewReader(b))
			for {
				got, err := r.Read()
				if err != nil {
					break
				}
				out, err := got.Append(nil)
				if err != nil || !bytes.HasPrefix(b, out) {
					t.Fatalf("read %v of %d bytes from % x: %v", got.Type, len(got.Payload), b, err)
				}
				b = b[len(out):]
			}
		}
	})
}
