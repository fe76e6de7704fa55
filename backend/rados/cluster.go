package rados

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/ceph/go-ceph/rados"

	"github.com/lsd-ceph/lsd/backend"
)

const (
	// connectTimeout is how long the monitors may take to answer when there is
	// no connection yet.
	connectTimeout = 30 * time.Second

	// closeTimeout is how long Close waits for operations that were abandoned.
	// What is not done by then goes on in the background.
	closeTimeout = 5 * time.Second

	// maxOps is how many operations one connection has in flight, and how many
	// of those may be abandoned ones.
	maxOps = 512

	// maxLeaseOps is the same for operations on objects that change, superblocks for the
	// most part: leases are renewed while those on data hang.
	maxLeaseOps = 128

	// maxBlocking is how many calls that librados has only in a blocking form
	// one connection has in flight; each takes a thread.
	maxBlocking = 8

	// askPause is how long a connection waits from one question for the newest
	// map to the next.
	askPause = time.Second
)

// Clusters is a set of connections to clusters. The stores that it opens share
// one connection for each pair of configuration file and client, because a
// connection costs threads and memory. The zero value has none.
type Clusters struct {
	mu sync.Mutex
	m  map[clusterKey]*cluster // guarded by mu; those with users
}

type clusterKey struct{ conf, id string }

// A cluster is one connection, which may still be in the making.
type cluster struct {
	key      clusterKey
	users    int           // guarded by Clusters.mu
	ready    chan struct{} // closed when conn, addr and err are set
	conn     *rados.Conn
	addr     string // names the connection to others; "" if that is not known
	err      error
	slots    chan struct{} // of operations on data in flight
	leases   chan struct{} // of operations in flight on objects that change
	blocking chan struct{} // of blocking calls in flight
	asking   chan struct{} // held while the monitors are asked for the newest map
	memory   trimmer       // of operations
}

// acquire returns the connection for key, and makes it if there is none. The
// caller must release it.
//
// Making one blocks, and cannot be interrupted: it goes on when ctx ends, for
// at most connectTimeout, and whoever comes meanwhile waits for the same one.
func (cs *Clusters) acquire(ctx context.Context, key clusterKey) (*cluster, error) {
	cs.mu.Lock()
	c := cs.m[key]
	if c == nil {
		c = &cluster{
			key:      key,
			ready:    make(chan struct{}),
			slots:    make(chan struct{}, maxOps),
			leases:   make(chan struct{}, maxLeaseOps),
			blocking: make(chan struct{}, maxBlocking),
			asking:   make(chan struct{}, 1),
		}
		if cs.m == nil {
			cs.m = make(map[clusterKey]*cluster)
		}
		cs.m[key] = c
		c.users++ // connect itself
		go func() {
			defer cs.release(c)
			if c.conn, c.err = connect(key); c.err == nil {
				if addrs, err := c.conn.GetAddrs(); err == nil {
					c.addr = clientAddr(addrs)
				}
			}
			close(c.ready)
		}()
	}
	c.users++
	cs.mu.Unlock()

	err := ctx.Err()
	if err == nil {
		select {
		case <-c.ready:
			err = c.err
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		cs.release(c)
		return nil, err
	}
	return c, nil
}

// retain adds one use of c, of which there is one already.
func (cs *Clusters) retain(c *cluster) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.users++
}

// release ends one use of c, and c with the last one.
func (cs *Clusters) release(c *cluster) {
	cs.mu.Lock()
	c.users--
	last := c.users == 0
	// Nobody else gets a connection that failed or is being shut down.
	if (last || c.failed()) && cs.m[c.key] == c {
		delete(cs.m, c.key)
	}
	cs.mu.Unlock()
	if last && c.conn != nil {
		c.conn.Shutdown()
		c.memory.end()
	}
}

// forget keeps c, which is of no use any more, from whoever comes next.
func (cs *Clusters) forget(c *cluster) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.m[c.key] == c {
		delete(cs.m, c.key)
	}
}

