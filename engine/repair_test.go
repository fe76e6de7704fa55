package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/faultstore"
	"github.com/lsd-ceph/lsd/backend/mem"
	"github.com/lsd-ceph/lsd/internal/racetest"
)

// miscounted is a small image that nobody has attached, whose checkpoint counts
// wrongly, and what its blocks read as. A point goes back to that checkpoint; an
// orphan and what a dead owner has begun are there, too.
type miscounted struct {
	*checkedImage
	want map[uint64]uint64
}

func newMiscounted(t *testing.T) miscounted {
	t.Helper()
	st := mem.New()
	c := miscounted{&checkedImage{t, st, newImageIn(t, st)}, map[uint64]uint64{}}
	a, b := newHost(t, "alpha", st, 1), newHost(t, "beta", st, 2)
	if err := a.open(c.id, false); err != nil {
		t.Fatal(err)
	}
	for n := range uint64(12) {
		block := n % 8
		a.mustWrite(block, n+1)
		c.want[block] = n + 1
		if n%3 == 2 {
			a.mustDestage()
		}
	}
	a.im.checkpoint.now(func(error) {})
	a.run(0)
	a.mustWrite(7, 99) // only in the log of a host that is cut off
	if err := b.open(c.id, true); err != nil {
		t.Fatal(err)
	}
	b.mustClose()
	r := c.reach()
	if len(r.views) != 2 || !sameRef(r.views[0].ref, r.views[1].ref) {
		t.Fatal("no point goes back to the image's own checkpoint: this tests nothing")
	}
	c.rewrite(func(m *manifest) {
		for i := range m.objects {
			if o := &m.objects[i]; o.live > 0 && o.live < o.sectors {
				o.live++
				return
			}
		}
		t.Fatal("no object is half dead")
	})
	c.put(dataKey(c.id, 3, 77), []byte("x"))
	begun := checkpointRef{r.head.end() + 1, r.sb.Epoch}
	c.put(mapKey(c.id, begun, 0), []byte("x"))
	c.change(func(sb *superblock) { sb.Intent = &begun })
	return c
}

func (c miscounted) copy(t *testing.T) miscounted {
	return miscounted{c.checkedImage.copy(t), c.want}
}

// repair checks the image through a store with faults, and repairs it.
func (c miscounted) repair(inject faultstore.Injector) (*CheckReport, error) {
	st := faultstore.New(c.st, inject)
	return Check(context.Background(), st, "disk", "mem:/disk", CheckOptions{Repair: true, Parallel: 1})
}

// attach attaches the image, which must work without force, and reads all of it.
func (c miscounted) attach(name string) *host {
	c.t.Helper()
	h := newHost(c.t, name, c.st, 3)
	if err := h.open(c.id, false); err != nil {
		c.t.Fatal(err)
	}
	for block, n := range c.want {
		h.mustRead(block, n)
	}
	return h
}

// goOn writes, if the owner counts rightly: else the invariants would end the test.
func (c miscounted) goOn(h *host) {
	c.t.Helper()
	if len(c.check(CheckOptions{}).Errors) == 0 {
		h.mustOverwrite(1)
		c.want[1] = 1
	}
}

// dies makes a repair that dies at its first call of that method.
func (c miscounted) dies(method string) (end func()) {
	c.t.Helper()
	_, err := c.repair(faultstore.If(faultstore.Method(method), faultstore.Fault{Before: context.Canceled}))
	if err != nil && !errors.Is(err, context.Canceled) {
		c.t.Fatal(err)
	}
	return func() {}
}

