package rados

// #cgo LDFLAGS: -lrados
// #include "aio.h"
import "C"

import (
	"context"
	"fmt"
	"runtime/cgo"
	"syscall"
	"time"
	"unsafe"

	"github.com/lsd-ceph/lsd/backend"
)

// lsdRadosDone is called by a thread of librados when an operation is complete.
//
//export lsdRadosDone
func lsdRadosDone(handle C.uintptr_t) {
	h := cgo.Handle(handle)
	done := h.Value().(chan struct{})
	h.Delete()
	close(done)
}

// do is doIn for an operation on data.
func (l *link) do(ctx context.Context, len int, submit func(C.rados_ioctx_t, *C.struct_lsd_op) C.int, result func(op *C.struct_lsd_op, ret int)) (int, error) {
	return l.doIn(ctx, l.cluster.slots, len, submit, result)
}

// doIn runs one asynchronous operation, in one of slots: submit gives it to librados,
// and result, which may be nil, takes what it brought when it succeeded. It returns
// what the operation returned, which is negative errno if it failed, or the error of
// ctx; then the operation was cancelled, which it may have been too late for.
//
// The operation's own memory is len bytes of C's memory, and lives until librados
// is through with it, however long that takes. Until then it also holds its
// slot, so that operations that nobody waits for are bounded too.
func (l *link) doIn(ctx context.Context, slots chan struct{}, len int, submit func(C.rados_ioctx_t, *C.struct_lsd_op) C.int, result func(op *C.struct_lsd_op, ret int)) (int, error) {
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	if ctx.Err() != nil { // select draws lots when both are ready
		<-slots
		return 0, ctx.Err()
	}
	l.running.Add(1)
	done := make(chan struct{})
	h := cgo.NewHandle(done)
	l.cluster.memory.use(len)
	buf := alloc(len)
	var op *C.struct_lsd_op
	if buf != nil || len == 0 {
		op = C.lsd_op_new(C.uintptr_t(h), buf, C.size_t(len))
	}
	end := func() {
		if op != nil {
			C.lsd_op_free(op)
		}
		free(buf)
		<-slots
		l.running.Done()
	}
	if op == nil {
		h.Delete()
		end()
		return -int(syscall.ENOMEM), nil
	}
	io := C.rados_ioctx_t(l.ioctx.Pointer())
	if ret := submit(io, op); ret < 0 {
		h.Delete()
		end()
		return int(ret), nil
	}
	select {
	case <-done:
	case <-ctx.Done():
		C.rados_aio_cancel(io, op.completion)
		go func() {
			<-done
			end()
		}()
		return 0, ctx.Err()
	}
	ret := int(C.rados_aio_get_return_value(op.completion))
	if ret >= 0 && result != nil {
		result(op, ret)
	}
	end()
	return ret, nil
}

func (l *link) put(ctx context.Context, oid string, data []byte) (int, error) {
	l.cluster.memory.use(len(data)) // that librados copies them to
	return l.do(ctx, 0, func(io C.rados_ioctx_t, op *C.struct_lsd_op) C.int {
		name := C.CString(oid)
		defer C.free(unsafe.Pointer(name))
		return C.lsd_put(io, op, name, (*C.char)(unsafe.Pointer(unsafe.SliceData(data))), C.size_t(len(data)))
	}, nil)
}

// get reads into p, by way of C's memory: librados could still write to p after
// the caller, whose context has ended, has put it to other use.
func (l *link) get(ctx context.Context, oid string, p []byte, off int64) (int, error) {
	return l.do(ctx, len(p), func(io C.rados_ioctx_t, op *C.struct_lsd_op) C.int {
		name := C.CString(oid)
		defer C.free(unsafe.Pointer(name))
		return C.lsd_get(io, op, name, C.uint64_t(off))
	}, func(op *C.struct_lsd_op, ret int) {
		copy(p, bytesAt(op.buf, min(ret, len(p))))
	})
}

