package bench

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/lsd-ceph/lsd/engine"
)

var (
	ampImage  = flag.Int("amp.image", 1024, "amplification: size of the image, MiB, a power of two")
	ampObject = flag.Int("amp.object", 8, "amplification: size of the data objects, MiB")
	ampRounds = flag.Int("amp.rounds", 10, "amplification: image lengths that are written over")
	ampWarm   = flag.Int("amp.warm", 5, "amplification: of these, before the figures are taken")
	ampRatio  = flag.Float64("amp.ratio", engine.DefaultSpaceRatio, "amplification: space held for what lives")
	ampMap    = flag.Int64("amp.map", engine.DefaultMapMemory>>20, "amplification: memory for the map, MiB")
	ampEvery  = flag.Int("amp.every", 0, "amplification: data objects that a recovery may have to replay; 0: the default")
)

// pattern says where a client writes.
type pattern struct {
	name string
	next func(rng *rand.Rand, n, blocks uint64) uint64 // block of write n
	// theory returns the least write amplification known for oldest-first cleaning
	// in which each class of blocks is kept apart, at a space ratio.
	theory func(ratio float64) float64
}

// scatter gives block i of 2^k another place, so that blocks written as often are
// no neighbours.
func scatter(i, blocks uint64) uint64 { return i * 2654435761 % blocks }

var patterns = []pattern{
	{"uniform", func(rng *rand.Rand, _, blocks uint64) uint64 { return rng.Uint64N(blocks) }, oldestFirst},
	{"80/20 two zones", func(rng *rand.Rand, _, blocks uint64) uint64 {
		hot := blocks / 5
		if rng.Float64() < 0.8 {
			return scatter(rng.Uint64N(hot), blocks)
		}
		return scatter(hot+rng.Uint64N(blocks-hot), blocks)
	}, func(ratio float64) float64 {
		return separated(ratio, []zone{{0.2, 0.8}, {0.8, 0.2}})
	}},
	{"80/20 pareto", func(rng *rand.Rand, _, blocks uint64) uint64 {
		return scatter(uint64(math.Pow(rng.Float64(), math.Log(0.2)/math.Log(0.8))*float64(blocks)), blocks)
	}, func(ratio float64) float64 { return separated(ratio, paretoZones(0.2)) }},
	{"sequential", func(_ *rand.Rand, n, blocks uint64) uint64 { return n % blocks }, func(float64) float64 { return 1 }},
}

// oldestFirst returns the write amplification of cleaning the oldest object under
// uniform random writes, in the limit of many objects of many blocks (Desnoyers,
// "Analytic models of SSD write performance", 2014): a / (a + W(-a e^-a)).
func oldestFirst(a float64) float64 {
	if a <= 1 {
		return math.Inf(1)
	}
	// The principal branch of W at -a e^-a, by Newton's method from above; what
	// lives of an object when it is cleaned is -w/a.
	z, w := -a*math.Exp(-a), 0.0
	for range 100 {
		w -= (w - z*math.Exp(-w)) / (1 + w)
	}
	return a / (a + w)
}

// zone is a class of blocks: its share of all blocks, and of all writes.
type zone struct{ blocks, writes float64 }

// paretoZones cuts the self-similar distribution, in which the share h of the
// blocks gets 1-h of the writes, and the same again inside those, into zones.
func paretoZones(h float64) []zone {
	var list []zone
	power := math.Log(1-h) / math.Log(h)
	for hi := 1.0; hi > 1e-6; hi /= 1.25 {
		lo := hi / 1.25
		if lo <= 1e-6 {
			lo = 0
		}
		list = append(list, zone{hi - lo, math.Pow(hi, power) - math.Pow(lo, power)})
	}
	return list
}

// separated returns the least write amplification when each zone has its own
// objects and the spare space is divided among them in the best way: one small
// part after the other goes where it saves most.
func separated(ratio float64, zones []zone) float64 {
	const steps = 4000
	part := (ratio - 1) / steps
	spare, now, gain := make([]float64, len(zones)), make([]float64, len(zones)), make([]float64, len(zones))
	give := func(i int) {
		spare[i] += part
		z := zones[i]
		now[i] = z.writes * oldestFirst(1+spare[i]/z.blocks)
		gain[i] = now[i] - z.writes*oldestFirst(1+(spare[i]+part)/z.blocks)
	}
	for i := range zones {
		give(i)
	}
	for range steps - len(zones) {
		best := 0
		for i := range zones {
			if gain[i] > gain[best] {
				best = i
			}
		}
		give(best)
	}
	sum := 0.0
	for _, x := range now {
		sum += x
	}
	return sum
}