// mustEndWell repairs the image, once more if need be, and fails if anything is wrong
// or left over then, or after its next owner.
func (c miscounted) mustEndWell() {
	c.t.Helper()
	if rep := c.check(CheckOptions{Repair: true}); !rep.Clean() {
		c.t.Fatalf("a second repair: %s%q", c.lines(rep), rep.Notes)
	}
	nothing := func(when string) {
		c.t.Helper()
		rep := c.check(CheckOptions{Deep: true})
		if left := append(append(rep.Dead, rep.Stale...), rep.Pending...); len(rep.Errors)+len(left) > 0 || rep.Points != 1 {
			c.t.Fatalf("%s: %sleft over: %q, %d points", when, c.lines(rep), left, rep.Points)
		}
	}
	nothing("after the repair")
	h := c.attach("delta")
	h.mustOverwrite(2)
	h.run(3 * leftoverGrace)
	h.mustClose()
	nothing("after the next owner")
	// What the host that was cut off may still put stays noted.
	sb := c.reach().sb
	if sb.Intent != nil || len(sb.Prev) > 0 || len(sb.Stale) != 1 || sb.Stale[0].Epoch != sb.Points[0].Epoch {
		c.t.Fatalf("the superblock still has intent %v, prev %v, stale %v", sb.Intent, sb.Prev, sb.Stale)
	}
}

// steps returns what a repair does to the store, from its first change on.
func (c miscounted) steps(t *testing.T) (before int, steps []string) {
	_, err := c.copy(t).repair(func(op faultstore.Op) faultstore.Fault {
		if len(steps) > 0 || faultstore.Writes(op) {
			steps = append(steps, op.Method+" "+strings.TrimPrefix(op.Key, c.id.String()+"/"))
		} else {
			before++
		}
		return faultstore.Fault{}
	})
	if err != nil {
		t.Fatal(err)
	}
	return before, steps
}

func TestRepairCounts(t *testing.T) {
	c := newMiscounted(t)
	if rep := c.check(CheckOptions{}); rep.Clean() || len(rep.Repairs) != 3 {
		t.Fatalf("before: %s%+v", c.lines(rep), rep.Repairs)
	}
	rep := c.check(CheckOptions{Repair: true})
	for _, r := range rep.Repairs {
		if !r.Done {
			t.Errorf("not done: %+v", r)
		}
	}
	if sb := c.reach().sb; sb.Owner != nil || sb.Intent != nil || len(sb.Prev) > 0 || !sameRef(sb.Points[0].Checkpoint, sb.Checkpoint) {
		t.Errorf("the superblock after the repair: %+v", sb)
	}
	c.mustEndWell()
}

// TestRepairInterrupted: a repair that ends between any two steps, or whose step
// fails before or after it takes effect, leaves an image that can be attached and
// reads right, and that another repair brings to its end.
func TestRepairInterrupted(t *testing.T) {
	whole := newMiscounted(t)
	before, steps := whole.steps(t)
	if len(steps) < 8 {
		t.Fatalf("a repair is only %q", steps)
	}
	for _, x := range []struct {
		name  string
		fault faultstore.Fault
		dead  bool // nothing more reaches the store
	}{
		{"dies before", faultstore.Fault{Before: context.Canceled}, true},
		{"dies after", faultstore.Fault{After: context.Canceled}, true},
		{"fails before", faultstore.Fault{Before: backend.ErrPermanent}, false},
		{"fails after", faultstore.Fault{After: backend.ErrTemporary}, false},
	} {
		for k, step := range steps {
			for _, attached := range []bool{false, true} { // before the second repair
				t.Run(fmt.Sprintf("%s %d %s, attached %v", x.name, k, strings.ReplaceAll(step, "/", "."), attached), func(t *testing.T) {
					if k > 0 {
						racetest.Slow(t)
					}
					c := whole.copy(t)
					n := -before - k
					rep, err := c.repair(func(op faultstore.Op) faultstore.Fault {
						n++
						switch {
						case n == 1:
							return x.fault
						case n > 1 && x.dead:
							return faultstore.Fault{Before: context.Canceled}
						}
						return faultstore.Fault{}
					})
					if x.dead && err == nil && k+1 < len(steps) {
						t.Fatalf("it has not noticed: %+v", rep)
					}
					if attached {
						c.attach("gamma").mustClose()
					}
					c.mustEndWell()
				})
			}
		}
	}
}

