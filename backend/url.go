package backend

import (
	"errors"
	"fmt"
	"net/url"
	"path"
	"strings"
	"unicode"
	"unicode/utf8"
)

// The schemes of store URLs.
const (
	SchemeFile  = "file"
	SchemeRADOS = "rados"
	SchemeMem   = "mem" // for tests: lives and dies with the process
)

const (
	// MaxImageName is the limit on the bytes of an image's name.
	MaxImageName = 96

	maxURL  = 8192
	maxPath = 1024 // of dir and conf; escaped, both and the rest fit in maxURL
	maxPart = 128  // of a pool, namespace or client id
)

// A URL names a store. It is comparable, and the values that ParseStore,
// ParseImage and the like return are canonical: two that name the same place in the same
// words are equal. It holds no secrets.
type URL struct {
	Scheme    string // one of the constants above
	Pool      string // rados: the pool; mem: the store's name, may be empty
	Namespace string // rados: the namespace in the pool, or empty
	Dir       string // file: the directory, absolute and clean
	Conf      string // rados: path of ceph.conf, absolute, or empty for the default
	ID        string // rados: the client is client.ID, or the default if empty
}

// ParseStore parses the URL of a store:
//
//	file:///dir
//	rados://pool[/namespace][?conf=/path&id=client]
//	mem:[name]
//
// Characters that have a meaning in a URL are written %xx. The error is one
// line, and repeats nothing that could be a secret.
func ParseStore(s string) (URL, error) {
	u, parts, err := parseURL(s)
	if err != nil {
		return URL{}, err
	}
	return u.withPlace(parts)
}

// ParseImage parses the URL of an image, which is its store's with one more
// component, and returns the store and the image's name:
//
//	file:///dir/image
//	rados://pool[/namespace]/image[?conf=/path&id=client]
//	mem:[name/]image
//
// The name is one that CheckImageName accepts. The error is as ParseStore's.
func ParseImage(s string) (u URL, image string, err error) {
	u, image, _, err = parseNamed(s, imageAlone)
	return u, image, err
}

// ParseSnapshot parses the URL of a snapshot, which is its image's with @ and the
// snapshot's name after the image's, and returns the store and both names:
//
//	file:///dir/image@snapshot
//	rados://pool[/namespace]/image@snapshot[?conf=/path&id=client]
//	mem:[name/]image@snapshot
//
// The names are such as CheckImageName and CheckSnapshotName accept. The error is as
// ParseStore's.
func ParseSnapshot(s string) (u URL, image, snapshot string, err error) {
	return parseNamed(s, snapshotAlone)
}

// ParseSource parses the URL of an image, as ParseImage does, or of a snapshot, as
// ParseSnapshot does. The snapshot's name is empty if it is an image's. The image may be in the
// trash: then its name is one that InTrash tells.
func ParseSource(s string) (u URL, image, snapshot string, err error) {
	return parseNamed(s, imageOrSnapshot)
}

// What the last component of a URL may name.
type named int

const (
	imageAlone named = iota
	snapshotAlone
	imageOrSnapshot
)

// parseNamed parses the URL of what is in a store.
func parseNamed(s string, what named) (u URL, image, snapshot string, err error) {
	fail := func(err error) (URL, string, string, error) { return URL{}, "", "", err }
	u, parts, err := parseURL(s)
	if err != nil {
		return fail(err)
	}
	last := len(parts) - 1
	if u.Scheme == SchemeRADOS && last < 1 {
		return fail(errors.New("rados URL names no image: write rados://pool/image or rados://pool/namespace/image"))
	}
	if image, snapshot, err = splitName(parts[last], what); err != nil {
		return fail(fmt.Errorf("%s URL: %w", u.Scheme, err))
	}
	if u, err = u.withPlace(parts[:last]); err != nil {
		return fail(err)
	}
	return u, image, snapshot, nil
}

// splitName splits the last component of a URL into the names of an image and of a
// snapshot, which is empty if there is none.
func splitName(part string, what named) (image, snapshot string, err error) {
	image, snapshot, at := strings.Cut(part, "@")
	switch {
	case at && what == imageAlone:
		return "", "", fmt.Errorf("bad image name %q: what has an '@' names a snapshot, and an image is wanted here", clip(part))
	case !at && what == snapshotAlone:
		return "", "", fmt.Errorf("%q names no snapshot: write it after the image's name, as in image@snapshot", clip(part))
	}
	if err := CheckImageName(image); err != nil && (what != imageOrSnapshot || !InTrash(image)) {
		return "", "", err
	}
	if at {
		err = CheckSnapshotName(snapshot)
	}
	return image, snapshot, err
}

