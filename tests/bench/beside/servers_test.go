package main

import (
	"os"
	"testing"
	"time"
)

func TestPercentile(t *testing.T) {
	many := make([]time.Duration, 200)
	for i := range many {
		many[i] = time.Duration(200 - i)
	}
	for _, c := range []struct {
		all  []time.Duration
		part float64
		want time.Duration
	}{
		{nil, 0.99, 0},
		{[]time.Duration{7}, 0.99, 7},
		{[]time.Duration{3, 1, 2}, 0.5, 2},
		{many, 0.99, 199},
		{many, 1, 200},
		{many, 0, 1},
	} {
		if got := percentile(c.all, c.part); got != c.want {
			t.Errorf("%v of %d: %d, want %d", c.part, len(c.all), got, c.want)
		}
	}
}

// TestServers: there are as many files afterwards as before, and the figures are those of what was
// done.
func TestServers(t *testing.T) {
	const files = 64
	mail, share := t.TempDir(), t.TempDir()
	if err := fillMail(mail, files); err != nil {
		t.Fatal(err)
	}
	if err := fillShare(share, files); err != nil {
		t.Fatal(err)
	}
	f, err := mailServer(t.Context(), mail, files, 20*time.Millisecond)
	if err != nil || f["ops/s"] <= 0 || f["p99 ms"] <= 0 {
		t.Errorf("mail server: %v, %v", f, err)
	}
	f, err = fileServer(t.Context(), share, files, 4*shareClients)
	if err != nil || f["ops/s"] <= 0 {
		t.Errorf("file server: %v, %v", f, err)
	}
	for _, dir := range []string{mail, share} {
		list, err := os.ReadDir(dir)
		if err != nil || len(list) != files {
			t.Errorf("%d files, %v", len(list), err)
		}
	}
	if err := os.Remove(fileName(share, 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := fileServer(t.Context(), share, shareClients, 4*shareClients); err == nil {
		t.Error("a file is missing, and nobody says so")
	}
}