// amplification is what a run measured, after the warm-up.
type amplification struct {
	write, writeAll         float64 // bytes put for each byte written; of all rounds
	header, maps, cleaned   float64 // parts of write: headers of objects; the map; data moved
	space, spacePeak, table float64 // bytes of data objects for each byte that lives; as the image counts it
	theory                  float64 // at the space that was measured
	deleted                 uint64
	mapBytes                float64 // memory of the map for each block of 4 KiB
	ops                     float64 // of the store, for each GiB written
}

// overwriter writes an image that is full over and over.
type overwriter struct {
	im      *engine.Image
	l       *loop
	st      *countingStore
	pattern pattern
	rng     *rand.Rand
	blocks  uint64
	written uint64
	live    int // writes in flight
	errs    int
	free    []*engine.Request
}

// RequestDone implements engine.Completer.
func (o *overwriter) RequestDone(r *engine.Request) {
	if r.Err != 0 {
		o.errs++
	}
	o.free = append(o.free, r)
	o.live--
}

const ampDepth = 32

// write writes n blocks and calls sample after each turn.
func (o *overwriter) write(n uint64, next func(n uint64) uint64, sample func()) {
	for end := o.written + n; o.written < end; {
		for len(o.free) > 0 && o.written < end {
			r := o.free[len(o.free)-1]
			o.free = o.free[:len(o.free)-1]
			r.Sector = next(o.written) * 8
			o.written++
			o.live++
			o.im.Submit(r)
		}
		// More jobs than the client's puts are, so that the cleaner keeps pace.
		o.l.turn(o.im, 4)
		sample()
	}
}

// overwriting says what is measured: image and object sizes and the map's memory in MiB,
// and how many image lengths are written, of which the first are warm-up.
type overwriting struct {
	image, object, rounds, warm int
	ratio                       float64
	maps                        int64
	every                       int
}

// amplify measures one pattern.
func amplify(tb testing.TB, p pattern, c overwriting) amplification {
	tb.Helper()
	ctx := context.Background()
	block := make([]byte, 4096)
	random := rand.NewChaCha8([32]byte{2})
	random.Read(block)
	st := newCountingStore(block)
	size := uint64(c.image) << 20
	id, err := engine.Create(ctx, st, "bench", engine.CreateOptions{Size: size, ObjectSize: uint32(c.object) << 20})
	if err != nil {
		tb.Fatal(err)
	}
	disk := newRAMDisk(513 << 20)
	im, err := engine.Open(ctx, st, id, engine.OpenOptions{Log: disk, Host: "bench", URL: "mem:/bench", Parallel: 1, Config: engine.Config{
		SpaceRatio: c.ratio, CheckpointEvery: c.every, Shared: engine.NewShared(engine.Limits{Map: c.maps << 20}), Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}})
	if err != nil {
		tb.Fatal(err)
	}
	o := &overwriter{im: im, l: &loop{disk: disk}, st: st, pattern: p, rng: rand.New(rand.NewPCG(3, 4)), blocks: size / 4096}
	for range ampDepth {
		o.free = append(o.free, &engine.Request{Op: engine.Write, Sectors: 8, Buf: block, Done: o})
	}
	im.Start(o.l, ramDevice{disk}, make([]byte, 32<<20))
	o.write(o.blocks, func(n uint64) uint64 { return n }, func() {}) // fill it
	a := o.measure(c.rounds, c.warm)
	if o.errs > 0 {
		tb.Fatalf("%d writes failed", o.errs)
	}
	im.Abandon()
	return a
}

// measure writes the image over as often as rounds says, and takes the figures
// after the first warm of them.
func (o *overwriter) measure(rounds, warm int) (a amplification) {
	next := func(n uint64) uint64 { return o.pattern.next(o.rng, n, o.blocks) }
	whole, filled := o.st.total(), o.written
	o.write(uint64(warm)*o.blocks, next, func() {})
	before := maps.Clone(o.st.put)
	puts, moved, began := o.st.total(), o.im.Stats().Cleaned, o.written
	dataPut, ops, samples, turn := o.im.Stats().PutBytes, o.st.ops, 0, 0
	o.write(uint64(rounds-warm)*o.blocks, next, func() {
		if turn++; turn%16 != 0 {
			return
		}
		s := o.im.Stats()
		r := float64(o.st.space) / float64(s.LiveBytes)
		a.space += r
		a.spacePeak = max(a.spacePeak, r)
		a.table += float64(s.DataBytes) / float64(s.LiveBytes)
		a.mapBytes = max(a.mapBytes, float64(s.MapBytes)/float64(o.blocks))
		samples++
	})
	written := float64(o.written-began) * 4096
	s := o.im.Stats()
	a.write = float64(o.st.total()-puts) / written
	a.ops = float64(o.st.ops-ops) / written * (1 << 30)
	a.writeAll = float64(o.st.total()-whole) / (float64(o.written-filled) * 4096)
	a.cleaned = float64(s.Cleaned-moved) / written
	for _, k := range []engine.ObjectKind{engine.KindMap, engine.KindManifest, engine.KindSuperblock} {
		a.maps += float64(o.st.put[k]-before[k]) / written
	}
	a.header = float64(s.PutBytes-dataPut)/written - 1 - a.cleaned
	a.space /= float64(samples)
	a.table /= float64(samples)
	a.theory = o.pattern.theory(a.space)
	a.deleted = s.Deleted
	return a
}