// parseURL splits s into a URL with scheme and parameters, and the components
// of its path, of which there is at least one.
func parseURL(s string) (URL, []string, error) {
	if len(s) > maxURL {
		return URL{}, nil, fmt.Errorf("URL of %d bytes: the limit is %d", len(s), maxURL)
	}
	scheme, rest, ok := strings.Cut(s, ":")
	if !ok {
		return URL{}, nil, errors.New("not a URL: write file:///dir or rados://pool")
	}
	u := URL{Scheme: scheme}
	rest, query, hasQuery := strings.Cut(rest, "?")
	switch scheme {
	case SchemeFile:
		p, ok := strings.CutPrefix(rest, "///")
		if !ok {
			return URL{}, nil, errors.New("file URL needs an absolute path: write file:///dir, with three slashes")
		}
		rest = p
	case SchemeRADOS:
		p, ok := strings.CutPrefix(rest, "//")
		if !ok {
			return URL{}, nil, errors.New("rados URL needs two slashes: write rados://pool")
		}
		rest = p
	case SchemeMem:
		rest = strings.TrimPrefix(rest, "//")
	default:
		return URL{}, nil, fmt.Errorf("unknown scheme %q: known are file, rados", clip(scheme))
	}
	parts := strings.Split(rest, "/")
	for i, part := range parts {
		p, err := unescape(part)
		if err != nil {
			return URL{}, nil, fmt.Errorf("%s URL: %w", scheme, err)
		}
		parts[i] = p
	}
	if hasQuery {
		if err := u.setQuery(query); err != nil {
			return URL{}, nil, err
		}
	}
	return u, parts, nil
}

// setQuery sets what the query names. Its errors name parameters but never
// repeat values.
func (u *URL) setQuery(query string) error {
	if u.Scheme != SchemeRADOS {
		return fmt.Errorf("%s URL takes no parameters", u.Scheme)
	}
	seen := make(map[string]bool)
	for pair := range strings.SplitSeq(query, "&") {
		key, value, _ := strings.Cut(pair, "=")
		v, err := unescape(value)
		if err != nil {
			return fmt.Errorf("rados URL: parameter %q: %w", clip(key), err)
		}
		if seen[key] {
			return fmt.Errorf("rados URL: parameter %q is there twice", clip(key))
		}
		seen[key] = true
		switch key {
		case "conf":
			if !path.IsAbs(v) {
				return errors.New("rados URL: conf needs an absolute path: write ?conf=/etc/ceph/ceph.conf")
			}
			if len(v) > maxPath {
				return fmt.Errorf("rados URL: conf of %d bytes: the limit is %d", len(v), maxPath)
			}
			u.Conf = path.Clean(v)
		case "id":
			v = strings.TrimPrefix(v, "client.")
			if err := checkPart("client id", v); err != nil {
				return err
			}
			u.ID = v
		default:
			return fmt.Errorf("rados URL: unknown parameter %q: known are conf, id", clip(key))
		}
	}
	return nil
}

// withPlace returns u with the store's place as the path's components tell it.
func (u URL) withPlace(parts []string) (URL, error) {
	switch u.Scheme {
	case SchemeFile:
		for _, p := range parts {
			if strings.Contains(p, "/") {
				return URL{}, errors.New("file URL: a component of the path contains a slash")
			}
		}
		u.Dir = path.Clean("/" + strings.Join(parts, "/"))
		if u.Dir == "/" {
			return URL{}, errors.New("file URL names no directory: write file:///dir for a store, file:///dir/image for an image")
		}
		if len(u.Dir) > maxPath {
			return URL{}, fmt.Errorf("file URL has a path of %d bytes: the limit is %d", len(u.Dir), maxPath)
		}
		return u, nil
	case SchemeMem:
		if len(parts) > 1 {
			return URL{}, errors.New("mem URL has too many components: write mem:name")
		}
		if len(parts) == 1 {
			u.Pool = parts[0]
		}
		if u.Pool == "" {
			return u, nil
		}
		return u, checkPart("store name", u.Pool)
	}
	if len(parts) > 2 {
		return URL{}, errors.New("rados URL has too many components: write rados://pool/namespace for a store, rados://pool/namespace/image for an image")
	}
	u.Pool = parts[0]
	if err := checkPart("pool name", u.Pool); err != nil {
		return URL{}, err
	}
	if len(parts) == 2 {
		u.Namespace = parts[1]
		if err := checkPart("namespace", u.Namespace); err != nil {
			return URL{}, err
		}
	}
	return u, nil
}

