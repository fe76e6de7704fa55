package backend

import (
	"cmp"
	"encoding/json"
	"strings"
	"testing"
)

func TestParseStore(t *testing.T) {
	tests := []struct {
		in   string
		want URL
		str  string // if not in
	}{
		{"file:///srv/lsd", URL{Scheme: "file", Dir: "/srv/lsd"}, ""},
		{"file:///srv//lsd/../lsd/.", URL{Scheme: "file", Dir: "/srv/lsd"}, "file:///srv/lsd"},
		{"file:///srv/lsd/", URL{Scheme: "file", Dir: "/srv/lsd"}, "file:///srv/lsd"},
		{"file:////srv", URL{Scheme: "file", Dir: "/srv"}, "file:///srv"},
		{"file:///a b%25%3f&#é", URL{Scheme: "file", Dir: "/a b%?&#é"}, "file:///a%20b%25%3F%26%23%C3%A9"},
		{"rados://rbd", URL{Scheme: "rados", Pool: "rbd"}, ""},
		{"rados://.Rbd_1/ns", URL{Scheme: "rados", Pool: ".Rbd_1", Namespace: "ns"}, ""},
		{"rados://p/n?conf=/etc/ceph/x.conf&id=lsd", URL{Scheme: "rados", Pool: "p", Namespace: "n", Conf: "/etc/ceph/x.conf", ID: "lsd"}, ""},
		{"rados://p?id=client.lsd", URL{Scheme: "rados", Pool: "p", ID: "lsd"}, "rados://p?id=lsd"},
		{"rados://p?id=a&conf=/a/../b", URL{Scheme: "rados", Pool: "p", Conf: "/b", ID: "a"}, "rados://p?conf=/b&id=a"},
		{"rados://p?conf=/a%26b", URL{Scheme: "rados", Pool: "p", Conf: "/a&b"}, ""},
		{"mem:", URL{Scheme: "mem"}, ""},
		{"mem:x", URL{Scheme: "mem", Pool: "x"}, ""},
		{"mem://x", URL{Scheme: "mem", Pool: "x"}, "mem:x"},
	}
	for _, tt := range tests {
		got, err := ParseStore(tt.in)
		if err != nil || got != tt.want {
			t.Errorf("ParseStore(%q) = %+v, %v; want %+v", tt.in, got, err, tt.want)
			continue
		}
		str := tt.str
		if str == "" {
			str = tt.in
		}
		if got.String() != str {
			t.Errorf("ParseStore(%q).String() = %q; want %q", tt.in, got.String(), str)
		}
	}
}

func TestParseImage(t *testing.T) {
	tests := []struct {
		in   string
		want URL
		name string
	}{
		{"file:///srv/lsd/vm1", URL{Scheme: "file", Dir: "/srv/lsd"}, "vm1"},
		{"rados://rbd/vm1", URL{Scheme: "rados", Pool: "rbd"}, "vm1"},
		{"rados://rbd/ns/vm1", URL{Scheme: "rados", Pool: "rbd", Namespace: "ns"}, "vm1"},
		{"rados://rbd/ns/vm1?id=x", URL{Scheme: "rados", Pool: "rbd", Namespace: "ns", ID: "x"}, "vm1"},
		{"mem:vm1", URL{Scheme: "mem"}, "vm1"},
		{"mem:s/vm1", URL{Scheme: "mem", Pool: "s"}, "vm1"},
	}
	for _, tt := range tests {
		got, name, err := ParseImage(tt.in)
		if err != nil || got != tt.want || name != tt.name {
			t.Errorf("ParseImage(%q) = %+v, %q, %v; want %+v, %q", tt.in, got, name, err, tt.want, tt.name)
			continue
		}
		if s := got.Image(name); s != tt.in {
			t.Errorf("Image = %q; want %q", s, tt.in)
		}
	}
}

