//go:build e2e

package e2e

import (
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// qemuIO runs qemu-io's commands on a device; a pattern that is not there makes
// it fail.
func qemuIO(t testing.TB, dev string, commands ...string) {
	t.Helper()
	args := []string{"-f", "raw", "-t", "none"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	r := execute(2*time.Minute, nil, "qemu-io", append(args, dev)...)
	// Its status tells of most failures, its output of all.
	if r.failed != nil || strings.Contains(r.stdout+r.stderr, "failed") || strings.Contains(r.stdout+r.stderr, "error") {
		t.Fatalf("%v\n%s%s", r.err(), r.stdout, r.stderr)
	}
}

// TestBlocks: discard, write-zeroes and QEMU's tools.
func TestBlocks(t *testing.T) {
	clearKernelLog(t)
	h := newHost(t, "blocks")
	url := storeURL(t) + "/disk"
	h.create(url, "1G")
	dev := h.add(url)

	// A discard in the middle, and its neighbours to the byte.
	qemuIO(t, dev, "write -P 0xa5 8M 16M", "flush")
	run(t, "blkdiscard", "-o", "10485760", "-l", "4198400", dev) // 10 MiB, 4 MiB + 4 KiB
	discarded := []string{"read -P 0xa5 8M 2M", "read -P 0 10M 4100k", "read -P 0xa5 14340k 9948k", "read -P 0 24M 1M"}
	qemuIO(t, dev, discarded...)
	run(t, "blkdiscard", "-z", "-o", "16777216", "-l", "1048576", dev)
	zeroed := []string{"read -P 0xa5 15M 1M", "read -P 0 16M 1M", "read -P 0xa5 17M 7M"}
	qemuIO(t, dev, zeroed...)

	// qemu-io's own zeroes, and data over them, unaligned to anything but blocks.
	qemuIO(t, dev, "write -P 1 64M 1M", "write -z 65532k 8k", "write -z -u 64500k 64k", "write -P 2 64512k 4k", "aio_write -P 3 65028k 12k", "aio_flush",
		"discard 65100k 36k", "flush")
	patterns := []string{"read -P 0 65532k 4k", "read -P 0 64M 0", "read -P 0 65536k 4k", "read -P 1 65540k 508k", "read -P 1 66048k 512k", "read -P 3 65028k 12k",
		"read -P 0 64500k 12k", "read -P 2 64512k 4k", "read -P 0 64516k 48k", "read -P 0 65100k 36k"}
	qemuIO(t, dev, patterns...)
	if im := h.status(dev); im.Stats.Discards == 0 {
		t.Error("no discard came to the image")
	}

	// An image with holes and data through qemu-img.
	src := filepath.Join(ssdDir, "convert.raw")
	writeSparse(t, src, 96<<20, pick(12, 48))
	run(t, "qemu-img", "convert", "-n", "-t", "none", "-T", "none", "-f", "raw", "-O", "raw", src, dev+"")
	compare := func() {
		t.Helper()
		// The device is larger: what is beyond the image is not its business.
		if got, want := sumOf(t, dev, 96<<20), sumOf(t, src, 96<<20); got != want {
			t.Error("the device does not hold what qemu-img has converted")
		}
	}
	compare()
	if out := run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", "-T", "none", src, dev); !strings.Contains(out, "identical") {
		t.Errorf("qemu-img compare: %s", out)
	}
	h.del(dev)
	dev = h.add(url)
	compare()
	h.del(dev)
	if e := kernelErrors(t, "ublkb"); len(e) > 0 {
		t.Errorf("the kernel reports: %q", e)
	}
}

// writeSparse makes a file of that size with so many runs of data in it.
func writeSparse(t testing.TB, path string, size int64, runs int) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(7, 7))
	source := rand.NewChaCha8(sha256.Sum256([]byte("sparse")))
	for range runs {
		b := make([]byte, 4096*(1+rng.IntN(200)))
		_, _ = source.Read(b)
		if _, err := f.WriteAt(b, 4096*rng.Int64N((size-int64(len(b)))/4096)); err != nil {
			t.Fatal(err)
		}
	}
}

// sumOf returns the checksum of the first n bytes of a file or device.
func sumOf(t testing.TB, path string, n int64) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.CopyN(h, f, n); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}