// checkPart checks a name that Ceph gives a meaning to; what is the name of.
func checkPart(what, s string) error {
	switch {
	case s == "":
		return fmt.Errorf("URL has an empty %s", what)
	case len(s) > maxPart:
		return fmt.Errorf("URL has a %s of %d bytes: the limit is %d", what, len(s), maxPart)
	case strings.ContainsAny(s, "/@"):
		return fmt.Errorf("URL has a %s with a '/' or '@', which it cannot have", what)
	}
	return nil
}

// unescape decodes %xx, and refuses what cannot be shown on one line.
func unescape(s string) (string, error) {
	s, err := url.PathUnescape(s)
	if err != nil {
		return "", errors.New("a '%' is not followed by two hexadecimal digits: write %25 for a plain one")
	}
	if !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) {
		return "", errors.New("control character, or not UTF-8")
	}
	return s, nil
}

// clip keeps a wrong word from filling the screen.
func clip(s string) string {
	if len(s) > 16 {
		return s[:16] + "..."
	}
	return s
}

// CheckImageName returns nil if name can be an image's: 1 to MaxImageName
// characters A-Z a-z 0-9 . _ : + ~ -, of which the first is a letter, a digit
// or '_'. The error is one line that tells the rule.
//
// RBD forbids '/' and '@' alone; the rest is left out because it has a meaning
// for shells, terminals or QEMU's option syntax.
func CheckImageName(name string) error { return checkName("image", name) }

// CheckSnapshotName returns nil if name can be a snapshot's: the rule is that of
// images' names.
func CheckSnapshotName(name string) error { return checkName("snapshot", name) }

// checkName checks the name of an image, or of what.
func checkName(what, name string) error {
	switch {
	case name == "":
		return fmt.Errorf("empty %s name", what)
	case len(name) > MaxImageName:
		return fmt.Errorf("%s name of %d bytes: the limit is %d", what, len(name), MaxImageName)
	}
	for i := 0; i < len(name); i++ {
		c := name[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '_':
		case strings.IndexByte(".:+~-", c) < 0:
			return fmt.Errorf("bad %s name %q: it is made of A-Z a-z 0-9 . _ : + ~ -", what, clip(name))
		case i == 0:
			return fmt.Errorf("bad %s name %q: it begins with a letter, a digit or '_'", what, clip(name))
		}
	}
	return nil
}

// String returns the URL that ParseStore parses to u.
func (u URL) String() string {
	switch u.Scheme {
	case SchemeFile:
		return "file://" + escapePath(u.Dir)
	case SchemeMem:
		return "mem:" + escape(u.Pool)
	}
	return u.Scheme + "://" + u.radosPath() + u.query()
}

// Image returns the URL of the image of that name in the store u, which
// ParseImage parses to u and name.
func (u URL) Image(name string) string {
	switch u.Scheme {
	case SchemeFile:
		return u.String() + "/" + name
	case SchemeMem:
		if u.Pool == "" {
			return "mem:" + name
		}
		return u.String() + "/" + name
	}
	return u.Scheme + "://" + u.radosPath() + "/" + name + u.query()
}

// Snapshot returns the URL of a snapshot of the image of that name in the store u,
// which ParseSnapshot parses to u and both names.
func (u URL) Snapshot(image, snapshot string) string { return u.Image(image + "@" + snapshot) }

func (u URL) radosPath() string {
	s := escape(u.Pool)
	if u.Namespace != "" {
		s += "/" + escape(u.Namespace)
	}
	return s
}

func (u URL) query() string {
	sep, s := "?", ""
	if u.Conf != "" {
		s += sep + "conf=" + escapePath(u.Conf)
		sep = "&"
	}
	if u.ID != "" {
		s += sep + "id=" + escape(u.ID)
	}
	return s
}

// escape is url.PathEscape, and escapes also what ends a parameter's value.
func escape(s string) string {
	return strings.ReplaceAll(url.PathEscape(s), "&", "%26")
}

func escapePath(p string) string {
	return strings.ReplaceAll(escape(p), "%2F", "/")
}

// MarshalText returns u.String(), so that a URL in JSON is a string.
func (u URL) MarshalText() ([]byte, error) {
	return []byte(u.String()), nil
}

// UnmarshalText sets u to what ParseStore makes of text.
func (u *URL) UnmarshalText(text []byte) error {
	v, err := ParseStore(string(text))
	if err != nil {
		return err
	}
	*u = v
	return nil
}
