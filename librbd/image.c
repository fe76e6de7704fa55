/* Handles: opening, closing, what an image says of itself. */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define ENTRIES_WANTED 512u
#define DATA_WANTED (32u * MIB)
#define OPEN_TRIES 10       /* of an open at which the daemon hangs up */
#define OPEN_PAUSE 100000000 /* ns */

static uint32_t power_of_two(uint32_t n)
{
	while (n & (n - 1))
		n &= n - 1;
	return n;
}

static void fill_open(struct writer *w, const struct target *t, uint32_t entries, uint64_t data)
{
	static const uint8_t none[16];
	uint32_t flags = (t->read_only ? 1 : 0) | (t->by_id ? 2 : 0) | (t->again ? 4 : 0) |
			 (t->instead ? 8 : 0) | (t->shared && !t->read_only ? 16 : 0);

	put_name(w, t->store);
	put_name(w, t->image);
	put_name(w, t->snapshot);
	put_u64(w, t->number);
	put_u32(w, flags);
	put_u32(w, entries);
	put_u64(w, data);
	put_id(w, t->again ? t->again : none);
	if (t->instead)
		put_u64(w, t->instead);
}

static int take_open(struct answer *a, struct opened *o)
{
	uint32_t entries;
	uint64_t data;
	int e;

	get_id(&a->fields, o->id);
	o->name = get_string(&a->fields);
	o->size = get_u64(&a->fields);
	get_u32(&a->fields); /* logical block: every byte can be written */
	o->object = get_u64(&a->fields);
	entries = get_u32(&a->fields);
	data = get_u64(&a->fields);
	o->read_only = get_u32(&a->fields) & 1;
	o->handle = a->fields.n >= 8 ? get_u64(&a->fields) : 0; /* not of older daemons */
	a->nfds = 0; /* ring_map takes them */
	e = ring_map(&o->ring, a->fds, o->conn.version, entries, data);
	if (e == 0 && (a->fields.bad || o->object == 0)) {
		ring_unmap(&o->ring);
		e = -EPROTO;
	}
	if (e < 0)
		free(o->name);
	return e;
}

int image_connect(const struct target *t, int64_t deadline, bool quiet, struct opened *o)
{
	uint8_t buf[REQUEST_MOST];
	struct writer w = {.p = buf, .cap = sizeof buf};
	struct answer a;
	bool broken;
	int e = conn_open(&o->conn, deadline, quiet);

	o->answered = false;
	if (e < 0)
		return e;
	fill_open(&w, t, power_of_two(o->conn.entries < ENTRIES_WANTED ? o->conn.entries :
								   ENTRIES_WANTED),
		  o->conn.data < DATA_WANTED ? o->conn.data / UNIT * UNIT : DATA_WANTED);
	e = conn_call(&o->conn, T_OPEN, &w, NULL, deadline, &a, &broken);
	o->answered = !broken;
	if (e == 0) {
		e = take_open(&a, o);
		answer_free(&a);
	}
	if (e < 0) {
		conn_close(&o->conn);
		return e;
	}
	o->number = t->number;
	if (t->snapshot)
		e = snap_number(&o->conn, deadline, t->snapshot, &o->number);
	if (e < 0)
		opened_free(o);
	return e;
}

void opened_free(struct opened *o)
{
	conn_close(&o->conn);
	ring_unmap(&o->ring);
	free(o->name);
}

void image_adopt(struct image *h, struct opened *o)
{
	h->conn = o->conn;
	h->ring = o->ring;
	h->ntags = 0;
	for (uint32_t i = h->ring.entries; i > 0; i--) {
		h->pieces[i - 1].state = FREE;
		h->tags[h->ntags++] = i - 1;
	}
	space_init(&h->space, h->ring.units);
	h->writes = 0;
	free(h->name);
	h->name = o->name;
	h->size = o->size;
	h->object = o->object;
	h->number = o->handle;
	h->state = LIVE;
	h->life++;
	h->watch_due = h->watches != NULL;
}

/* ---- all handles, for forks ---- */

