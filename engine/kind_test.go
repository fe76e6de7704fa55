package engine

import (
	"testing"

	"github.com/google/uuid"
)

func TestKindOf(t *testing.T) {
	id := uuid.New()
	ref := checkpointRef{Object: 5, Epoch: 2}
	keys := map[string]ObjectKind{
		dataKey(id, 7, 1):       KindData,
		mapKey(id, ref, 3):      KindMap,
		manifestKey(id, ref, 0): KindManifest,
		SuperblockKey(id):       KindSuperblock,
		attributesKey(id):       KindAttributes,
		"directory":             KindOther,
		"super":                 KindOther,
		id.String() + "/d":      KindOther,
		"":                      KindOther,
	}
	for key, want := range keys {
		if got := KindOf(key); got != want {
			t.Errorf("KindOf(%q) = %v, want %v", key, got, want)
		}
	}
	key := dataKey(id, 7, 1)
	if n := testing.AllocsPerRun(100, func() { KindOf(key) }); n != 0 {
		t.Errorf("KindOf allocates %v times", n)
	}
}
