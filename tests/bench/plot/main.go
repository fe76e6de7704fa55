// Command plot draws results of benchmarks: for each JSON file that it is given
// it writes an SVG beside it, and prints the table.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/lsd-ceph/lsd/tests/bench"
)

func main() {
	for _, path := range os.Args[1:] {
		if err := plot(path); err != nil {
			fmt.Fprintf(os.Stderr, "plot: %s: %v\n", path, err)
			os.Exit(1)
		}
	}
}

func plot(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var r bench.Results
	if err := json.Unmarshal(b, &r); err != nil {
		return err
	}
	for _, row := range r.Rows {
		if len(row.Ours) == 0 || len(row.Peer) == 0 {
			return fmt.Errorf("row %q has no figures", row.Name)
		}
	}
	fmt.Printf("%s\n\n%s\n", r.Title, r.Table())
	return os.WriteFile(strings.TrimSuffix(path, ".json")+".svg", []byte(r.SVG()), 0o644)
}