static pthread_mutex_t handles_lock = PTHREAD_MUTEX_INITIALIZER;
static struct image *handles; /* handles_lock */

/* With all locks nobody is in the middle of replacing a descriptor. */
static void before_fork(void)
{
	pthread_mutex_lock(&handles_lock);
	for (struct image *h = handles; h; h = h->next)
		pthread_mutex_lock(&h->lock);
}

static void after_fork_parent(void)
{
	for (struct image *h = handles; h; h = h->next)
		pthread_mutex_unlock(&h->lock);
	pthread_mutex_unlock(&handles_lock);
}

/*
 * The child has none of the threads and none of the rings. Its copies of the descriptors go
 * at once, for the parent's connections must end when the parent does.
 */
static void after_fork_child(void)
{
	fork_generation++;
	pthread_mutex_init(&handles_lock, NULL);
	events_after_fork();
	for (struct image *h = handles; h; h = h->next) {
		h->forked = true;
		close(h->wake);
		if (h->conn.fd >= 0)
			close(h->conn.fd);
		if (h->ring.daemon >= 0)
			close(h->ring.daemon);
		if (h->ring.client >= 0)
			close(h->ring.client);
	}
	handles = NULL;
}

static void watch_forks(void)
{
	pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

void handles_add(struct image *h)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, watch_forks);
	pthread_mutex_lock(&handles_lock);
	h->next = handles;
	if (handles)
		handles->prev = h;
	handles = h;
	pthread_mutex_unlock(&handles_lock);
}

void handles_remove(struct image *h)
{
	pthread_mutex_lock(&handles_lock);
	if (h->prev)
		h->prev->next = h->next;
	else
		handles = h->next;
	if (h->next)
		h->next->prev = h->prev;
	pthread_mutex_unlock(&handles_lock);
}

/* ---- open and close ---- */

void image_free(struct image *h)
{
	if (!h->forked) {
		if (h->wake >= 0)
			close(h->wake);
		pthread_mutex_destroy(&h->lock);
		pthread_cond_destroy(&h->changed);
	}
	watches_free(h);
	free(h->store);
	free(h->name);
	free(h->pool_name);
	free(h->pool_space);
	free(h);
}

static struct image *image_new(const char *store)
{
	struct image *h = calloc(1, sizeof *h);
	pthread_mutexattr_t attr;

	if (!h)
		return NULL;
	/* It is held for as long as a copy takes: to sleep takes longer. */
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_ADAPTIVE_NP);
	pthread_mutex_init(&h->lock, &attr);
	pthread_mutexattr_destroy(&attr);
	pthread_cond_init(&h->changed, NULL);
	atomic_init(&h->event_fd, -1);
	h->conn.fd = h->ring.memory = h->ring.daemon = h->ring.client = -1;
	h->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	h->store = strdup(store);
	if (h->wake < 0 || !h->store) {
		image_free(h);
		return NULL;
	}
	return h;
}

/* What an aio_open does in a thread of its own; an ordinary open has it on its stack. */
struct opening {
	char store[NAME_MOST + 1];
	char *image, *snapshot;
	bool by_id, read_only;
	int64_t pool;
	char *pool_name, *pool_space;
	rbd_image_t *out;
	struct completion *c;
};

/*
 * image_connect of what is not open yet. A daemon that dies or ends while it is at it is waited for
 * as by what is open; one that is not there to begin with is not, nor one that hangs up again and
 * again, as it does where it has no room.
 */
static int connect_first(const struct target *t, struct opened *o)
{
	const struct timespec pause = {.tv_nsec = OPEN_PAUSE};
	int64_t limit = reconnect_ms(), end = now_ms() + limit;

	for (int tries = 0;;) {
		int e = image_connect(t, 0, tries > 0, o);

		if (e == -EAGAIN || (e == -ECONNRESET && !o->answered))
			tries++;
		else if (e != -ECONNREFUSED || o->answered || tries == 0)
			return e; /* what the daemon says of its store is not of the daemon */
		if (tries == OPEN_TRIES || (limit && now_ms() >= end))
			return e;
		nanosleep(&pause, NULL);
	}
}

