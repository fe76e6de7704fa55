package backend

import "errors"

// The classes of errors that a Store returns. An implementation wraps one of
// them, with what was being done to which object, and its own cause.
var (
	// ErrNotFound: the object is not there.
	ErrNotFound = errors.New("not found")
	// ErrExists: an immutable object of that key is there already.
	ErrExists = errors.New("exists already")
	// ErrConflict: a mutable object is not at the version that was named.
	ErrConflict = errors.New("changed meanwhile")
	// ErrTemporary: the store could not answer, or is full; the same call may
	// succeed later. Its outcome is unknown.
	ErrTemporary = errors.New("store unavailable")
	// ErrPermanent: repeating the call as it is will not help (no permission,
	// bad key, no such pool, not a directory, corrupt).
	ErrPermanent = errors.New("store refused")
)

// An Error says what a store was doing to which object when it failed.
// errors.Is matches both its class and its cause.
type Error struct {
	Op    string // the Store method, in lower case: "put", "get", ...
	Key   string // the object, or "" for the store itself
	Class error  // one of the classes above
	Cause error  // what the system or library said; may be nil
}

// Error returns one line: "put 1f/data/7: store unavailable: timed out".
func (e *Error) Error() string {
	s := e.Op
	if e.Key != "" {
		s += " " + e.Key
	}
	s += ": " + e.Class.Error()
	if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	return s
}

// Unwrap returns class and cause.
func (e *Error) Unwrap() []error {
	if e.Cause == nil {
		return []error{e.Class}
	}
	return []error{e.Class, e.Cause}
}
