package wire

import (
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// maxFiles is how many descriptors come with a frame at most.
const maxFiles = 3

// WriteWithFiles writes a frame, with descriptors that come with its first byte. They
// stay the caller's.
func WriteWithFiles(conn *net.UnixConn, f Frame, fds ...int) error {
	b, err := f.Append(nil)
	if err != nil {
		return err
	}
	n, _, err := conn.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
	if err == nil && n < len(b) { // the socket's buffer is full
		_, err = conn.Write(b[n:])
	}
	if err != nil {
		return fmt.Errorf("write %v with %d descriptors: %w", f.Type, len(fds), err)
	}
	return nil
}

// ReadWithFiles reads a frame and the descriptors that came with it, which are the
// caller's. It is what a client does; nothing may have been read ahead from conn.
func ReadWithFiles(conn *net.UnixConn) (Frame, []int, error) {
	r := fileReader{conn: conn}
	f, err := r.frame()
	if err != nil {
		return Frame{}, nil, errors.Join(err, closeAll(r.fds))
	}
	return f, r.fds, nil
}

// A fileReader reads from a socket and gathers the descriptors that come.
type fileReader struct {
	conn *net.UnixConn
	fds  []int
}

func (r *fileReader) frame() (Frame, error) {
	var h [HeaderSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return Frame{}, fmt.Errorf("read a frame's header: %w", err)
	}
	f, n, err := parseHeader(h[:])
	if err != nil {
		return Frame{}, err
	}
	f.Payload = make([]byte, n)
	if _, err := io.ReadFull(r, f.Payload); err != nil {
		return Frame{}, fmt.Errorf("read %v of %d bytes: %w", f.Type, n, err)
	}
	return f, check(h[:], f)
}

// Read implements io.Reader.
func (r *fileReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	n, oobn, flags, _, err := r.conn.ReadMsgUnix(p, oob)
	if err != nil {
		return n, err
	}
	if perr := r.gather(oob[:oobn]); perr != nil {
		return n, perr
	}
	switch {
	case flags&unix.MSG_CTRUNC != 0:
		return n, fmt.Errorf("more than %d descriptors came", maxFiles)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// gather takes the descriptors of control messages.
func (r *fileReader) gather(oob []byte) error {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("parse what came with a frame: %w", err)
	}
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			return fmt.Errorf("parse what came with a frame: %w", err)
		}
		r.fds = append(r.fds, fds...)
	}
	return nil
}

func closeAll(fds []int) error {
	var err error
	for _, fd := range fds {
		err = errors.Join(err, unix.Close(fd))
	}
	return err
}
