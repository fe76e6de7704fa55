/* Snapshots. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>

struct snapshot {
	uint64_t number, size;
	int64_t made; /* nanoseconds since 1970 */
	char *name;
};

struct snapshots {
	uint32_t n;
	struct snapshot *at;
};

static void list_free(struct snapshots *l)
{
	for (uint32_t i = 0; i < l->n; i++)
		free(l->at[i].name);
	free(l->at);
	l->at = NULL;
	l->n = 0;
}

static int list_decode(struct reader *r, struct snapshots *l)
{
	uint32_t n = get_u32(r);

	/* Each has 28 bytes at least: no count from outside is allocated for. */
	if (r->bad || n > r->n / 28)
		return -EPROTO;
	l->at = calloc(n ? n : 1, sizeof *l->at);
	if (!l->at)
		return -ENOMEM;
	for (; l->n < n; l->n++) {
		struct snapshot *s = &l->at[l->n];

		s->number = get_u64(r);
		s->size = get_u64(r);
		s->made = (int64_t)get_u64(r);
		s->name = get_string(r);
		if (!s->name) {
			list_free(l);
			return -EPROTO;
		}
	}
	return 0;
}

static int list_get(struct image *h, struct snapshots *l)
{
	struct answer a;
	int e = image_call(h, T_SNAP_LIST, NULL, NULL, true, &a);

	memset(l, 0, sizeof *l);
	if (e < 0)
		return e;
	e = list_decode(&a.fields, l);
	answer_free(&a);
	return e;
}

int snap_number(struct conn *c, int64_t deadline, const char *name, uint64_t *number)
{
	struct snapshots l = {0};
	struct answer a;
	bool broken;
	int e = conn_call(c, T_SNAP_LIST, NULL, NULL, deadline, &a, &broken);

	if (e < 0)
		return e;
	e = list_decode(&a.fields, &l);
	answer_free(&a);
	if (e < 0)
		return e;
	e = -ENOENT;
	for (uint32_t i = 0; i < l.n && e < 0; i++) {
		if (strcmp(l.at[i].name, name) == 0) {
			*number = l.at[i].number;
			e = 0;
		}
	}
	list_free(&l);
	return e;
}

/* A snapshot by its name, or where that is NULL by its number; its name is *l's. */
static int find(struct image *h, const char *name, uint64_t number, struct snapshots *l,
		struct snapshot *out)
{
	int e = list_get(h, l);

	if (e < 0)
		return e;
	for (uint32_t i = 0; i < l->n; i++) {
		if (name ? strcmp(l->at[i].name, name) == 0 : l->at[i].number == number) {
			*out = l->at[i];
			return 0;
		}
	}
	list_free(l);
	return -ENOENT;
}

/* find without the name. */
static int look(struct image *h, const char *name, uint64_t number, struct snapshot *out)
{
	struct snapshots l;
	int e = find(h, name, number, &l, out);

	if (e == 0) {
		list_free(&l);
		out->name = NULL;
	}
	return e;
}

/* Only a handle that may write changes an image's snapshots. */
static int change(struct image *h, uint16_t type, const char *name, const char *other,
		  const struct progress *pr)
{
	uint8_t buf[REQUEST_MOST];
	struct writer w = {.p = buf, .cap = sizeof buf};
	struct answer a;
	int e;

	if (!name)
		return -EINVAL;
	if (!h->forked && h->read_only)
		return -EROFS;
	put_name(&w, name);
	if (other)
		put_name(&w, other);
	e = image_call(h, type, &w, pr, false, &a);
	answer_free(&a);
	return e;
}

int rbd_snap_create(rbd_image_t image, const char *snapname)
{
	return change(image, T_SNAP_CREATE, snapname, NULL, NULL);
}

int rbd_snap_create2(rbd_image_t image, const char *snap_name, uint32_t flags,
		     librbd_progress_fn_t cb, void *cbdata)
{
	struct progress pr = {.fn = cb, .arg = cbdata};

	if (flags & ~(uint32_t)(RBD_SNAP_CREATE_SKIP_QUIESCE | RBD_SNAP_CREATE_IGNORE_QUIESCE_ERROR))
		return -EINVAL;
	return change(image, T_SNAP_CREATE, snap_name, NULL, &pr);
}

int rbd_snap_remove(rbd_image_t image, const char *snapname)
{
	return change(image, T_SNAP_REMOVE, snapname, NULL, NULL);
}

int rbd_snap_remove2(rbd_image_t image, const char *snap_name, uint32_t flags,
		     librbd_progress_fn_t cb, void *cbdata)
{
	struct progress pr = {.fn = cb, .arg = cbdata};

	/* Clones do not need their snapshot: nothing is to be flattened or unprotected. */
	if (flags & ~(uint32_t)RBD_SNAP_REMOVE_FORCE)
		return -EINVAL;
	return change(image, T_SNAP_REMOVE, snap_name, NULL, &pr);
}

int rbd_snap_remove_by_id(rbd_image_t image, uint64_t snap_id)
{
	struct snapshots l;
	struct snapshot s;
	int e = find(image, NULL, snap_id, &l, &s);

	if (e < 0)
		return e;
	e = rbd_snap_remove(image, s.name);
	list_free(&l);
	return e;
}

