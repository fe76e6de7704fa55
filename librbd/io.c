/* librbd's calls for reading and writing. */
#include "internal.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>

#define ITERATE MIB /* bytes of a read of rbd_read_iterate */

static void set_buffer(struct request *r, uint8_t op, uint64_t off, uint64_t len,
		       const void *buf)
{
	r->op = op;
	r->off = off;
	r->len = len;
	r->one = (struct iovec){.iov_base = (void *)(uintptr_t)buf, .iov_len = len};
	r->iov = &r->one;
	r->iovcnt = 1;
}

/* The bytes of a vector, or -EINVAL. */
static int64_t vector_len(const struct iovec *iov, int count)
{
	size_t n = 0;

	if (!iov || count <= 0)
		return -EINVAL;
	for (int i = 0; i < count; i++) {
		if (iov[i].iov_len > (size_t)SSIZE_MAX - n)
			return -EINVAL;
		n += iov[i].iov_len;
	}
	return (int64_t)n;
}

static uint8_t write_flags(int op_flags)
{
	return op_flags & LIBRADOS_OP_FLAG_FADVISE_FUA ? SQE_FUA : 0;
}

static int claim(struct image *h, struct completion *c)
{
	return h->forked ? -EIO : completion_use(c);
}

/* Submits a request that is on the stack and waits for it. */
static ssize_t sync_run(struct image *h, struct completion *c)
{
	if (h->forked)
		return -EIO;
	if (image_own_thread(h))
		return -EDEADLK; /* from a callback: nobody else would end it */
	c->sync = true;
	c->used = true;
	image_submit(h, c);
	return completion_wait(c);
}

static int aio_buffer(rbd_image_t image, uint8_t op, uint64_t off, uint64_t len,
		      const void *buf, rbd_completion_t comp, uint8_t flags)
{
	struct completion *c = comp;
	int e = claim(image, c);

	if (e < 0)
		return e;
	set_buffer(&c->req, op, off, len, buf);
	c->req.flags = flags;
	image_submit(image, c);
	return 0;
}

static int aio_vector(rbd_image_t image, uint8_t op, uint64_t off, const struct iovec *iov,
		      int count, rbd_completion_t comp)
{
	struct completion *c = comp;
	int64_t len = vector_len(iov, count);
	int e = len < 0 ? (int)len : claim(image, c);

	if (e < 0)
		return e;
	c->req.op = op;
	c->req.off = off;
	c->req.len = (uint64_t)len;
	c->req.iov = iov;
	c->req.iovcnt = count;
	image_submit(image, c);
	return 0;
}

static ssize_t sync_buffer(rbd_image_t image, uint8_t op, uint64_t off, uint64_t len,
			   const void *buf, uint8_t flags)
{
	struct completion c;

	completion_init(&c, NULL, NULL);
	set_buffer(&c.req, op, off, len, buf);
	c.req.flags = flags;
	return sync_run(image, &c);
}

ssize_t rbd_read(rbd_image_t image, uint64_t ofs, size_t len, char *buf)
{
	return sync_buffer(image, OP_READ, ofs, len, buf, 0);
}

ssize_t rbd_read2(rbd_image_t image, uint64_t ofs, size_t len, char *buf, int op_flags)
{
	(void)op_flags;
	return rbd_read(image, ofs, len, buf);
}

ssize_t rbd_write(rbd_image_t image, uint64_t ofs, size_t len, const char *buf)
{
	return sync_buffer(image, OP_WRITE, ofs, len, buf, 0);
}

ssize_t rbd_write2(rbd_image_t image, uint64_t ofs, size_t len, const char *buf, int op_flags)
{
	return sync_buffer(image, OP_WRITE, ofs, len, buf, write_flags(op_flags));
}

int rbd_discard(rbd_image_t image, uint64_t ofs, uint64_t len)
{
	if (len > INT_MAX)
		return -EINVAL; /* the result would not fit */
	return (int)sync_buffer(image, OP_DISCARD, ofs, len, NULL, 0);
}

ssize_t rbd_write_zeroes(rbd_image_t image, uint64_t ofs, size_t len, int zero_flags,
			 int op_flags)
{
	(void)op_flags;
	if (zero_flags & ~RBD_WRITE_ZEROES_FLAG_THICK_PROVISION)
		return -EINVAL;
	return sync_buffer(image, OP_ZEROES, ofs, len, NULL, 0);
}

