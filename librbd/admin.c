/* Images as a whole: making, removing, listing, resizing. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>

#define ORDER_LEAST 12
#define ORDER_MOST 25

int on_store(struct on_store *s, rados_ioctx_t io)
{
	char url[NAME_MOST + 1];
	int e = store_url(io, url, sizeof url);

	if (e < 0)
		return e;
	s->w = (struct writer){.p = s->buf, .cap = sizeof s->buf};
	put_name(&s->w, url);
	return 0;
}

void rbd_version(int *major, int *minor, int *extra)
{
	if (major)
		*major = LIBRBD_VER_MAJOR;
	if (minor)
		*minor = LIBRBD_VER_MINOR;
	if (extra)
		*extra = LIBRBD_VER_EXTRA;
}

/* order 0: the daemon's choice. */
static int create(rados_ioctx_t io, const char *name, uint64_t size, uint64_t order)
{
	struct on_store s;
	struct answer a;
	int e;

	if (!name || !*name)
		return -EINVAL;
	if (order && (order < ORDER_LEAST || order > ORDER_MOST))
		return -EDOM;
	e = on_store(&s, io);
	if (e < 0)
		return e;
	put_name(&s.w, name);
	put_u64(&s.w, size);
	put_u64(&s.w, order ? 1ull << order : 0);
	e = call_once(T_CREATE, &s.w, NULL, &a);
	if (e == 0)
		answer_free(&a);
	return e;
}

/* What can be asked for: what has a meaning here is always there. */
int check_layout(uint64_t features, uint64_t stripe_count)
{
	if (features & ~(uint64_t)RBD_FEATURES_ALL)
		return -ENOSYS;
	if (stripe_count > 1 || features & RBD_FEATURE_DATA_POOL)
		return -EOPNOTSUPP;
	return 0;
}

int rbd_create(rados_ioctx_t io, const char *name, uint64_t size, int *order)
{
	int n = order ? *order : 0;

	return n < 0 ? -EDOM : create(io, name, size, (uint64_t)n);
}

int rbd_create2(rados_ioctx_t io, const char *name, uint64_t size, uint64_t features, int *order)
{
	return rbd_create3(io, name, size, features, order, 0, 0);
}

int rbd_create3(rados_ioctx_t io, const char *name, uint64_t size, uint64_t features, int *order,
		uint64_t stripe_unit, uint64_t stripe_count)
{
	int e = check_layout(features, stripe_count);

	(void)stripe_unit;
	return e < 0 ? e : rbd_create(io, name, size, order);
}

uint64_t option(rbd_image_options_t opts, int name, uint64_t otherwise)
{
	uint64_t v;

	return rbd_image_options_get_uint64(opts, name, &v) == 0 ? v : otherwise;
}

int check_options(rbd_image_options_t opts)
{
	bool data_pool = false;

	if (option(opts, RBD_IMAGE_OPTION_FORMAT, 2) != 2)
		return -EINVAL;
	rbd_image_options_is_set(opts, RBD_IMAGE_OPTION_DATA_POOL, &data_pool);
	if (data_pool)
		return -EOPNOTSUPP;
	return check_layout(option(opts, RBD_IMAGE_OPTION_FEATURES, 0) |
				    option(opts, RBD_IMAGE_OPTION_FEATURES_SET, 0),
			    option(opts, RBD_IMAGE_OPTION_STRIPE_COUNT, 0));
}

int rbd_create4(rados_ioctx_t io, const char *name, uint64_t size, rbd_image_options_t opts)
{
	int e = check_options(opts);

	return e < 0 ? e : create(io, name, size, option(opts, RBD_IMAGE_OPTION_ORDER, 0));
}

int rbd_remove_with_progress(rados_ioctx_t io, const char *name, librbd_progress_fn_t cb,
			     void *cbdata)
{
	struct progress pr = {.fn = cb, .arg = cbdata};
	struct on_store s;
	struct answer a;
	int e = name && *name ? on_store(&s, io) : -EINVAL;

	if (e < 0)
		return e;
	put_name(&s.w, name);
	e = call_once(T_REMOVE, &s.w, &pr, &a);
	if (e == 0)
		answer_free(&a);
	return e;
}

int rbd_remove(rados_ioctx_t io, const char *name)
{
	return rbd_remove_with_progress(io, name, NULL, NULL);
}

int rbd_rename(rados_ioctx_t src_io_ctx, const char *srcname, const char *destname)
{
	struct on_store s;
	struct answer a;
	int e = srcname && *srcname && destname && *destname ? on_store(&s, src_io_ctx) : -EINVAL;

	if (e < 0)
		return e;
	put_name(&s.w, srcname);
	put_name(&s.w, destname);
	e = call_once(T_RENAME, &s.w, NULL, &a);
	if (e == 0)
		answer_free(&a);
	return e;
}

/* ---- lists ---- */

void *list_room(void *at, size_t n, size_t *room, size_t size)
{
	size_t more = *room ? 2 * *room : 64;

	if (n < *room)
		return at;
	at = reallocarray(at, more, size);
	if (at)
		*room = more;
	return at;
}

struct names {
	rbd_image_spec_t *at;
	size_t n, room;
};

static int names_add(struct names *l, char *name, const uint8_t id[16])
{
	char text[ID_TEXT];
	rbd_image_spec_t s = {.name = name}, *at;

	if (!name)
		return -EPROTO;
	at = list_room(l->at, l->n, &l->room, sizeof *at);
	if (!at)
		return -ENOMEM;
	l->at = at;
	id_format(id, text);
	s.id = strdup(text);
	if (!s.id)
		return -ENOMEM;
	l->at[l->n++] = s;
	return 0;
}

