package ublk

import (
	"encoding/binary"
	"errors"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestABI compares with what a C compiler makes of linux/ublk_cmd.h.
func TestABI(t *testing.T) {
	for cmd, want := range map[command]uint32{
		cmdGetDevInfo:        0x80207502,
		cmdAddDev:            0xc0207504,
		cmdSetParams:         0xc0207508,
		cmdStartUserRecovery: 0xc0207510,
		cmdGetFeatures:       0x80207513,
		cmdDelDevAsync:       0x80207514,
		cmdUpdateSize:        0xc0207515,
		ioFetchReq:           0xc0107520,
		ioCommitAndFetchReq:  0xc0107521,
		ioPrepIOCmds:         0xc0107525,
		ioCommitIOCmds:       0xc0107526,
		ioFetchIOCmds:        0xc0107527,
	} {
		if uint32(cmd) != want {
			t.Errorf("%v = %#x, want %#x", cmd, uint32(cmd), want)
		}
	}
	for _, s := range []struct {
		v    any
		want int
	}{
		{ctrlCmd{}, sizeofCtrlCmd},
		{devInfo{}, sizeofDevInfo},
		{paramsABI{}, sizeofParams},
	} {
		if got := binary.Size(s.v); got != s.want {
			t.Errorf("%T has %d bytes, want %d", s.v, got, s.want)
		}
	}
	if cmdAddDev.legacy() != 4 || ioFetchReq.legacy() != 0x20 {
		t.Error("legacy numbers are wrong")
	}
}

func TestFeatureNames(t *testing.T) {
	f := FeatureZeroCopy | FeatureShmemZeroCopy | FeatureQuiesce | 1<<40
	if got := f.String(); got != "SUPPORT_ZERO_COPY QUIESCE SHMEM_ZC bit 40" {
		t.Errorf("names: %q", got)
	}
	if FeatureShmemZeroCopy != 1<<19 || FeatureUpdateSize != 1<<10 {
		t.Error("feature bits are out of order")
	}
	if !f.Has(FeatureQuiesce) || f.Has(FeatureQuiesce|FeatureZoned) {
		t.Error("Has is wrong")
	}
}

func TestParseFeatures(t *testing.T) {
	for names, want := range map[string]Features{
		"":                    0,
		"BATCH_IO":            FeatureBatchIO,
		"USER_COPY,BATCH_IO":  FeatureUserCopy | FeatureBatchIO,
		" ZONED  SHMEM_ZC , ": FeatureZoned | FeatureShmemZeroCopy,
	} {
		if got, err := ParseFeatures(names); err != nil || got != want {
			t.Errorf("%q: %v, %v", names, got, err)
		}
	}
	for _, bad := range []string{"batch_io", "BATCH_IO;USER_COPY", "40"} {
		if _, err := ParseFeatures(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestParams(t *testing.T) {
	p := Params{ID: -1, SizeBytes: 1 << 30, VolatileCache: true, FUA: true, ReadOnly: true,
		MaxDiscardBytes: 1 << 30, MaxZeroesBytes: 1 << 20, LogicalBlock: 4096}.withDefaults()
	if err := p.check(); err != nil {
		t.Fatal(err)
	}
	got, err := decodeParams(p.encode())
	if err != nil {
		t.Fatal(err)
	}
	got.ID, got.Queues, got.Depth = p.ID, p.Queues, p.Depth
	if !reflect.DeepEqual(got, p) {
		t.Errorf("parameters come back as %+v, want %+v", got, p)
	}
}

func TestBadParams(t *testing.T) {
	good := Params{ID: -1, SizeBytes: 1 << 20}
	for want, change := range map[string]func(*Params){
		"device number":     func(p *Params) { p.ID = -2 },
		"size of":           func(p *Params) { p.SizeBytes = 1000 },
		"size of 0":         func(p *Params) { p.SizeBytes = 0 },
		"logical block":     func(p *Params) { p.LogicalBlock = 1024 * 3 },
		"logical block of ": func(p *Params) { p.LogicalBlock = 256 },
		"physical block":    func(p *Params) { p.LogicalBlock = 4096; p.PhysicalBlock = 512 },
		"preferred":         func(p *Params) { p.IOOpt = 3000 },
		"greatest request":  func(p *Params) { p.MaxIOBytes = 5000 },
		"queues":            func(p *Params) { p.Queues = -1 },
		"depth":             func(p *Params) { p.Depth = 5000 },
		"FUA":               func(p *Params) { p.FUA = true },
		"granule":           func(p *Params) { p.DiscardGranule = 3 },
		"greatest discard":  func(p *Params) { p.MaxDiscardBytes = 100 },
	} {
		p := good
		change(&p)
		p = p.withDefaults()
		if err := p.check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: check says %v", want, err)
		}
	}
}

func TestNoDriver(t *testing.T) {
	if exists(controlPath) {
		t.Skip("this kernel has ublk")
	}
	if _, err := OpenControl(); !errors.Is(err, ErrNoDriver) || !strings.Contains(err.Error(), "modprobe") {
		t.Errorf("OpenControl: %v", err)
	}
}

func TestBusyError(t *testing.T) {
	err := error(&BusyError{ID: 7, Holders: []string{"process 1 (init)", "mount /x"}, Err: unix.ETIME})
	if got := err.Error(); got != "ublk: /dev/ublkb7 is in use by process 1 (init), mount /x" {
		t.Error(got)
	}
	if !errors.Is(err, unix.ETIME) {
		t.Error("the cause is lost")
	}
	if h := Holders(1 << 20); len(h) != 0 {
		t.Errorf("a device that is not there is held by %v", h)
	}
}

// TestLoadBounds feeds descriptors that the kernel would not send.
func TestLoadBounds(t *testing.T) {
	d := &Device{info: Info{MaxIOBytes: 4096}}
	d.sectors.Store(100)
	tg := &tag{d: d, desc: make([]byte, sizeofIODesc), buf: make([]byte, 4096)}
	for _, c := range []struct {
		op      Op
		sectors uint32
		sector  uint64
		ok      bool
	}{
		{OpRead, 8, 0, true},
		{OpRead, 8, 92, true},
		{OpRead, 8, 93, false},
		{OpRead, 9, 0, false},
		{OpWrite, 1 << 31, 0, false},
		{OpWrite, 1, ^uint64(0), false},
		{OpDiscard, 100, 0, true},
		{OpDiscard, 101, 0, false},
		{OpFlush, 0, ^uint64(0), true},
	} {
		binary.NativeEndian.PutUint32(tg.desc, uint32(c.op)|uint32(FlagFUA))
		binary.NativeEndian.PutUint32(tg.desc[4:], c.sectors)
		binary.NativeEndian.PutUint64(tg.desc[8:], c.sector)
		if got := tg.load(); got != c.ok {
			t.Errorf("%v of %d sectors at %d: load = %v", c.op, c.sectors, c.sector, got)
		}
		if c.ok && c.op <= OpWrite && len(tg.io.Buf) != int(c.sectors)*sectorSize {
			t.Errorf("buffer of %d bytes for %d sectors", len(tg.io.Buf), c.sectors)
		}
		if !tg.io.FUA {
			t.Error("FUA flag lost")
		}
	}
}

func TestDiskIs(t *testing.T) {
	for path, want := range map[string]bool{
		"/dev/ublkb1":             true,
		"/dev/ublkb1p2":           true,
		"/dev/ublkb1 (deleted)":   true,
		"/dev/ublkb1p2 (deleted)": true,
		"/dev/ublkb10":            false,
		"/dev/ublkb1p":            false,
		"/dev/ublkc1":             false,
		"/tmp/ublkb1":             false,
		"ublkb1":                  false,
	} {
		if got := disk("ublkb1").is(path); got != want {
			t.Errorf("is(%q) = %v", path, got)
		}
	}
}
