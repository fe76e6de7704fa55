package backend

import (
	"errors"
	"fmt"
	"strings"
)

// CheckKey returns nil if key is one that a Store must accept, or an error of
// one line that tells the rule it breaks. The error carries no class: a Store
// wraps it in ErrPermanent.
func CheckKey(key string) error {
	if key == "" {
		return errors.New("empty key")
	}
	if err := CheckPrefix(key); err != nil {
		return err
	}
	for part := range strings.SplitSeq(key, "/") {
		if part == "" {
			return fmt.Errorf("bad key %q: empty component", key)
		}
	}
	return nil
}

// CheckPrefix returns nil if prefix, which may be empty, can begin a key that
// CheckKey accepts, or an error of one line.
func CheckPrefix(prefix string) error {
	if len(prefix) > MaxKey {
		return fmt.Errorf("key %q... of %d bytes: the limit is %d", prefix[:16], len(prefix), MaxKey)
	}
	start := true // of a component
	for i := 0; i < len(prefix); i++ {
		c := prefix[i]
		switch {
		case c == '/' && start:
			return fmt.Errorf("bad key %q: empty component", prefix)
		case c == '.' && start:
			return fmt.Errorf("bad key %q: a component begins with a dot", prefix)
		case !keyByte(c):
			return fmt.Errorf("bad key %q: %q is not one of a-z 0-9 . _ - /", prefix, c)
		}
		start = c == '/'
	}
	return nil
}

func keyByte(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' ||
		c == '.' || c == '_' || c == '-' || c == '/'
}

// CheckPut returns nil if an immutable object of that key and size may be
// created, or an error of one line without a class.
func CheckPut(key string, size int) error {
	return checkSize(key, size, MaxObject)
}

// CheckSwap returns nil if a mutable object of that key may have that size, or
// an error of one line without a class.
func CheckSwap(key string, size int) error {
	return checkSize(key, size, MaxMutable)
}

func checkSize(key string, size, limit int) error {
	if err := CheckKey(key); err != nil {
		return err
	}
	if size > limit {
		return fmt.Errorf("%d bytes: the limit is %d", size, limit)
	}
	return nil
}

// CheckGet returns nil if a read may begin at off in an object of that key, or
// an error of one line without a class.
func CheckGet(key string, off int64) error {
	if err := CheckKey(key); err != nil {
		return err
	}
	if off < 0 {
		return fmt.Errorf("negative offset %d", off)
	}
	return nil
}
