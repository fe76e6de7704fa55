//go:build lab

package bench

import (
	"context"
	"os"
	"testing"

	"github.com/google/uuid"
	"github.com/lsd-ceph/lsd/backend"
	"github.com/lsd-ceph/lsd/backend/rados"
	"github.com/lsd-ceph/lsd/internal/cephtest"
)

func TestMain(m *testing.M) { os.Exit(cephtest.Main(m, 300, "bluestore")) }

// BenchmarkReadPathRADOS is BenchmarkReadPath on a real cluster.
func BenchmarkReadPathRADOS(b *testing.B) {
	u := backend.URL{Scheme: backend.SchemeRADOS, Pool: "rbd", Namespace: "bench-" + uuid.NewString()}
	st, err := new(rados.Clusters).Open(context.Background(), u)
	if err != nil {
		b.Fatal(err)
	}
	defer st.Close()
	readPath(b, workDir(b), st)
}
