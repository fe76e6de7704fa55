package main

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// A mercyJob is what a client writes.
type mercyJob struct {
	args []string
	onto string // lsd's image, of those that were written all over, and then at random as much again, so that there is cleaning; "": a new one
}

// mercy counts what the same client work asks of the cluster: a number of writes, not a time,
// from one rest to the next, with all of it in the store in between. What the libraries do for
// themselves meanwhile (checkpoints, leases, cleaning; object maps, locks, watches) counts.
// Neither lsd nor Ceph scrubs: that goes by time.
func mercy() comparison {
	return comparison{name: "mercy", title: "what the same writes ask of the cluster, beside Ceph's librbd", run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
		s, err := newMercySides(ctx, h)
		if err != nil {
			return nil, err
		}
		random := mercyRandom("--number_ios=" + lab.Pick(h.Effort, "12000", "60000"))
		cases := []lab.Case[mercyJob]{
			{Name: "randwrite 4k, new image", Do: mercyJob{args: random}},
			{Name: "randwrite 4k, with cleaning", Do: mercyJob{args: random, onto: mercyFull}},
		}
		if !h.Short {
			cases = append(cases,
				lab.Case[mercyJob]{Name: "the same, objects of 32 MiB", Do: mercyJob{args: mercyRandom("--number_ios=120000"), onto: mercyLarge}},
				lab.Case[mercyJob]{Name: "write 64k", Do: mercyJob{args: []string{"--rw=write", "--bs=64k", "--iodepth=32", "--io_size=512m", "--end_fsync=1"}}})
		}
		m, err := lab.Turns(ctx, h, cases, []lab.Side[mercyJob]{
			{Name: "lsd", Turn: s.lsd},
			{Name: "librbd, cache on", Turn: s.librbd(true)},
			{Name: "librbd, cache off", Turn: s.librbd(false)},
		})
		if err != nil {
			return nil, err
		}
		less := func(of lab.Metric, name, title, unit string) bench.Table {
			return m.Table(of, bench.Table{Name: name, Title: title, Unit: unit, Less: true})
		}
		const mib = "MiB for a GiB that the client writes"
		return []bench.Table{
			less("operations for 1,000 writes", "operations", "Operations of the OSD", "for 1,000 of the client's writes"),
			less("operations for a GiB", "operations-gib", "The same operations", "for a GiB that the client writes"),
			m.Parts(mercyParts(), bench.Table{Name: "parts", Title: "What lsd asks the store for", Unit: "operations for a GiB that the client writes", Less: true}),
			less("µs CPU for a write", "cpu", "CPU of the OSD", "µs for one of the client's writes"),
			less("s CPU for a GiB", "cpu-gib", "The same CPU", "seconds for a GiB that the client writes"),
			less("MiB of traffic", "traffic", "Data sent to the OSD and read from it", mib),
			less("MiB of metadata", "metadata", "Written by the OSD's database, its journal included", mib),
			less("MiB to disk", "disk", "Written to the OSD's disk in all", mib),
			less("MiB to own disk", "own-disk", "Written to the client's own disk", mib),
		}, nil
	}}
}

func mercyRandom(until string) []string {
	return []string{"--rw=randwrite", "--bs=4k", "--iodepth=32", "--norandommap", "--end_fsync=1", until}
}

// mercySides are the sides, on one cluster.
type mercySides struct {
	h       *lab.Host
	cluster *lab.Cluster
	daemon  *lab.Daemon
	store   string // of lsd's images
	made    int    // images
}

// The names of the images that stay, full: with objects as large as they are by default, and as
// large as they can be. The peer has one of them.
const (
	mercyFull  = "full"
	mercyLarge = "large"
)