// unanswered is told that an operation on c got no answer in its time. Maybe the
// OSD is elsewhere by now: unless it is being done already, and at most once in
// askPause, the monitors are asked for the newest map, in the background. The
// caller has a use of c.
//
// librados has no standing order for maps. It asks for the next one when it loses
// an OSD, once, and the next one may be about something else; after that, only for
// operations that it has had for ten seconds (objecter_timeout), of which there
// are none where callers wait for less. An OSD that was killed and came back is
// another one under the same address, which refuses those who look for the one
// before: without a new map they are refused for ever.
func (cs *Clusters) unanswered(c *cluster) {
	select {
	case c.asking <- struct{}{}:
	default:
		return
	}
	cs.retain(c)
	go func() {
		// It blocks for as long as no monitor answers, where nothing can end it.
		_ = c.conn.WaitForLatestOSDMap()
		cs.release(c)
		time.Sleep(askPause)
		<-c.asking
	}()
}

func (c *cluster) failed() bool {
	select {
	case <-c.ready:
		return c.err != nil
	default:
		return false
	}
}

// connect makes a connection.
func connect(key clusterKey) (*rados.Conn, error) {
	newConn := rados.NewConn
	if key.id != "" {
		newConn = func() (*rados.Conn, error) { return rados.NewConnWithUser(key.id) }
	}
	conn, err := newConn()
	if err != nil {
		return nil, permanent("cannot set up librados: %w", err)
	}
	if err := configure(conn, key.conf); err != nil {
		return nil, err
	}
	if err := conn.Connect(); err != nil {
		conn.Shutdown()
		return nil, connectError(err, key)
	}
	return conn, nil
}

func configure(conn *rados.Conn, conf string) error {
	if conf == "" {
		if err := conn.ReadDefaultConfigFile(); err != nil {
			return permanent("no usable ceph.conf in /etc/ceph, nor named by CEPH_CONF: name one with ?conf=/path (%w)", err)
		}
	} else {
		// librados says "invalid argument" to most of what can be wrong.
		f, err := os.Open(conf)
		if err != nil {
			var pathErr *fs.PathError
			if errors.As(err, &pathErr) {
				err = pathErr.Err
			}
			return permanent("cannot read %s: %w", conf, err)
		}
		f.Close()
		if err := conn.ReadConfigFile(conf); err != nil {
			return permanent("cannot use %s: %w", conf, err)
		}
	}
	for _, o := range [][2]string{
		// A daemon's standard error is not librados' to write to.
		{"log_to_stderr", "false"},
		{"err_to_stderr", "false"},
		{"client_mount_timeout", fmt.Sprint(int(connectTimeout.Seconds()))},
		// What would stop the thread that submits an operation, where no
		// context reaches it: slots bound the operations instead.
		{"objecter_inflight_ops", fmt.Sprint(2 * maxOps)},
		{"objecter_inflight_op_bytes", fmt.Sprint(2 * maxOps * backend.MaxObject)},
	} {
		if err := conn.SetConfigOption(o[0], o[1]); err != nil {
			return permanent("cannot set "+o[0]+": %w", err)
		}
	}
	return nil
}

// An openError is an error of Open before it has its place in a backend.Error.
type openError struct {
	class error
	cause error
}

func (e *openError) Error() string { return e.cause.Error() }

func permanent(format string, args ...any) error {
	return &openError{backend.ErrPermanent, fmt.Errorf(format, args...)}
}

func connectError(err error, key clusterKey) error {
	client := "client.admin"
	if key.id != "" {
		client = "client." + key.id
	}
	switch -errorCode(err) {
	case int(syscall.ETIMEDOUT):
		return &openError{backend.ErrTemporary, fmt.Errorf("no monitor answered %s within %v", client, connectTimeout)}
	case int(syscall.ENOENT):
		return permanent("the configuration names no monitors, or there is no key for %s", client)
	case int(syscall.EACCES), int(syscall.EPERM):
		return permanent("the cluster does not let %s in: %w", client, syscall.Errno(-errorCode(err)))
	}
	return &openError{backend.ErrTemporary, fmt.Errorf("cannot connect as %s: %w", client, err)}
}

// errorCode returns the negative errno of an error of go-ceph.
func errorCode(err error) int {
	var e interface{ ErrorCode() int }
	if errors.As(err, &e) {
		return e.ErrorCode()
	}
	return 0
}
