package wire

// Features of an image, as librbd's flags have them.
const (
	FeatureLayering      uint64 = 1 << 0
	FeatureExclusiveLock uint64 = 1 << 2
	FeatureObjectMap     uint64 = 1 << 3
	FeatureFastDiff      uint64 = 1 << 4
)

// A FeaturesResult is that of Features: those that the image has.
type FeaturesResult struct{ Features uint64 }

// Fields implements Message.
func (m *FeaturesResult) Fields(f Fields) { f.U64(&m.Features) }

// A SwitchFeaturesRequest switches features on, or off.
type SwitchFeaturesRequest struct {
	Features uint64
	On       bool
}

// Fields implements Message.
func (m *SwitchFeaturesRequest) Fields(f Fields) {
	f.U64(&m.Features)
	f.Bool(&m.On)
}
