package ublk

import (
	"fmt"
	"math/bits"
	"strings"
)

// Features are the driver's abilities, or the flags of a device (UBLK_F_*,
// include/uapi/linux/ublk_cmd.h).
type Features uint64

// The features, in the order of their bits.
const (
	FeatureZeroCopy       Features = 1 << iota // UBLK_F_SUPPORT_ZERO_COPY
	FeatureCompInTask                          // UBLK_F_URING_CMD_COMP_IN_TASK
	FeatureNeedGetData                         // UBLK_F_NEED_GET_DATA
	FeatureRecovery                            // UBLK_F_USER_RECOVERY
	FeatureReissue                             // UBLK_F_USER_RECOVERY_REISSUE
	FeatureUnprivileged                        // UBLK_F_UNPRIVILEGED_DEV
	FeatureIoctlEncode                         // UBLK_F_CMD_IOCTL_ENCODE
	FeatureUserCopy                            // UBLK_F_USER_COPY
	FeatureZoned                               // UBLK_F_ZONED
	FeatureFailIO                              // UBLK_F_USER_RECOVERY_FAIL_IO
	FeatureUpdateSize                          // UBLK_F_UPDATE_SIZE
	FeatureAutoBufReg                          // UBLK_F_AUTO_BUF_REG
	FeatureQuiesce                             // UBLK_F_QUIESCE
	FeaturePerIODaemon                         // UBLK_F_PER_IO_DAEMON
	FeatureBufRegAnywhere                      // UBLK_F_BUF_REG_OFF_DAEMON
	FeatureBatchIO                             // UBLK_F_BATCH_IO
	FeatureIntegrity                           // UBLK_F_INTEGRITY
	FeatureSafeStop                            // UBLK_F_SAFE_STOP_DEV
	FeatureNoPartScan                          // UBLK_F_NO_AUTO_PART_SCAN
	FeatureShmemZeroCopy                       // UBLK_F_SHMEM_ZC
)

// featureName returns the kernel's name of a bit without its UBLK_F_.
func featureName(bit int) string {
	names := [...]string{
		"SUPPORT_ZERO_COPY", "URING_CMD_COMP_IN_TASK", "NEED_GET_DATA", "USER_RECOVERY",
		"USER_RECOVERY_REISSUE", "UNPRIVILEGED_DEV", "CMD_IOCTL_ENCODE", "USER_COPY",
		"ZONED", "USER_RECOVERY_FAIL_IO", "UPDATE_SIZE", "AUTO_BUF_REG",
		"QUIESCE", "PER_IO_DAEMON", "BUF_REG_OFF_DAEMON", "BATCH_IO",
		"INTEGRITY", "SAFE_STOP_DEV", "NO_AUTO_PART_SCAN", "SHMEM_ZC",
	}
	if bit < len(names) {
		return names[bit]
	}
	return fmt.Sprintf("bit %d", bit)
}

// ParseFeatures returns the features of names, which are those of String, separated by
// spaces or commas.
func ParseFeatures(names string) (Features, error) {
	var f Features
next:
	for _, name := range strings.FieldsFunc(names, func(r rune) bool { return r == ' ' || r == ',' }) {
		for bit := range 64 {
			if featureName(bit) == name {
				f |= 1 << bit
				continue next
			}
		}
		return 0, fmt.Errorf("ublk: there is no feature %s", name)
	}
	return f, nil
}

// Has reports whether f has all of g.
func (f Features) Has(g Features) bool { return f&g == g }

// Names returns the kernel's names of the features in f, without UBLK_F_, in
// the order of their bits. A bit without a known name is called by its number.
func (f Features) Names() []string {
	var names []string
	for v := uint64(f); v != 0; v &= v - 1 {
		names = append(names, featureName(bits.TrailingZeros64(v)))
	}
	return names
}

// String returns the names, separated by spaces.
func (f Features) String() string { return strings.Join(f.Names(), " ") }
