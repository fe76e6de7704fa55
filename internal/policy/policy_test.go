package policy

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lsd-ceph/lsd/backend"
)

// ids resolves the names of the tests.
func ids(group bool, name string) (uint32, error) {
	switch {
	case !group && name == "alice":
		return 1000, nil
	case !group && name == "qemu":
		return 64055, nil
	case group && name == "lsd":
		return 900, nil
	}
	return 0, ErrUnknown
}

func mustParse(t testing.TB, text string) *Policy {
	t.Helper()
	p, err := Parse("p", text, ids)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const example = `# who              stores           images  rights
allow user:alice   rados://vms      *       read
allow user:alice	rados://vms	vm-*-disk	write
  # more
allow user:64055   file:///srv/*    vm*     read,write
allow user:nobody-here * * read
allow group:lsd    *                *       manage,read,write
allow group:901    rados://a*/n*    x       read
allow user:7       rados://p?conf=/etc/ceph/b.conf&id=seven * read

`

func TestRights(t *testing.T) {
	p := mustParse(t, example)
	alice, qemu, member, other := Caller{UID: 1000, Groups: []uint32{1000}}, Caller{UID: 64055}, Caller{UID: 5, Groups: []uint32{5, 900}}, Caller{UID: 900, Groups: []uint32{1000, 64055}}
	for _, c := range []struct {
		who          Caller
		store, image string
		want         Rights
	}{
		{alice, "rados://vms", "x", Read},
		{alice, "rados://vms", "vm-1-disk", Read | Write},
		{alice, "rados://vms", "vm-disk", Read},
		{alice, "rados://vms", "vm--disk", Read | Write},
		{alice, "rados://vms/ns", "x", 0},
		{alice, "rados://vms2", "x", 0},
		{alice, "rados://vms?id=admin", "x", 0},
		{alice, "rados://vms?conf=/tmp/evil.conf", "x", 0},
		{alice, "file:///srv/a", "vm1", 0},
		{qemu, "file:///srv/a", "vm1", Read | Write},
		{qemu, "file:///srv/x/../a/", "vm1", Read | Write},
		{qemu, "file:///srv/a", "x", 0},
		{qemu, "file:///srv/a/b", "vm1", 0},
		{qemu, "file:///srv", "vm1", 0},
		{qemu, "file:///srv/a/../../etc", "vm1", 0},
		{qemu, "file:///srv/a/../../etc/b", "vm1", 0},
		{member, "rados://p/n", "x", All},
		{member, "file:///anywhere", "x", All},
		{member, "rados://p?conf=/etc/ceph/b.conf", "x", 0},
		{member, "rados://p?id=x", "x", 0},
		{other, "rados://vms", "x", 0},
		{Caller{UID: 0, Groups: []uint32{5}}, "rados://p?conf=/x", "x", All},
		{Caller{UID: 9, Groups: []uint32{901}}, "rados://ab/n", "x", Read},
		{Caller{UID: 9, Groups: []uint32{901}}, "rados://ab", "x", 0},
		{Caller{UID: 7}, "rados://p?id=seven&conf=/etc/ceph/b.conf", "x", Read},
		{Caller{UID: 7}, "rados://p?id=client.seven&conf=/etc/ceph//b.conf", "x", Read},
		{Caller{UID: 7}, "rados://p?conf=/etc/ceph/b.conf", "x", 0},
		{Caller{UID: 7}, "rados://p", "x", 0},
	} {
		u, err := backend.ParseStore(c.store)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.In(c.who, u).Rights(c.image); got != c.want {
			t.Errorf("%+v, %s of %s: %v, want %v", c.who, c.image, c.store, got, c.want)
		}
	}
	if len(p.Unknown) != 1 || !strings.Contains(p.Unknown[0], "p:6: user:nobody-here: there is none") {
		t.Errorf("unknown: %q", p.Unknown)
	}
	for _, c := range []struct {
		who  Caller
		want bool
	}{{alice, true}, {other, false}, {Caller{}, true}, {member, true}} {
		if got := p.Names(c.who); got != c.want {
			t.Errorf("names %+v: %v", c.who, got)
		}
	}
}

func TestAllowAll(t *testing.T) {
	p := mustParse(t, "allow user:1 * * read\nallow user:1 * vm* write\nallow user:2 * * read\nallow user:2 * * write\n")
	u := backend.URL{Scheme: "file", Dir: "/a"}
	if g := p.In(Caller{UID: 1}, u); !g.AllowAll(Read) || g.AllowAll(Write) || !g.Allow("vm1", Read|Write) || g.Allow("x", Write) {
		t.Errorf("%v", g)
	}
	if g := p.In(Caller{UID: 2}, u); !g.AllowAll(Read|Write) || g.AllowAll(All) {
		t.Errorf("%v", g)
	}
	if g := p.In(Caller{UID: 3}, u); len(g) != 0 || g.AllowAll(Read) {
		t.Errorf("%v", g)
	}
}

func TestGroup(t *testing.T) {
	p := Group(900)
	if !p.In(Caller{UID: 1, Groups: []uint32{900}}, backend.URL{Scheme: "rados", Pool: "p"}).Allow("x", All) || p.Names(Caller{UID: 900}) || !p.OnlyGroup(900) || p.OnlyGroup(901) {
		t.Error("not the group, or not all")
	}
	for text, want := range map[string]bool{"": true, "allow group:lsd * * read": true, "allow user:900 * * read": false, "allow user:who * * read": true, "allow group:lsd * x read\nallow group:1 * * read": false} {
		if got := mustParse(t, text).OnlyGroup(900); got != want {
			t.Errorf("%q: only the group: %v", text, got)
		}
	}
}

func TestParseErrors(t *testing.T) {
	for line, want := range map[string]string{
		"deny user:alice * * read":                              "a line is: allow",
		"allow user:alice * *":                                  "a line is: allow",
		"allow user:alice * * read # why":                       "a line is: allow",
		"allow alice * * read":                                  "write user:NAME",
		"allow user: * * read":                                  "write user:NAME",
		"allow users:alice * * read":                            "write user:NAME",
		"allow user:4294967295 * * read":                        "no number",
		"allow user:99999999999999999999 * * read":              "no number",
		"allow user:alice vms * read":                           "not a URL",
		"allow user:alice *vms * read":                          "not a URL",
		"allow user:alice mem:x * read":                         "mem:",
		"allow user:alice file:///a/../b * read":                "which is /b",
		"allow user:alice file:///a/*/../b * read":              "which is /a/b",
		"allow user:alice file:///a/%2e%2e/b * read":            "which is /b",
		"allow user:alice file:///a/ * read":                    "which is /a",
		"allow user:alice file:///a%2ab * read":                 "cannot be meant itself",
		"allow user:alice rados://p?id=* * read":                "cannot be meant itself",
		"allow user:alice rados://p?key=x * read":               "unknown parameter",
		"allow user:alice rados://p/n/* * read":                 "too many components",
		"allow user:alice * -* read":                            "bad image name",
		"allow user:alice * a/b read":                           "bad image name",
		"allow user:alice * * ":                                 "a line is: allow",
		"allow user:alice * * read,":                            "is no right",
		"allow user:alice * * Read":                             "is no right",
		"allow user:alice * * read,read":                        "twice",
		"allow user:alice * * read\r":                           "control character",
		"allow user:alice * \xff read":                          "control character",
		"allow user:" + strings.Repeat("a", 9000) + " * * read": "8192 bytes",
	} {
		_, err := Parse("/etc/p", "# first\n"+line+"\nallow", ids)
		if err == nil || !strings.HasPrefix(err.Error(), "/etc/p:2: ") || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 300 {
			t.Errorf("%q: %v, want one line with %q", line, err, want)
		}
	}
	if _, err := Parse("p", strings.Repeat("#", maxFile+1), ids); err == nil {
		t.Error("a file without end was read")
	}
	if _, err := Parse("p", strings.Repeat("allow user:1 * * read\n", maxRules+1), ids); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("p:%d: ", maxRules+1)) {
		t.Errorf("too many lines: %v", err)
	}
}

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{"", "", true}, {"", "a", false}, {"*", "", true}, {"*", "abc", true}, {"a*", "a", true}, {"a*", "ba", false},
		{"*a", "ba", true}, {"*a", "ab", false}, {"a*a", "a", false}, {"a*a", "aa", true}, {"a*b*c", "aXbYc", true},
		{"a*b*c", "abc", true}, {"a*b*c", "ac", false}, {"a*b*b", "ab", false}, {"a**b", "ab", true}, {"*ab*ab*", "ab", false},
		{"*ab*ab*", "xabab", true}, {"a?", "ab", false}, {"[a]", "a", false},
	} {
		if got := match(c.pattern, c.s); got != c.want {
			t.Errorf("match %q to %q: %v", c.s, c.pattern, got)
		}
	}
}

