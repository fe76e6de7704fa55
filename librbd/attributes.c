/* What is kept with an image: metadata and advisory locks; and who has it. */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#define REQUEST_FIXED 64u /* bytes of a request beside its texts */

static size_t length(const char *s)
{
	return s ? strlen(s) : 0;
}

/* A writer with room for two texts and a few numbers: 0 or -ENOMEM; free w->p. */
static int room_for(struct writer *w, const char *a, const char *b)
{
	size_t n = REQUEST_FIXED + length(a) + length(b);

	*w = (struct writer){.p = malloc(n), .cap = n};
	return w->p ? 0 : -ENOMEM;
}

/* Makes a request and frees it; a, if there is one, is the caller's to free where this is 0. */
static int ask(struct image *h, uint16_t type, struct writer *w, bool query, struct answer *a)
{
	struct answer none;
	int e;

	if (w->bad || w->n > FRAME_MOST)
		e = -E2BIG;
	else
		e = image_call(h, type, w, NULL, query, a ? a : &none);
	free(w->p);
	if (e == 0 && !a)
		answer_free(&none);
	return e;
}

/* ---- metadata ---- */

int rbd_metadata_get(rbd_image_t image, const char *key, char *value, size_t *val_len)
{
	struct writer w;
	struct answer a;
	const uint8_t *v;
	uint32_t n;
	int e;

	if (!key)
		return -EINVAL;
	e = room_for(&w, key, NULL);
	if (e < 0)
		return e;
	put_name(&w, key);
	e = ask(image, T_META_GET, &w, true, &a);
	if (e < 0)
		return e;
	v = get_bytes(&a.fields, &n);
	if (!v || memchr(v, 0, n)) {
		e = -EPROTO;
	} else if (*val_len < (size_t)n + 1) {
		*val_len = (size_t)n + 1;
		e = -ERANGE;
	} else {
		memcpy(value, v, n);
		value[n] = 0;
	}
	answer_free(&a);
	return e;
}

int rbd_metadata_set(rbd_image_t image, const char *key, const char *value)
{
	struct image *h = image;
	struct writer w;
	int e;

	if (!key || !value)
		return -EINVAL;
	if (!h->forked && h->read_only)
		return -EROFS;
	if (length(value) > FRAME_MOST)
		return -E2BIG;
	e = room_for(&w, key, value);
	if (e < 0)
		return e;
	put_name(&w, key);
	put_text(&w, value);
	return ask(h, T_META_SET, &w, false, NULL);
}

int rbd_metadata_remove(rbd_image_t image, const char *key)
{
	struct image *h = image;
	struct writer w;
	int e;

	if (!key)
		return -EINVAL;
	if (!h->forked && h->read_only)
		return -EROFS;
	e = room_for(&w, key, NULL);
	if (e < 0)
		return e;
	put_name(&w, key);
	return ask(h, T_META_REMOVE, &w, false, NULL);
}

/* Texts one behind the other, each with its zero. */
struct texts {
	char *p;
	size_t n, cap;
};

static int texts_add(struct texts *t, const uint8_t *p, uint32_t n)
{
	if (!p || memchr(p, 0, n))
		return -EPROTO;
	if (t->cap - t->n < (size_t)n + 1) {
		size_t cap = 2 * (t->cap + n + 1);
		char *q = realloc(t->p, cap);

		if (!q)
			return -ENOMEM;
		t->p = q;
		t->cap = cap;
	}
	memcpy(t->p + t->n, p, n);
	t->p[t->n + n] = 0;
	t->n += (size_t)n + 1;
	return 0;
}

static int take_text(struct reader *r, struct texts *t)
{
	uint32_t n;
	const uint8_t *p = get_bytes(r, &n);

	return texts_add(t, p, n);
}

/* Copies texts to the caller, who has checked that they fit. */
static void texts_out(const struct texts *t, char *out)
{
	if (t->n > 0)
		memcpy(out, t->p, t->n);
}

struct pairs {
	struct texts keys, values;
	size_t last; /* where the last key begins */
	uint64_t n;
};

