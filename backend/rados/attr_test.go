package rados

import (
	"bytes"
	"testing"
)

// FuzzVersionAttribute: only an attribute that fits its data passes.
func FuzzVersionAttribute(f *testing.F) {
	data := []byte("contents")
	good := newAttr(data)
	if err := checkAttr(good, data); err != nil {
		f.Fatal(err)
	}
	f.Add(good, data)
	f.Add(good[:attrSize-1], data)
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, attr, data []byte) {
		if checkAttr(attr, data) != nil {
			return
		}
		if len(attr) != attrSize || attr[0] != attrFormat {
			t.Fatalf("attribute %x passes", attr)
		}
		for i := range attr {
			damaged := bytes.Clone(attr)
			damaged[i] ^= 1
			if checkAttr(damaged, data) == nil {
				t.Fatalf("byte %d flipped: attribute %x passes", i, damaged)
			}
		}
	})
}
