#ifndef LSD_RADOS_AIO_H
#define LSD_RADOS_AIO_H

#include <rados/librados.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// An lsd_range is what is read of an object by an operation that reads several.
struct lsd_range {
	uint64_t off;
	size_t len, got;
	int rval;
};

// An lsd_op is one asynchronous operation, with everything that librados may
// write to until it completes. It is C's memory, as its buffer is: an operation
// that nobody waits for any more still has a place to write to.
struct lsd_op {
	rados_completion_t completion;
	uintptr_t handle; // of the Go channel to close
	rados_write_op_t write;
	rados_read_op_t read;

	char *buf; // what was read
	size_t len, got;
	struct lsd_range *ranges; // of buf, one after the other
	uint64_t size; // of the object
	time_t mtime;
	rados_xattrs_iter_t xattrs;
	int rval_read, rval_stat, rval_xattrs;
};

// lsd_trim gives free memory back to the system.
void lsd_trim(void);

// lsd_alloc is malloc, of which cgo's own form ends the process when there is no memory.
void *lsd_alloc(size_t len);

// lsd_op_new returns an operation, or NULL if there is no memory. buf, of len bytes,
// stays the caller's, who must not use it before the operation is complete.
struct lsd_op *lsd_op_new(uintptr_t handle, void *buf, size_t len);
void lsd_op_free(struct lsd_op *op);

int lsd_put(rados_ioctx_t io, struct lsd_op *op, const char *oid, const char *data, size_t len);
int lsd_get(rados_ioctx_t io, struct lsd_op *op, const char *oid, uint64_t off);

// lsd_get_ranges reads n ranges, of which op keeps a copy.
int lsd_get_ranges(rados_ioctx_t io, struct lsd_op *op, const char *oid, const struct lsd_range *ranges, size_t n);

int lsd_stat(rados_ioctx_t io, struct lsd_op *op, const char *oid);
int lsd_remove(rados_ioctx_t io, struct lsd_op *op, const char *oid);
int lsd_load(rados_ioctx_t io, struct lsd_op *op, const char *oid);

// lsd_swap makes data the contents and attr the attribute of the object, if
// its attribute is old, or it does not exist and old_len is 0.
int lsd_swap(rados_ioctx_t io, struct lsd_op *op, const char *oid,
	const char *old, size_t old_len, const char *attr, size_t attr_len,
	const char *data, size_t len);

// lsd_attr sets val to the attribute that lsd_load read, which is op's, and
// returns its length, or 0 if the object has none.
size_t lsd_attr(struct lsd_op *op, const char **val);

#endif