/* Keys come in order, behind start: else there would be no end of them. */
static int take_page(struct reader *r, const char *start, struct pairs *l, bool *more)
{
	uint32_t n;
	int e = 0;

	*more = get_u32(r) != 0;
	n = get_u32(r);
	if (r->bad || (n == 0 && *more))
		return -EPROTO;
	for (uint32_t i = 0; e == 0 && i < n; i++) {
		size_t before = l->last;

		l->last = l->keys.n;
		e = take_text(r, &l->keys);
		if (e == 0 && strcmp(l->keys.p + l->last, l->n ? l->keys.p + before : start ? start : "") <= 0)
			e = -EPROTO;
		if (e == 0)
			e = take_text(r, &l->values);
		l->n++;
	}
	return e;
}

/* All metadata after start, of which there are at most max, 0: any number. */
static int list_pairs(struct image *h, const char *start, uint64_t max, struct pairs *l)
{
	bool more = true;
	int e = 0;

	while (e == 0 && more && (max == 0 || l->n < max)) {
		const char *after = l->n ? l->keys.p + l->last : start;
		uint64_t want = max ? max - l->n : 0;
		struct writer w;
		struct answer a;

		e = room_for(&w, after, NULL);
		if (e < 0)
			return e;
		put_name(&w, after);
		put_u32(&w, want > UINT32_MAX ? 0 : (uint32_t)want);
		e = ask(h, T_META_LIST, &w, true, &a);
		if (e < 0)
			return e;
		e = take_page(&a.fields, start, l, &more);
		answer_free(&a);
	}
	return e;
}

int rbd_metadata_list(rbd_image_t image, const char *start, uint64_t max, char *keys,
		      size_t *key_len, char *values, size_t *vals_len)
{
	struct pairs l = {0};
	bool fits;
	int e = list_pairs(image, start, max, &l);

	if (e == 0) {
		fits = l.keys.n <= *key_len && l.values.n <= *vals_len;
		*key_len = l.keys.n;
		*vals_len = l.values.n;
		if (fits) {
			texts_out(&l.keys, keys);
			texts_out(&l.values, values);
		} else {
			e = -ERANGE;
		}
	}
	free(l.keys.p);
	free(l.values.p);
	return e;
}

/* ---- advisory locks ---- */

struct lockers {
	bool exclusive;
	uint32_t n;
	struct texts tag, clients, cookies, addrs;
};

static void lockers_free(struct lockers *l)
{
	free(l->tag.p);
	free(l->clients.p);
	free(l->cookies.p);
	free(l->addrs.p);
}

static int take_lockers(struct reader *r, struct lockers *l)
{
	int e;

	l->exclusive = get_u32(r) != 0;
	e = take_text(r, &l->tag);
	l->n = get_u32(r);
	if (e == 0 && (r->bad || l->n > INT32_MAX))
		e = -EPROTO;
	for (uint32_t i = 0; e == 0 && i < l->n; i++) {
		e = take_text(r, &l->clients);
		if (e == 0)
			e = take_text(r, &l->cookies);
		if (e == 0)
			e = take_text(r, &l->addrs);
		get_u64(r); /* since when */
	}
	return e == 0 && r->bad ? -EPROTO : e;
}

ssize_t rbd_list_lockers(rbd_image_t image, int *exclusive, char *tag, size_t *tag_len,
			 char *clients, size_t *clients_len, char *cookies, size_t *cookies_len,
			 char *addrs, size_t *addrs_len)
{
	struct lockers l = {0};
	struct answer a;
	bool fits;
	ssize_t e = image_call(image, T_LOCKS, NULL, NULL, true, &a);

	if (e < 0)
		return e;
	e = take_lockers(&a.fields, &l);
	answer_free(&a);
	if (e == 0) {
		fits = l.tag.n <= *tag_len && l.clients.n <= *clients_len &&
		       l.cookies.n <= *cookies_len && l.addrs.n <= *addrs_len;
		*tag_len = l.tag.n;
		*clients_len = l.clients.n;
		*cookies_len = l.cookies.n;
		*addrs_len = l.addrs.n;
		e = fits ? (ssize_t)l.n : -ERANGE;
		if (fits) {
			texts_out(&l.tag, tag);
			texts_out(&l.clients, clients);
			texts_out(&l.cookies, cookies);
			texts_out(&l.addrs, addrs);
			*exclusive = l.exclusive;
		}
	}
	lockers_free(&l);
	return e;
}

