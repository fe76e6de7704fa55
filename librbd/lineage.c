/* Clones, of what an image was cloned, and what was cloned from it. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>

/* Ceph 20; older headers have it not. */
CEPH_RBD_API int rbd_clone4(rados_ioctx_t p_ioctx, const char *p_name, uint64_t p_snap_id,
			    rados_ioctx_t c_ioctx, const char *c_name, rbd_image_options_t c_opts);

#define NO_SNAPSHOT (UINT64_MAX - 1) /* CEPH_NOSNAP: librbd's name of the image itself */

/* ---- cloning ---- */

/* A clone is in the store of its parent: what it has of that is there. */
static int same_store(rados_ioctx_t a, rados_ioctx_t b)
{
	char one[NAME_MOST + 1], other[NAME_MOST + 1];
	int e = store_url(a, one, sizeof one);

	if (e == 0)
		e = store_url(b, other, sizeof other);
	if (e < 0)
		return e;
	return strcmp(one, other) == 0 ? 0 : -EXDEV;
}

/* Of a snapshot by its name, or where that is NULL by its number; *object is the clone's. */
static int clone_image(rados_ioctx_t p_io, const char *p_name, const char *p_snapname,
		       uint64_t number, rados_ioctx_t c_io, const char *c_name, uint64_t *object)
{
	struct on_store s;
	struct answer a;
	uint8_t id[16];
	int e;

	if (!p_name || !*p_name || !c_name || !*c_name)
		return -EINVAL;
	e = same_store(p_io, c_io);
	if (e == 0)
		e = on_store(&s, p_io);
	if (e < 0)
		return e;
	put_name(&s.w, p_name);
	put_name(&s.w, p_snapname);
	put_u64(&s.w, number);
	put_name(&s.w, c_name);
	e = call_once(T_CLONE, &s.w, NULL, &a);
	if (e < 0)
		return e;
	get_id(&a.fields, id);
	*object = get_u64(&a.fields);
	e = a.fields.bad || *object == 0 ? -EPROTO : 0;
	answer_free(&a);
	return e;
}

int rbd_clone2(rados_ioctx_t p_ioctx, const char *p_name, const char *p_snapname,
	       rados_ioctx_t c_ioctx, const char *c_name, uint64_t features, int *c_order,
	       uint64_t stripe_unit, int stripe_count)
{
	uint64_t object;
	int e = p_snapname && *p_snapname && stripe_count >= 0 ? 0 : -EINVAL;

	(void)stripe_unit;
	if (e == 0)
		e = check_layout(features, (uint64_t)stripe_count);
	if (e == 0)
		e = clone_image(p_ioctx, p_name, p_snapname, 0, c_ioctx, c_name, &object);
	if (e == 0 && c_order)
		*c_order = 63 - __builtin_clzll(object); /* that of the parent, whatever was wanted */
	return e;
}

int rbd_clone(rados_ioctx_t p_ioctx, const char *p_name, const char *p_snapname,
	      rados_ioctx_t c_ioctx, const char *c_name, uint64_t features, int *c_order)
{
	return rbd_clone2(p_ioctx, p_name, p_snapname, c_ioctx, c_name, features, c_order, 0, 0);
}

/* What librbd refuses; protection is not needed, so one format of clones is as the other. */
static int check_clone_options(rbd_image_options_t opts)
{
	uint64_t format = option(opts, RBD_IMAGE_OPTION_CLONE_FORMAT, 0);
	bool flatten = false;

	if (!opts)
		return -EINVAL;
	rbd_image_options_is_set(opts, RBD_IMAGE_OPTION_FLATTEN, &flatten);
	return flatten || format > 2 ? -EINVAL : check_options(opts);
}