// newMercySides makes the images that stay, and has them in the state in which writing them at
// random for ever leaves them.
func newMercySides(ctx context.Context, h *lab.Host) (s *mercySides, err error) {
	s = &mercySides{h: h, store: "rados://rbd/" + uuid.NewString()}
	if s.cluster, err = h.Cluster(ctx); err != nil {
		return nil, err
	}
	if s.daemon, err = h.Daemon(ctx, "--librbd-log-size", "512M", "--read-cache-size", "1G", "--scrub-rate", "0"); err != nil {
		return nil, err
	}
	size := lab.Pick(h.Effort, "128M", "1G")
	fill := func(fio func(args []string) (lab.Fio, error)) error {
		if _, err := fio([]string{"--rw=write", "--bs=1m", "--iodepth=16", "--end_fsync=1"}); err != nil {
			return err
		}
		_, err := fio(mercyRandom("--io_size=" + size))
		return err
	}
	if err := s.createPeer(ctx, mercyFull, size); err != nil {
		return nil, err
	}
	if err := fill(func(args []string) (lab.Fio, error) { return s.fioPeer(ctx, true, mercyFull, args) }); err != nil {
		return nil, err
	}
	images := [][]string{{mercyFull}, {mercyLarge, "--object-size", "32M"}}
	if h.Short {
		images = images[:1]
	}
	for _, image := range images {
		if err := s.createWith(ctx, image[0], size, image[1:]...); err != nil {
			return nil, err
		}
		if err := fill(func(args []string) (lab.Fio, error) { return s.fio(ctx, image[0], args) }); err != nil {
			return nil, err
		}
		// Or it is let go of between two turns, and the cleaner has to load the map first.
		if err := s.daemon.Hold(ctx, s.store, image[0]); err != nil {
			return nil, err
		}
	}
	return s, h.Rest(ctx)
}

func (s *mercySides) create(ctx context.Context, image, size string) error {
	return s.createWith(ctx, image, size)
}

// createWith creates an image with more of lsdctl's flags.
func (s *mercySides) createWith(ctx context.Context, image, size string, how ...string) error {
	_, err := s.daemon.Lsdctl(ctx, append([]string{"create", s.store + "/" + image, "--size", size}, how...)...)
	return err
}

func (s *mercySides) createPeer(ctx context.Context, image, size string) error {
	_, err := s.h.Run(ctx, "rbd", "create", image, "--size", size, "--image-feature", "layering,exclusive-lock,object-map,fast-diff")
	return err
}

// fio has fio work on lsd's library.
func (s *mercySides) fio(ctx context.Context, image string, args []string) (lab.Fio, error) {
	return lab.RunFio(s.daemon.Command(ctx, s.store, lab.RBDArgs(image, args...)...))
}

// fioPeer has fio work on Ceph's library.
func (s *mercySides) fioPeer(ctx context.Context, cache bool, image string, args []string) (lab.Fio, error) {
	return lab.RunFio(s.h.Librbd(ctx, cache, lab.RBDArgs(image, args...)...))
}

// image returns the image that stays, if there is to be one, and makes a new one else.
func (s *mercySides) image(ctx context.Context, stays string, create func(ctx context.Context, image, size string) error) (string, error) {
	if stays != "" {
		return stays, nil
	}
	s.made++
	image := fmt.Sprintf("fresh%d", s.made)
	return image, create(ctx, image, lab.Pick(s.h.Effort, "512M", "2G"))
}

// lsd does a job on lsd's library. The image is attached before, for the log's file is made
// then; a new one is detached in the end, and the checkpoint that this takes counts.
func (s *mercySides) lsd(ctx context.Context, j mercyJob) (lab.Figures, error) {
	image, err := s.image(ctx, j.onto, s.create)
	if err != nil {
		return nil, err
	}
	if _, err := s.fio(ctx, image, []string{"--rw=read", "--bs=4k", "--number_ios=1"}); err != nil {
		return nil, err
	}
	return s.count(ctx, true, func() (lab.Fio, error) {
		f, err := s.fio(ctx, image, j.args)
		if err != nil {
			return f, err
		}
		id, err := s.device(ctx, image)
		if err != nil {
			return f, err
		}
		if j.onto != "" {
			return f, s.daemon.Client.Flush(ctx, id, nil)
		}
		_, err = s.daemon.Client.Detach(ctx, id, api.DetachRequest{}, nil)
		return f, err
	})
}

// device returns the number under which an image is attached.
func (s *mercySides) device(ctx context.Context, image string) (int, error) {
	list, err := s.daemon.Client.Images(ctx)
	if err != nil {
		return 0, err
	}
	for _, im := range list {
		if im.URL == s.store+"/"+image {
			return im.ID, nil
		}
	}
	return 0, fmt.Errorf("%s is not attached", image)
}

