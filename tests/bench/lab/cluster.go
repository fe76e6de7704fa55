package lab

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Cluster is a throw-away Ceph cluster: one monitor, one OSD, its store BlueStore on a file in
// the host's directory. Its pool is "rbd".
type Cluster struct {
	Dir    string
	osd    int    // process; 0 in the virtual machine, whose cluster is outside
	script string // path of scripts/ceph
}

// Command returns the shell command that has the cluster do something: pause, or resume. From
// inside the virtual machine it is the way to it that does: the forwarders of scripts/vm-init.
func (c *Cluster) Command(do string) string {
	if c.osd != 0 {
		return c.script + " " + do + " --dir " + c.Dir
	}
	if do == "pause" {
		return "pkill -x -STOP socat"
	}
	return "pkill -x -CONT socat"
}

// Conf returns the path of its configuration, for CEPH_CONF.
func (c *Cluster) Conf() string { return filepath.Join(c.Dir, "ceph.conf") }

// LetCluster has the host's cluster do something: pause, or resume.
func (h *Host) LetCluster(ctx context.Context, do string) error {
	_, err := h.Shell(ctx, h.cluster.Command(do))
	return err
}

// Cluster returns the host's cluster, which is started when it is first asked for. CEPH_CONF
// names it from then on. In the virtual machine it is the one that was started outside.
func (h *Host) Cluster(ctx context.Context) (*Cluster, error) {
	if h.cluster != nil {
		return h.cluster, nil
	}
	if h.VM {
		conf := os.Getenv("CEPH_CONF")
		if conf == "" {
			return nil, errors.New("the virtual machine was started without a cluster")
		}
		h.cluster = &Cluster{Dir: filepath.Dir(conf), script: filepath.Join(h.Root, "scripts/ceph")}
		return h.cluster, nil
	}
	c := &Cluster{Dir: filepath.Join(h.Dir, "ceph"), script: filepath.Join(h.Root, "scripts/ceph")}
	h.Defer(func() { _, _ = h.Run(context.WithoutCancel(ctx), c.script, "down", "--dir", c.Dir) })
	// Ports that no test's cluster takes; those of another run may be in use.
	var err error
	for shift := 0; shift < 400; shift += 100 {
		port := func(n int) string { return strconv.Itoa(n + shift) }
		if _, err = h.Run(ctx, c.script, "up", "--dir", c.Dir, "--size", "40G", "--mon-port", port(17790), "--mon-port2", port(14301), "--osd-ports", port(17850)); err == nil {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(c.Dir, "osd.pid"))
	if err != nil {
		return nil, err
	}
	if c.osd, err = strconv.Atoi(strings.TrimSpace(string(text))); err != nil {
		return nil, fmt.Errorf("the OSD's process: %w", err)
	}
	h.cluster = c
	return c, os.Setenv("CEPH_CONF", c.Conf())
}

// OSD is what an OSD has done since it was started.
type OSD struct {
	CPU        time.Duration
	Writes     float64 // operations
	Reads      float64
	WriteBytes float64 // that clients have sent
	ReadBytes  float64 // that they were sent
	Metadata   float64 // bytes that its database has written, its journal included
}

// Sub returns what was done since before.
func (o OSD) Sub(before OSD) OSD {
	return OSD{o.CPU - before.CPU, o.Writes - before.Writes, o.Reads - before.Reads,
		o.WriteBytes - before.WriteBytes, o.ReadBytes - before.ReadBytes, o.Metadata - before.Metadata}
}

// OSD asks the OSD what it has done, which takes it next to nothing.
func (c *Cluster) OSD() (o OSD, err error) {
	if c.osd == 0 {
		return o, errors.New("the OSD is not on this machine")
	}
	if o.CPU, err = CPU(c.osd); err != nil {
		return o, err
	}
	text, err := c.ask("perf dump")
	if err != nil {
		return o, fmt.Errorf("asking the OSD: %w", err)
	}
	var said struct {
		OSD struct {
			Writes     float64 `json:"op_w"`
			Reads      float64 `json:"op_r"`
			ReadWrites float64 `json:"op_rw"`
			In         float64 `json:"op_in_bytes"`
			Out        float64 `json:"op_out_bytes"`
		} `json:"osd"`
		BlueFS struct {
			WAL float64 `json:"bytes_written_wal"`
			SST float64 `json:"bytes_written_sst"`
		} `json:"bluefs"`
	}
	if err := json.Unmarshal(text, &said); err != nil {
		return o, fmt.Errorf("asking the OSD: %w", err)
	}
	o.Writes, o.Reads = said.OSD.Writes+said.OSD.ReadWrites, said.OSD.Reads
	o.WriteBytes, o.ReadBytes = said.OSD.In, said.OSD.Out
	o.Metadata = said.BlueFS.WAL + said.BlueFS.SST
	return o, nil
}

// ask sends a command to the OSD's admin socket and returns the answer: the command as JSON and
// a zero byte, then the answer's length, four bytes, big endian, and the answer (Ceph's
// common/admin_socket.cc).
func (c *Cluster) ask(command string) ([]byte, error) {
	socket, err := c.socket()
	if err != nil {
		return nil, err
	}
	conn, err := net.DialTimeout("unix", socket, 5*time.Second)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintf(conn, "{\"prefix\": %q}\x00", command); err != nil {
		return nil, err
	}
	var n uint32
	if err := binary.Read(conn, binary.BigEndian, &n); err != nil {
		return nil, err
	}
	if n > 16<<20 {
		return nil, fmt.Errorf("an answer of %d bytes", n)
	}
	text := make([]byte, n)
	_, err = io.ReadFull(conn, text)
	return text, err
}

// socket returns the path of the OSD's admin socket, as the configuration has it.
func (c *Cluster) socket() (string, error) {
	f, err := os.Open(c.Conf())
	if err != nil {
		return "", err
	}
	defer f.Close()
	section := ""
	for s := bufio.NewScanner(f); s.Scan(); {
		line := strings.TrimSpace(s.Text())
		if strings.HasPrefix(line, "[") {
			section = line
		}
		if path, ok := strings.CutPrefix(line, "admin socket = "); ok && section == "[osd]" {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s names no admin socket of the OSD", c.Conf())
}