func (a amplification) String() string {
	return fmt.Sprintf("WA %.3f (theory %.3f; all rounds %.3f; moved %.3f, headers and dedup %.4f, map %.4f), space %.3f (peak %.3f, table %.3f), %d objects deleted, %.0f operations for a GiB, at most %.2f bytes of memory a block",
		a.write, a.theory, a.writeAll, a.cleaned, a.header, a.maps, a.space, a.spacePeak, a.table, a.deleted, a.ops, a.mapBytes)
}

// BenchmarkAmplification measures write and space amplification in the long form.
func BenchmarkAmplification(b *testing.B) {
	for _, p := range patterns {
		b.Run(p.name, func(b *testing.B) {
			a := amplify(b, p, overwriting{*ampImage, *ampObject, *ampRounds, *ampWarm, *ampRatio, *ampMap, *ampEvery})
			b.Log(a)
			b.ReportMetric(a.write, "put/written")
			b.ReportMetric(a.theory, "theory")
			b.ReportMetric(a.ops, "ops/GiB")
			b.ReportMetric(a.space, "space/live")
			b.ReportMetric(a.spacePeak, "space-peak/live")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// TestAmplification holds the engine to its bounds, in a small form: bytes are
// counted, not time, and they are the same in each run.
func TestAmplification(t *testing.T) {
	bounds := map[string]float64{"uniform": 2.4, "80/20 two zones": 1.98, "80/20 pareto": 1.5, "sequential": 1.05}
	// With objects of 1 MiB. Where all is written alike, a batch is one object.
	ops := map[string]float64{"uniform": 11000, "80/20 two zones": 17500, "80/20 pareto": 16500, "sequential": 2500}
	for _, p := range patterns {
		t.Run(p.name, func(t *testing.T) {
			a := amplify(t, p, overwriting{256, 1, 6, 3, engine.DefaultSpaceRatio, engine.DefaultMapMemory >> 20, 0})
			t.Log(a)
			if bound, ok := bounds[p.name]; !ok || a.write > bound {
				t.Errorf("%.3f bytes are put for each byte written, more than %.2f", a.write, bound)
			}
			if a.mapBytes > 8.2 {
				t.Errorf("the map takes %.2f bytes of memory for each block of 4 KiB", a.mapBytes)
			}
			if bound := ops[p.name]; a.ops > bound {
				t.Errorf("the store is asked for %.0f operations for a GiB, more than %.0f", a.ops, bound)
			}
			// A sixty-fourth of slack for an image this small, and what one
			// cleaning has put before its victims die.
			if a.space > engine.DefaultSpaceRatio+1.0/64 || a.spacePeak > engine.DefaultSpaceRatio+3.0/64 {
				t.Errorf("the objects take %.3f of what lives, %.3f at the most", a.space, a.spacePeak)
			}
		})
	}
}

// TestAskedWithLargeObjects: with the largest objects, of which random writes of 4 KiB and the cleaner
// fill the whole, the store is asked for no more than one operation for 500 of the client's writes.
func TestAskedWithLargeObjects(t *testing.T) {
	const bound = (1 << 30) / 4096 / 500
	a := amplify(t, patterns[0], overwriting{1024, 32, 3, 1, engine.DefaultSpaceRatio, engine.DefaultMapMemory >> 20, 0})
	t.Log(a)
	if a.ops > bound {
		t.Errorf("%s: the store is asked for %.0f operations for a GiB, more than %d", patterns[0].name, a.ops, bound)
	}
}

func TestOldestFirst(t *testing.T) {
	// From the fixed point of u = exp(-a (1-u)), for what lives of the oldest object.
	for _, c := range []struct{ ratio, want float64 }{{1.1, 5.67}, {1.3, 2.364}, {2, 1.255}} {
		u := 0.5
		for range 100000 {
			u = math.Exp(-c.ratio * (1 - u))
		}
		if got := oldestFirst(c.ratio); math.Abs(got-c.want) > 0.01 || math.Abs(got-1/(1-u)) > 1e-6 {
			t.Errorf("ratio %.2f: %.4f, want %.4f", c.ratio, got, 1/(1-u))
		}
	}
	// Where all is written alike, keeping zones apart gains nothing.
	if got, want := separated(1.3, []zone{{0.5, 0.5}, {0.5, 0.5}}), oldestFirst(1.3); math.Abs(got-want) > 0.001 {
		t.Errorf("two equal zones: %.4f, want %.4f", got, want)
	}
}