// librbd returns the side of Ceph's library, with its cache or without.
func (s *mercySides) librbd(cache bool) func(context.Context, mercyJob) (lab.Figures, error) {
	return func(ctx context.Context, j mercyJob) (lab.Figures, error) {
		stays := j.onto
		if stays != "" {
			stays = mercyFull // whatever lsd's objects are
		}
		image, err := s.image(ctx, stays, s.createPeer)
		if err != nil {
			return nil, err
		}
		return s.count(ctx, false, func() (lab.Fio, error) { return s.fioPeer(ctx, cache, image, j.args) })
	}
}

// mercyEffort is what has been done, by the OSD above all.
type mercyEffort struct {
	lab.OSD
	disk, own float64            // bytes written to the OSD's disk, and by the daemon to that of its host
	asked     map[string]float64 // of stores by the daemon, as lab.Daemon.StoreOps has it
}

// mercyParts are the kinds of operations that lsd's are told apart by, mercyRest the others.
func mercyParts() []lab.Metric {
	return []lab.Metric{"put data", "get data", "get_ranges data", "delete data", "put map", "get map", "get_ranges map", "delete map", "put manifest", "delete manifest", "swap superblock", mercyRest}
}

const mercyRest lab.Metric = "all others"

func (s *mercySides) effort(ctx context.Context) (e mercyEffort, err error) {
	if e.asked, err = s.daemon.StoreOps(ctx); err != nil {
		return e, err
	}
	if e.OSD, err = s.cluster.OSD(); err != nil {
		return e, err
	}
	if e.disk, err = lab.Written(s.cluster.OSDPid()); err != nil {
		return e, err
	}
	e.own, err = lab.Written(s.daemon.Pid())
	return e, err
}

// count has work done, until all have come to rest. They are at rest when it begins: what was
// counted before has ended so, and nothing is removed, which would go on for a while. What the
// daemon has done counts if it has a part in it.
func (s *mercySides) count(ctx context.Context, daemon bool, work func() (lab.Fio, error)) (lab.Figures, error) {
	before, err := s.effort(ctx)
	if err != nil {
		return nil, err
	}
	f, err := work()
	if err != nil {
		return nil, err
	}
	if err := s.h.Rest(ctx); err != nil {
		return nil, err
	}
	after, err := s.effort(ctx)
	if err != nil {
		return nil, err
	}
	written := f.Bytes * f.Took.Seconds()
	figures := mercyFigures(before, after, f.Ops, written)
	if daemon {
		maps.Copy(figures, mercyDaemon(before, after, written))
	}
	return figures, nil
}

// mercyFigures returns what the cluster has done between, for each of a client's writes and for each GiB.
func mercyFigures(before, after mercyEffort, writes, written float64) lab.Figures {
	d := after.Sub(before.OSD)
	operations, gib := d.Writes+d.Reads, written/(1<<30)
	mib := func(bytes float64) float64 { return bytes / (1 << 20) / gib }
	return lab.Figures{
		"operations for 1,000 writes": operations / writes * 1000,
		"operations for a GiB":        operations / gib,
		"µs CPU for a write":          d.CPU.Seconds() * 1e6 / writes,
		"s CPU for a GiB":             d.CPU.Seconds() / gib,
		"MiB of traffic":              mib(d.WriteBytes + d.ReadBytes),
		"MiB of metadata":             mib(d.Metadata),
		"MiB to disk":                 mib(after.disk - before.disk),
	}
}

// mercyDaemon returns what the daemon has done between, for each GiB.
func mercyDaemon(before, after mercyEffort, written float64) lab.Figures {
	gib := written / (1 << 30)
	f := lab.Figures{"MiB to own disk": (after.own - before.own) / (1 << 20) / gib}
	for kind, n := range after.asked {
		part := lab.Metric(kind)
		if !slices.Contains(mercyParts(), part) {
			part = mercyRest
		}
		f[part] += (n - before.asked[kind]) / gib
	}
	return f
}
