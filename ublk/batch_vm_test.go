//go:build ublk

package ublk

import (
	"errors"
	"os/exec"
	"testing"
)

// TestVMBatch: devices use batches where the kernel has them, and are not told to do
// without.
func TestVMBatch(t *testing.T) {
	c := openControl(t)
	has := c.features.Has(FeatureBatchIO)
	for _, k := range []struct {
		name  string
		forgo Features
		depth int
		want  bool
	}{
		{"here", 0, 32, has},
		{"forgone", FeatureBatchIO, 32, false},
		{"of one", 0, 1, false},
	} {
		t.Run(k.name, func(t *testing.T) {
			c := openControl(t)
			c.Forgo(k.forgo)
			m := &ram{data: make([]byte, 16<<20)}
			d := start(t, c, Params{SizeBytes: uint64(len(m.data)), Depth: k.depth, Queues: 2}, m)
			info, err := c.Info(testContext(t), d.ID())
			if err != nil {
				t.Fatal(err)
			}
			if got := info.Flags.Has(FeatureBatchIO); got != k.want {
				t.Errorf("the device's flags are %v", info.Flags)
			}
			if _, got := d.carriers[0].(*batchQueue); got != k.want {
				t.Errorf("its carriers are of type %T", d.carriers[0])
			}
			fio(t, d.Path(), "--ioengine=libaio", "--iodepth=32", "--numjobs=2", "--rw=randrw", "--bssplit=4k/80:64k/20", "--size=8m", "--offset_increment=8m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0")
		})
	}
}

// TestVMWithoutBatch runs once more what depends most on how requests and results pass the
// border, the way of kernels that have no batches. The rest is run on such kernels.
func TestVMWithoutBatch(t *testing.T) {
	if !openControl(t).features.Has(FeatureBatchIO) {
		t.Skip("this kernel has no other way")
	}
	t.Setenv(withoutEnv, FeatureBatchIO.String())
	for _, k := range []struct {
		name string
		test func(*testing.T)
	}{
		{"InTime", TestVMInTime},
		{"StopUnderLoad", TestVMStopUnderLoad},
		{"ReactorPanic", TestVMReactorPanic},
		{"KillServer", TestVMKillServer},
		{"KillInRecovery", TestVMKillInRecovery},
		{"Allocs", TestVMAllocs},
	} {
		t.Run(k.name, k.test)
	}
}

// TestVMBatchRecovered: a device keeps the way it was made for, whatever the server that
// takes it over would choose.
func TestVMBatchRecovered(t *testing.T) {
	const size = 8 << 20
	c := openControl(t)
	if !c.features.Has(FeatureBatchIO) {
		t.Skip("this kernel has no batches")
	}
	for _, k := range []struct {
		name          string
		before, after string
		want          bool
	}{
		{"from a server without", "BATCH_IO", "", false},
		{"by a server without", "", "BATCH_IO", true},
	} {
		t.Run(k.name, func(t *testing.T) {
			t.Setenv(withoutEnv, k.before)
			v := newVictim(t, c, size)
			t.Setenv(withoutEnv, k.after)
			v.kill()
			v.Wait()
			v.replace(t, "")
			info, err := c.Info(testContext(t), v.id)
			if err != nil || info.State != StateLive || info.Flags.Has(FeatureBatchIO) != k.want {
				t.Errorf("%+v, %v", info, err)
			}
			if out, err := exec.Command("dd", "if="+blockPath(v.id), "of=/dev/null", "bs=1M", "iflag=direct").CombinedOutput(); err != nil {
				t.Errorf("read the device: %v\n%s", err, out)
			}
		})
	}
}

// TestVMBatchBuffers serves a device with a single buffer for what the kernel tells, so
// that it finds none again and again.
func TestVMBatchBuffers(t *testing.T) {
	c, ctx := openControl(t), testContext(t)
	if !c.features.Has(FeatureBatchIO) {
		t.Skip("this kernel has no batches")
	}
	m := &ram{data: make([]byte, 64<<20)}
	d, err := c.Add(ctx, Params{ID: -1, SizeBytes: uint64(len(m.data)), Queues: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Delete(testContext(t), true); err != nil && !errors.Is(err, ErrNoDevice) {
			t.Errorf("delete: %v", err)
		}
	})
	for _, q := range d.carriers {
		q.(*batchQueue).buffers = 1
	}
	r := newReactor(t, 0)
	if err := d.Start(ctx, r, m); err != nil {
		t.Fatal(err)
	}
	fio(t, d.Path(), "--ioengine=libaio", "--iodepth=64", "--numjobs=4", "--rw=randrw", "--bssplit=4k/80:64k/20", "--size=16m", "--offset_increment=16m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0")
	var refetched int
	if err := r.Call(func() {
		for _, q := range d.carriers {
			refetched += q.(*batchQueue).refetched
		}
	}); err != nil {
		t.Fatal(err)
	}
	t.Logf("the kernel found no buffer %d times", refetched)
	if refetched == 0 {
		t.Error("this tests nothing")
	}
}
