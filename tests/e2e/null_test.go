//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// TestNull: lsdctl add --null is a block device without an image. What it costs is compared by
// tests/bench/beside.
func TestNull(t *testing.T) {
	h := newHost(t, "null")
	null := h.device(h.must("add", "--null", "--size", "1G"))
	if im := h.list(); len(im) != 1 || !im[0].Null || im[0].Device != null || im[0].Size != 1<<30 {
		t.Errorf("lsdctl list: %+v", im)
	}
	if n := randomReads(t, null, 1); n <= 0 {
		t.Errorf("%v reads a second", n)
	}
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