func TestParseSnapshot(t *testing.T) {
	tests := []struct {
		in          string
		want        URL
		image, snap string
		str         string // if not in
	}{
		{"file:///srv/lsd/vm1@monday", URL{Scheme: "file", Dir: "/srv/lsd"}, "vm1", "monday", ""},
		{"file:///srv/a@b/vm1@2026-01-01", URL{Scheme: "file", Dir: "/srv/a@b"}, "vm1", "2026-01-01", ""},
		{"file:///srv/vm1%40monday", URL{Scheme: "file", Dir: "/srv"}, "vm1", "monday", "file:///srv/vm1@monday"},
		{"rados://rbd/vm1@1", URL{Scheme: "rados", Pool: "rbd"}, "vm1", "1", ""},
		{"rados://pool/ns/vm1@monday?id=x", URL{Scheme: "rados", Pool: "pool", Namespace: "ns", ID: "x"}, "vm1", "monday", ""},
		{"rados://p/i@s?conf=/a@b", URL{Scheme: "rados", Pool: "p", Conf: "/a@b"}, "i", "s", ""},
		{"mem:vm1@_", URL{Scheme: "mem"}, "vm1", "_", ""},
		{"mem:s/vm1@a:b+c~d", URL{Scheme: "mem", Pool: "s"}, "vm1", "a:b+c~d", ""},
	}
	for _, tt := range tests {
		for name, parse := range map[string]func(string) (URL, string, string, error){"ParseSnapshot": ParseSnapshot, "ParseSource": ParseSource} {
			got, image, snap, err := parse(tt.in)
			if err != nil || got != tt.want || image != tt.image || snap != tt.snap {
				t.Errorf("%s(%q) = %+v, %q, %q, %v; want %+v, %q, %q", name, tt.in, got, image, snap, err, tt.want, tt.image, tt.snap)
			}
		}
		if s := tt.want.Snapshot(tt.image, tt.snap); s != cmp.Or(tt.str, tt.in) {
			t.Errorf("Snapshot = %q; want %q", s, cmp.Or(tt.str, tt.in))
		}
	}
	for _, in := range []string{"file:///srv/vm1", "rados://p/n/vm1?id=x", "mem:vm1"} {
		u, image, snap, err := ParseSource(in)
		if err != nil || image != "vm1" || snap != "" || u.Image(image) != in {
			t.Errorf("ParseSource(%q) = %+v, %q, %q, %v", in, u, image, snap, err)
		}
	}
}

// TestParseTrashed: an image in the trash is one that can be read, and no other.
func TestParseTrashed(t *testing.T) {
	const id = "2f1b8fb3-7fd5-47a9-8d4f-5f2b4ec5a5b0"
	for _, in := range []string{"file:///srv/~" + id, "rados://p/n/~" + id, "mem:~" + id} {
		u, image, snap, err := ParseSource(in)
		if err != nil || image != "~"+id || snap != "" || u.Image(image) != in {
			t.Errorf("ParseSource(%q) = %+v, %q, %q, %v", in, u, image, snap, err)
		}
		if _, image, err := ParseImage(in); err == nil {
			t.Errorf("ParseImage(%q) = %q", in, image)
		}
		if _, image, _, err := ParseSnapshot(in + "@s"); err == nil {
			t.Errorf("ParseSnapshot(%q) = %q", in, image)
		}
	}
	for _, name := range []string{"~", "~x", "~" + strings.ToUpper(id), "~{" + id + "}", "~~" + id} {
		if _, image, _, err := ParseSource("file:///srv/" + name); err == nil {
			t.Errorf("ParseSource of %q = %q", name, image)
		}
	}
}

