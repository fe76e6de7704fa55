package daemon

import (
	"github.com/lsd-ceph/lsd/internal/api"
	"github.com/lsd-ceph/lsd/ublk"
	"golang.org/x/sys/unix"
)

// usedFeatures are what lsd uses of ublk; it needs the first two.
const usedFeatures = ublk.FeatureRecovery | ublk.FeatureReissue | ublk.FeatureIoctlEncode | ublk.FeatureUpdateSize | ublk.FeatureSafeStop

// Features tells what a driver can do, for people.
func Features(f ublk.Features) api.Features {
	var u unix.Utsname
	_ = unix.Uname(&u) // for people: it may be empty
	return api.Features{
		Mask:    uint64(f),
		Kernel:  unix.ByteSliceToString(u.Release[:]),
		Names:   f.Names(),
		Used:    (f & usedFeatures).Names(),
		Missing: (usedFeatures &^ f).Names(),
	}
}
