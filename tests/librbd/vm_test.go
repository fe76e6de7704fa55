//go:build lab

package librbd_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A vm is a QEMU that runs on the library. A goroutine of its own reads its console.
type vm struct {
	h     *host
	cmd   *exec.Cmd
	ended chan error    // of Wait, which stays in it
	said  *bytes.Buffer // what QEMU itself says; to be read when it has ended
	lines chan string   // of the serial console; closed when QEMU has ended
	shown []string      // lines that have been taken
	*qmp
}

// machine returns the arguments of a QEMU that has nothing but memory and a processor.
func machine(args ...string) []string {
	return append([]string{"qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-M", "pc", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "256M"}, args...)
}

// disk returns the arguments for an image as a virtio disk whose node is called by its name, and
// which others than the guest may write to as well.
func (h *host) disk(image string) []string {
	return []string{"-blockdev", h.blockdev(image), "-device", "virtio-blk-pci,share-rw=on,drive=" + image}
}

// blockdev returns what QEMU is told of an image's node.
func (h *host) blockdev(image string) string {
	b, err := json.Marshal(h.node(image))
	if err != nil {
		h.t.Fatal(err)
	}
	return string(b)
}

func (h *host) node(image string) map[string]any {
	return map[string]any{"driver": "raw", "node-name": image, "discard": "unmap", "file": h.protocol(image)}
}

func (h *host) protocol(image string) map[string]any {
	p := map[string]any{"driver": "rbd", "pool": h.pool, "image": image}
	if h.pool != "any" {
		p["conf"] = os.Getenv("CEPH_CONF")
	}
	return p
}

// qemu starts QEMU with a console and a monitor.
func (h *host) qemu(name string, args ...string) *vm {
	h.t.Helper()
	monitor := filepath.Join(h.dir, name+".qmp")
	args = append(args, "-serial", "stdio", "-qmp", "unix:"+monitor+",server=on,wait=off")
	v := &vm{h: h, said: new(bytes.Buffer), ended: make(chan error, 1), lines: make(chan string, 4096)}
	v.cmd = h.command(h.t.Context(), args...)
	v.cmd.Stderr = v.said
	out, err := v.cmd.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := v.cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			v.lines <- strings.TrimSpace(s.Text())
		}
		close(v.lines)
		v.ended <- v.cmd.Wait()
	}()
	h.t.Cleanup(v.kill)
	v.qmp = dialQMP(h.t, monitor, v.gone)
	return v
}

// gone tells why QEMU has ended, or nil.
func (v *vm) gone() error {
	select {
	case err := <-v.ended:
		v.ended <- err
		return fmt.Errorf("QEMU has ended: %v: %s", err, v.said)
	default:
		return nil
	}
}

// kill ends QEMU as a loss of power would.
func (v *vm) kill() {
	_ = v.cmd.Process.Signal(syscall.SIGKILL)
	for line := range v.lines {
		v.shown = append(v.shown, line)
	}
	v.ended <- <-v.ended
}

// line waits until the guest says something on its console, and returns what follows that.
func (v *vm) line(says string) (string, error) {
	end := time.After(2 * time.Minute)
	for {
		select {
		case line, ok := <-v.lines:
			if !ok {
				return "", fmt.Errorf("the guest has ended before it said %q: %s", says, v.said)
			}
			v.shown = append(v.shown, line)
			// A message of the kernel's may stand before it.
			if _, rest, ok := strings.Cut(line, "guest: "+says); ok {
				return strings.TrimSpace(rest), nil
			}
			if strings.Contains(line, "guest: failed") {
				return "", errors.New(line)
			}
		case <-end:
			return "", fmt.Errorf("the guest does not say %q", says)
		}
	}
}

// hear is line of what must come.
func (v *vm) hear(says string) string {
	v.h.t.Helper()
	rest, err := v.line(says)
	if err != nil {
		v.h.t.Fatalf("%v; its console:\n%s", err, strings.Join(v.shown, "\n"))
	}
	return rest
}

// last returns what followed what the guest said, the last time that it did.
func (v *vm) last(says string) string {
	v.h.t.Helper()
	for _, line := range slices.Backward(v.shown) {
		if _, rest, ok := strings.Cut(line, "guest: "+says+" "); ok {
			return rest
		}
	}
	v.h.t.Fatalf("the guest has not said %q", says)
	return ""
}

// quit ends QEMU as one who has the monitor does.
func (v *vm) quit() {
	v.h.t.Helper()
	v.do("quit", nil)
	v.wait()
}

// wait waits until QEMU has ended, well.
func (v *vm) wait() {
	v.h.t.Helper()
	select {
	case err := <-v.ended:
		v.ended <- err
		if err != nil {
			v.h.t.Fatalf("QEMU: %v: %s", err, v.said)
		}
	case <-time.After(time.Minute):
		v.h.t.Fatal("QEMU does not end")
	}
}