// TestRepairLate: a change of the superblock that takes effect when the repair is
// long over changes nothing any more, or is as good as one of a repair that died.
func TestRepairLate(t *testing.T) {
	whole := newMiscounted(t)
	before, steps := whole.steps(t)
	for k, step := range steps {
		for _, attached := range []bool{false, true} { // before it takes effect
			t.Run(fmt.Sprintf("%d %s, attached %v", k, strings.ReplaceAll(step, "/", "."), attached), func(t *testing.T) {
				c := whole.copy(t)
				n := -before - k
				effect := func() {}
				_, _ = c.repair(func(op faultstore.Op) faultstore.Fault {
					if n++; n == 1 {
						return faultstore.Fault{Late: func(fn func()) { effect = fn }}
					}
					return faultstore.Fault{}
				})
				if attached {
					h := c.attach("gamma")
					effect()
					h.mustClose()
				}
				effect()
				c.mustEndWell()
			})
		}
	}
}

// TestRepairBesideOthers: whoever attaches the image between any two steps of a
// repair has it, and the repair says so; another repair that comes in between is no
// worse.
func TestRepairBesideOthers(t *testing.T) {
	racetest.Slow(t)
	whole := newMiscounted(t)
	before, steps := whole.steps(t)
	for _, x := range []struct {
		name string
		come func(t *testing.T, c miscounted) (end func())
	}{
		{"owner", func(t *testing.T, c miscounted) func() {
			h := c.attach("gamma")
			return func() { c.goOn(h); h.mustClose() }
		}},
		{"owner who has gone", func(t *testing.T, c miscounted) func() {
			h := c.attach("gamma")
			c.goOn(h)
			h.mustClose()
			return func() {}
		}},
		{"another repair", func(t *testing.T, c miscounted) func() {
			c.check(CheckOptions{Repair: true, Parallel: 1})
			return func() {}
		}},
		{"another repair that dies soon", func(t *testing.T, c miscounted) func() { return c.dies(faultstore.Swap) }},
		{"another repair that dies", func(t *testing.T, c miscounted) func() { return c.dies(faultstore.Put) }},
	} {
		for k := -before; k < len(steps); k++ {
			step := "look"
			if k >= 0 {
				step = strings.ReplaceAll(steps[k], "/", ".")
			}
			t.Run(fmt.Sprintf("%s %d %s", x.name, k, step), func(t *testing.T) {
				c := whole.copy(t)
				c.want = maps.Clone(c.want)
				n := -before
				end := func() {}
				rep, err := c.repair(func(faultstore.Op) faultstore.Fault {
					if n++; n-1 == k {
						end = x.come(t, c)
					}
					return faultstore.Fault{}
				})
				if err != nil {
					t.Fatal(err)
				}
				end()
				said := strings.Contains(fmt.Sprint(rep.Notes), "meanwhile")
				if !rep.Clean() && !said {
					t.Errorf("it does not say why it was not repaired: %s%q", c.lines(rep), rep.Notes)
				}
				c.mustEndWell()
			})
		}
	}
}

// TestRepairWithdraws: a repair that puts its checkpoint when the image's next owner has
// removed for good what it may have left, or the image itself, takes it away.
func TestRepairWithdraws(t *testing.T) {
	whole := newMiscounted(t)
	for _, x := range []struct {
		name string
		come func(c miscounted)
		left int // parts of manifests
	}{
		{"owner", func(c miscounted) {
			h := c.attach("gamma")
			h.run(3 * leftoverGrace)
			h.mustClose()
		}, 1},
		{"removed", func(c miscounted) {
			if err := removeWhole(c.st, "disk", RemoveOptions{URL: "mem:/disk"}); err != nil {
				c.t.Fatal(err)
			}
		}, 0},
	} {
		t.Run(x.name, func(t *testing.T) {
			c := whole.copy(t)
			put := faultstore.All(faultstore.Method(faultstore.Put), faultstore.First(1))
			rep, err := c.repair(func(op faultstore.Op) faultstore.Fault {
				if put(op) {
					x.come(c)
				}
				return faultstore.Fault{}
			})
			if err != nil || rep.Clean() || !strings.Contains(fmt.Sprint(rep.Notes), "meanwhile") {
				t.Errorf("%v, %+v", err, rep)
			}
			if keys := c.keys("c/"); len(keys) != x.left {
				t.Errorf("there are %q", keys)
			}
		})
	}
}
