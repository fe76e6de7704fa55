/* In which ranges what a handle has open differs from a snapshot, or holds data. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>

/* Ceph 20; older headers have it not. */
CEPH_RBD_API int rbd_diff_iterate3(rbd_image_t image, uint64_t from_snap_id, uint64_t ofs,
				   uint64_t len, uint8_t include_parent, uint8_t whole_object,
				   int (*cb)(uint64_t, size_t, int, void *), void *arg);

#define RANGES_FIRST 8u   /* of the first answer: many callers want to know only what comes next */
#define RANGES_MOST 16384u
#define RANGE 20u /* bytes */

struct diff {
	const char *from; /* NULL: from_number */
	uint64_t from_number; /* 0: none */
	uint64_t pos, end;
	uint32_t flags;
	int (*cb)(uint64_t, size_t, int, void *);
	void *arg;
};

/* One answer: nothing in it is used before it has been checked. */
static int diff_ask(struct image *h, const struct diff *d, uint32_t most, struct answer *a)
{
	uint8_t buf[REQUEST_MOST];
	struct writer w = {.p = buf, .cap = sizeof buf};

	put_name(&w, d->from);
	put_u64(&w, d->from_number);
	put_u64(&w, d->pos);
	put_u64(&w, d->end - d->pos);
	put_u32(&w, d->flags);
	put_u32(&w, most);
	return image_call(h, T_DIFF, &w, NULL, true, a);
}

/* Calls back for the ranges of an answer, and moves pos behind them. */
static int diff_tell(struct diff *d, struct reader *r)
{
	uint64_t next = get_u64(r);
	uint32_t n = get_u32(r);
	int e;

	if (r->bad || n > r->n / RANGE || next <= d->pos || next > d->end)
		return -EPROTO;
	for (; n > 0; n--) {
		uint64_t off = get_u64(r), len = get_u64(r);
		uint32_t exists = get_u32(r);

		if (off < d->pos || off >= next || len == 0 || len > next - off)
			return -EPROTO;
		e = d->cb(off, len, exists & 1, d->arg);
		if (e < 0)
			return e;
		d->pos = off + len;
	}
	d->pos = next;
	return 0;
}

/* No lock is held while the caller is called back: it may use the handle. */
static int diff_run(struct image *h, struct diff *d, uint64_t len)
{
	uint32_t most = RANGES_FIRST;
	uint64_t size;
	int e = rbd_get_size(h, &size);

	if (e == 0)
		e = clip(size, d->pos, &len);
	d->end = d->pos + len;
	/* Asked also where there is nothing to be told: whether there is such a snapshot. */
	do {
		struct answer a;

		if (e == 0)
			e = diff_ask(h, d, most, &a);
		if (e < 0)
			break;
		if (d->pos < d->end)
			e = diff_tell(d, &a.fields);
		answer_free(&a);
		most = most < RANGES_MOST ? 8 * most : RANGES_MOST;
	} while (e == 0 && d->pos < d->end);
	return e;
}

int rbd_diff_iterate2(rbd_image_t image, const char *fromsnapname, uint64_t ofs, uint64_t len,
		      uint8_t include_parent, uint8_t whole_object,
		      int (*cb)(uint64_t, size_t, int, void *), void *arg)
{
	struct diff d = {
		.from = fromsnapname,
		.pos = ofs,
		.flags = (include_parent ? 1u : 0) | (whole_object ? 2u : 0),
		.cb = cb,
		.arg = arg,
	};

	if (fromsnapname && !*fromsnapname)
		return -ENOENT; /* no snapshot has that name */
	return diff_run(image, &d, len);
}

int rbd_diff_iterate(rbd_image_t image, const char *fromsnapname, uint64_t ofs, uint64_t len,
		     int (*cb)(uint64_t, size_t, int, void *), void *arg)
{
	return rbd_diff_iterate2(image, fromsnapname, ofs, len, true, false, cb, arg);
}

int rbd_diff_iterate3(rbd_image_t image, uint64_t from_snap_id, uint64_t ofs, uint64_t len,
		      uint8_t include_parent, uint8_t whole_object,
		      int (*cb)(uint64_t, size_t, int, void *), void *arg)
{
	struct diff d = {
		.from_number = from_snap_id,
		.pos = ofs,
		.flags = (include_parent ? 1u : 0) | (whole_object ? 2u : 0),
		.cb = cb,
		.arg = arg,
	};

	return diff_run(image, &d, len);
}
