package engine

const (
	// stintBase is what a turn without requests does: some 20 µs of it.
	stintBase = 16
	// stintPerRequest is what each request of a turn allows the next one: more than a
	// write of one block brings about. Its extent is entered, and at the space held by
	// default the cleaner looks at 2.4 for it and enters 1.4.
	stintPerRequest = 8
	// stintCopy is what it costs to copy a segment of the map for a checkpoint.
	stintCopy = 32
	// stintObjects is how many objects are weighed as victims at the cost of one.
	stintObjects = 64
)

// stint bounds what one turn does for destaging, cleaning and checkpoints, so that
// no request waits for long, and that all of it keeps up with the requests: the
// busier a turn was, the more the next one does. The unit is an extent that is
// looked up in the map or entered into it, about a microsecond. The reactor owns
// it.
type stint struct {
	left     int // in this turn; below 0 if the last thing begun took more
	kept     int // what an object that is being accepted may have of it in any case
	requests int // in this turn
}

// over reports whether what is left is for the next turn.
func (s *stint) over() bool { return s.left <= 0 }

// spend counts n units of work done.
func (s *stint) spend(n int) { s.left -= n }

// accept counts a unit of work done to accept an object, and reports whether it may be
// done in this turn. Half of a turn is kept for that: what clients have loaded may take
// more than there is, and writes would wait for as long as others read.
func (s *stint) accept() bool {
	if s.over() && s.kept <= 0 {
		return false
	}
	s.spend(1)
	s.kept--
	return true
}

// renew begins the next turn's.
func (s *stint) renew() {
	s.left, s.requests = stintBase+stintPerRequest*s.requests, 0
	s.kept = s.left / 2
}
