package main

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/engine"
)

func TestMeta(t *testing.T) {
	url := "file://" + t.TempDir() + "/store/vm1"
	must(t, "create", url, "--size", "1G")
	if out := must(t, "meta", "ls", url, "--json"); out != "[]\n" {
		t.Errorf("a new image: %q", out)
	}
	must(t, "meta", "set", url, "owner", "the database people")
	must(t, "meta", "set", url, "text", "two\nlines")
	if out := must(t, "meta", "get", url, "owner"); out != "the database people\n" {
		t.Errorf("get: %q", out)
	}
	out := must(t, "meta", "ls", url)
	if want := "KEY    VALUE\nowner  the database people\ntext   \"two\\nlines\"\n"; out != want {
		t.Errorf("ls: %q, want %q", out, want)
	}
	var list []engine.Metadatum
	if err := json.Unmarshal([]byte(must(t, "meta", "ls", url, "--json")), &list); err != nil || len(list) != 2 || list[1].Value != "two\nlines" {
		t.Errorf("%+v, %v", list, err)
	}
	must(t, "clone", url, url+"-clone")
	if out := must(t, "meta", "get", url+"-clone", "owner"); out != "the database people\n" {
		t.Errorf("of a clone: %q", out)
	}
	must(t, "copy", url, url+"-copy")
	if out := must(t, "meta", "get", url+"-copy", "owner"); out != "the database people\n" {
		t.Errorf("of a copy: %q", out)
	}
	must(t, "meta", "rm", url, "owner")
	if out := must(t, "meta", "ls", url); strings.Contains(out, "owner") {
		t.Errorf("removed: %q", out)
	}
	must(t, "meta", "rm", url, "--all")
	if out := must(t, "meta", "ls", url, "--json"); out != "[]\n" {
		t.Errorf("all removed: %q", out)
	}
	must(t, "check", url)
}

func TestLock(t *testing.T) {
	url := "file://" + t.TempDir() + "/store/vm1"
	must(t, "create", url, "--size", "1G")
	lock := func(client string) {
		t.Helper()
		err := onImage(t.Context(), url, func(ctx context.Context, st backend.Store, id uuid.UUID) error {
			return engine.Lock(ctx, st, id, engine.Locker{Client: client, Cookie: "c 1", Address: "alpha:0/7", Since: time.Unix(5, 0)}, false, "tag")
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	var l engine.Locks
	list := func() []engine.Locker {
		t.Helper()
		l = engine.Locks{}
		if err := json.Unmarshal([]byte(must(t, "lock", "ls", url, "--json")), &l); err != nil || l.Lockers == nil {
			t.Fatalf("%+v, %v", l, err)
		}
		return l.Lockers
	}
	if len(list()) != 0 {
		t.Errorf("a new image: %+v", l)
	}
	for _, client := range []string{"client.1", "client.2", "client.3"} {
		lock(client)
	}
	if out := must(t, "lock", "ls", url); !strings.Contains(out, "client.2") || !strings.Contains(out, "alpha:0/7") || !strings.Contains(out, "shared, tag") {
		t.Errorf("ls: %s", out)
	}
	must(t, "lock", "break", url, "client.2", "c 1")
	if got := list(); len(got) != 2 || got[1].Client != "client.3" {
		t.Errorf("after one was broken: %+v", got)
	}
	must(t, "lock", "break", url, "--all")
	if len(list()) != 0 {
		t.Errorf("after all were broken: %+v", l)
	}
}
