package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// Fio is what fio says of its one job, or of all of them with --group_reporting.
type Fio struct {
	Rate  float64       // operations a second
	Bytes float64       // a second
	Ops   float64       // in all
	Took  time.Duration // as fio sees it
	CPU   time.Duration // of fio, with what library it has
	// Latency of an operation, from its submission on.
	P50, P99, P999, Longest time.Duration
	SyncP99                 time.Duration // of an fsync, where it does any
}

// fioDir is one direction in fio's JSON.
type fioDir struct {
	IOPS  float64 `json:"iops"`
	Bytes float64 `json:"bw_bytes"`
	Total float64 `json:"total_ios"`
	MS    int64   `json:"runtime"`
	Clat  struct {
		Max        float64            `json:"max"`
		Percentile map[string]float64 `json:"percentile"`
	} `json:"clat_ns"`
}

// FioArgs returns the arguments that each job has.
func FioArgs(args ...string) []string {
	return append([]string{"fio", "--name=x", "--randrepeat=0", "--output-format=json", "--group_reporting"}, args...)
}

// Fio runs fio with these arguments besides those that each job has, in the host's directory.
func (h *Host) Fio(ctx context.Context, args ...string) (Fio, error) {
	all := FioArgs(args...)
	return RunFio(h.Command(ctx, all[0], all[1:]...))
}

// RunFio runs a command that is fio, with FioArgs. The figures are those of the direction with
// more operations; rates are of both together.
func RunFio(cmd *exec.Cmd) (Fio, error) {
	text, err := Output(cmd)
	if err != nil {
		return Fio{}, err
	}
	f, err := parseFio(text)
	f.CPU = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return f, err
}

func parseFio(text string) (Fio, error) {
	var said struct {
		Jobs []struct {
			Error       int `json:"error"`
			Read, Write fioDir
			Sync        struct {
				Lat struct {
					Percentile map[string]float64 `json:"percentile"`
				} `json:"lat_ns"`
			} `json:"sync"`
		}
	}
	// It may say something else before.
	_, after, _ := strings.Cut(text, "{")
	if err := json.Unmarshal([]byte("{"+after), &said); err != nil || len(said.Jobs) != 1 || said.Jobs[0].Error != 0 {
		return Fio{}, fmt.Errorf("fio says %q: %v", text, err)
	}
	d, other := said.Jobs[0].Read, said.Jobs[0].Write
	if other.Total > d.Total {
		d, other = other, d
	}
	if d.Total == 0 {
		return Fio{}, fmt.Errorf("fio has done nothing: %s", text)
	}
	p := func(name string) time.Duration { return time.Duration(d.Clat.Percentile[name]) }
	return Fio{
		Rate: d.IOPS + other.IOPS, Bytes: d.Bytes + other.Bytes, Ops: d.Total + other.Total, Took: time.Duration(d.MS) * time.Millisecond,
		P50: p("50.000000"), P99: p("99.000000"), P999: p("99.900000"), Longest: time.Duration(d.Clat.Max),
		SyncP99: time.Duration(said.Jobs[0].Sync.Lat.Percentile["99.000000"]),
	}, nil
}

// Random returns the arguments for random operations of 4 KiB that go by time.
func Random(rw string, depth, seconds int) []string {
	return []string{"--rw=" + rw, "--bs=4k", fmt.Sprintf("--iodepth=%d", depth), "--norandommap", "--time_based", fmt.Sprintf("--runtime=%d", seconds)}
}
