package policy

import (
	"errors"
	"fmt"
	"math"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/lsd-ceph/lsd/backend"
)

const (
	maxFile  = 1 << 20
	maxRules = 4096
	maxField = 8192 // the longest URL
)

// A Resolver finds the number of a user, or of a group, by its name.
type Resolver func(group bool, name string) (uint32, error)

// Parse reads a policy. The error is one line that names the file and the line in it.
func Parse(file, text string, resolve Resolver) (*Policy, error) {
	if len(text) > maxFile {
		return nil, fmt.Errorf("%s: %d bytes: the limit is %d", file, len(text), maxFile)
	}
	p := new(Policy)
	number := 0
	for line := range strings.Lines(text) {
		number++
		r, unknown, err := parseLine(strings.TrimSuffix(line, "\n"), resolve)
		switch {
		case err != nil:
		case r == nil:
			continue
		case len(p.rules) == maxRules:
			err = fmt.Errorf("it is one line too many: the limit is %d", maxRules)
		}
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, number, err)
		}
		if unknown != nil {
			p.Unknown = append(p.Unknown, fmt.Sprintf("%s:%d: %v", file, number, unknown))
		}
		p.rules = append(p.rules, *r)
	}
	return p, nil
}

// parseLine reads one line; nil if that says nothing. unknown says why a subject is nobody.
func parseLine(line string, resolve Resolver) (r *rule, unknown, err error) {
	if !utf8.ValidString(line) || strings.ContainsFunc(line, func(c rune) bool { return unicode.IsControl(c) && c != '\t' }) {
		return nil, nil, errors.New("control character, or not UTF-8")
	}
	fields := strings.FieldsFunc(line, func(c rune) bool { return c == ' ' || c == '\t' })
	if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
		return nil, nil, nil
	}
	if fields[0] != "allow" || len(fields) != 5 {
		return nil, nil, errors.New("a line is: allow user:NAME|group:NAME STORE IMAGES RIGHTS")
	}
	if slices.ContainsFunc(fields, func(f string) bool { return len(f) > maxField }) {
		return nil, nil, fmt.Errorf("a field has more than %d bytes", maxField)
	}
	r = new(rule)
	if r.who, unknown, err = parseSubject(fields[1], resolve); err != nil {
		return nil, nil, err
	}
	if r.store, err = parseStore(fields[2]); err != nil {
		return nil, nil, err
	}
	if err := backend.CheckImageName(strings.ReplaceAll(fields[3], "*", "x")); err != nil {
		return nil, nil, err
	}
	r.grant.images = fields[3]
	r.grant.rights, err = parseRights(fields[4])
	return r, unknown, err
}

// parseSubject reads a user or a group. unknown says why it is nobody.
func parseSubject(s string, resolve Resolver) (who subject, unknown, err error) {
	kind, name, _ := strings.Cut(s, ":")
	if kind != "user" && kind != "group" || name == "" {
		return who, nil, fmt.Errorf("%q is nobody: write user:NAME or group:NAME, with a name or a number", clip(s))
	}
	who.group = kind == "group"
	if strings.Trim(name, "0123456789") == "" {
		id, err := strconv.ParseUint(name, 10, 32)
		if err != nil || id == math.MaxUint32 {
			return who, nil, fmt.Errorf("%q is no number of a user or group", clip(name))
		}
		who.id, who.known = uint32(id), true
		return who, nil, nil
	}
	if who.id, unknown = resolve(who.group, name); unknown != nil {
		return who, fmt.Errorf("%s: %w", clip(s), unknown), nil
	}
	who.known = true
	return who, nil, nil
}

// parseStore reads the pattern of a store's URL.
func parseStore(s string) (p storePattern, err error) {
	if s == "*" {
		return storePattern{any: true}, nil
	}
	place, query, _ := strings.Cut(s, "?")
	if strings.Contains(query, "*") || strings.Contains(strings.ToLower(s), "%2a") {
		return p, errors.New("a '*' stands in for parts of a pool, a namespace or a path alone, and cannot be meant itself")
	}
	if p.url, err = backend.ParseStore(s); err != nil {
		return p, err
	}
	switch p.url.Scheme {
	case backend.SchemeMem:
		return p, errors.New("a mem: store is not there for library clients")
	case backend.SchemeFile:
		// A cleaned pattern would not be the one that was meant: what is a '*' before "..".
		dir, err := url.PathUnescape(strings.TrimPrefix(place, "file://"))
		if err != nil || dir != path.Clean(dir) {
			return p, fmt.Errorf("a path with empty parts, '.' or '..', which is %s", p.url.Dir)
		}
	}
	return p, nil
}

// parseRights reads a list of rights.
func parseRights(s string) (Rights, error) {
	var r Rights
	for word := range strings.SplitSeq(s, ",") {
		i := slices.Index(names[:], word)
		if i < 0 {
			return 0, fmt.Errorf("%q is no right: they are read, write and manage, with commas between them", clip(word))
		}
		if r&(1<<i) != 0 {
			return 0, fmt.Errorf("%s is there twice", word)
		}
		r |= 1 << i
	}
	return r, nil
}

// clip keeps a wrong word from filling the screen.
func clip(s string) string {
	if len(s) > 32 {
		return s[:32] + "..."
	}
	return s
}
