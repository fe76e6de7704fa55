// Package durable makes changes of directories survive a power cut.
package durable

import "os"

// SyncDir makes durable which names the directory holds (fsync(2)): a file that
// was made, renamed or removed is so for good only afterwards.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
