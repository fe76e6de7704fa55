//go:build e2e

package e2e

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// TestRestart ends the daemon in an orderly way under a mounted, busy file
// system, some seconds before the next one starts: as an upgrade does.
func TestRestart(t *testing.T) {
	clearKernelLog(t)
	h := newHost(t, "restart")
	url := storeURL(t) + "/disk"
	h.create(url, "1G")
	dev := h.add(url)
	run(t, "mkfs.ext4", "-q", dev)
	dir := filepath.Join(runDir, "mnt-restart")
	// Without remount-ro an error would be seen in the log only.
	unmount := mounted(t, dev, dir, "-o", "errors=remount-ro")
	stopWatch := watchNode(t, dev)
	defer stopWatch()

	var files atomic.Int64
	stop := make(chan struct{})
	type outcome struct {
		sums map[string][32]byte
		err  error
	}
	ended := make(chan outcome, 1)
	go func() {
		o := outcome{sums: map[string][32]byte{}}
		for n := 0; o.err == nil; n++ {
			select {
			case <-stop:
				ended <- o
				return
			default:
			}
			b := make([]byte, 1000+n*37%100000)
			for i := range b {
				b[i] = byte(i * (n + 1) >> 3)
			}
			name := fmt.Sprint(n % 500)
			o.err = writeSync(filepath.Join(dir, name), b)
			o.sums[name] = sha256.Sum256(b)
			files.Add(1)
		}
		ended <- o
	}()
	more := func(n int64) {
		t.Helper()
		goal := files.Load() + n
		eventually(t, time.Minute, "more files", func() bool {
			select {
			case o := <-ended:
				t.Fatalf("a write failed: %v\n%s", o.err, h.logTail())
			default:
			}
			return files.Load() >= goal
		})
	}
	for range pick(2, 6) {
		more(10)
		h.terminate()
		before := files.Load()
		time.Sleep(time.Second)
		if n := files.Load() - before; n > 1 {
			t.Errorf("%d files were flushed to the disk while no daemon ran", n)
		}
		began := time.Now()
		h.start()
		more(10)
		t.Logf("ten files %v after the new daemon's start", time.Since(began).Round(time.Millisecond))
	}
	close(stop)
	o := <-ended
	if o.err != nil {
		t.Fatal(o.err)
	}
	stopWatch()
	unmount()
	fsck(t, "ext4", dev)
	unmount = mounted(t, dev, dir, "-o", "ro")
	checkFiles(t, dir, o.sums)
	unmount()
	if e := kernelErrors(t, dev); len(e) > 0 {
		t.Errorf("the kernel reports: %q", e)
	}
	h.del(dev)
}

func writeSync(path string, b []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	return f.Sync()
}
