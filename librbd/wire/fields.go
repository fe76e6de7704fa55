package wire

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/uuid"
)

// ErrPayload is what errors of a Decoder match: the payload is not what it must be.
var ErrPayload = errors.New("malformed payload")

// Fields goes through the fields of a message, in their order: an Encoder writes what
// they are, and a Decoder sets them.
type Fields interface {
	U32(*uint32)
	U64(*uint64)
	I64(*int64)
	Bool(*bool) // a u32; anything but 0 is true
	ID(*uuid.UUID)
	Name(*string) // at most MaxName bytes
	// Text is of at most so many bytes.
	Text(v *string, most int)
	// Count is the number of the elements that follow, of which each has at least size
	// bytes: it takes that to be written and returns that to go through.
	Count(n, size int) int
}

// A Message is a payload, or the part of one.
type Message interface{ Fields(Fields) }

// Append appends the messages' bytes to b. It fails with ErrTooLong when a name is.
func Append(b []byte, msgs ...Message) ([]byte, error) {
	e := Encoder{b: b}
	for _, m := range msgs {
		m.Fields(&e)
	}
	return e.b, e.err
}

// Parse sets the messages to what is in the payload, whose bytes they do not keep. What
// follows the last field is ignored. The error matches ErrPayload.
func Parse(payload []byte, msgs ...Message) error {
	d := Decoder{b: payload}
	for _, m := range msgs {
		m.Fields(&d)
	}
	return d.err
}

// An Encoder appends fields. Its error sticks.
type Encoder struct {
	b   []byte
	err error
}

// Bytes returns what was appended.
func (e *Encoder) Bytes() []byte { return e.b }

// Err returns the first error.
func (e *Encoder) Err() error { return e.err }

// U32 implements Fields.
func (e *Encoder) U32(v *uint32) { e.b = binary.LittleEndian.AppendUint32(e.b, *v) }

// U64 implements Fields.
func (e *Encoder) U64(v *uint64) { e.b = binary.LittleEndian.AppendUint64(e.b, *v) }

// I64 implements Fields.
func (e *Encoder) I64(v *int64) { e.b = binary.LittleEndian.AppendUint64(e.b, uint64(*v)) }

// Bool implements Fields.
func (e *Encoder) Bool(v *bool) {
	var n uint32
	if *v {
		n = 1
	}
	e.U32(&n)
}

// ID implements Fields.
func (e *Encoder) ID(v *uuid.UUID) { e.b = append(e.b, v[:]...) }

// Name implements Fields.
func (e *Encoder) Name(v *string) { e.Text(v, MaxName) }

// Text implements Fields.
func (e *Encoder) Text(v *string, most int) {
	if len(*v) > most && e.err == nil {
		e.err = fmt.Errorf("a name of %d bytes, of at most %d: %w", len(*v), most, ErrTooLong)
	}
	n := uint32(len(*v))
	e.U32(&n)
	e.b = append(e.b, *v...)
}

// Count implements Fields.
func (e *Encoder) Count(n, _ int) int {
	v := uint32(n)
	e.U32(&v)
	return n
}

// A Decoder takes fields off a payload. Its error sticks; what comes after it is left as
// it was.
type Decoder struct {
	b   []byte
	err error
}

// NewDecoder returns a Decoder of a payload.
func NewDecoder(payload []byte) *Decoder { return &Decoder{b: payload} }

// Err returns the first error. It matches ErrPayload.
func (d *Decoder) Err() error { return d.err }

// Rest returns what has not been taken yet.
func (d *Decoder) Rest() []byte { return d.b }

// next takes n bytes, or returns nil.
func (d *Decoder) next(n int, what string) []byte {
	if d.err != nil {
		return nil
	}
	if n > len(d.b) {
		d.err = fmt.Errorf("%w: %s of %d bytes, and %d are left", ErrPayload, what, n, len(d.b))
		return nil
	}
	p := d.b[:n:n]
	d.b = d.b[n:]
	return p
}

// U32 implements Fields.
func (d *Decoder) U32(v *uint32) {
	if p := d.next(4, "a number"); p != nil {
		*v = binary.LittleEndian.Uint32(p)
	}
}

// U64 implements Fields.
func (d *Decoder) U64(v *uint64) {
	if p := d.next(8, "a number"); p != nil {
		*v = binary.LittleEndian.Uint64(p)
	}
}

// I64 implements Fields.
func (d *Decoder) I64(v *int64) {
	if p := d.next(8, "a number"); p != nil {
		*v = int64(binary.LittleEndian.Uint64(p))
	}
}

// Bool implements Fields.
func (d *Decoder) Bool(v *bool) {
	var n uint32
	if d.U32(&n); d.err == nil {
		*v = n != 0
	}
}

// ID implements Fields.
func (d *Decoder) ID(v *uuid.UUID) {
	if p := d.next(len(v), "an id"); p != nil {
		copy(v[:], p)
	}
}

// Name implements Fields.
func (d *Decoder) Name(v *string) { d.Text(v, MaxName) }

// Text implements Fields.
func (d *Decoder) Text(v *string, most int) {
	var n uint32
	d.U32(&n)
	if d.err == nil && uint64(n) > uint64(most) {
		d.err = fmt.Errorf("%w: a name of %d bytes, of at most %d", ErrPayload, n, most)
	}
	if p := d.next(int(n), "a name"); d.err == nil {
		*v = string(p)
	}
}

// Count implements Fields.
func (d *Decoder) Count(_, size int) int {
	var n uint32
	d.U32(&n)
	if d.err == nil && uint64(n)*uint64(size) > uint64(len(d.b)) {
		d.err = fmt.Errorf("%w: %d elements, and %d bytes are left", ErrPayload, n, len(d.b))
	}
	if d.err != nil {
		return 0
	}
	return int(n)
}
