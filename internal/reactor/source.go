package reactor

// A Source brings a reactor work by another way than its ring and its inbox: memory
// that it shares with others. Its methods are called on the reactor, in each turn, and
// must not block.
type Source interface {
	// Poll takes what has come. The turn's completions, posted functions and timers
	// have been run, and its hooks have not.
	Poll()
	// EndTurn tells others what the turn has done for them. It comes after all hooks,
	// and before what is queued on the ring is submitted.
	EndTurn()
	// Waiting reports whether something has come that Poll would take. The reactor may ask
	// again and again before it sleeps.
	Waiting() bool
	// Arm says that the reactor is about to sleep. From then on until Disarm whoever
	// brings the source something must end the reactor's wait, by a completion on its
	// ring; and Arm reports whether something has come before that was sure, or is
	// left to do, so that the reactor does not sleep.
	Arm() bool
	// Disarm follows each Arm when the reactor is awake again.
	Disarm()
}

// AddSource makes the reactor look at s in each turn, for the rest of its life, after
// the sources that were added before. It is called on the reactor.
func (r *Reactor) AddSource(s Source) { r.sources = append(r.sources, s) }
