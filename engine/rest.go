package engine

// Rest drops what memory an idle image does not need, and reports whether the
// memory that Start was given may lose its contents. It does nothing while
// anything is under way, or in the log alone. If much has died in the store since the
// last checkpoint, it begins one first, so that this can be deleted.
func (im *Image) Rest() bool {
	if im.jobs+im.reading+len(im.queue)+im.late.n+im.acks.n+im.flushes.n+im.blocked.n > 0 || im.open != nil ||
		im.apply.h != nil || im.clean.running != nil || im.checkpoint.running != nil || im.flatten != nil {
		return false
	}
	if !im.readOnly && im.checkpoint.atRest() {
		return false
	}
	im.tail = tail{}
	im.spare, im.queue, im.waiters = nil, nil, nil
	im.readOps, im.slowOps, im.slow = nil, nil, [slowKinds]slowReads{}
	im.streams, im.own, im.spanOf = streams{}, gathered{}, nil
	im.sums.clear()
	im.windows.drop(0)
	return !im.readOnly && im.log.Rest()
}
