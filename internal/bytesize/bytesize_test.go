package bytesize

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for in, want := range map[string]uint64{
		"0": 0, "512": 512, "4096": 4096, "4K": 4096, "4k": 4096, "4KiB": 4096, "4kb": 4096, "8M": 8 << 20,
		"20G": 20 << 30, "1T": 1 << 40, "64T": 64 << 40, "1.5G": 3 << 29, "0.5K": 512, "1P": 1 << 50, "15E": 15 << 60,
		"18446744073709551615": 1<<64 - 1,
	} {
		if got, err := Parse(in); err != nil || got != want {
			t.Errorf("Parse(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{
		"", " ", "G", "-1", "+1", "-1G", "1 G", "1X", "0x10", "1e9", "4KK", "1.G", ".5G", "1.5", "1.2.3G", "16E",
		"18446744073709551616", "99999999999T", "0.3K", "512B", "1i", "²", "1G1", "１G",
	} {
		if got, err := Parse(in); err == nil {
			t.Errorf("Parse(%q) = %d", in, got)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("Parse(%q): more than one line: %v", in, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"1", "4K", "1.5G", "16E", "0.0000000001T"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		v, err := Parse(in)
		if err != nil {
			return
		}
		s := Size(v)
		if again, err := Parse(s.String()); err != nil || again != v {
			t.Errorf("%q is %d, whose text %q is %d, %v", in, v, s.String(), again, err)
		}
	})
}

func TestHuman(t *testing.T) {
	for in, want := range map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 20 << 30: "20 GiB", 64 << 40: "64 TiB",
		1<<20 - 1: "1 MiB", 1234567: "1.18 MiB", 999 << 10: "999 KiB", 1000 << 10: "0.98 MiB", 1<<64 - 1: "16 EiB",
	} {
		if got := Human(in); got != want {
			t.Errorf("Human(%d) = %q, want %q", in, got, want)
		}
	}
}
