package engine

// storedMap says where the segments of the map are stored, as a checkpoint has left them.
type storedMap struct {
	maps     []mapObject
	segments [segmentKinds][]storedSegment // by index, up to the last one that there is
}

// mapObject is an object that holds map segments.
type mapObject struct {
	at   checkpointRef // that wrote it
	part uint32
	size uint32 // bytes
	live uint32 // bytes of segments that are current
	died uint32 // object of the checkpoint with which live became 0
}

// storedSegment says where in the map objects a segment is, or its delta. Size 0 means
// that there is none: the segment is empty, or what is stored whole is all of it.
type storedSegment struct {
	object uint32 // index into the map objects
	offset uint32 // bytes
	size   uint32 // bytes
}

// place is where in the store a segment or a delta is. Size 0 means nowhere.
type place struct {
	object       mapObject
	offset, size uint32 // bytes
}

// places are where a segment and its delta are.
type places [segmentKinds]place

// segment returns where segment i is stored, or its delta.
func (m *storedMap) segment(kind segmentKind, i uint32) storedSegment {
	if list := m.segments[kind]; int(i) < len(list) {
		return list[i]
	}
	return storedSegment{}
}

// empty reports whether nothing of segment i is stored.
func (m *storedMap) empty(i uint32) bool { return m.segment(kindWhole, i).size == 0 }

// set makes s the place of segment i, or of its delta.
func (m *storedMap) set(kind segmentKind, i uint32, s storedSegment) {
	list := m.segments[kind]
	if s.size == 0 && int(i) >= len(list) {
		return
	}
	for int(i) >= len(list) {
		list = append(list, storedSegment{})
	}
	list[i] = s
	m.segments[kind] = list
}

// place returns where segment i is in the store, or its delta.
func (m *storedMap) place(kind segmentKind, i uint32) place {
	s := m.segment(kind, i)
	if s.size == 0 {
		return place{}
	}
	o := m.maps[s.object]
	o.live, o.died = 0, 0 // these change
	return place{o, s.offset, s.size}
}

// places returns where segment i and its delta are in the store.
func (m *storedMap) places(i uint32) (p places) {
	for kind := range segmentKinds {
		p[kind] = m.place(kind, i)
	}
	return p
}

// filled returns how many segments are not empty.
func (m *storedMap) filled() (n int) {
	for _, s := range m.segments[kindWhole] {
		if s.size > 0 {
			n++
		}
	}
	return n
}

// held returns how many segments and deltas are stored, and the bytes that they have.
func (m *storedMap) held() (n, bytes int) {
	for _, list := range m.segments {
		for _, s := range list {
			if s.size > 0 {
				n++
				bytes += int(s.size)
			}
		}
	}
	return n, bytes
}

// withoutRemoved returns a copy without the map objects that have been removed.
func (m *storedMap) withoutRemoved() storedMap {
	n := storedMap{maps: make([]mapObject, 0, len(m.maps))}
	index := make([]uint32, len(m.maps))
	for i, o := range m.maps {
		if o.size > 0 {
			index[i] = uint32(len(n.maps))
			n.maps = append(n.maps, o)
		}
	}
	for kind, list := range m.segments {
		n.segments[kind] = append([]storedSegment(nil), list...)
		for i := range n.segments[kind] {
			if s := &n.segments[kind][i]; s.size > 0 {
				s.object = index[s.object]
			}
		}
	}
	return n
}