int rbd_clone3(rados_ioctx_t p_ioctx, const char *p_name, const char *p_snapname,
	       rados_ioctx_t c_ioctx, const char *c_name, rbd_image_options_t c_opts)
{
	uint64_t object;
	int e = p_snapname && *p_snapname ? check_clone_options(c_opts) : -EINVAL;

	return e < 0 ? e : clone_image(p_ioctx, p_name, p_snapname, 0, c_ioctx, c_name, &object);
}

int rbd_clone4(rados_ioctx_t p_ioctx, const char *p_name, uint64_t p_snap_id,
	       rados_ioctx_t c_ioctx, const char *c_name, rbd_image_options_t c_opts)
{
	uint64_t object;
	int e = p_snap_id < NO_SNAPSHOT ? check_clone_options(c_opts) : -EINVAL;

	if (e == 0 && p_snap_id == 0)
		e = -ENOENT;
	return e < 0 ? e : clone_image(p_ioctx, p_name, NULL, p_snap_id, c_ioctx, c_name, &object);
}

/* ---- parents ---- */

struct parent {
	char id[ID_TEXT];
	char *name, *snapshot; /* parent_free */
	uint64_t number, overlap;
	bool removed; /* the image; it is there for its clones */
	bool unnamed; /* the snapshot has been removed: its name is an id */
};

static void parent_free(struct parent *p)
{
	free(p->name);
	free(p->snapshot);
}

/* -ENOENT: what the handle has open has none. */
static int parent_get(struct image *h, struct parent *p)
{
	struct answer a;
	uint8_t id[16];
	uint32_t flags;
	int e = image_call(h, T_PARENT, NULL, NULL, true, &a);

	if (e < 0)
		return e;
	get_id(&a.fields, id);
	id_format(id, p->id);
	p->name = get_string(&a.fields);
	p->snapshot = get_string(&a.fields);
	p->number = get_u64(&a.fields);
	p->overlap = get_u64(&a.fields);
	flags = get_u32(&a.fields);
	p->removed = flags & 1;
	p->unnamed = flags & 2;
	if (a.fields.bad) {
		parent_free(p);
		e = -EPROTO;
	}
	answer_free(&a);
	return e;
}

int rbd_get_overlap(rbd_image_t image, uint64_t *overlap)
{
	struct parent p;
	int e = parent_get(image, &p);

	if (e < 0 && e != -ENOENT)
		return e;
	*overlap = 0;
	if (e == 0) {
		*overlap = p.overlap;
		parent_free(&p);
	}
	return 0;
}

/* Copies a name to where the caller wants it, if it does: 0 or -ERANGE. */
static int give(const char *name, char *to, size_t room)
{
	if (!to)
		return 0;
	if (strlen(name) + 1 > room)
		return -ERANGE;
	strcpy(to, name);
	return 0;
}

int rbd_get_parent_info2(rbd_image_t image, char *parent_poolname, size_t ppoolnamelen,
			 char *parent_name, size_t pnamelen, char *parent_id, size_t pidlen,
			 char *parent_snapname, size_t psnapnamelen)
{
	struct image *h = image;
	struct parent p;
	int e = parent_get(h, &p), short_of = 0;

	if (e < 0)
		return e;
	short_of |= give(h->pool_name, parent_poolname, ppoolnamelen);
	short_of |= give(p.name, parent_name, pnamelen);
	short_of |= give(p.id, parent_id, pidlen);
	short_of |= give(p.snapshot, parent_snapname, psnapnamelen);
	parent_free(&p);
	return short_of ? -ERANGE : 0;
}

int rbd_get_parent_info(rbd_image_t image, char *parent_poolname, size_t ppoolnamelen,
			char *parent_name, size_t pnamelen, char *parent_snapname,
			size_t psnapnamelen)
{
	return rbd_get_parent_info2(image, parent_poolname, ppoolnamelen, parent_name, pnamelen,
				    NULL, 0, parent_snapname, psnapnamelen);
}