func TestParseSnapshotErrors(t *testing.T) {
	tests := []struct{ in, image, snapshot, source string }{ // parts of the errors
		{"mem:vm1@a", "an image is wanted", "", ""},
		{"mem:vm1", "", `"vm1" names no snapshot`, ""},
		{"mem:@a", "an image is wanted", "empty image name", "empty image name"},
		{"mem:vm1@", "an image is wanted", "empty snapshot name", "empty snapshot name"},
		{"mem:vm1@a@b", "an image is wanted", `bad snapshot name "a@b"`, `bad snapshot name "a@b"`},
		{"mem:vm1@-a", "an image is wanted", "begins with", "begins with"},
		{"mem:v m@a", "an image is wanted", `bad image name "v m"`, `bad image name "v m"`},
		{"mem:vm1@" + strings.Repeat("x", MaxImageName+1), "an image is wanted", "snapshot name of 97 bytes: the limit is 96", "snapshot name of 97"},
		{"file:///vm1@a", "an image is wanted", "names no directory", "names no directory"},
		{"rados://p@a", "names no image", "names no image", "names no image"},
		{"rados://p@x/i@s", "an image is wanted", "'@'", "'@'"},
		{"rados://p/n@x/i@s", "an image is wanted", "'@'", "'@'"},
		{"vm1@a", "not a URL", "not a URL", "not a URL"},
	}
	check := func(name, in, want string, err error) {
		t.Helper()
		switch {
		case want == "" && err != nil, want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("%s(%q): error %v; want one with %q", name, in, err, want)
		case err != nil && (strings.Contains(err.Error(), "\n") || len(err.Error()) > 200):
			t.Errorf("%s(%q): error %q is not one short line", name, in, err)
		}
	}
	for _, tt := range tests {
		_, _, err := ParseImage(tt.in)
		check("ParseImage", tt.in, tt.image, err)
		_, _, _, err = ParseSnapshot(tt.in)
		check("ParseSnapshot", tt.in, tt.snapshot, err)
		_, _, _, err = ParseSource(tt.in)
		check("ParseSource", tt.in, tt.source, err)
	}
}

func TestParseErrors(t *testing.T) {
	tests := []struct {
		in    string
		image bool
		want  string // a part of the error
	}{
		{"", false, "not a URL"},
		{"/srv/lsd", false, "write file:///dir"},
		{"http://x", false, "known are file, rados"},
		{"s3://bucket", false, "known are"},
		{"FILE:///x", false, "unknown scheme"},
		{"file:dir", false, "write file:///dir"},
		{"file://dir/x", false, "write file:///dir"},
		{"file://./x", false, "write file:///dir"},
		{"file:///", false, "names no directory"},
		{"file:///a/..", false, "names no directory"},
		{"file:///a%2fb", false, "slash"},
		{"file:///a?x=1", false, "no parameters"},
		{"file:///a%00b", false, "control"},
		{"file:///a\nb", false, "control"},
		{"file:///a%zz", false, "%25"},
		{"file:///" + strings.Repeat("a", maxURL), false, "limit"},
		{"file:///" + strings.Repeat("a", maxPath), false, "limit"},
		{"rados://p?conf=/" + strings.Repeat("a", maxPath), false, "limit"},
		{"rados:pool", false, "write rados://pool"},
		{"rados://", false, "empty pool name"},
		{"rados:///x", false, "empty pool name"},
		{"rados://p/", false, "empty namespace"},
		{"rados://p/n/x", false, "too many"},
		{"rados://u:sesame@p", false, "'@'"},
		{"rados://" + strings.Repeat("p", 129), false, "limit"},
		{"rados://p?key=sesame", false, `unknown parameter "key"`},
		{"rados://p?conf=ceph.conf", false, "absolute"},
		{"rados://p?conf=", false, "absolute"},
		{"rados://p?id=", false, "empty client id"},
		{"rados://p?id=client.", false, "empty client id"},
		{"rados://p?id=a&id=b", false, "twice"},
		{"rados://p?", false, "unknown parameter"},
		{"mem:a/b", false, "too many"},
		{"file:///srv/lsd/", true, "empty image name"},
		{"file:///vm1", true, "names no directory"},
		{"file:///a/..", true, "begins with"},
		{"rados://p", true, "names no image"},
		{"rados://p/n/", true, "empty image name"},
		{"rados://p/n/i/x", true, "too many"},
		{"rados://p/vm@snap", true, "bad image name"},
		{"rados://p/vm@snap", true, "names a snapshot"},
		{"mem:", true, "empty image name"},
		{"mem:a/b/c", true, "too many"},
	}
	for _, tt := range tests {
		var err error
		if tt.image {
			_, _, err = ParseImage(tt.in)
		} else {
			_, err = ParseStore(tt.in)
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: error %v; want one with %q", tt.in, err, tt.want)
			continue
		}
		if s := err.Error(); strings.Contains(s, "\n") || strings.Contains(s, "sesame") || len(s) > 200 {
			t.Errorf("%q: error %q is not one short line without secrets", tt.in, s)
		}
	}
}

