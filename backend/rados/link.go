package rados

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ceph/go-ceph/rados"

	"github.com/lsd-ceph/lsd/backend"
)

const (
	// fenceFor is how long a client stays blocklisted. It is by its address and a
	// number that no later client has, so the length harms nobody; a host that is
	// stopped for longer finds that its lease is over.
	fenceFor = 24 * time.Hour

	// A connection that was blocklisted is replaced at once; one that is again,
	// with a pause that doubles, for then the whole host may be shut out.
	reconnectMin = time.Second
	reconnectMax = 30 * time.Second
)

// A link is a store's use of one connection. A store has one at a time, but what
// it began on an earlier one ends there.
type link struct {
	cluster *cluster
	poolID  int64
	ioctx   *rados.IOContext
	running sync.WaitGroup // operations, also those that nobody waits for
	made    time.Time
}

// openLink opens the pool on a connection, which the link keeps. It may have to
// ask the monitors, which blocks: when ctx ends, what is under way keeps the
// connection until it is through.
func (cs *Clusters) openLink(ctx context.Context, key clusterKey, pool, namespace string) (*link, error) {
	c, err := cs.acquire(ctx, key)
	if err != nil {
		return nil, err
	}
	ioctx, err := cs.openPool(ctx, c, pool)
	if err != nil {
		cs.release(c)
		return nil, err
	}
	ioctx.SetNamespace(namespace)
	return &link{cluster: c, ioctx: ioctx, poolID: ioctx.GetPoolID(), made: time.Now()}, nil
}

func (cs *Clusters) openPool(ctx context.Context, c *cluster, pool string) (*rados.IOContext, error) {
	select {
	case c.blocking <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	var ioctx *rados.IOContext
	var err error
	done := make(chan struct{})
	cs.retain(c)
	go func() {
		defer cs.release(c)
		defer func() { <-c.blocking }()
		ioctx, err = c.conn.OpenIOContext(pool)
		if err == nil {
			// While cluster or pool are full librados would keep back all that writes,
			// deletes as well: room could only be made by others.
			err = ioctx.SetPoolFullTry()
		}
		select {
		case done <- struct{}{}:
		case <-ctx.Done():
			if err == nil {
				ioctx.Destroy()
			}
		}
	}()
	select {
	case <-done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if errorCode(err) == -int(syscall.ENOENT) {
		return nil, permanent("no such pool: %s; create it with: ceph osd pool create %s", pool, pool)
	}
	return ioctx, err
}

// close waits for what was begun on the link and ends it.
func (l *link) close(cs *Clusters) {
	l.running.Wait()
	l.ioctx.Destroy()
	cs.release(l.cluster)
}

// shutOut is told that the cluster has blocklisted the connection of l: nothing
// will ever go through it. The store gets another one, in the background.
func (s *Store) shutOut(l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.link != l || s.renewing || s.ctx.Err() != nil {
		return
	}
	s.clusters.forget(l.cluster)
	s.renewing = true
	s.background.Add(1)
	go s.reconnect(l)
}

// reconnect replaces the store's link, old, trying until that works or the store
// is closed.
func (s *Store) reconnect(old *link) {
	defer s.background.Done()
	pause := reconnectMin
	if time.Since(old.made) < reconnectMax && !s.sleep(pause) {
		return
	}
	for {
		l, err := s.clusters.openLink(s.ctx, s.key, s.pool, s.namespace)
		if err == nil {
			s.replace(l)
			old.close(s.clusters)
			return
		}
		if !s.sleep(pause) {
			return
		}
		pause = min(2*pause, reconnectMax)
	}
}

func (s *Store) replace(l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.link, s.renewing = l, false
}

// sleep waits for d and reports whether the store is still open.
func (s *Store) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-s.ctx.Done():
		return false
	}
}

// Identity implements backend.Fencer: it is the address of the connection and
// its number, as ceph osd blocklist takes it.
func (s *Store) Identity() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.link.cluster.addr
}

var _ backend.Fencer = (*Store)(nil)

// Fence implements backend.Fencer: it blocklists the client. When it returns,
// this connection knows a map of the cluster in which that is so, and no OSD that
// this client talks to from then on serves the other one.
func (s *Store) Fence(ctx context.Context, identity string) error {
	addr, err := parseIdentity(identity)
	l, err := s.begin(ctx, "fence", identity, err)
	if err != nil {
		return err
	}
	defer l.running.Done()
	select {
	case l.cluster.blocking <- struct{}{}:
	case <-ctx.Done():
		return s.end(l, "fence", identity, 0, ctx.Err())
	}
	done := make(chan int, 1)
	l.running.Add(1)
	go func() {
		defer l.running.Done()
		defer func() { <-l.cluster.blocking }()
		done <- l.cluster.blocklist(addr, fenceFor)
	}()
	select {
	case ret := <-done:
		return s.end(l, "fence", identity, ret, nil)
	case <-ctx.Done():
		return s.end(l, "fence", identity, 0, ctx.Err())
	}
}

// parseIdentity checks an identity, which comes from an object in the store, and
// returns it as the monitors are to be given it: ADDRESS:PORT/NUMBER.
func parseIdentity(s string) (string, error) {
	addr, nonce, ok := strings.Cut(s, "/")
	if ok {
		ap, err := netip.ParseAddrPort(addr)
		n, nerr := strconv.ParseUint(nonce, 10, 32)
		if err == nil && nerr == nil && ap.Addr().Zone() == "" {
			return fmt.Sprintf("%s/%d", ap, n), nil
		}
	}
	return "", fmt.Errorf("%.80q names no client of a cluster: it should be ADDRESS:PORT/NUMBER", s)
}

// clientAddr picks out of what librados says of a connection's addresses the one
// that names it: they differ in their protocol alone, as in
// [v2:10.0.0.1:0/77,v1:10.0.0.1:0/77]. It returns "" if there is none.
func clientAddr(addrs string) string {
	first, _, _ := strings.Cut(strings.Trim(addrs, "[]"), ",")
	for _, proto := range []string{"v2:", "v1:", "any:"} {
		first = strings.TrimPrefix(first, proto)
	}
	if a, err := parseIdentity(first); err == nil {
		return a
	}
	return ""
}