int rbd_flush(rbd_image_t image)
{
	return (int)sync_buffer(image, OP_FLUSH, 0, 0, NULL, 0);
}

int rbd_invalidate_cache(rbd_image_t image)
{
	struct image *h = image;

	/* Nothing is cached here, and all handles of a host see one image. */
	return h->forked ? -EIO : 0;
}

int rbd_aio_read(rbd_image_t image, uint64_t off, size_t len, char *buf, rbd_completion_t c)
{
	return aio_buffer(image, OP_READ, off, len, buf, c, 0);
}

int rbd_aio_read2(rbd_image_t image, uint64_t off, size_t len, char *buf, rbd_completion_t c,
		  int op_flags)
{
	(void)op_flags;
	return rbd_aio_read(image, off, len, buf, c);
}

int rbd_aio_readv(rbd_image_t image, const struct iovec *iov, int iovcnt, uint64_t off,
		  rbd_completion_t c)
{
	return aio_vector(image, OP_READ, off, iov, iovcnt, c);
}

int rbd_aio_write(rbd_image_t image, uint64_t off, size_t len, const char *buf,
		  rbd_completion_t c)
{
	return aio_buffer(image, OP_WRITE, off, len, buf, c, 0);
}

int rbd_aio_write2(rbd_image_t image, uint64_t off, size_t len, const char *buf,
		   rbd_completion_t c, int op_flags)
{
	return aio_buffer(image, OP_WRITE, off, len, buf, c, write_flags(op_flags));
}

int rbd_aio_writev(rbd_image_t image, const struct iovec *iov, int iovcnt, uint64_t off,
		   rbd_completion_t c)
{
	return aio_vector(image, OP_WRITE, off, iov, iovcnt, c);
}

int rbd_aio_discard(rbd_image_t image, uint64_t off, uint64_t len, rbd_completion_t c)
{
	return aio_buffer(image, OP_DISCARD, off, len, NULL, c, 0);
}

int rbd_aio_write_zeroes(rbd_image_t image, uint64_t off, size_t len, rbd_completion_t c,
			 int zero_flags, int op_flags)
{
	(void)op_flags;
	if (zero_flags & ~RBD_WRITE_ZEROES_FLAG_THICK_PROVISION)
		return -EINVAL;
	return aio_buffer(image, OP_ZEROES, off, len, NULL, c, 0);
}

int rbd_aio_flush(rbd_image_t image, rbd_completion_t c)
{
	return aio_buffer(image, OP_FLUSH, 0, 0, NULL, c, 0);
}

static int set_pattern(struct request *r, uint64_t off, size_t len, const char *buf,
		       size_t period, int op_flags)
{
	if (period == 0 || len % period != 0)
		return -EINVAL;
	r->op = OP_WRITE;
	r->off = off;
	r->len = len;
	r->pattern = buf;
	r->period = period;
	r->flags = write_flags(op_flags);
	return 0;
}

ssize_t rbd_writesame(rbd_image_t image, uint64_t ofs, size_t len, const char *buf,
		      size_t data_len, int op_flags)
{
	struct completion c;
	int e;

	if (len > INT_MAX)
		return -EINVAL;
	completion_init(&c, NULL, NULL);
	e = set_pattern(&c.req, ofs, len, buf, data_len, op_flags);
	return e < 0 ? e : sync_run(image, &c);
}

int rbd_aio_writesame(rbd_image_t image, uint64_t off, size_t len, const char *buf,
		      size_t data_len, rbd_completion_t comp, int op_flags)
{
	struct completion *c = comp;
	struct request r = {0};
	int e = set_pattern(&r, off, len, buf, data_len, op_flags);

	if (e == 0)
		e = claim(image, c);
	if (e < 0)
		return e;
	c->req = r;
	image_submit(image, c);
	return 0;
}

/* The first len bytes of what is compared and of what is written, for a request that is new. */
static void set_compare(struct request *r, uint64_t off, size_t len, const char *cmp,
			const char *buf, uint64_t *mismatch, int op_flags)
{
	set_buffer(r, OP_COMPARE, off, len, buf);
	r->cmp_one = (struct iovec){.iov_base = (void *)(uintptr_t)cmp, .iov_len = len};
	r->cmp = &r->cmp_one;
	r->cmpcnt = 1;
	r->mismatch = mismatch;
	r->flags = write_flags(op_flags);
}