/* A handle on what t names, with its thread; p's names of the pool are the handle's then. */
static int image_open(const struct target *t, struct opening *p, struct image **out)
{
	struct opened o;
	struct image *h = image_new(t->store);
	int e = h ? connect_first(t, &o) : -ENOMEM;

	if (e < 0) {
		if (h)
			image_free(h);
		return e;
	}
	memcpy(h->id, o.id, sizeof h->id);
	id_format(h->id, h->id_text);
	h->pool = p->pool;
	h->pool_name = p->pool_name;
	h->pool_space = p->pool_space;
	p->pool_name = p->pool_space = NULL;
	h->snapshot_number = o.number;
	h->read_only = t->read_only;
	h->shared = t->shared;
	h->fixed = o.read_only || t->read_only || o.number;
	image_adopt(h, &o);
	handles_add(h);
	e = thread_start(&h->thread, image_run, h);
	if (e < 0) {
		handles_remove(h);
		conn_close(&h->conn);
		ring_unmap(&h->ring);
		image_free(h);
		return e;
	}
	*out = h;
	return 0;
}

static int opening_run(struct opening *p)
{
	struct target t = {
		.store = p->store,
		.image = p->image,
		.snapshot = p->snapshot,
		.by_id = p->by_id,
		.read_only = p->read_only,
		.shared = switched_on("LSD_SHARED"),
	};
	struct image *h;
	int e = image_open(&t, p, &h);

	if (e == 0)
		*p->out = h;
	free(p->pool_name);
	free(p->pool_space);
	p->pool_name = p->pool_space = NULL;
	return e;
}

static int opening_fill(struct opening *p, rados_ioctx_t io, rbd_image_t *image, bool by_id,
			bool read_only)
{
	int e = store_url(io, p->store, sizeof p->store);

	if (e < 0)
		return e;
	p->pool = store_pool_id(io);
	p->by_id = by_id;
	p->read_only = read_only;
	p->out = image;
	return store_pool_names(io, &p->pool_name, &p->pool_space);
}

static int open_now(rados_ioctx_t io, const char *name, rbd_image_t *image, const char *snap,
		    bool by_id, bool read_only)
{
	struct opening p = {
		.image = (char *)(uintptr_t)name,
		.snapshot = snap && *snap ? (char *)(uintptr_t)snap : NULL,
	};
	int e;

	if (!name || !image)
		return -EINVAL;
	e = opening_fill(&p, io, image, by_id, read_only);
	if (e == 0)
		return opening_run(&p);
	free(p.pool_name);
	free(p.pool_space);
	return e;
}

static void opening_free(struct opening *p)
{
	free(p->image);
	free(p->snapshot);
	free(p->pool_name);
	free(p->pool_space);
	free(p);
}

static void *open_thread(void *arg)
{
	struct opening *p = arg;
	struct completion *c = p->c;
	int e = opening_run(p);

	opening_free(p);
	completion_end(c, e);
	return NULL;
}

static int open_later(rados_ioctx_t io, const char *name, rbd_image_t *image, const char *snap,
		      rbd_completion_t comp, bool by_id, bool read_only)
{
	struct opening *p;
	int e;

	if (!name || !image)
		return -EINVAL;
	p = calloc(1, sizeof *p);
	if (!p)
		return -ENOMEM;
	p->image = strdup(name);
	p->snapshot = snap && *snap ? strdup(snap) : NULL;
	p->c = comp;
	e = p->image && (p->snapshot || !snap || !*snap) ? 0 : -ENOMEM;
	if (e == 0)
		e = opening_fill(p, io, image, by_id, read_only);
	if (e == 0)
		e = completion_use(comp);
	if (e == 0) {
		pthread_t thread;

		e = thread_start(&thread, open_thread, p);
		if (e == 0)
			pthread_detach(thread);
		else
			rbd_aio_release(comp); /* the request's hold */
	}
	if (e < 0)
		opening_free(p);
	return e;
}

