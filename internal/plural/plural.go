// Package plural puts numbers of things into words.
package plural

import "strconv"

// Count returns how many of a thing there are, such as "1 object" or "2 objects".
// The thing is an English noun whose plural ends in s.
func Count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return strconv.Itoa(n) + " " + thing + "s"
}
