//go:build lab

package librbd_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// guestKernel has ext4 built in, and virtio_blk as a module.
const guestKernel = "6.12"

// guestTools are what the scripts use of busybox.
const guestTools = "cat cmp fstrim grep head insmod mkdir mount poweroff rm seq sh sleep switch_root sync umount yes"

// firstScript is the initial RAM disk's: what is on the disk must be whole before it is used. The
// kernel makes variables of what it is given as phase=... and stamps=...
const firstScript = `#!/bin/busybox sh
export PATH=/bin:/sbin
mount -t devtmpfs dev /dev
die() { echo "guest: failed: $*"; poweroff -f; }
echo "guest: started"
insmod /virtio_blk.ko || die no driver
for i in $(seq 100); do [ -b /dev/vda ] && break; sleep 0.1; done
if [ "$phase" = verify ]; then
	# The first mount replays the journal; then nothing may be left to repair.
	mount -t ext4 /dev/vda /root && umount /root || die mount
	e2fsck -fn /dev/vda || die "e2fsck: $?"
	echo "guest: checked"
fi
mount -t ext4 /dev/vda /root || die mount
exec switch_root /root /init
`

// diskScript is the first process on the lsd disk.
const diskScript = `#!/bin/sh
export PATH=/bin:/sbin:/usr/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
die() { echo "guest: failed: $*"; poweroff -f; }
grep -q '^/dev/vda / ext4 rw' /proc/mounts || die "the root is another: $(cat /proc/mounts)"
contents() { yes "stamp $1" | head -c 20000; }
if [ "$phase" = verify ]; then
	for i in $(seq "$stamps"); do
		contents "$i" | cmp - "/stamps/$i" || die "stamp $i"
	done
	echo "guest: found $stamps"
	poweroff -f
fi
echo "guest: booted"
fio --name=v --filename=/verified --size=8m --rw=randwrite --bsrange=4k-64k --direct=1 \
	--ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --eta=never --output=/fio.log || die "fio: $(cat /fio.log)"
rm /verified
fstrim / || die fstrim
size=$(cat /sys/block/vda/size)
echo "guest: verified $size"
while [ "$(cat /sys/block/vda/size)" = "$size" ]; do sleep 0.2; done
echo "guest: resized $(cat /sys/block/vda/size)"
fio --name=w --filename=/written --size=16m --rw=randwrite --bs=4k --fsync=32 --rate=1m --time_based=1 --runtime=1000 --eta=never --output=/dev/null &
mkdir /stamps
for i in $(seq 100000); do
	contents "$i" >"/stamps/$i" && sync "/stamps/$i" || die "stamp $i"
	echo "guest: stamp $i"
done
`

// TestGuest: a guest lives on an lsd disk: it boots from it, writes and reads back through the
// death of the daemon, sees the disk grow, moves to another QEMU, and after the loss of its power
// finds all that it had synced, on a file system without a fault.
func TestGuest(t *testing.T) {
	onStoresLong(t, func(t *testing.T, h *host) {
		g := h.guest("vm1")
		v := g.boot("first", "phase=write")
		v.hear("booted")
		h.stop(syscall.SIGKILL)
		h.start()
		v.hear("verified")
		v.do("block_resize", map[string]any{"node-name": "vm1", "size": 192 << 20})
		if got, want := v.hear("resized"), fmt.Sprint(192<<20/512); got != want {
			t.Errorf("the guest's disk has %s sectors, want %s", got, want)
		}
		v.hear("stamp 5")
		socket := filepath.Join(h.dir, "migrate")
		to := g.start("second", "", "-incoming", "unix:"+socket)
		v.migrate(to, socket)
		for range 10 {
			to.hear("stamp")
		}
		to.kill()
		h.stop(syscall.SIGKILL)
		h.start()
		last := to.last("stamp")
		v = g.boot("third", "phase=verify stamps="+last)
		v.hear("checked")
		v.hear("found " + last)
		v.wait()
		h.mustCheck("vm1")
	})
}

// A guest is what a Linux guest boots from: a kernel and a first RAM disk, and an image.
type guest struct {
	h              *host
	image          string
	kernel, initrd string // paths
}

// guest makes an image that a Linux guest boots from.
func (h *host) guest(image string) *guest {
	h.t.Helper()
	dir := filepath.Join(h.dir, "guest")
	g := &guest{h: h, image: image, initrd: filepath.Join(dir, "initrd.cpio")}
	kernel := strings.TrimSpace(h.shell("../../scripts", `. ./lib.sh; ./fetch-kernel `+guestKernel+` && echo "$lsd_cache/kernels/`+guestKernel+`"`))
	g.kernel = filepath.Join(kernel, "vmlinuz")
	h.place(filepath.Join(dir, "first", "init"), firstScript)
	h.copyPrograms(filepath.Join(dir, "first"), "busybox", "e2fsck")
	h.place(filepath.Join(dir, "root", "init"), diskScript)
	h.copyPrograms(filepath.Join(dir, "root"), "busybox", "fio")
	h.shell(dir, `mkdir -p root/{proc,sys,dev} first/{dev,root}
		cp `+kernel+`/modules/kernel/drivers/block/virtio_blk.ko first
		for name in `+guestTools+`; do ln -s busybox first/bin/$name; ln -s busybox root/bin/$name; done
		(cd first && find . | busybox cpio -o -H newc) >initrd.cpio
		mkfs.ext4 -q -d root disk 160M`)
	h.lsdctl("create", h.image(image), "--size", "160M")
	h.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", filepath.Join(dir, "disk"), h.spec(image))
	return g
}

// start starts a QEMU for the guest; parameters are for its kernel.
func (g *guest) start(name, parameters string, more ...string) *vm {
	g.h.t.Helper()
	args := machine("-smp", "2", "-kernel", g.kernel, "-initrd", g.initrd,
		// QEMU 7.2's cmpxchg16b goes wrong now and then: see scripts/vm.
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off clearcpuid=cx16 "+parameters)
	return g.h.qemu(name, append(append(args, g.h.disk(g.image)...), more...)...)
}

// boot is start, until the first process runs. A kernel that QEMU's emulation has led astray
// before that is given another try.
func (g *guest) boot(name, parameters string) *vm {
	g.h.t.Helper()
	for try := 1; ; try++ {
		v := g.start(fmt.Sprint(name, try), parameters)
		_, err := v.line("started")
		if err == nil {
			return v
		}
		g.h.t.Logf("boot %d: %v", try, err)
		if try == 3 {
			g.h.t.Fatal("the guest does not boot")
		}
		v.kill()
	}
}

// copyPrograms copies programs to bin below dir, and the libraries that they need to their places.
func (h *host) copyPrograms(dir string, programs ...string) {
	h.t.Helper()
	for _, name := range programs {
		path, err := exec.LookPath(name)
		if err != nil {
			h.t.Fatalf("%v: run scripts/setup lab", err)
		}
		h.shell(".", fmt.Sprintf(`mkdir -p %[1]s/bin
			cp %[2]s %[1]s/bin
			libs=$(ldd %[2]s | grep -o '/[^ ]*' || true)
			[ -z "$libs" ] || cp -L --parents $libs %[1]s`, dir, path))
	}
}

// place makes a program of a script.
func (h *host) place(path, script string) {
	h.t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		h.t.Fatal(err)
	}
}