static void names_free(struct names *l)
{
	rbd_image_spec_list_cleanup(l->at, l->n);
	free(l->at);
}

/* One answer's names; *more where the daemon has others behind them. */
static int names_decode(struct reader *r, struct names *l, bool *more)
{
	uint32_t n;

	*more = get_u32(r) == 1;
	n = get_u32(r);
	if (n == 0 && *more)
		return -EPROTO; /* it would never end */
	for (; n > 0 && !r->bad; n--) {
		uint8_t id[16];
		char *name = get_string(r);
		int e;

		get_id(r, id);
		e = r->bad ? -EPROTO : names_add(l, name, id);
		if (e < 0) {
			free(name);
			return e;
		}
	}
	return r->bad ? -EPROTO : 0;
}

static int names_get(rados_ioctx_t io, struct names *l)
{
	bool more = true;
	int e = 0;

	memset(l, 0, sizeof *l);
	while (e == 0 && more) {
		struct on_store s;
		struct answer a;
		size_t before = l->n;

		e = on_store(&s, io);
		if (e < 0)
			break;
		put_name(&s.w, l->n ? l->at[l->n - 1].name : "");
		e = call_once(T_LIST, &s.w, NULL, &a);
		if (e < 0)
			break;
		e = names_decode(&a.fields, l, &more);
		answer_free(&a);
		if (e == 0 && before > 0 && l->n > before &&
		    strcmp(l->at[before].name, l->at[before - 1].name) <= 0)
			e = -EPROTO; /* not behind what was known */
	}
	if (e < 0)
		names_free(l);
	return e;
}

int rbd_list2(rados_ioctx_t io, rbd_image_spec_t *images, size_t *max_images)
{
	struct names l;
	int e;

	if (!max_images)
		return -EINVAL;
	if (*max_images > 0) /* callers clean up what they have, whatever comes of it */
		memset(images, 0, *max_images * sizeof *images);
	e = names_get(io, &l);
	if (e < 0)
		return e;
	if (*max_images < l.n) {
		*max_images = l.n;
		names_free(&l);
		return -ERANGE;
	}
	if (l.n > 0)
		memcpy(images, l.at, l.n * sizeof *images);
	*max_images = l.n;
	free(l.at); /* the strings are the caller's now */
	return 0;
}

int rbd_list(rados_ioctx_t io, char *names, size_t *size)
{
	struct names l;
	size_t need = 0;
	int e;

	if (!size)
		return -EINVAL;
	e = names_get(io, &l);
	if (e < 0)
		return e;
	for (size_t i = 0; i < l.n; i++)
		need += strlen(l.at[i].name) + 1;
	if (*size < need || (need && !names)) {
		e = -ERANGE;
	} else {
		e = (int)need;
		for (size_t i = 0; i < l.n; i++)
			names = stpcpy(names, l.at[i].name) + 1;
	}
	*size = need;
	names_free(&l);
	return e;
}

void rbd_image_spec_cleanup(rbd_image_spec_t *image)
{
	free(image->id);
	free(image->name);
	image->id = image->name = NULL;
}

void rbd_image_spec_list_cleanup(rbd_image_spec_t *images, size_t num_images)
{
	for (size_t i = 0; i < num_images; i++)
		rbd_image_spec_cleanup(&images[i]);
}

void rbd_linked_image_spec_cleanup(rbd_linked_image_spec_t *image)
{
	free(image->pool_name);
	free(image->pool_namespace);
	free(image->image_id);
	free(image->image_name);
	image->pool_name = image->pool_namespace = image->image_id = image->image_name = NULL;
}

void rbd_linked_image_spec_list_cleanup(rbd_linked_image_spec_t *images, size_t num_images)
{
	for (size_t i = 0; i < num_images; i++)
		rbd_linked_image_spec_cleanup(&images[i]);
}

int rbd_namespace_exists(rados_ioctx_t io, const char *namespace_name, bool *exists)
{
	(void)io;
	if (!namespace_name || !*namespace_name)
		return -EINVAL;
	*exists = true; /* a namespace is a prefix: it is there when something is in it */
	return 0;
}

/* ---- resizing ---- */

int rbd_resize2(rbd_image_t image, uint64_t size, bool allow_shrink, librbd_progress_fn_t cb,
		void *cbdata)
{
	struct image *h = image;
	struct progress pr = {.fn = cb, .arg = cbdata};
	uint8_t buf[16];
	struct writer w = {.p = buf, .cap = sizeof buf};
	struct answer a;
	int e;

	if (!h->forked && h->fixed)
		return -EROFS;
	/* An image has whole sectors; QEMU's formats make it larger by a few bytes at a time. */
	if (size <= UINT64_MAX - SECTOR)
		size = (size + SECTOR - 1) / SECTOR * SECTOR;
	put_u64(&w, size);
	put_u32(&w, allow_shrink ? 1 : 0);
	e = image_call(h, T_RESIZE, &w, &pr, false, &a);
	answer_free(&a);
	return e;
}

int rbd_resize(rbd_image_t image, uint64_t size)
{
	return rbd_resize2(image, size, true, NULL, NULL);
}

int rbd_resize_with_progress(rbd_image_t image, uint64_t size, librbd_progress_fn_t cb,
			     void *cbdata)
{
	return rbd_resize2(image, size, true, cb, cbdata);
}
