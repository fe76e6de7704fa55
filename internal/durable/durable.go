// Package durable makes changes of directories survive a power cut.
package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

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

// MkdirAll is os.MkdirAll that survives a power cut. A directory that is there may have
// been made a moment ago, by a process that died before its name was durable: so that is
// made durable, too, unless it is in one that we may not read, where others have made it.
func MkdirAll(dir string, mode fs.FileMode) error {
	err := os.Mkdir(dir, mode)
	if errors.Is(err, fs.ErrNotExist) {
		if err := MkdirAll(filepath.Dir(dir), mode); err != nil {
			return err
		}
		err = os.Mkdir(dir, mode)
	}
	there := false
	if errors.Is(err, fs.ErrExist) {
		st, serr := os.Stat(dir)
		there = serr == nil && st.IsDir()
	}
	if err != nil && !there {
		return err
	}
	err = SyncDir(filepath.Dir(dir))
	if there && errors.Is(err, fs.ErrPermission) {
		return nil
	}
	return err
}