ssize_t rbd_compare_and_write(rbd_image_t image, uint64_t ofs, size_t len, const char *cmp_buf,
			      const char *buf, uint64_t *mismatch_off, int op_flags)
{
	struct completion c;

	completion_init(&c, NULL, NULL);
	set_compare(&c.req, ofs, len, cmp_buf, buf, mismatch_off, op_flags);
	return sync_run(image, &c);
}

ssize_t rbd_aio_compare_and_write(rbd_image_t image, uint64_t off, size_t len,
				  const char *cmp_buf, const char *buf, rbd_completion_t comp,
				  uint64_t *mismatch_off, int op_flags)
{
	struct completion *c = comp;
	int e = claim(image, c);

	if (e < 0)
		return e;
	set_compare(&c->req, off, len, cmp_buf, buf, mismatch_off, op_flags);
	image_submit(image, c);
	return 0;
}

/* Newer than the header that this is built with, maybe. */
__attribute__((visibility("default")))
ssize_t rbd_aio_compare_and_writev(rbd_image_t image, uint64_t off, const struct iovec *cmp_iov,
				   int cmp_iovcnt, const struct iovec *iov, int iovcnt,
				   rbd_completion_t comp, uint64_t *mismatch_off, int op_flags);
ssize_t rbd_aio_compare_and_writev(rbd_image_t image, uint64_t off, const struct iovec *cmp_iov,
				   int cmp_iovcnt, const struct iovec *iov, int iovcnt,
				   rbd_completion_t comp, uint64_t *mismatch_off, int op_flags)
{
	struct completion *c = comp;
	int64_t len = vector_len(iov, iovcnt), cmp_len = vector_len(cmp_iov, cmp_iovcnt);
	int e = len < 0 || cmp_len != len ? -EINVAL : claim(image, c);

	if (e < 0)
		return e;
	c->req.op = OP_COMPARE;
	c->req.off = off;
	c->req.len = (uint64_t)len;
	c->req.iov = iov;
	c->req.iovcnt = iovcnt;
	c->req.cmp = cmp_iov;
	c->req.cmpcnt = cmp_iovcnt;
	c->req.mismatch = mismatch_off;
	c->req.flags = write_flags(op_flags);
	image_submit(image, c);
	return 0;
}

static bool all_zero(const char *p, size_t n)
{
	return n == 0 || (p[0] == 0 && memcmp(p, p + 1, n - 1) == 0);
}

/* Reads and calls back with NULL for what is zeroes: the bytes read or a negative errno. */
static int64_t iterate(rbd_image_t image, uint64_t off, uint64_t len,
		       int (*cb)(uint64_t, size_t, const char *, void *), void *arg)
{
	struct image *h = image;
	uint64_t done = 0;
	char *buf;
	int64_t e;

	if (h->forked)
		return -EIO;
	e = clip(image_size(h), off, &len);
	if (e < 0)
		return e;
	buf = malloc(ITERATE);
	if (!buf)
		return -ENOMEM;
	while (done < len) {
		size_t run = ITERATE - (off + done) % ITERATE;

		if (run > len - done)
			run = (size_t)(len - done);
		e = rbd_read(image, off + done, run, buf);
		if (e <= 0)
			break; /* an error, or the image has become smaller */
		run = (size_t)e;
		e = cb(off + done, run, all_zero(buf, run) ? NULL : buf, arg);
		if (e < 0)
			break;
		done += run;
	}
	free(buf);
	return e < 0 ? e : (int64_t)done;
}

int64_t rbd_read_iterate(rbd_image_t image, uint64_t ofs, size_t len,
			 int (*cb)(uint64_t, size_t, const char *, void *), void *arg)
{
	return iterate(image, ofs, len, cb, arg);
}

int rbd_read_iterate2(rbd_image_t image, uint64_t ofs, uint64_t len,
		      int (*cb)(uint64_t, size_t, const char *, void *), void *arg)
{
	int64_t e = iterate(image, ofs, len, cb, arg);

	return e < 0 ? (int)e : 0;
}
