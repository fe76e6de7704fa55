//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestNull: lsdctl add --null is a block device without an image. With
// --bench-null it is measured beside the kernel's own, taking turns in one boot:
// what the block layer, ublk and our loop cost, and no storage.
func TestNull(t *testing.T) {
	h := newHost(t, "null")
	null := h.device(h.must("add", "--null", "--size", "1G"))
	if im := h.list(); len(im) != 1 || !im[0].Null || im[0].Device != null || im[0].Size != 1<<30 {
		t.Errorf("lsdctl list: %+v", im)
	}
	if !*benchNull {
		if n := randomReads(t, null, 1); n <= 0 {
			t.Errorf("%v reads a second", n)
		}
		h.del(null)
		return
	}
	if im := h.list(); len(im) == 1 && im[0].Queues != 1 {
		t.Logf("the device has %d queues", im[0].Queues)
	}
	names := []string{"lsd --null", "null_blk", "loop"}
	devs := []string{null, nullBlk(t), loop(t)}
	rates := make([][]float64, len(devs))
	for range pick(5, 9) {
		for i, d := range devs {
			rates[i] = append(rates[i], randomReads(t, d, pick(4, 10)))
		}
	}
	medians := make([]float64, len(devs))
	for i, r := range rates {
		slices.Sort(r)
		medians[i] = r[len(r)/2]
		fmt.Printf("figure: %-10s %6.0f IOPS (median of %d, %.0f to %.0f)\n", names[i], medians[i], len(r), r[0], r[len(r)-1])
	}
	fmt.Printf("figure: lsd --null / null_blk %.2f, lsd --null / loop %.2f (libaio, 4 KiB random reads, depth 32)\n", medians[0]/medians[1], medians[0]/medians[2])
	h.del(null)
}

// randomReads returns how many 4 KiB random reads a second a device does.
func randomReads(t testing.TB, dev string, seconds int) float64 {
	t.Helper()
	// A name in /dev that is no device would be measured as a file in memory.
	if fi, err := os.Stat(dev); err != nil || fi.Mode()&os.ModeDevice == 0 || fi.Mode()&os.ModeCharDevice != 0 {
		t.Fatalf("%s is no block device (%v)", dev, err)
	}
	r := execute(time.Duration(seconds+60)*time.Second, nil, "fio", "--name=x", "--filename="+dev, "--direct=1", "--ioengine=libaio", "--allow_file_create=0",
		"--rw=randread", "--bs=4k", "--iodepth=32", "--size=1G", "--time_based", fmt.Sprintf("--runtime=%d", seconds), "--output-format=json")
	if r.err() != nil {
		t.Fatal(r.err())
	}
	var out struct {
		Jobs []struct {
			Read struct{ IOPS float64 }
		}
	}
	// It may say something else before.
	if err := json.Unmarshal([]byte(r.stdout[strings.Index(r.stdout, "{"):]), &out); err != nil || len(out.Jobs) != 1 {
		t.Fatalf("fio: %v in %s", err, r.stdout)
	}
	return out.Jobs[0].Read.IOPS
}

// nullBlk makes a null_blk device.
func nullBlk(t testing.TB) string {
	t.Helper()
	run(t, "modprobe", "null_blk", "nr_devices=0")
	dir := "/sys/kernel/config/nullb/nullb0"
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = os.WriteFile(dir+"/power", []byte("0"), 0)
		os.Remove(dir)
	})
	for _, s := range []string{"size=1024", "blocksize=512", "irqmode=0", "queue_mode=2", "submit_queues=1", "hw_queue_depth=128", "power=1"} {
		k, v, _ := strings.Cut(s, "=")
		if err := os.WriteFile(filepath.Join(dir, k), []byte(v), 0); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, 10*time.Second, "/dev/nullb0", func() bool {
		_, err := os.Stat("/dev/nullb0")
		return err == nil
	})
	return "/dev/nullb0"
}

// loop makes a loop device on a file in memory, so that no disk is measured.
func loop(t testing.TB) string {
	t.Helper()
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		run(t, "modprobe", "loop")
	}
	file := filepath.Join(runDir, "loop")
	run(t, "truncate", "-s", "1G", file)
	dev := strings.TrimSpace(run(t, "losetup", "--find", "--show", file))
	t.Cleanup(func() {
		_ = execute(20*time.Second, nil, "losetup", "-d", dev)
		os.Remove(file)
	})
	return dev
}