static int lock(struct image *h, bool exclusive, const char *cookie, const char *tag)
{
	struct writer w;
	int e;

	if (!cookie || !tag)
		return -EINVAL;
	e = room_for(&w, cookie, tag);
	if (e < 0)
		return e;
	put_u32(&w, exclusive);
	put_name(&w, cookie);
	put_name(&w, tag);
	return ask(h, T_LOCK, &w, false, NULL);
}

int rbd_lock_exclusive(rbd_image_t image, const char *cookie)
{
	return lock(image, true, cookie, "");
}

int rbd_lock_shared(rbd_image_t image, const char *cookie, const char *tag)
{
	return lock(image, false, cookie, tag);
}

int rbd_unlock(rbd_image_t image, const char *cookie)
{
	struct writer w;
	int e;

	if (!cookie)
		return -EINVAL;
	e = room_for(&w, cookie, NULL);
	if (e < 0)
		return e;
	put_name(&w, cookie);
	return ask(image, T_UNLOCK, &w, false, NULL);
}

int rbd_break_lock(rbd_image_t image, const char *client, const char *cookie)
{
	struct writer w;
	int e;

	if (!client || !cookie)
		return -EINVAL;
	e = room_for(&w, client, cookie);
	if (e < 0)
		return e;
	put_name(&w, client);
	put_name(&w, cookie);
	return ask(image, T_BREAK_LOCK, &w, false, NULL);
}

/* ---- who has the image ---- */

struct watchers {
	bool owned; /* by the host of this handle, which may write */
	char *host; /* that owns it */
	uint32_t n;
	rbd_image_watcher_t *at;
};

static void watchers_free(struct watchers *l)
{
	free(l->host);
	rbd_watchers_list_cleanup(l->at, l->n);
	free(l->at);
}

static int take_watchers(struct reader *r, struct watchers *l)
{
	uint32_t n;

	l->owned = get_u32(r) != 0;
	l->host = get_string(r);
	n = get_u32(r);
	/* Each has 20 bytes at least: no count from outside is allocated for. */
	if (r->bad || n > r->n / 20)
		return -EPROTO;
	l->at = calloc(n ? n : 1, sizeof *l->at);
	if (!l->at)
		return -ENOMEM;
	for (; l->n < n; l->n++) {
		l->at[l->n].addr = get_string(r);
		l->at[l->n].id = (int64_t)get_u64(r);
		l->at[l->n].cookie = get_u64(r);
	}
	return r->bad ? -EPROTO : 0;
}

/* Free l in any case. */
static int look(struct image *h, struct watchers *l)
{
	struct answer a;
	int e = image_call(h, T_WATCHERS, NULL, NULL, true, &a);

	*l = (struct watchers){0};
	if (e < 0)
		return e;
	e = take_watchers(&a.fields, l);
	answer_free(&a);
	return e;
}

int rbd_watchers_list(rbd_image_t image, rbd_image_watcher_t *watchers, size_t *max_watchers)
{
	struct watchers l;
	int e = look(image, &l);

	if (e == 0) {
		if (l.n > *max_watchers) {
			e = -ERANGE;
		} else {
			memcpy(watchers, l.at, l.n * sizeof *l.at);
			memset(l.at, 0, l.n * sizeof *l.at); /* they are the caller's now */
		}
	}
	/* Callers clean up what is there, also after an error. */
	*max_watchers = e == 0 || e == -ERANGE ? l.n : 0;
	watchers_free(&l);
	return e;
}

void rbd_watchers_list_cleanup(rbd_image_watcher_t *watchers, size_t num_watchers)
{
	for (size_t i = 0; i < num_watchers; i++) {
		free(watchers[i].addr);
		watchers[i].addr = NULL;
	}
}

/*
 * The exclusive lock of librbd is here that the image is its host's, for as long as a handle is
 * open that may write. Others have none, as images without the feature.
 */
