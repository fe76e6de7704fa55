package daemon

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// RecordedLogs returns the write logs in the records of a state directory, each
// with the URL of its image.
func RecordedLogs(stateDir string) (map[string]string, error) {
	dir := records{filepath.Join(stateDir, "attachments")}.dir
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	logs := make(map[string]string)
	for _, e := range entries {
		if r, err := readRecord(filepath.Join(dir, e.Name())); err == nil && r.Log != "" {
			logs[r.Log] = r.URL
		}
	}
	return logs, nil
}
