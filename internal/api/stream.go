package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// message is one line of a stream.
type message struct {
	Progress *Progress       `json:"progress,omitempty"`
	Result   json.RawMessage `json:"result,omitempty"`
	Error    string          `json:"error,omitempty"`
}

// A Sender writes a stream. It may be used by one goroutine at a time.
type Sender struct {
	enc   *json.Encoder
	flush func()
}

// NewSender returns a Sender that writes to w and calls flush after each line.
func NewSender(w io.Writer, flush func()) *Sender {
	return &Sender{json.NewEncoder(w), flush}
}

func (s *Sender) send(m message) error {
	if err := s.enc.Encode(m); err != nil {
		return err
	}
	s.flush()
	return nil
}

// Progress sends how far it has come.
func (s *Sender) Progress(p Progress) error { return s.send(message{Progress: &p}) }

// Result ends the stream with a result.
func (s *Sender) Result(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.send(message{Result: b})
}

// Error ends the stream with an error.
func (s *Sender) Error(err error) error { return s.send(message{Error: OneLine(err)}) }

// errCut says that the daemon ended in the middle of a stream.
var errCut = errors.New("the daemon went away before it had answered: look at its log, and at lsdctl list")

// receive reads a stream to its end and decodes the result into v.
func receive(r io.Reader, progress func(Progress), v any) error {
	dec := json.NewDecoder(r)
	for {
		var m message
		if err := dec.Decode(&m); err != nil {
			return errCut
		}
		switch {
		case m.Error != "":
			return errors.New(m.Error)
		case m.Progress != nil:
			if progress != nil {
				progress(*m.Progress)
			}
		default:
			if v == nil || m.Result == nil {
				return nil
			}
			if err := json.Unmarshal(m.Result, v); err != nil {
				return fmt.Errorf("the daemon's answer makes no sense: %w", err)
			}
			return nil
		}
	}
}

// OneLine returns the error's text on one line.
func OneLine(err error) string {
	return strings.Join(strings.FieldsFunc(err.Error(), func(c rune) bool { return c == '\n' || c == '\r' }), "; ")
}
