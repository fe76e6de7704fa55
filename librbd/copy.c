/* What may take long: flattening, and copies. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>

#define CHUNK (4u * MIB) /* of a copy into an image that is there */

/*
 * A request on a handle of its own, which is what h has open: so others go on with h meanwhile,
 * and a caller that has enough, which a negative result of its callback says, ends that alone.
 */
static int long_call(struct image *h, uint16_t type, bool read_only, const struct writer *w,
		     librbd_progress_fn_t cb, void *arg)
{
	struct progress pr = {.fn = cb, .arg = arg, .ends = true};
	struct target t = {
		.store = h->store,
		.image = h->id_text,
		.by_id = true,
		.read_only = read_only,
		.shared = h->shared,
	};
	struct opened o;
	struct answer a;
	bool broken;
	int e;

	if (h->forked)
		return -EIO;
	pthread_mutex_lock(&h->lock);
	t.number = h->snapshot_number;
	pthread_mutex_unlock(&h->lock);
	e = image_connect(&t, 0, false, &o);
	if (e < 0)
		return e;
	e = conn_call(&o.conn, type, w, &pr, 0, &a, &broken);
	if (e == 0)
		answer_free(&a);
	if (!broken)
		goodbye(&o.conn); /* the image is not in use any more when this returns */
	opened_free(&o);
	return e;
}

/* ---- flattening ---- */

int rbd_flatten_with_progress(rbd_image_t image, librbd_progress_fn_t cb, void *cbdata)
{
	struct image *h = image;

	if (!h->forked && h->fixed)
		return -EROFS;
	return long_call(h, T_FLATTEN, false, NULL, cb, cbdata);
}

int rbd_flatten(rbd_image_t image)
{
	return rbd_flatten_with_progress(image, NULL, NULL);
}

/* ---- copies into new images ---- */

static int copy_image(struct image *h, rados_ioctx_t io, const char *name, bool deep,
		      librbd_progress_fn_t cb, void *arg)
{
	struct on_store s;
	int e = name && *name ? on_store(&s, io) : -EINVAL;

	if (e < 0)
		return e;
	put_name(&s.w, name);
	put_u32(&s.w, deep ? 1 : 0);
	return long_call(h, T_COPY, true, &s.w, cb, arg);
}

int rbd_copy_with_progress4(rbd_image_t image, rados_ioctx_t dest_p, const char *destname,
			    rbd_image_options_t dest_opts, librbd_progress_fn_t cb, void *cbdata,
			    size_t sparse_size)
{
	bool flatten = false;
	int e;

	(void)sparse_size; /* what is empty stays so, to the sector */
	rbd_image_options_is_set(dest_opts, RBD_IMAGE_OPTION_FLATTEN, &flatten);
	e = flatten ? -EINVAL : check_options(dest_opts);
	return e < 0 ? e : copy_image(image, dest_p, destname, false, cb, cbdata);
}

int rbd_copy_with_progress3(rbd_image_t image, rados_ioctx_t dest_p, const char *destname,
			    rbd_image_options_t dest_opts, librbd_progress_fn_t cb, void *cbdata)
{
	return rbd_copy_with_progress4(image, dest_p, destname, dest_opts, cb, cbdata, 0);
}

int rbd_copy_with_progress(rbd_image_t image, rados_ioctx_t dest_p, const char *destname,
			   librbd_progress_fn_t cb, void *cbdata)
{
	return rbd_copy_with_progress4(image, dest_p, destname, NULL, cb, cbdata, 0);
}

int rbd_copy4(rbd_image_t src, rados_ioctx_t dest_io_ctx, const char *destname,
	      rbd_image_options_t dest_opts, size_t sparse_size)
{
	return rbd_copy_with_progress4(src, dest_io_ctx, destname, dest_opts, NULL, NULL,
				       sparse_size);
}

int rbd_copy3(rbd_image_t src, rados_ioctx_t dest_io_ctx, const char *destname,
	      rbd_image_options_t dest_opts)
{
	return rbd_copy4(src, dest_io_ctx, destname, dest_opts, 0);
}

int rbd_copy(rbd_image_t image, rados_ioctx_t dest_io_ctx, const char *destname)
{
	return rbd_copy4(image, dest_io_ctx, destname, NULL, 0);
}

/* A copy has never a parent, so that it is flattened is no wish. */
int rbd_deep_copy_with_progress(rbd_image_t image, rados_ioctx_t dest_io_ctx, const char *destname,
				rbd_image_options_t dest_opts, librbd_progress_fn_t cb,
				void *cbdata)
{
	int e = check_options(dest_opts);

	return e < 0 ? e : copy_image(image, dest_io_ctx, destname, true, cb, cbdata);
}

int rbd_deep_copy(rbd_image_t src, rados_ioctx_t dest_io_ctx, const char *destname,
		  rbd_image_options_t dest_opts)
{
	return rbd_deep_copy_with_progress(src, dest_io_ctx, destname, dest_opts, NULL, NULL);
}

/* ---- copies into images that are there ---- */

struct copying {
	struct image *from, *to;
	char *buf; /* CHUNK bytes */
	uint64_t size;
	librbd_progress_fn_t cb;
	void *arg;
};

/* Copies a range with data; one that is empty stays as it is in the other image, as with librbd. */
static int copy_range(uint64_t off, size_t len, int exists, void *arg)
{
	struct copying *c = arg;

	while (exists && len > 0) {
		size_t n = len < CHUNK ? len : CHUNK;
		ssize_t r = rbd_read(c->from, off, n, c->buf);

		if (r > 0)
			r = rbd_write(c->to, off, (size_t)r, c->buf);
		if (r <= 0)
			return r < 0 ? (int)r : -EIO;
		off += (size_t)r;
		len -= (size_t)r;
		if (c->cb) {
			int e = c->cb(off, c->size, c->arg);

			if (e < 0)
				return e;
		}
	}
	return 0;
}

int rbd_copy_with_progress2(rbd_image_t src, rbd_image_t dest, librbd_progress_fn_t cb,
			    void *cbdata)
{
	struct copying c = {.from = src, .to = dest, .cb = cb, .arg = cbdata};
	uint64_t room;
	int e = rbd_get_size(src, &c.size);

	if (e == 0)
		e = rbd_get_size(dest, &room);
	if (e < 0)
		return e;
	if (room < c.size)
		return -EINVAL;
	c.buf = malloc(CHUNK);
	if (!c.buf)
		return -ENOMEM;
	e = rbd_diff_iterate2(src, NULL, 0, c.size, true, false, copy_range, &c);
	free(c.buf);
	return e;
}

int rbd_copy2(rbd_image_t src, rbd_image_t dest)
{
	return rbd_copy_with_progress2(src, dest, NULL, NULL);
}