int rbd_open(rados_ioctx_t io, const char *name, rbd_image_t *image, const char *snap_name)
{
	return open_now(io, name, image, snap_name, false, false);
}

int rbd_open_by_id(rados_ioctx_t io, const char *id, rbd_image_t *image, const char *snap_name)
{
	return open_now(io, id, image, snap_name, true, false);
}

int rbd_open_read_only(rados_ioctx_t io, const char *name, rbd_image_t *image,
		       const char *snap_name)
{
	return open_now(io, name, image, snap_name, false, true);
}

int rbd_open_by_id_read_only(rados_ioctx_t io, const char *id, rbd_image_t *image,
			     const char *snap_name)
{
	return open_now(io, id, image, snap_name, true, true);
}

int rbd_aio_open(rados_ioctx_t io, const char *name, rbd_image_t *image, const char *snap_name,
		 rbd_completion_t c)
{
	return open_later(io, name, image, snap_name, c, false, false);
}

int rbd_aio_open_by_id(rados_ioctx_t io, const char *id, rbd_image_t *image,
		       const char *snap_name, rbd_completion_t c)
{
	return open_later(io, id, image, snap_name, c, true, false);
}

int rbd_aio_open_read_only(rados_ioctx_t io, const char *name, rbd_image_t *image,
			   const char *snap_name, rbd_completion_t c)
{
	return open_later(io, name, image, snap_name, c, false, true);
}

int rbd_aio_open_by_id_read_only(rados_ioctx_t io, const char *id, rbd_image_t *image,
				 const char *snap_name, rbd_completion_t c)
{
	return open_later(io, id, image, snap_name, c, true, true);
}

/* Whether this is a progress callback of the handle's; lock is held. */
static bool asks(const struct image *h)
{
	return h->call && pthread_equal(h->call->thread, pthread_self());
}

/* Whether this is a callback of the handle's, which ends before the handle can. */
static bool calls_back(struct image *h)
{
	bool progress;

	pthread_mutex_lock(&h->lock);
	progress = asks(h);
	pthread_mutex_unlock(&h->lock);
	return progress || image_own_thread(h);
}

static void ask_to_close(struct image *h, struct completion *c)
{
	pthread_mutex_lock(&h->lock);
	h->closing = true;
	h->closed = c;
	image_wake(h);
	pthread_cond_broadcast(&h->changed);
	pthread_mutex_unlock(&h->lock);
}

int rbd_close(rbd_image_t image)
{
	struct image *h = image;
	struct completion *c;

	if (h->forked) {
		image_free(h);
		return -EIO;
	}
	if (calls_back(h)) {
		/* From there nobody can wait: it ends behind it. */
		int e = rbd_aio_create_completion(NULL, NULL, (rbd_completion_t *)&c);

		if (e == 0) {
			completion_use(c);
			ask_to_close(h, c);
			rbd_aio_release(c);
		}
		return e;
	}
	ask_to_close(h, NULL);
	pthread_join(h->thread, NULL);
	image_free(h);
	return 0;
}

int rbd_aio_close(rbd_image_t image, rbd_completion_t c)
{
	struct image *h = image;
	int e;

	if (h->forked)
		return -EIO;
	e = completion_use(c);
	if (e == 0)
		ask_to_close(h, c);
	return e;
}

/* ---- control calls of a handle ---- */

/*
 * What a control call must wait for: 0, nothing; 1, something that will come; or a negative errno.
 * lock is held. From a callback nobody can wait for what only the handle's thread can bring, nor
 * from a progress callback for its own call's end.
 */
static int call_waits(const struct image *h, const struct call *c)
{
	bool own = pthread_equal(c->thread, h->thread);

	if (h->call && (pthread_equal(h->call->thread, c->thread) || (own && h->call->calls_back)))
		return -EDEADLK;
	if (h->state == DEAD)
		return h->dead;
	if (h->closing)
		return -ESHUTDOWN;
	if (h->state == LOST && own)
		return -ECONNRESET;
	return h->call || h->state == LOST || (h->change && !own);
}

