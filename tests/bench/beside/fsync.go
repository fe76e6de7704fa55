package main

import (
	"context"

	"github.com/lsd-ceph/lsd/tests/bench"
	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// fsyncs has fio wait for stable storage after each write, as syncs does on block devices in the
// virtual machine, but here and through the libraries; and on a plain file of the same disk.
func fsyncs() comparison {
	return comparison{name: "fsync", title: "an fsync after each write, through the libraries", run: func(ctx context.Context, h *lab.Host) ([]bench.Table, error) {
		l, err := newLibraries(ctx, h)
		if err != nil {
			return nil, err
		}
		var cases []lab.Case[libraryJob]
		for _, c := range fsyncWrites(h, h.Seconds) {
			cases = append(cases, lab.Case[libraryJob]{Name: c.Name, Do: libraryJob{args: c.Do, raw: true}})
		}
		m, err := lab.Turns(ctx, h, cases, l.sides())
		if err != nil {
			return nil, err
		}
		return []bench.Table{
			m.Table("ops/s", bench.Table{Name: "rate", Title: "A write and an fsync, through the libraries", Unit: "of both a second", Plot: true}),
			m.Table("p99 ms", bench.Table{Name: "p99", Title: "99th percentile of such an fsync", Unit: "ms", Less: true}),
		}, nil
	}}
}
