package rados

import "testing"

func TestClientAddr(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.1:0/77":                       "10.0.0.1:0/77",
		"v1:10.0.0.1:0/77":                    "10.0.0.1:0/77",
		"[v2:10.0.0.1:0/77,v1:10.0.0.1:0/77]": "10.0.0.1:0/77",
		"[v2:[fd00::1]:0/4294967295]":         "[fd00::1]:0/4294967295",
		"any:10.0.0.1:0/3":                    "10.0.0.1:0/3",
		"":                                    "",
		"-":                                   "",
		"[]":                                  "",
		"10.0.0.1:0/4294967296":               "",
		"10.0.0.1:65536/1":                    "",
		"10.0.0.1:0/1\",\"blocklistop\":\"rm\",\"": "",
	} {
		if got := clientAddr(in); got != want {
			t.Errorf("clientAddr(%q) = %q, want %q", in, got, want)
		}
	}
}
