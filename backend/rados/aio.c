#include "aio.h"
#include "_cgo_export.h"

#include <errno.h>
#include <malloc.h>

// What is free, such as librados' copies of objects, is kept up to so many bytes: the kernel
// must find and clear the pages of each anew otherwise, which costs more than all else that a
// put costs here.
#define KEPT (64 << 20)

static const char attr_name[] = "lsd.version";

// A thread of librados calls this.
static void complete(rados_completion_t c, void *arg)
{
	(void)c;
	lsdRadosDone(((struct lsd_op *)arg)->handle);
}

// The C library is told before there are threads, each of which would have a heap of its own:
// what is free has then one end, which can be given back also where memory is locked (mlock(2)).
__attribute__((constructor)) static void bound_malloc(void)
{
	mallopt(M_MMAP_THRESHOLD, 32 << 20);
	mallopt(M_TRIM_THRESHOLD, KEPT);
	mallopt(M_ARENA_MAX, 1);
}

void lsd_trim(void)
{
	malloc_trim(0);
}

void *lsd_alloc(size_t len)
{
	return malloc(len);
}

struct lsd_op *lsd_op_new(uintptr_t handle, void *buf, size_t len)
{
	struct lsd_op *op = calloc(1, sizeof *op);
	if (!op)
		return NULL;
	op->handle = handle;
	op->buf = buf;
	op->len = len;
	if (rados_aio_create_completion2(op, complete, &op->completion) < 0) {
		free(op);
		return NULL;
	}
	return op;
}

void lsd_op_free(struct lsd_op *op)
{
	rados_aio_release(op->completion);
	if (op->write)
		rados_release_write_op(op->write);
	if (op->read)
		rados_release_read_op(op->read);
	if (op->xattrs)
		rados_getxattrs_end(op->xattrs);
	free(op->ranges);
	free(op);
}

int lsd_put(rados_ioctx_t io, struct lsd_op *op, const char *oid, const char *data, size_t len)
{
	op->write = rados_create_write_op();
	rados_write_op_create(op->write, LIBRADOS_CREATE_EXCLUSIVE, NULL);
	rados_write_op_write_full(op->write, data, len); // copies
	return rados_aio_write_op_operate(op->write, io, op->completion, oid, NULL, 0);
}

int lsd_get(rados_ioctx_t io, struct lsd_op *op, const char *oid, uint64_t off)
{
	return rados_aio_read(io, oid, op->completion, op->buf, op->len, off);
}

int lsd_get_ranges(rados_ioctx_t io, struct lsd_op *op, const char *oid, const struct lsd_range *ranges, size_t n)
{
	char *p = op->buf;

	op->ranges = malloc(n * sizeof *ranges);
	if (!op->ranges)
		return -ENOMEM;
	memcpy(op->ranges, ranges, n * sizeof *ranges);
	op->read = rados_create_read_op();
	for (struct lsd_range *r = op->ranges; r < op->ranges + n; r++) {
		rados_read_op_read(op->read, r->off, r->len, p, &r->got, &r->rval);
		p += r->len;
	}
	return rados_aio_read_op_operate(op->read, io, op->completion, oid, 0);
}

int lsd_stat(rados_ioctx_t io, struct lsd_op *op, const char *oid)
{
	return rados_aio_stat(io, oid, op->completion, &op->size, &op->mtime);
}

int lsd_remove(rados_ioctx_t io, struct lsd_op *op, const char *oid)
{
	return rados_aio_remove(io, oid, op->completion);
}

int lsd_load(rados_ioctx_t io, struct lsd_op *op, const char *oid)
{
	op->read = rados_create_read_op();
	rados_read_op_stat(op->read, &op->size, &op->mtime, &op->rval_stat);
	rados_read_op_getxattrs(op->read, &op->xattrs, &op->rval_xattrs);
	rados_read_op_read(op->read, 0, op->len, op->buf, &op->got, &op->rval_read);
	return rados_aio_read_op_operate(op->read, io, op->completion, oid, 0);
}

int lsd_swap(rados_ioctx_t io, struct lsd_op *op, const char *oid,
	const char *old, size_t old_len, const char *attr, size_t attr_len,
	const char *data, size_t len)
{
	op->write = rados_create_write_op();
	if (old_len) {
		rados_write_op_assert_exists(op->write);
		rados_write_op_cmpxattr(op->write, attr_name, LIBRADOS_CMPXATTR_OP_EQ, old, old_len);
	} else {
		rados_write_op_create(op->write, LIBRADOS_CREATE_EXCLUSIVE, NULL);
	}
	rados_write_op_write_full(op->write, data, len);
	rados_write_op_setxattr(op->write, attr_name, attr, attr_len);
	return rados_aio_write_op_operate(op->write, io, op->completion, oid, NULL, 0);
}

size_t lsd_attr(struct lsd_op *op, const char **val)
{
	const char *name;
	size_t len;

	while (op->xattrs && rados_getxattrs_next(op->xattrs, &name, val, &len) == 0 && name)
		if (strcmp(name, attr_name) == 0)
			return len;
	return 0;
}
