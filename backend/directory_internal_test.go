package backend

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"reflect"
	"strings"
	"testing"

	"github.com/google/uuid"
)

// TestDirectoryFormat pins the format: stores out there hold these bytes.
func TestDirectoryFormat(t *testing.T) {
	d := directory{
		{"a", uuid.MustParse("00112233-4455-6677-8899-aabbccddeeff")},
		{"vm-1", uuid.MustParse("ffeeddcc-bbaa-9988-7766-554433221100")},
	}
	const want = "6c7364206469720a" + "01000000" + "02000000" +
		"01" + "61" + "00112233445566778899aabbccddeeff" +
		"04" + "766d2d31" + "ffeeddccbbaa99887766554433221100" +
		"38ac5e7e"
	b, err := d.encode()
	if err != nil || hex.EncodeToString(b) != want {
		t.Errorf("encode = %x, %v; want %s", b, err, want)
	}
	got, err := decodeDirectory(b)
	if err != nil || !reflect.DeepEqual(got, d) {
		t.Errorf("decode = %v, %v; want %v", got, err, d)
	}
	for i := range b {
		for bit := range 8 {
			bad := bytes.Clone(b)
			bad[i] ^= 1 << bit
			if got, err := decodeDirectory(bad); err == nil {
				t.Fatalf("decode with bit %d of byte %d flipped = %v", bit, i, got)
			}
		}
		if got, err := decodeDirectory(b[:i]); err == nil {
			t.Fatalf("decode of the first %d bytes = %v", i, got)
		}
	}
}

func TestDirectoryDecodeBad(t *testing.T) {
	id := uuid.MustParse("00112233-4455-6677-8899-aabbccddeeff")
	for what, d := range map[string]directory{
		"unsorted":  {{"b", id}, {"a", id}},
		"twice":     {{"a", id}, {"a", id}},
		"no name":   {{"", id}},
		"bad name":  {{"a/b", id}},
		"trash":     {{TrashName(uuid.UUID{1}), id}},
		"long name": {{strings.Repeat("a", MaxImageName+1), id}},
	} {
		b, err := d.encode()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := decodeDirectory(b); err == nil {
			t.Errorf("%s: decode = %v", what, got)
		}
	}
}

func TestDirectoryFull(t *testing.T) {
	var d directory
	for i := range 149000 {
		d = append(d, Entry{Name: fmt.Sprintf("%096d", i)})
	}
	if _, err := d.encode(); err == nil || !strings.Contains(err.Error(), "full of images") {
		t.Errorf("encode of %d entries: %v", len(d), err)
	}
	if b, err := d[:148000].encode(); err != nil || len(b) > MaxMutable {
		t.Errorf("encode of 148000 entries: %d bytes, %v", len(b), err)
	}
}

func FuzzDirectory(f *testing.F) {
	for _, d := range []directory{nil, {{"a", uuid.UUID{1}}}, {{"a", uuid.UUID{1}}, {"b-2", uuid.UUID{2}}}, {{"a", uuid.UUID{1}}, {TrashName(uuid.UUID{2}), uuid.UUID{2}}}} {
		b, err := d.encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b[:len(b)-directoryTrailer])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		decodeDirectory(b)
		// What has the right checksum must still be checked, and is the one
		// encoding of what it decodes to.
		b = appendSum(b)
		d, err := decodeDirectory(b)
		if err != nil {
			return
		}
		if again, err := d.encode(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%x decodes to %v, which encodes to %x, %v", b, d, again, err)
		}
	})
}

func appendSum(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(bytes.Clone(b), crc32.Checksum(b, castagnoli))
}