// getRanges is get for several ranges of an object, in one operation of it.
func (l *link) getRanges(ctx context.Context, oid string, ranges []backend.Range) (int, error) {
	parts, size := make([]C.struct_lsd_range, len(ranges)), backend.SizeOf(ranges)
	for i, r := range ranges {
		parts[i] = C.struct_lsd_range{off: C.uint64_t(r.Off), len: C.size_t(len(r.P))}
	}
	var part C.int // what the parts of the operation returned
	ret, err := l.do(ctx, size, func(io C.rados_ioctx_t, op *C.struct_lsd_op) C.int {
		name := C.CString(oid)
		defer C.free(unsafe.Pointer(name))
		return C.lsd_get_ranges(io, op, name, unsafe.SliceData(parts), C.size_t(len(parts)))
	}, func(op *C.struct_lsd_op, _ int) {
		data := bytesAt(op.buf, size)
		for i, p := range unsafe.Slice(op.ranges, len(ranges)) {
			r := &ranges[i]
			part = min(part, p.rval)
			r.N = copy(r.P, data[:min(p.got, p.len)])
			data = data[len(r.P):]
		}
	})
	return min(ret, int(part)), err
}

func (l *link) stat(ctx context.Context, oid string) (is backend.Info, ret int, err error) {
	ret, err = l.do(ctx, 0, func(io C.rados_ioctx_t, op *C.struct_lsd_op) C.int {
		name := C.CString(oid)
		defer C.free(unsafe.Pointer(name))
		return C.lsd_stat(io, op, name)
	}, func(op *C.struct_lsd_op, _ int) {
		is = backend.Info{Size: int64(op.size), Modified: time.Unix(int64(op.mtime), 0)}
	})
	return is, ret, err
}

func (l *link) remove(ctx context.Context, oid string) (int, error) {
	return l.do(ctx, 0, func(io C.rados_ioctx_t, op *C.struct_lsd_op) C.int {
		name := C.CString(oid)
		defer C.free(unsafe.Pointer(name))
		return C.lsd_remove(io, op, name)
	}, nil)
}

// load reads at most room bytes of contents, and the size and attribute that
// the object has at the same time.
func (l *link) load(ctx context.Context, oid string, room int) (data, attr []byte, size uint64, ret int, err error) {
	var part C.int // what the parts of the operation returned
	ret, err = l.doIn(ctx, l.cluster.leases, room, func(io C.rados_ioctx_t, op *C.struct_lsd_op) C.int {
		name := C.CString(oid)
		defer C.free(unsafe.Pointer(name))
		return C.lsd_load(io, op, name)
	}, func(op *C.struct_lsd_op, _ int) {
		part = min(op.rval_stat, op.rval_xattrs, op.rval_read)
		if part < 0 {
			return
		}
		size = uint64(op.size)
		data = append([]byte{}, bytesAt(op.buf, min(int(op.got), room))...)
		var val *C.char
		if n := C.lsd_attr(op, &val); n > 0 && n < 1<<16 {
			attr = append([]byte{}, bytesAt(val, int(n))...)
		}
	})
	return data, attr, size, min(ret, int(part)), err
}

// swap replaces contents and attribute of an object whose attribute is old, or
// makes it if old is empty.
func (l *link) swap(ctx context.Context, oid string, old, attr, data []byte) (int, error) {
	return l.doIn(ctx, l.cluster.leases, 0, func(io C.rados_ioctx_t, op *C.struct_lsd_op) C.int {
		name := C.CString(oid)
		defer C.free(unsafe.Pointer(name))
		ptr := func(p []byte) *C.char { return (*C.char)(unsafe.Pointer(unsafe.SliceData(p))) }
		return C.lsd_swap(io, op, name, ptr(old), C.size_t(len(old)),
			ptr(attr), C.size_t(len(attr)), ptr(data), C.size_t(len(data)))
	}, nil)
}

// blocklist adds a client to the cluster's blocklist. It blocks.
func (c *cluster) blocklist(addr string, d time.Duration) int {
	name := C.CString(addr)
	defer C.free(unsafe.Pointer(name))
	return int(C.rados_blocklist_add(C.rados_t(c.conn.Cluster()), name, C.uint32_t(d/time.Second)))
}

// bytesAt returns the n bytes at p, which are C's.
func bytesAt(p *C.char, n int) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(p)), n)
}

// errnoOf returns what the negative return value of librados means.
func errnoOf(ret int) error {
	if ret == -int(syscall.ESHUTDOWN) {
		return fmt.Errorf("the cluster has blocklisted this client: see ceph osd blocklist ls: %w", syscall.ESHUTDOWN)
	}
	return syscall.Errno(-ret)
}