/* Waits for the handle's connection, which is the call's then: 0 or a negative errno. */
static int call_begin(struct image *h, struct call *c)
{
	int e;

	pthread_mutex_lock(&h->lock);
	h->asking++;
	while ((e = call_waits(h, c)) > 0)
		pthread_cond_wait(&h->changed, &h->lock);
	h->asking--;
	if (h->closing)
		image_wake(h);
	if (e == 0) {
		c->conn = h->conn;
		c->life = h->life;
		c->left = false;
		h->call = c;
	}
	pthread_mutex_unlock(&h->lock);
	return e;
}

/* Gives the connection back, or ends it where the handle has none or another one now. */
static void call_end(struct image *h, struct call *c)
{
	pthread_mutex_lock(&h->lock);
	h->call = NULL;
	if (c->left)
		conn_close(&c->conn);
	else
		h->conn.number = c->conn.number;
	if (h->change || h->closing)
		image_wake(h); /* it has waited for this */
	pthread_cond_broadcast(&h->changed);
	pthread_mutex_unlock(&h->lock);
}

/* Waits until the handle's thread has seen the end of a connection. */
static void wait_seen(struct image *h, unsigned life)
{
	pthread_mutex_lock(&h->lock);
	while (h->state == LIVE && h->life == life)
		pthread_cond_wait(&h->changed, &h->lock);
	pthread_mutex_unlock(&h->lock);
}

static int call(struct image *h, uint16_t type, const struct writer *w, const struct progress *pr,
		bool query, struct answer *a)
{
	struct call c = {.thread = pthread_self(), .calls_back = pr && pr->fn};
	bool broken;
	int e;

	memset(a, 0, sizeof *a);
	if (h->forked)
		return -EIO;
	for (;;) {
		e = call_begin(h, &c);
		if (e < 0)
			return e;
		e = conn_call(&c.conn, type, w, pr, 0, a, &broken);
		if (broken)
			shutdown(c.conn.fd, SHUT_RDWR); /* the thread sees it */
		call_end(h, &c);
		if (!broken || !query || image_own_thread(h))
			return e;
		wait_seen(h, c.life);
	}
}

/* The handle refers to what is on the caller's stack: a thread that is cancelled ends behind it. */
static int hold_on(void)
{
	int old;

	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &old);
	return old;
}

int image_call(struct image *h, uint16_t type, const struct writer *w, const struct progress *pr,
	       bool query, struct answer *a)
{
	int old = hold_on(), e = call(h, type, w, pr, query, a);

	pthread_setcancelstate(old, NULL);
	return e;
}

static int change(struct image *h, const char *snapshot, uint64_t number)
{
	struct change ch = {.snapshot = snapshot, .number = number};

	if (h->forked)
		return -EIO;
	if (image_own_thread(h))
		return -EDEADLK;
	pthread_mutex_lock(&h->lock);
	while (h->change && !asks(h))
		pthread_cond_wait(&h->changed, &h->lock);
	if (asks(h)) {
		pthread_mutex_unlock(&h->lock);
		return -EDEADLK;
	}
	h->change = &ch;
	image_wake(h);
	while (!ch.done)
		pthread_cond_wait(&h->changed, &h->lock);
	pthread_mutex_unlock(&h->lock);
	return ch.result;
}

int image_change(struct image *h, const char *snapshot, uint64_t number)
{
	int old = hold_on(), e = change(h, snapshot, number);

	pthread_setcancelstate(old, NULL);
	return e;
}

/* ---- what an image says of itself ---- */

static int order_of(uint64_t object)
{
	return 63 - __builtin_clzll(object);
}

static void prefix_of(const struct image *h, char *buf, size_t n)
{
	snprintf(buf, n, "lsd.%02x%02x%02x%02x%02x%02x%02x%02x", h->id[0], h->id[1], h->id[2],
		 h->id[3], h->id[4], h->id[5], h->id[6], h->id[7]);
}

