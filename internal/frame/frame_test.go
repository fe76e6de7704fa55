package frame

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

func TestDamage(t *testing.T) {
	good := Encode("LSDTEST\x00", 1, []byte("payload"))
	if p, err := Decode("LSDTEST\x00", good, 1); err != nil || string(p) != "payload" {
		t.Fatalf("Decode = %q, %v", p, err)
	}
	for i := range good {
		b := bytes.Clone(good)
		b[i] ^= 4
		if _, err := Decode("LSDTEST\x00", b, 1); !errors.Is(err, ErrCorrupt) {
			t.Errorf("byte %d flipped: %v", i, err)
		}
		if _, err := Decode("LSDTEST\x00", good[:i], 1); !errors.Is(err, ErrCorrupt) {
			t.Errorf("cut to %d bytes: %v", i, err)
		}
	}
}

// TestVersion: what is in another format is not taken for damaged.
func TestVersion(t *testing.T) {
	b := Encode("LSDTEST\x00", 2, []byte("payload"))
	for _, version := range []uint32{1, 3} {
		if _, err := Decode("LSDTEST\x00", b, version); !errors.Is(err, ErrVersion) || errors.Is(err, ErrCorrupt) {
			t.Errorf("version 2 where %d is known: %v", version, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(Encode("LSDTEST\x00", 1, []byte("x")))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= HeaderSize { // get past length and checksum
			binary.LittleEndian.PutUint32(b[12:], uint32(len(b)-HeaderSize))
			binary.LittleEndian.PutUint32(b[16:], checksum(b))
		}
		if p, err := Decode("LSDTEST\x00", b, 1); err == nil && !bytes.Equal(Encode("LSDTEST\x00", 1, p), b) {
			// The four reserved bytes are the only ones that may differ.
			c := bytes.Clone(b)
			copy(c[20:24], make([]byte, 4))
			if !bytes.Equal(Encode("LSDTEST\x00", 1, p)[24:], c[24:]) {
				t.Fatal("decoded something that does not encode to itself")
			}
		}
	})
}