func TestLoad(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give files away")
	}
	path := filepath.Join(t.TempDir(), "policy")
	if _, err := Load(path); !os.IsNotExist(err) || StampOf(path) != (Stamp{}) {
		t.Errorf("no file: %v", err)
	}
	if err := os.WriteFile(path, []byte("allow user:0 * * read\nallow group:no-such-group * * read\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	before := StampOf(path)
	if p, err := Load(path); err != nil || len(p.Unknown) != 1 {
		t.Errorf("%+v, %v", p, err)
	}
	for _, c := range []struct {
		change func() error
		want   string
	}{
		{func() error { return os.Chmod(path, 0o664) }, "chmod go-w"},
		{func() error { return os.Chmod(path, 0o602) }, "chmod go-w"},
		{func() error { return os.Chown(path, 1000, 0) }, "belongs to user 1000"},
		{func() error { return os.WriteFile(path, []byte("nonsense"), 0o600) }, ":1: a line is"},
	} {
		if err := c.change(); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(path); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%v, want %q", err, c.want)
		}
		if StampOf(path) == before {
			t.Error("the change is not to be seen")
		}
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, 0, 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Load(filepath.Dir(path)); err == nil || !strings.Contains(err.Error(), "is not a file") {
		t.Errorf("a directory: %v", err)
	}
}

func TestCheckDir(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give directories away")
	}
	dir := t.TempDir()
	at := func(p string) string { return filepath.Join(dir, p) }
	mk := func(p string, mode os.FileMode) {
		t.Helper()
		if err := os.MkdirAll(at(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(at(p), mode); err != nil {
			t.Fatal(err)
		}
	}
	mk("good/store", 0o700)
	mk("open/store", 0o755)
	mk("open", 0o777)
	mk("group", 0o775)
	mk("tmp/store", 0o755)
	mk("tmp", 0o777|os.ModeSticky)
	mk("alice/store", 0o755)
	if err := os.Chown(at("alice"), 1000, 1000); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(at("good"), at("link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at("file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for p, want := range map[string]string{
		"good": "", "good/store": "", "good/new": "", "good/new/er": "", "tmp/store": "",
		"open": "written by others", "open/store": "written by others", "group/new": "written by others",
		"tmp": "written by anybody", "tmp/new": "anybody could make it", "alice": "user 1000", "alice/store": "user 1000", "alice/new": "user 1000",
		"link": "symbolic link", "link/store": "symbolic link", "file": "no directory", "file/x": "no directory",
	} {
		err := CheckDir(at(p))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", p, err, want)
		}
	}
}

// FuzzParse: whatever a policy says, root may do everything, who is not named nothing, and each
// line that is taken has its effect with a name and store that it is for.
func FuzzParse(f *testing.F) {
	f.Add(example, "file:///srv/a", "vm1")
	f.Add("allow user:alice rados://* *-* read", "rados://p/n?id=x", "a-b")
	f.Add("allow group:lsd file:///*/a%20b* x* write,read", "file:///../c/a%20bc", "x")
	f.Fuzz(func(t *testing.T, text, store, image string) {
		p, err := Parse("p", text, ids)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "p:") || strings.ContainsAny(err.Error(), "\n\r\x1b") {
				t.Errorf("error %q", err)
			}
			return
		}
		u, err := backend.ParseStore(store)
		if err != nil {
			return
		}
		if !p.In(Caller{}, u).Allow(image, All) {
			t.Error("root may not")
		}
		nobody := Caller{UID: 4294967295, Groups: []uint32{4294967295}}
		if p.Names(nobody) || p.In(nobody, u).Rights(image) != 0 {
			t.Error("who is not named may")
		}
		for _, r := range p.rules {
			c := Caller{UID: 4294967295, Groups: []uint32{r.who.id}}
			if !r.who.group {
				c = Caller{UID: r.who.id}
			}
			like := backend.URL{Scheme: backend.SchemeFile, Dir: "/a"}
			if !r.store.any {
				like = r.store.url // a '*' is one of the runs that it stands for
			}
			name := strings.ReplaceAll(r.grant.images, "*", "")
			if r.who.known && !p.In(c, like).Allow(name, r.grant.rights) {
				t.Errorf("%+v may not %v %s in %v", c, r.grant.rights, name, like)
			}
			if c.UID != 0 && r.store.url.Conf != u.Conf && r.store.match(u) {
				t.Errorf("%v is for another configuration: %v", r.store, u)
			}
		}
	})
}
