// Package policy says who may do what with which images through the library's socket.
//
// A policy is a text file. Each line allows something, and what no line allows is denied; so
// their order means nothing, and what several lines allow adds up:
//
//	# who                 stores           images   rights
//	allow user:alice      rados://vms      *        read,write
//	allow group:backup    file:///srv/lsd  vm-*     read
//	allow group:lsd       *                *        read,write,manage
//
// The fields are separated by blanks or tabs. Lines that are empty, or begin with '#', say nothing.
//
//   - Who is a user or a group, by name or by number. A name that the host does not know is
//     nobody's, until the file is read again. Root may do everything, and needs no line.
//   - Stores is the URL of a store, in which '*' stands for any run of characters of the pool's
//     name, of the namespace's, or of one component of the directory's path: it never stands for
//     a '/', and never for no namespace. '*' alone is every store. The configuration and the
//     client of Ceph that a URL may name (?conf=, ?id=) are not patterns: a line is for URLs that
//     have the same, so one that names none, '*' included, is for none.
//   - Images is a pattern of images' names: '*' stands for any run of characters.
//   - Rights are read, write and manage, separated by commas. None includes another.
//
// Patterns are compared with what a URL was parsed to, not with its text.
package policy

import (
	"slices"
	"strings"

	"github.com/lsd-ceph/lsd/backend"
)

// Rights are what somebody may do with an image.
type Rights uint8

const (
	// Read is to see that the image is there, what it is like, and its data.
	Read Rights = 1 << iota
	// Write is to change its data, and what snapshots it has.
	Write
	// Manage is to make, clone, rename, resize, flatten and remove it.
	Manage

	// All is everything.
	All = Read | Write | Manage
)

// Has reports whether r includes all of want.
func (r Rights) Has(want Rights) bool { return r&want == want }

// names are those of the rights, by their bit.
var names = [...]string{"read", "write", "manage"}

// String returns the rights as a policy has them.
func (r Rights) String() string {
	var s []string
	for i, name := range names {
		if r&(1<<i) != 0 {
			s = append(s, name)
		}
	}
	if len(s) == 0 {
		return "nothing"
	}
	return strings.Join(s, ",")
}

// A Caller is a process that wants something.
type Caller struct {
	UID    uint32
	Groups []uint32 // the primary one and the supplementary ones
}

// root is what root may do in any store.
var root = Grants{{images: "*", rights: All}}

// A Policy says who may do what. It does not change.
type Policy struct {
	rules   []rule
	Unknown []string // what of it means nothing on this host: one line each
}

// A rule allows somebody something.
type rule struct {
	who   subject
	store storePattern
	grant grant
}

// A subject is a user or a group.
type subject struct {
	group bool
	id    uint32
	known bool // else it is nobody
}

func (s subject) is(c Caller) bool {
	switch {
	case !s.known:
		return false
	case s.group:
		return slices.Contains(c.Groups, s.id)
	}
	return c.UID == s.id
}

// Group returns the policy by which the members of a group may do everything.
func Group(gid uint32) *Policy {
	return &Policy{rules: []rule{{subject{group: true, id: gid, known: true}, storePattern{any: true}, root[0]}}}
}

// Names reports whether the policy allows a caller anything at all.
func (p *Policy) Names(c Caller) bool {
	return c.UID == 0 || slices.ContainsFunc(p.rules, func(r rule) bool { return r.who.is(c) })
}

// OnlyGroup reports whether the policy allows nothing to anybody but root and a group.
func (p *Policy) OnlyGroup(gid uint32) bool {
	return !slices.ContainsFunc(p.rules, func(r rule) bool { return r.who.known && r.who != subject{true, gid, true} })
}

// In returns what a caller may do in a store.
func (p *Policy) In(c Caller, u backend.URL) Grants {
	if c.UID == 0 {
		return root
	}
	var g Grants
	for _, r := range p.rules {
		if r.who.is(c) && r.store.match(u) {
			g = append(g, r.grant)
		}
	}
	return g
}

// Grants are what somebody may do in one store. Without any he may do nothing.
type Grants []grant

// A grant is one part of it.
type grant struct {
	images string
	rights Rights
}

// Rights returns what may be done with the image of that name, whether there is one or not.
func (g Grants) Rights(image string) Rights {
	var r Rights
	for _, one := range g {
		if match(one.images, image) {
			r |= one.rights
		}
	}
	return r
}

// Allow reports whether all of want may be done with the image of that name.
func (g Grants) Allow(image string, want Rights) bool { return g.Rights(image).Has(want) }

// AllowAll reports whether all of want may be done with every image, whatever its name.
func (g Grants) AllowAll(want Rights) bool {
	var r Rights
	for _, one := range g {
		if one.images == "*" {
			r |= one.rights
		}
	}
	return r.Has(want)
}

// A storePattern is a store's URL in which '*' stands for parts of names.
type storePattern struct {
	any bool // of which no part is told
	url backend.URL
}

func (p storePattern) match(u backend.URL) bool {
	switch {
	case u.Conf != p.url.Conf || u.ID != p.url.ID:
		return false
	case p.any:
		return true
	case u.Scheme != p.url.Scheme || (u.Namespace == "") != (p.url.Namespace == ""):
		return false
	}
	return match(p.url.Pool, u.Pool) && match(p.url.Namespace, u.Namespace) && matchPath(p.url.Dir, u.Dir)
}

// matchPath matches each component of a path by itself.
func matchPath(pattern, path string) bool {
	p, s := strings.Split(pattern, "/"), strings.Split(path, "/")
	return slices.EqualFunc(p, s, match)
}

// match reports whether s is what pattern says, where '*' stands for any run of bytes.
func match(pattern, s string) bool {
	parts := strings.Split(pattern, "*")
	first, last := parts[0], parts[len(parts)-1]
	if len(parts) == 1 {
		return s == pattern
	}
	if len(s) < len(first)+len(last) || !strings.HasPrefix(s, first) || !strings.HasSuffix(s, last) {
		return false
	}
	s = s[len(first) : len(s)-len(last)]
	for _, part := range parts[1 : len(parts)-1] {
		i := strings.Index(s, part)
		if i < 0 {
			return false
		}
		s = s[i+len(part):]
	}
	return true
}
