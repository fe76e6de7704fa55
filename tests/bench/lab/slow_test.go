package lab

import "testing"

func TestBlockGroup(t *testing.T) {
	for _, x := range []struct {
		name, list string
		want       group // without anything: an error
	}{
		{"first version", "7:blkio:/x\n1:cpu:/y\n0::/\n", group{"/sys/fs/cgroup/blkio", "/x", "blkio.throttle.write_bps_device", ""}},
		{"second version", "0::/user.slice/a:b\n", group{"/sys/fs/cgroup", "/user.slice/a:b", "io.max", "wbps="}},
		{"none", "1:cpu:/y\n", group{}},
		{"empty", "", group{}},
	} {
		got, err := blockGroup(x.list)
		if got != x.want || (err != nil) != (x.want == group{}) {
			t.Errorf("%s: %+v, %v; want %+v", x.name, got, err, x.want)
		}
	}
}