/* Fills in an image of the handle's pool, and takes its name over: 0 or -ENOMEM. */
static int linked_fill(const struct image *h, rbd_linked_image_spec_t *s, const char *id,
		       char *name, bool removed)
{
	*s = (rbd_linked_image_spec_t){
		.pool_id = h->pool,
		.pool_name = strdup(h->pool_name),
		.pool_namespace = strdup(h->pool_space),
		.image_id = strdup(id),
		.image_name = name,
		.trash = removed,
	};
	if (s->pool_name && s->pool_namespace && s->image_id)
		return 0;
	rbd_linked_image_spec_cleanup(s);
	return -ENOMEM;
}

int rbd_get_parent(rbd_image_t image, rbd_linked_image_spec_t *parent_image,
		   rbd_snap_spec_t *parent_snap)
{
	struct parent p;
	int e;

	if (parent_image)
		memset(parent_image, 0, sizeof *parent_image);
	if (parent_snap)
		memset(parent_snap, 0, sizeof *parent_snap);
	e = parent_get(image, &p);
	if (e < 0)
		return e;
	e = linked_fill(image, parent_image, p.id, p.name, p.removed);
	if (e < 0) {
		free(p.snapshot); /* the name went with the image */
		return e;
	}
	*parent_snap = (rbd_snap_spec_t){
		.id = p.number,
		.namespace_type = p.unnamed ? RBD_SNAP_NAMESPACE_TYPE_TRASH :
					      RBD_SNAP_NAMESPACE_TYPE_USER,
		.name = p.snapshot,
	};
	return 0;
}

/* ---- children ---- */

struct child {
	char *name;
	uint8_t id[16];
	bool removed;
};

struct children {
	struct child *at;
	size_t n, room;
};

static void children_free(struct children *l)
{
	for (size_t i = 0; i < l->n; i++)
		free(l->at[i].name);
	free(l->at);
}

static int children_add(struct children *l, struct reader *r)
{
	struct child *c, *at;

	at = list_room(l->at, l->n, &l->room, sizeof *at);
	if (!at)
		return -ENOMEM;
	l->at = at;
	c = &l->at[l->n];
	c->name = get_string(r);
	if (!c->name)
		return -EPROTO;
	get_id(r, c->id);
	c->removed = get_u32(r) & 1;
	l->n++;
	/* By their ids, so that it ends. */
	if (r->bad || (l->n > 1 && memcmp(c[-1].id, c->id, sizeof c->id) >= 0))
		return -EPROTO;
	return 0;
}

static int children_page(struct image *h, bool deep, struct children *l, bool *more)
{
	static const uint8_t none[16];
	uint8_t buf[20];
	struct writer w = {.p = buf, .cap = sizeof buf};
	struct answer a;
	uint32_t n;
	int e;

	put_id(&w, l->n ? l->at[l->n - 1].id : none);
	put_u32(&w, deep ? 1 : 0);
	e = image_call(h, T_CHILDREN, &w, NULL, true, &a);
	if (e < 0)
		return e;
	*more = get_u32(&a.fields);
	n = get_u32(&a.fields);
	if (a.fields.bad || (n == 0 && *more))
		e = -EPROTO;
	for (; n > 0 && e == 0; n--)
		e = children_add(l, &a.fields);
	answer_free(&a);
	return e;
}

static int by_name(const void *a, const void *b)
{
	return strcmp(((const struct child *)a)->name, ((const struct child *)b)->name);
}

/* The clones of what the handle has open, deep: and theirs, by name; children_free. */
static int children_get(struct image *h, bool deep, struct children *l)
{
	bool more = true;
	int e = 0;

	memset(l, 0, sizeof *l);
	while (e == 0 && more)
		e = children_page(h, deep, l, &more);
	if (e < 0)
		children_free(l);
	else if (l->n > 0)
		qsort(l->at, l->n, sizeof *l->at, by_name);
	return e;
}