static int owned(struct image *h, bool *yes)
{
	struct watchers l;
	int e = look(h, &l);

	if (e == 0)
		*yes = l.owned;
	watchers_free(&l);
	return e;
}

/* 0 where the handle's host owns the image. */
static int must_own(struct image *h)
{
	bool yes = false;
	int e;

	if (!h->forked && h->read_only)
		return -EINVAL;
	e = owned(h, &yes);
	return e < 0 ? e : yes ? 0 : -EROFS;
}

int rbd_is_exclusive_lock_owner(rbd_image_t image, int *is_owner)
{
	bool yes = false;
	int e = owned(image, &yes);

	if (e == 0)
		*is_owner = yes;
	return e;
}

int rbd_lock_acquire(rbd_image_t image, rbd_lock_mode_t lock_mode)
{
	return lock_mode == RBD_LOCK_MODE_EXCLUSIVE ? must_own(image) : -EOPNOTSUPP;
}

/* The host owns the image until the handle is closed; nobody waits for it to be released. */
int rbd_lock_release(rbd_image_t image)
{
	int e = must_own(image);

	return e == -EROFS ? -EINVAL : e;
}

int rbd_lock_get_owners(rbd_image_t image, rbd_lock_mode_t *lock_mode, char **lock_owners,
			size_t *max_lock_owners)
{
	struct image *h = image;
	struct watchers l;
	size_t room = *max_lock_owners;
	int e;

	*max_lock_owners = 0; /* callers clean up what is there, also after an error */
	if (!h->forked && h->read_only)
		return -EINVAL;
	e = look(h, &l);
	if (e == 0 && (!l.host || !*l.host))
		e = -ENOENT;
	if (e == 0 && room < 1)
		e = -ERANGE;
	if (e == 0) {
		*lock_mode = RBD_LOCK_MODE_EXCLUSIVE;
		lock_owners[0] = l.host;
		l.host = NULL;
	}
	if (e == 0 || e == -ERANGE)
		*max_lock_owners = 1;
	watchers_free(&l);
	return e;
}

void rbd_lock_get_owners_cleanup(char **lock_owners, size_t lock_owner_count)
{
	for (size_t i = 0; i < lock_owner_count; i++) {
		free(lock_owners[i]);
		lock_owners[i] = NULL;
	}
}

/* Whoever owns the image has writes that the store does not: lsdctl add --force says which. */
int rbd_lock_break(rbd_image_t image, rbd_lock_mode_t lock_mode, const char *lock_owner)
{
	int e;

	(void)lock_owner;
	if (lock_mode != RBD_LOCK_MODE_EXCLUSIVE)
		return -EOPNOTSUPP;
	e = must_own(image);
	if (e < 0 && e != -EROFS)
		return e;
	if (debugging())
		fprintf(stderr, "librbd of lsd: the image's host is not shut out here: lsdctl add --force on another one does it\n");
	return -EBUSY;
}

/* ---- times ---- */

enum { CREATED, MODIFIED, ACCESSED, TIMES };

static int get_time(struct image *h, int which, struct timespec *t)
{
	int64_t ns[TIMES];
	struct answer a;
	int e = image_call(h, T_TIMES, NULL, NULL, true, &a);

	if (e < 0)
		return e;
	for (int i = 0; i < TIMES; i++)
		ns[i] = (int64_t)get_u64(&a.fields);
	if (a.fields.bad || ns[which] < 0)
		e = -EPROTO;
	answer_free(&a);
	if (e == 0) {
		t->tv_sec = ns[which] / 1000000000;
		t->tv_nsec = ns[which] % 1000000000;
	}
	return e;
}

int rbd_get_create_timestamp(rbd_image_t image, struct timespec *timestamp)
{
	return get_time(image, CREATED, timestamp);
}

int rbd_get_modify_timestamp(rbd_image_t image, struct timespec *timestamp)
{
	return get_time(image, MODIFIED, timestamp);
}

int rbd_get_access_timestamp(rbd_image_t image, struct timespec *timestamp)
{
	return get_time(image, ACCESSED, timestamp);
}