// A qmp is a connection to a QEMU's monitor, for one goroutine.
type qmp struct {
	t      testing.TB
	conn   net.Conn
	dec    *json.Decoder
	events []event // that have come, and nobody has waited for
}

type event struct {
	Event string          `json:"event"`
	Data  json.RawMessage `json:"data"`
}

// dialQMP waits until a monitor answers; gone tells why it never will.
func dialQMP(t testing.TB, path string, gone func() error) *qmp {
	t.Helper()
	q := &qmp{t: t}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		var err error
		if q.conn, err = net.Dial("unix", path); err == nil {
			break
		}
		if why := gone(); why != nil {
			t.Fatal(why)
		}
		if time.Now().After(end) {
			t.Fatalf("no monitor: %v", err)
		}
	}
	t.Cleanup(func() { q.conn.Close() })
	q.dec = json.NewDecoder(q.conn)
	var greeting struct{ QMP json.RawMessage }
	if err := q.dec.Decode(&greeting); err != nil || greeting.QMP == nil {
		t.Fatalf("the monitor does not greet: %v", err)
	}
	q.do("qmp_capabilities", nil)
	return q
}

// try gives a command and returns its result, or the error that QEMU answers.
func (q *qmp) try(command string, arguments map[string]any) (json.RawMessage, error) {
	q.t.Helper()
	ask := map[string]any{"execute": command}
	if arguments != nil {
		ask["arguments"] = arguments
	}
	_ = q.conn.SetDeadline(time.Now().Add(time.Minute))
	if err := json.NewEncoder(q.conn).Encode(ask); err != nil {
		q.t.Fatalf("%s: %v", command, err)
	}
	for {
		var answer struct {
			event
			Return json.RawMessage `json:"return"`
			Error  *struct{ Desc string }
		}
		if err := q.dec.Decode(&answer); err != nil {
			q.t.Fatalf("%s: %v", command, err)
		}
		switch {
		case answer.Event != "":
			q.events = append(q.events, answer.event)
		case answer.Error != nil:
			return nil, fmt.Errorf("%s: %s", command, answer.Error.Desc)
		default:
			return answer.Return, nil
		}
	}
}

// do is try of what must not fail.
func (q *qmp) do(command string, arguments map[string]any) json.RawMessage {
	q.t.Helper()
	result, err := q.try(command, arguments)
	if err != nil {
		q.t.Fatal(err)
	}
	return result
}

// await waits for an event, and returns its data.
func (q *qmp) await(name string) json.RawMessage {
	q.t.Helper()
	for {
		for i, e := range q.events {
			if e.Event == name {
				q.events = append(q.events[:i:i], q.events[i+1:]...)
				return e.Data
			}
		}
		var e event
		_ = q.conn.SetDeadline(time.Now().Add(time.Minute))
		if err := q.dec.Decode(&e); err != nil {
			q.t.Fatalf("waiting for %s: %v; there were %v", name, err, q.events)
		}
		q.events = append(q.events, e)
	}
}

// export makes a node of QEMU's an NBD server's, at a socket in dir, and returns its name for
// qemu-io.
func (q *qmp) export(node, dir string) string {
	q.t.Helper()
	socket := filepath.Join(dir, node+".nbd")
	q.do("nbd-server-start", map[string]any{"addr": map[string]any{"type": "unix", "data": map[string]any{"path": socket}}})
	q.do("block-export-add", map[string]any{"type": "nbd", "id": "export", "node-name": node, "name": "", "writable": true})
	return "nbd:unix:" + socket
}

// size returns how many bytes a node has.
func (q *qmp) size(node string) uint64 {
	q.t.Helper()
	var nodes []struct {
		Name  string `json:"node-name"`
		Image struct {
			Size uint64 `json:"virtual-size"`
		} `json:"image"`
	}
	if err := json.Unmarshal(q.do("query-named-block-nodes", nil), &nodes); err != nil {
		q.t.Fatal(err)
	}
	for _, n := range nodes {
		if n.Name == node {
			return n.Image.Size
		}
	}
	q.t.Fatalf("no node %s", node)
	return 0
}

// migrate moves what v runs to another QEMU, which waits for it at a socket, and ends v.
func (v *vm) migrate(to *vm, socket string) {
	v.h.t.Helper()
	v.do("migrate", map[string]any{"uri": "unix:" + socket})
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		var m struct {
			Status string `json:"status"`
			Desc   string `json:"error-desc"`
		}
		if err := json.Unmarshal(v.do("query-migrate", nil), &m); err != nil {
			v.h.t.Fatal(err)
		}
		if m.Status == "completed" {
			break
		}
		if m.Status == "failed" || time.Now().After(end) {
			v.h.t.Fatalf("migration: %+v; %v", m, to.gone())
		}
	}
	v.quit()
}
