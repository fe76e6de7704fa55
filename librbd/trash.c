/* Images in the trash. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>

/* One request on the ioctx's store, of up to two names and a number, whose answer has no fields. */
static int trash_call(struct on_store *s, uint16_t type, const struct progress *pr)
{
	struct answer a;
	int e = call_once(type, &s->w, pr, &a);

	if (e == 0)
		answer_free(&a);
	return e;
}

int rbd_trash_move(rados_ioctx_t io, const char *name, uint64_t delay)
{
	struct on_store s;
	int e = name && *name ? on_store(&s, io) : -ENOENT;

	if (e < 0)
		return e;
	put_name(&s.w, name);
	put_u64(&s.w, delay);
	return trash_call(&s, T_TRASH_MOVE, NULL);
}

int rbd_trash_remove_with_progress(rados_ioctx_t io, const char *id, bool force,
				   librbd_progress_fn_t cb, void *cbdata)
{
	struct progress pr = {.fn = cb, .arg = cbdata};
	struct on_store s;
	int e = id ? on_store(&s, io) : -ENOENT;

	if (e < 0)
		return e;
	put_name(&s.w, id);
	put_u32(&s.w, force ? 1 : 0);
	return trash_call(&s, T_TRASH_REMOVE, &pr);
}

int rbd_trash_remove(rados_ioctx_t io, const char *id, bool force)
{
	return rbd_trash_remove_with_progress(io, id, force, NULL, NULL);
}

int rbd_trash_restore(rados_ioctx_t io, const char *id, const char *name)
{
	struct on_store s;
	int e = id ? on_store(&s, io) : -ENOENT;

	if (e < 0)
		return e;
	put_name(&s.w, id);
	put_name(&s.w, name);
	return trash_call(&s, T_TRASH_RESTORE, NULL);
}

int rbd_trash_purge_with_progress(rados_ioctx_t io, time_t expire_ts, float threshold,
				  librbd_progress_fn_t cb, void *cbdata)
{
	struct progress pr = {.fn = cb, .arg = cbdata};
	struct on_store s;
	int e;

	if (threshold != -1) /* how full a pool may be: a store does not know that */
		return threshold >= 0 && threshold <= 1 ? -EOPNOTSUPP : -EINVAL;
	e = on_store(&s, io);
	if (e < 0)
		return e;
	put_u64(&s.w, (uint64_t)(int64_t)expire_ts);
	return trash_call(&s, T_TRASH_PURGE, &pr);
}

int rbd_trash_purge(rados_ioctx_t io, time_t expire_ts, float threshold)
{
	return rbd_trash_purge_with_progress(io, expire_ts, threshold, NULL, NULL);
}

/* ---- lists ---- */

struct trash {
	rbd_trash_image_info_t *at;
	size_t n, room;
	uint8_t last[16]; /* id of the last one */
};

static int trash_add(struct trash *l, const rbd_trash_image_info_t *info)
{
	rbd_trash_image_info_t *at;

	at = list_room(l->at, l->n, &l->room, sizeof *at);
	if (!at)
		return -ENOMEM;
	l->at = at;
	l->at[l->n++] = *info;
	return 0;
}

static void trash_free(struct trash *l)
{
	rbd_trash_list_cleanup(l->at, l->n);
	free(l->at);
}

/* One image of an answer. */
static int trash_decode_one(struct reader *r, struct trash *l)
{
	rbd_trash_image_info_t info = {.source = RBD_TRASH_IMAGE_SOURCE_USER};
	char text[ID_TEXT];
	uint8_t id[16];
	int e;

	get_id(r, id);
	info.name = get_string(r);
	info.deletion_time = (time_t)(int64_t)get_u64(r);
	info.deferment_end_time = (time_t)(int64_t)get_u64(r);
	id_format(id, text);
	info.id = strdup(text);
	if (r->bad || !info.name || (l->n > 0 && memcmp(id, l->last, sizeof id) <= 0))
		e = -EPROTO; /* a list that does not go on would never end */
	else if (!info.id)
		e = -ENOMEM;
	else
		e = trash_add(l, &info);
	if (e < 0)
		rbd_trash_get_cleanup(&info);
	else
		memcpy(l->last, id, sizeof id);
	return e;
}

/* One answer's images; *more where the daemon has others behind them. */
static int trash_decode(struct reader *r, struct trash *l, bool *more)
{
	uint32_t n;
	int e = 0;

	*more = get_u32(r) == 1;
	n = get_u32(r);
	if (n == 0 && *more)
		return -EPROTO;
	for (; e == 0 && n > 0; n--)
		e = trash_decode_one(r, l);
	return e == 0 && r->bad ? -EPROTO : e;
}

static int trash_get(rados_ioctx_t io, struct trash *l)
{
	bool more = true;
	int e = 0;

	memset(l, 0, sizeof *l);
	while (e == 0 && more) {
		struct on_store s;
		struct answer a;

		e = on_store(&s, io);
		if (e < 0)
			break;
		put_id(&s.w, l->last);
		e = call_once(T_TRASH_LIST, &s.w, NULL, &a);
		if (e < 0)
			break;
		e = trash_decode(&a.fields, l, &more);
		answer_free(&a);
	}
	if (e < 0)
		trash_free(l);
	return e;
}

int rbd_trash_get(rados_ioctx_t io, const char *id, rbd_trash_image_info_t *info)
{
	struct trash l;
	int e;

	if (!id || !info)
		return -EINVAL;
	e = trash_get(io, &l);
	if (e < 0)
		return e;
	e = -ENOENT;
	for (size_t i = 0; i < l.n && e < 0; i++) {
		if (strcmp(l.at[i].id, id))
			continue;
		*info = l.at[i];
		l.at[i].id = l.at[i].name = NULL; /* the strings are the caller's now */
		e = 0;
	}
	trash_free(&l);
	return e;
}

void rbd_trash_get_cleanup(rbd_trash_image_info_t *info)
{
	free(info->id);
	free(info->name);
	info->id = info->name = NULL;
}

int rbd_trash_list(rados_ioctx_t io, rbd_trash_image_info_t *trash_entries, size_t *num_entries)
{
	struct trash l;
	int e;

	if (!num_entries)
		return -EINVAL;
	if (*num_entries > 0) /* callers clean up what they have, whatever comes of it */
		memset(trash_entries, 0, *num_entries * sizeof *trash_entries);
	e = trash_get(io, &l);
	if (e < 0)
		return e;
	if (*num_entries < l.n) {
		*num_entries = l.n;
		trash_free(&l);
		return -ERANGE;
	}
	if (l.n > 0)
		memcpy(trash_entries, l.at, l.n * sizeof *trash_entries);
	*num_entries = l.n;
	e = (int)l.n;
	free(l.at); /* the strings are the caller's now */
	return e;
}

void rbd_trash_list_cleanup(rbd_trash_image_info_t *trash_entries, size_t num_entries)
{
	for (size_t i = 0; i < num_entries; i++)
		rbd_trash_get_cleanup(&trash_entries[i]);
}