func TestCheckImageName(t *testing.T) {
	for _, name := range []string{"a", "0", "_x", "vm-100-disk-0", "A.b_c:d+e~f-", strings.Repeat("x", MaxImageName)} {
		if err := CheckImageName(name); err != nil {
			t.Errorf("CheckImageName(%q) = %v", name, err)
		}
	}
	for _, name := range []string{"", ".", "..", ".a", "-a", "~a", "a/b", "a@b", "a b", "é", "a\x00", strings.Repeat("x", MaxImageName+1)} {
		if err := CheckImageName(name); err == nil {
			t.Errorf("CheckImageName(%q) = nil", name)
		}
	}
}

func TestURLText(t *testing.T) {
	u := URL{Scheme: "rados", Pool: "p", ID: "x"}
	b, err := json.Marshal(u)
	if err != nil || string(b) != `"rados://p?id=x"` {
		t.Fatalf("Marshal = %s, %v", b, err)
	}
	var v URL
	if err := json.Unmarshal(b, &v); err != nil || v != u {
		t.Fatalf("Unmarshal = %+v, %v", v, err)
	}
	if err := json.Unmarshal([]byte(`"nfs:x"`), &v); err == nil || v != u {
		t.Fatalf("Unmarshal of a bad URL = %+v, %v", v, err)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"file:///srv/a%20b/vm", "rados://p/n/i?conf=/c&id=client.x", "mem:a/b", "rados://p?id=%26", "file:///a/../b", "mem:a/b@c", "rados://p/n/i@s?id=x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if u, err := ParseStore(s); err == nil {
			v, err := ParseStore(u.String())
			if err != nil || v != u {
				t.Errorf("%q: %+v became %q, which is %+v, %v", s, u, u.String(), v, err)
			}
		}
		if u, name, err := ParseImage(s); err == nil {
			v, n, err := ParseImage(u.Image(name))
			if err != nil || v != u || n != name {
				t.Errorf("%q: %+v %q became %q, which is %+v, %q, %v", s, u, name, u.Image(name), v, n, err)
			}
			if v, n, snap, err := ParseSource(s); err != nil || v != u || n != name || snap != "" {
				t.Errorf("%q is the image %q, and %q of %q, %v", s, name, snap, n, err)
			}
		}
		if u, name, snap, err := ParseSnapshot(s); err == nil {
			v, n, p, err := ParseSource(u.Snapshot(name, snap))
			if err != nil || v != u || n != name || p != snap || p == "" {
				t.Errorf("%q: %+v %q %q became %q, which is %+v, %q, %q, %v", s, u, name, snap, u.Snapshot(name, snap), v, n, p, err)
			}
			if _, _, err := ParseImage(s); err == nil {
				t.Errorf("%q is a snapshot and an image", s)
			}
		}
	})
}

func TestCheckKey(t *testing.T) {
	for _, key := range []string{"a", "0/1/2", "a.b_c-d", "a/b.c", "-", "_", strings.Repeat("k", MaxKey)} {
		if err := CheckKey(key); err != nil {
			t.Errorf("CheckKey(%q) = %v", key, err)
		}
	}
	for _, key := range []string{"", "/", "/a", "a/", "a//b", ".", "..", ".a", "a/.b", "a/../b", "A", "a b", "a\x00", "é", "a+b", strings.Repeat("k", MaxKey+1)} {
		if err := CheckKey(key); err == nil {
			t.Errorf("CheckKey(%q) = nil", key)
		}
	}
	for _, prefix := range []string{"", "a", "a/", "a/b"} {
		if err := CheckPrefix(prefix); err != nil {
			t.Errorf("CheckPrefix(%q) = %v", prefix, err)
		}
	}
	for _, prefix := range []string{"/", ".", "a//", "A"} {
		if err := CheckPrefix(prefix); err == nil {
			t.Errorf("CheckPrefix(%q) = nil", prefix)
		}
	}
}
