package lab

import "testing"

func TestBlockGroup(t *testing.T) {
	for _, x := range []struct {
		name, list string
		want       group // without anything: an error
	}{
		{"first version", "7:blkio:/x\n1:cpu:/y\n0::/\n", group{root: "/sys/fs/cgroup/blkio", path: "/x", limit: "blkio.throttle.write_bps_device", none: "0"}},
		{"second version", "0::/user.slice/a:b\n", group{root: "/sys/fs/cgroup", path: "/user.slice/a:b", limit: "io.max", key: "wbps=", none: "max"}},
		{"none", "1:cpu:/y\n", group{}},
		{"empty", "", group{}},
	} {
		got, err := blockGroup(x.list)
		if got != x.want || (err != nil) != (x.want == group{}) {
			t.Errorf("%s: %+v, %v; want %+v", x.name, got, err, x.want)
		}
	}
}

func TestBound(t *testing.T) {
	for _, x := range []struct {
		list       string
		some, none string
	}{
		{"7:blkio:/x\n", "1024", "0"},
		{"0::/x\n", "wbps=1024", "wbps=max"},
	} {
		g, err := blockGroup(x.list)
		if err != nil {
			t.Fatal(err)
		}
		if some, none := g.bound(1024), g.bound(0); some != x.some || none != x.none {
			t.Errorf("%q: %q and %q, want %q and %q", x.list, some, none, x.some, x.none)
		}
	}
}