/* Size and object size, as the daemon has them now: 0 or a negative errno. */
static int ask_stat(struct image *h, uint64_t *size, uint64_t *object)
{
	struct answer a;
	uint8_t id[16];
	uint32_t n;
	int e = image_call(h, T_STAT, NULL, NULL, true, &a);

	if (e < 0)
		return e;
	get_id(&a.fields, id);
	get_bytes(&a.fields, &n);
	*size = get_u64(&a.fields);
	get_u32(&a.fields);
	*object = get_u64(&a.fields);
	if (a.fields.bad || *object == 0)
		e = -EPROTO;
	answer_free(&a);
	return e;
}

/* infosize says nothing: Ceph's fills all of it, too, and go-ceph gives the size of a pointer. */
int rbd_stat(rbd_image_t image, rbd_image_info_t *info, size_t infosize)
{
	struct image *h = image;
	rbd_image_info_t i = {.parent_pool = -1};
	int e = ask_stat(h, &i.size, &i.obj_size);

	(void)infosize;
	if (e < 0)
		return e;
	i.num_objs = i.size / i.obj_size + (i.size % i.obj_size != 0);
	i.order = order_of(i.obj_size);
	prefix_of(h, i.block_name_prefix, sizeof i.block_name_prefix);
	*info = i;
	return 0;
}

int rbd_get_size(rbd_image_t image, uint64_t *size)
{
	struct image *h = image;
	int e;

	if (h->forked)
		return -EIO;
	pthread_mutex_lock(&h->lock);
	e = h->state == DEAD ? h->dead : 0;
	pthread_mutex_unlock(&h->lock);
	if (e == 0)
		*size = image_size(h);
	return e;
}

int rbd_get_old_format(rbd_image_t image, uint8_t *old)
{
	struct image *h = image;

	*old = 0;
	return h->forked ? -EIO : 0;
}

int rbd_get_op_features(rbd_image_t image, uint64_t *op_features)
{
	struct image *h = image;

	*op_features = 0;
	return h->forked ? -EIO : 0;
}

int rbd_get_flags(rbd_image_t image, uint64_t *flags)
{
	struct image *h = image;

	*flags = 0;
	return h->forked ? -EIO : 0;
}

int rbd_get_stripe_unit(rbd_image_t image, uint64_t *stripe_unit)
{
	struct image *h = image;

	if (h->forked)
		return -EIO;
	pthread_mutex_lock(&h->lock);
	*stripe_unit = h->object;
	pthread_mutex_unlock(&h->lock);
	return 0;
}

int rbd_get_stripe_count(rbd_image_t image, uint64_t *stripe_count)
{
	struct image *h = image;

	*stripe_count = 1;
	return h->forked ? -EIO : 0;
}

int rbd_get_name(rbd_image_t image, char *name, size_t *name_len)
{
	struct image *h = image;
	size_t need;
	int e = 0;

	if (h->forked)
		return -EIO;
	pthread_mutex_lock(&h->lock);
	need = strlen(h->name) + 1;
	if (*name_len < need)
		e = -ERANGE;
	else
		memcpy(name, h->name, need);
	pthread_mutex_unlock(&h->lock);
	*name_len = need;
	return e;
}

int rbd_get_id(rbd_image_t image, char *id, size_t id_len)
{
	struct image *h = image;

	if (h->forked)
		return -EIO;
	if (id_len < sizeof h->id_text)
		return -ERANGE;
	memcpy(id, h->id_text, sizeof h->id_text);
	return 0;
}

int rbd_get_block_name_prefix(rbd_image_t image, char *prefix, size_t prefix_len)
{
	struct image *h = image;
	char p[RBD_MAX_BLOCK_NAME_SIZE];

	if (h->forked)
		return -EIO;
	prefix_of(h, p, sizeof p);
	if (prefix_len < strlen(p) + 1)
		return -ERANGE;
	memcpy(prefix, p, strlen(p) + 1);
	return 0;
}

int64_t rbd_get_data_pool_id(rbd_image_t image)
{
	struct image *h = image;

	return h->forked ? -EIO : h->pool;
}
