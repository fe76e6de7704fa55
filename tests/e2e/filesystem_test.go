//go:build e2e

package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// writeFiles writes files of many sizes, some of them twice, and returns their
// checksums by name.
func writeFiles(t testing.TB, dir string, seed uint64, total int) map[string][32]byte {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 1))
	source := rand.NewChaCha8(sha256.Sum256(fmt.Append(nil, seed)))
	sums := map[string][32]byte{}
	for n := 0; total > 0; n++ {
		size := 1 + rng.IntN(1<<(8+rng.IntN(14))) // to 2 MiB; most are small
		b := make([]byte, size)
		_, _ = source.Read(b)
		name := fmt.Sprintf("%d/%d", rng.IntN(20), n)
		if rng.IntN(10) == 0 && n > 0 { // an older one again, of another size
			for name = range sums {
				break
			}
		}
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		sums[name] = sha256.Sum256(b)
		total -= size
	}
	return sums
}

// checkFiles reads all files back, past the page cache if the caller has
// unmounted in between.
func checkFiles(t testing.TB, dir string, sums map[string][32]byte) {
	t.Helper()
	seen := 0
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() {
			if e.Name() == "lost+found" {
				return fs.SkipDir
			}
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if want, ok := sums[name]; !ok || sha256.Sum256(b) != want {
			t.Errorf("%s: %d bytes, not what was written (known: %v)", name, len(b), ok)
		}
		seen++
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if seen != len(sums) {
		t.Errorf("%d files, %d were written", seen, len(sums))
	}
}

// fsck checks a file system, which must be clean as it is.
func fsck(t testing.TB, kind, dev string) {
	t.Helper()
	if kind == "ext4" {
		run(t, "fsck.ext4", "-f", "-n", dev)
	} else {
		run(t, "xfs_repair", "-n", dev)
	}
}

func TestFileSystems(t *testing.T) {
	h := newHost(t, "fs")
	store := storeURL(t)
	for _, c := range []struct {
		kind, size string
		mkfs       []string
		create     []string
	}{
		{"ext4", "2G", []string{"mkfs.ext4", "-q"}, nil},
		{"xfs", "1G", []string{"mkfs.xfs", "-q"}, []string{"--block-size", "512"}},
	} {
		t.Run(c.kind, func(t *testing.T) {
			clearKernelLog(t)
			url := store + "/" + c.kind
			h.create(url, c.size, c.create...)
			dev := h.add(url)
			dir := filepath.Join(runDir, "mnt-"+c.kind)
			run(t, c.mkfs[0], append(c.mkfs[1:], dev)...)
			unmount := mounted(t, dev, dir)
			sums := writeFiles(t, dir, 1, pick(8, 96)<<20)
			unmount()
			fsck(t, c.kind, dev)
			unmount = mounted(t, dev, dir)
			checkFiles(t, dir, sums)
			unmount()
			h.del(dev)
			// All of it is in the store now, and in nothing else.
			dev = h.add(url)
			fsck(t, c.kind, dev)
			unmount = mounted(t, dev, dir, "-o", "ro")
			checkFiles(t, dir, sums)
			unmount()
			h.del(dev)
			if e := kernelErrors(t, "ublkb"); len(e) > 0 {
				t.Errorf("the kernel reports: %q", e)
			}
		})
	}
	h.must("rm", store+"/ext4")
	if out := h.must("ls", store, "--json"); bytes.Contains([]byte(out), []byte(`"ext4"`)) {
		t.Errorf("a removed image is still listed: %s", out)
	}
}
