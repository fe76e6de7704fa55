package writelog

import (
	"hash/crc32"

	"github.com/lsd-ceph/lsd/internal/aio"
)

// nullDevice takes operations and never ends them.
type nullDevice struct{}

func (nullDevice) ReadAt([]byte, int64, aio.Completer)  {}
func (nullDevice) WriteAt([]byte, int64, aio.Completer) {}
func (nullDevice) Sync(aio.Completer)                   {}

func sum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }
