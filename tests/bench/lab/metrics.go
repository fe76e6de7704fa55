package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// Metrics returns what the daemon tells Prometheus under these names, which have no labels.
func (d *Daemon) Metrics(ctx context.Context, names ...string) (map[string]float64, error) {
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
	return parseMetrics(resp.Body, names)
}

// parseMetrics returns the values of these names in Prometheus's text format.
func parseMetrics(text io.Reader, names []string) (map[string]float64, error) {
	found := make(map[string]float64, len(names))
	s := bufio.NewScanner(text)
	for s.Scan() {
		name, value, ok := strings.Cut(s.Text(), " ")
		if !ok || !slices.Contains(names, name) {
			continue
		}
		value, _, _ = strings.Cut(value, " ") // a time may follow
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return nil, fmt.Errorf("metric %s: %w", name, err)
		}
		found[name] = v
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	for _, name := range names {
		if _, ok := found[name]; !ok {
			return nil, fmt.Errorf("there is no metric %s", name)
		}
	}
	return found, nil
}
