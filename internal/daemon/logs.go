package daemon

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// RecordedLogs returns the paths of the write logs in the records of a state
// directory.
func RecordedLogs(stateDir string) ([]string, error) {
	dir := records{filepath.Join(stateDir, "attachments")}.dir
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, e := range entries {
		if r, err := readRecord(filepath.Join(dir, e.Name())); err == nil && r.Log != "" {
			paths = append(paths, r.Log)
		}
	}
	return paths, nil
}