int rbd_snap_rollback(rbd_image_t image, const char *snapname)
{
	return change(image, T_ROLLBACK, snapname, NULL, NULL);
}

int rbd_snap_rollback_with_progress(rbd_image_t image, const char *snapname,
				    librbd_progress_fn_t cb, void *cbdata)
{
	struct progress pr = {.fn = cb, .arg = cbdata};

	return change(image, T_ROLLBACK, snapname, NULL, &pr);
}

int rbd_snap_rename(rbd_image_t image, const char *snapname, const char *dstsnapsname)
{
	return dstsnapsname ? change(image, T_SNAP_RENAME, snapname, dstsnapsname, NULL) : -EINVAL;
}

int rbd_snap_list(rbd_image_t image, rbd_snap_info_t *snaps, int *max_snaps)
{
	struct snapshots l;
	int e;

	if (!max_snaps || (!snaps && *max_snaps > 0)) /* go-ceph asks for the number first */
		return -EINVAL;
	if (*max_snaps > 0) /* callers clean up what they have, whatever comes of it */
		memset(snaps, 0, (size_t)*max_snaps * sizeof *snaps);
	e = list_get(image, &l);
	if (e < 0)
		return e;
	if (*max_snaps < 0 || (uint32_t)*max_snaps < l.n + 1) {
		*max_snaps = (int)l.n + 1;
		list_free(&l);
		return -ERANGE;
	}
	for (uint32_t i = 0; i < l.n; i++)
		snaps[i] = (rbd_snap_info_t){
			.id = l.at[i].number, .size = l.at[i].size, .name = l.at[i].name};
	snaps[l.n] = (rbd_snap_info_t){0};
	e = (int)l.n;
	free(l.at); /* the names are the caller's now */
	return e;
}

void rbd_snap_list_end(rbd_snap_info_t *snaps)
{
	for (; snaps->name; snaps++) {
		free((char *)(uintptr_t)snaps->name);
		snaps->name = NULL;
	}
}

int rbd_snap_exists(rbd_image_t image, const char *snapname, bool *exists)
{
	struct snapshot s;
	int e = snapname ? look(image, snapname, 0, &s) : -EINVAL;

	if (e < 0 && e != -ENOENT)
		return e;
	*exists = e == 0;
	return 0;
}

/* No snapshot needs protection: clones stay when it goes. */
int rbd_snap_protect(rbd_image_t image, const char *snap_name)
{
	struct snapshot s;

	return snap_name ? look(image, snap_name, 0, &s) : -EINVAL;
}

int rbd_snap_unprotect(rbd_image_t image, const char *snap_name)
{
	return rbd_snap_protect(image, snap_name);
}

/*
 * Never: whoever is about to clone protects it then, which succeeds, and whoever is about to
 * remove it may.
 */
int rbd_snap_is_protected(rbd_image_t image, const char *snap_name, int *is_protected)
{
	int e = rbd_snap_protect(image, snap_name);

	if (e == 0)
		*is_protected = 0;
	return e;
}

int rbd_snap_get_limit(rbd_image_t image, uint64_t *limit)
{
	struct image *h = image;

	*limit = UINT64_MAX;
	return h->forked ? -EIO : 0;
}

int rbd_snap_get_timestamp(rbd_image_t image, uint64_t snap_id, struct timespec *timestamp)
{
	struct snapshot s;
	int e = look(image, NULL, snap_id, &s);

	if (e < 0)
		return e;
	if (s.made < 0)
		return -EPROTO;
	timestamp->tv_sec = s.made / 1000000000;
	timestamp->tv_nsec = s.made % 1000000000;
	return 0;
}

int rbd_snap_get_id(rbd_image_t image, const char *snapname, uint64_t *snap_id)
{
	struct snapshot s;
	int e = snapname ? look(image, snapname, 0, &s) : -EINVAL;

	if (e == 0)
		*snap_id = s.number;
	return e;
}

int rbd_snap_get_name(rbd_image_t image, uint64_t snap_id, char *snapname, size_t *name_len)
{
	struct snapshots l;
	struct snapshot s;
	size_t need;
	int e = find(image, NULL, snap_id, &l, &s);

	if (e < 0)
		return e;
	need = strlen(s.name) + 1;
	if (*name_len < need)
		e = -ERANGE;
	else
		memcpy(snapname, s.name, need);
	*name_len = need;
	list_free(&l);
	return e;
}

int rbd_snap_get_namespace_type(rbd_image_t image, uint64_t snap_id,
				rbd_snap_namespace_type_t *namespace_type)
{
	struct snapshot s;
	int e = look(image, NULL, snap_id, &s);

	if (e == 0)
		*namespace_type = RBD_SNAP_NAMESPACE_TYPE_USER;
	return e;
}

void rbd_snap_spec_cleanup(rbd_snap_spec_t *snap)
{
	free(snap->name);
	snap->name = NULL;
}

int rbd_snap_set(rbd_image_t image, const char *snapname)
{
	return image_change(image, snapname && *snapname ? snapname : NULL, 0);
}

int rbd_snap_set_by_id(rbd_image_t image, uint64_t snap_id)
{
	/* The highest number is librbd's name of the image itself; it is none of a snapshot. */
	return image_change(image, NULL, snap_id >= UINT64_MAX - 1 ? 0 : snap_id);
}