/* The oldest of the calls knows nothing of what has been removed. */
ssize_t rbd_list_children(rbd_image_t image, char *pools, size_t *pools_len, char *images,
			  size_t *images_len)
{
	struct image *h = image;
	struct children l;
	size_t pool_need = 0, image_need = 0;
	ssize_t n = 0;
	int e = children_get(h, false, &l);

	if (e < 0)
		return e;
	for (size_t i = 0; i < l.n; i++) {
		if (l.at[i].removed)
			continue;
		n++;
		pool_need += strlen(h->pool_name) + 1;
		image_need += strlen(l.at[i].name) + 1;
	}
	if (pool_need > *pools_len || image_need > *images_len)
		n = -ERANGE;
	for (size_t i = 0; n > 0 && i < l.n; i++) {
		if (l.at[i].removed)
			continue;
		pools = stpcpy(pools, h->pool_name) + 1;
		images = stpcpy(images, l.at[i].name) + 1;
	}
	*pools_len = pool_need;
	*images_len = image_need;
	children_free(&l);
	return n;
}

void rbd_list_child_cleanup(rbd_child_info_t *child)
{
	free((char *)(uintptr_t)child->pool_name);
	free((char *)(uintptr_t)child->image_name);
	free((char *)(uintptr_t)child->image_id);
	*child = (rbd_child_info_t){0};
}

void rbd_list_children_cleanup(rbd_child_info_t *children, size_t num_children)
{
	for (size_t i = 0; i < num_children; i++)
		rbd_list_child_cleanup(&children[i]);
}

int rbd_list_children2(rbd_image_t image, rbd_child_info_t *children, int *max_children)
{
	struct image *h = image;
	struct children l;
	int e, n;

	if (!children || !max_children)
		return -EINVAL;
	if (*max_children > 0) /* as in list_linked */
		memset(children, 0, (size_t)*max_children * sizeof *children);
	e = children_get(h, false, &l);
	if (e < 0)
		return e;
	n = (int)l.n; /* thousands at most */
	if (*max_children < n + 1) {
		*max_children = n + 1;
		children_free(&l);
		return -ERANGE;
	}
	for (int i = 0; i < n; i++) {
		char id[ID_TEXT];

		id_format(l.at[i].id, id);
		children[i] = (rbd_child_info_t){
			.pool_name = strdup(h->pool_name),
			.image_name = strdup(l.at[i].name),
			.image_id = strdup(id),
			.trash = l.at[i].removed,
		};
		if (!children[i].pool_name || !children[i].image_name || !children[i].image_id)
			e = -ENOMEM;
	}
	children[n] = (rbd_child_info_t){0};
	children_free(&l);
	if (e < 0)
		rbd_list_children_cleanup(children, (size_t)n);
	return e < 0 ? e : n;
}

static int list_linked(struct image *h, bool deep, rbd_linked_image_spec_t *images,
		       size_t *max_images)
{
	struct children l;
	size_t given = 0;
	int e;

	if (*max_images > 0) /* callers clean up what they have, whatever comes of it */
		memset(images, 0, *max_images * sizeof *images);
	e = children_get(h, deep, &l);
	if (e < 0)
		return e;
	if (*max_images < l.n)
		e = -ERANGE;
	for (; e == 0 && given < l.n; given++) {
		struct child *c = &l.at[given];
		char id[ID_TEXT];

		id_format(c->id, id);
		e = linked_fill(h, &images[given], id, c->name, c->removed);
		c->name = NULL; /* it is the caller's */
	}
	*max_images = l.n;
	if (e < 0)
		rbd_linked_image_spec_list_cleanup(images, given);
	children_free(&l);
	return e;
}

int rbd_list_children3(rbd_image_t image, rbd_linked_image_spec_t *images, size_t *max_images)
{
	return list_linked(image, false, images, max_images);
}

int rbd_list_descendants(rbd_image_t image, rbd_linked_image_spec_t *images, size_t *max_images)
{
	return list_linked(image, true, images, max_images);
}
