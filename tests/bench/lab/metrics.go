package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
)

// Metrics returns what the daemon tells Prometheus under these names, which have no labels.
func (d *Daemon) Metrics(ctx context.Context, names ...string) (map[string]float64, error) {
	all, err := d.metrics(ctx)
	if err != nil {
		return nil, err
	}
	found := make(map[string]float64, len(names))
	for _, name := range names {
		v, ok := all[name]
		if !ok {
			return nil, fmt.Errorf("there is no metric %s", name)
		}
		found[name] = v
	}
	return found, nil
}

// StoreOps returns what the daemon has asked of stores so far, by operation and kind of object:
// "put data".
func (d *Daemon) StoreOps(ctx context.Context) (map[string]float64, error) {
	all, err := d.metrics(ctx)
	if err != nil {
		return nil, err
	}
	ops := make(map[string]float64)
	for name, v := range all {
		labels, ok := strings.CutPrefix(name, "lsd_store_operations_total")
		if !ok {
			continue
		}
		var object, op string
		if _, err := fmt.Sscanf(labels, "{object=%q,operation=%q}", &object, &op); err != nil {
			return nil, fmt.Errorf("metric %s: %w", name, err)
		}
		ops[op+" "+object] = v
	}
	return ops, nil
}

// metrics returns all that the daemon tells Prometheus, by name and labels as they are written.
func (d *Daemon) metrics(ctx context.Context) (map[string]float64, error) {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", d.socket)
	}}}
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://lsdd/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(q)
	if err != nil {
		return nil, fmt.Errorf("asking lsdd for its metrics: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, errors.New("asking lsdd for its metrics: " + resp.Status)
	}
	return parseMetrics(resp.Body)
}

// parseMetrics returns the values in Prometheus's text format, by name and labels.
func parseMetrics(text io.Reader) (map[string]float64, error) {
	found := make(map[string]float64)
	s := bufio.NewScanner(text)
	for s.Scan() {
		line := s.Text()
		if line == "" || line[0] == '#' {
			continue
		}
		end := strings.LastIndexByte(line, '}') + 1 // a label may have spaces
		n := strings.IndexByte(line[end:], ' ')
		if n < 0 {
			return nil, fmt.Errorf("a metric without a value: %q", line)
		}
		name, value := line[:end+n], line[end+n+1:]
		value, _, _ = strings.Cut(value, " ") // a time may follow
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return nil, fmt.Errorf("metric %s: %w", name, err)
		}
		found[name] = v
	}
	return found, s.Err()
}
