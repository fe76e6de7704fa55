/*
 * The way of a request: into the handle's queue, cut into pieces, into the ring, out of it
 * again in the handle's thread, and what that thread does when the daemon has ended.
 */
#include "internal.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BATCH 32
#define PAUSE_SOON 20     /* ms, for the first SOON ms where nobody answers */
#define SOON 1000         /* ms */
#define PAUSE_FIRST 100   /* ms */
#define PAUSE_MOST 1000   /* ms */
#define RECONNECT_DEFAULT 300 /* s */
#define OPEN_MS 600000 /* an open behind a long recovery, if something waits for it */
#define IDLE_MS 30000  /* and if nothing does */
#define CLOSE_MS 30000

/* Completions that have been taken and not been given back. */
struct batch {
	int n;
	struct {
		struct cqe e;
		bool late;
	} at[BATCH];
};

void list_add(struct list *l, struct request *r)
{
	r->next = NULL;
	*(l->last ? &l->last->next : &l->first) = r;
	l->last = r;
}

struct request *list_take(struct list *l)
{
	struct request *r = l->first;

	if (r) {
		l->first = r->next;
		if (!l->first)
			l->last = NULL;
	}
	return r;
}

void image_wake(struct image *h)
{
	uint64_t one = 1;

	while (write(h->wake, &one, sizeof one) < 0 && errno == EINTR)
		;
}

static bool changes(uint8_t op)
{
	return op == OP_WRITE || op == OP_DISCARD || op == OP_ZEROES || op == OP_COMPARE;
}

static void copy_out(const struct request *r, const struct piece *p, uint8_t *data)
{
	struct cursor at = p->at;

	if (r->pattern)
		pattern_out(r->pattern, r->period, p->off - r->off, data, p->len);
	else if (r->op == OP_ZEROES)
		memset(data, 0, p->len);
	else
		vector_out(r->iov, r->iovcnt, &at, data, p->len);
}

static uint8_t *piece_data(const struct image *h, const struct piece *p)
{
	return h->ring.data + (size_t)p->unit * UNIT + p->off % SECTOR;
}

/* The room of a piece in the data area, in units. */
static uint32_t units_of(const struct piece *p)
{
	uint32_t n = (uint32_t)((p->off % SECTOR + p->len + UNIT - 1) / UNIT);

	switch (p->op) {
	case OP_READ:
	case OP_WRITE:
		return n;
	case OP_COMPARE:
		return 2 * n; /* what is to be compared is behind what is to be written */
	}
	return 0;
}

/* What a compare and write has beside a write. */
static void place_compare(struct image *h, const struct piece *p, struct sqe *e)
{
	struct cursor at = {0};

	vector_out(p->req->cmp, p->req->cmpcnt, &at,
		   piece_data(h, p) + (size_t)p->units / 2 * UNIT, p->len);
	ring_undecide(&h->ring, e->tag);
	if (p->decided)
		e->flags |= SQE_DECIDED;
}

/* Puts a piece into the ring: false, and nothing has happened, where there is no room. */
static bool place(struct image *h, const struct piece *new)
{
	struct sqe e = {.op = new->op, .off = new->off, .len = new->len};
	struct piece *p;
	int64_t unit = 0;
	uint32_t units = units_of(new);

	if (h->ntags == 0)
		return false;
	if (units > 0) {
		unit = space_take(&h->space, units);
		if (unit < 0)
			return false;
	}
	e.tag = h->tags[--h->ntags];
	p = &h->pieces[e.tag];
	*p = *new;
	p->unit = (uint32_t)unit;
	p->units = units;
	p->state = SENT;
	if (changes(p->op)) {
		h->writes++;
		if (p->req->flags & SQE_FUA)
			e.flags = SQE_FUA;
	}
	if (units > 0)
		e.data = (uint64_t)unit * UNIT + p->off % SECTOR;
	if (p->op == OP_WRITE || p->op == OP_COMPARE)
		copy_out(p->req, p, piece_data(h, p));
	if (p->op == OP_COMPARE)
		place_compare(h, p, &e);
	ring_push(&h->ring, &e);
	return true;
}

/* Cuts the next piece off r and puts it into the ring. */
static bool place_next(struct image *h, struct request *r, const struct cut *c)
{
	struct piece p = {.req = r, .seq = h->seq, .off = r->pos, .len = c->len, .op = c->op,
			  .at = r->at};

	if (!place(h, &p))
		return false;
	h->seq++;
	r->pos += c->len;
	if (r->iov && !r->pattern) {
		/* Step over what this piece covers. */
		size_t n = c->len;

		while (n > 0) {
			size_t run = r->iov[r->at.index].iov_len - r->at.off;

			if (run > n) {
				r->at.off += n;
				break;
			}
			n -= run;
			r->at.index++;
			r->at.off = 0;
		}
	}
	return true;
}

/* Ends a request without the daemon, in the handle's thread. */
static void end_later(struct image *h, struct request *r, int error)
{
	r->error = error;
	list_add(&h->failed, r);
	image_wake(h);
}

/*
 * place of what was under way when the daemon ended. What had taken effect must not do so once
 * more, over what other handles have written since; that the image could be opened again says that
 * it still has. That this is so when its user is told a flush says in its place, within the lease
 * of now. A daemon of an older release has no compare and write, and whether there was an effect
 * nobody knows.
 */
static bool place_again(struct image *h, const struct piece *p)
{
	struct piece flush = {.req = p->req, .seq = p->seq, .op = OP_FLUSH, .effected = true};

	if (p->effected)
		return place(h, &flush);
	if (p->op != OP_COMPARE || h->ring.version >= 2)
		return place(h, p);
	end_later(h, p->req, -EIO);
	return true;
}

static bool place_flush(struct image *h, struct request *r)
{
	struct piece p = {.req = r, .seq = h->seq, .op = OP_FLUSH};

	if (!place(h, &p))
		return false;
	h->seq++;
	return true;
}

/* The lowest number of a piece that changes the image and has not ended. */
static uint64_t oldest_write(const struct image *h)
{
	uint64_t seq = h->seq;

	for (uint32_t i = 0; h->writes > 0 && i < h->ring.entries; i++) {
		const struct piece *p = &h->pieces[i];

		if (p->state != FREE && changes(p->op) && p->seq < seq)
			seq = p->seq;
	}
	return seq;
}

/*
 * A flush is for what had been written before it was called, whether that had ended or not:
 * it waits here until it has. It holds up nothing else.
 */
void image_pump_flushes(struct image *h)
{
	uint64_t oldest;

	if (!h->flushes.first || h->state != LIVE || h->again_pos < h->nagain)
		return;
	oldest = oldest_write(h);
	while (h->flushes.first && h->flushes.first->before <= oldest) {
		if (!place_flush(h, h->flushes.first))
			return;
		list_take(&h->flushes);
	}
}

static bool pump_request(struct image *h, struct request *r)
{
	struct cut c;

	if (r->op == OP_FLUSH) {
		if (h->writes == 0)
			return place_flush(h, r);
		list_take(&h->queue);
		r->before = h->seq;
		list_add(&h->flushes, r);
		return true;
	}
	if (r->op == OP_COMPARE && h->ring.version < 2) {
		list_take(&h->queue);
		end_later(h, r, -EOPNOTSUPP);
		return true;
	}
	while (cut_next(r->op, r->pos, r->off + r->len, &c))
		if (!place_next(h, r, &c))
			return false;
	return true;
}

void image_pump(struct image *h)
{
	if (h->state != LIVE)
		return;
	while (h->again_pos < h->nagain) {
		if (!place_again(h, &h->again[h->again_pos]))
			goto out;
		h->again_pos++;
	}
	while (h->queue.first) {
		struct request *r = h->queue.first;

		/*
		 * What has begun must end before the snapshot can be another; and so must a
		 * control call, whose callback may wait for what comes here.
		 */
		if ((h->change && !h->call && r->pos == r->off) || !pump_request(h, r))
			break;
		if (h->queue.first == r)
			list_take(&h->queue);
	}
out:
	ring_tell(&h->ring);
}

static uint64_t size_locked(const struct image *h)
{
	return h->state == LIVE ? ring_image_size(&h->ring) : h->size;
}

uint64_t image_size(struct image *h)
{
	uint64_t size;

	pthread_mutex_lock(&h->lock);
	size = size_locked(h);
	pthread_mutex_unlock(&h->lock);
	return size;
}

/* A compare and write is one entry of the ring, and Ceph's is inside of one object. */
static int prepare_compare(const struct image *h, const struct request *r)
{
	if (h->state == LIVE && h->ring.version < 2)
		return -EOPNOTSUPP;
	if (r->len > h->object || r->off % h->object > h->object - r->len)
		return -EINVAL;
	if ((r->off % SECTOR + r->len + SECTOR - 1) / SECTOR * SECTOR > COMPARE_MOST)
		return -EINVAL;
	return 0;
}

/* What of a request is to be done: 0, or its error. */
static int prepare(struct image *h, struct request *r)
{
	uint64_t end;
	int e;

	if (r->op == OP_FLUSH) {
		r->left = 1;
		return 0;
	}
	if (h->fixed && r->op != OP_READ)
		return -EROFS;
	e = clip(size_locked(h), r->off, &r->len);
	if (e == 0 && r->op == OP_COMPARE)
		e = prepare_compare(h, r);
	if (e < 0)
		return e;
	end = r->off + r->len;
	r->value = r->op == OP_READ || completion_of(r)->sync ? (ssize_t)r->len : 0;
	if (r->op == OP_DISCARD) {
		/* Sectors that are not covered wholly are left alone. */
		r->off = (r->off + SECTOR - 1) / SECTOR * SECTOR;
		end -= end % SECTOR;
		r->len = end > r->off ? end - r->off : 0;
	}
	r->pos = r->off;
	r->left = cut_count(r->op, r->off, r->off + r->len);
	return 0;
}

void image_submit(struct image *h, struct completion *c)
{
	struct request *r = &c->req;

	pthread_mutex_lock(&h->lock);
	if (atomic_load_explicit(&h->event_fd, memory_order_relaxed) >= 0 && !c->sync)
		c->events = h;
	if (h->state == DEAD)
		r->error = h->dead;
	else if (h->closing)
		r->error = -ESHUTDOWN;
	else
		r->error = prepare(h, r);
	if (r->error || r->left == 0) {
		list_add(&h->failed, r);
		image_wake(h);
	} else {
		list_add(&h->queue, r);
		image_pump(h);
	}
	pthread_mutex_unlock(&h->lock);
}

static void end(struct request *r)
{
	completion_end(completion_of(r), r->error ? r->error : r->value);
}

/* ---- the thread ---- */

bool image_own_thread(struct image *h)
{
	return pthread_equal(pthread_self(), h->thread);
}

static uint64_t boot_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_BOOTTIME, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* A mismatch is inside the range, and may be told at any time. */
static bool mismatch_check(const struct piece *p, const struct cqe *e)
{
	return p->op != OP_COMPARE || e->result != -EILSEQ ||
	       (e->mismatch < p->len && !(e->flags & CQE_TIME));
}

/* Takes what has completed: how many, or -EPROTO. */
static int batch_take(struct image *h, struct batch *b)
{
	int n = ring_ready(&h->ring);

	b->n = 0;
	if (n <= 0)
		return n;
	while (b->n < n && b->n < BATCH) {
		struct cqe e = ring_pull(&h->ring);

		if (e.tag >= h->ring.entries || h->pieces[e.tag].state != SENT ||
		    e.result > 0 || e.result < -ERRNO_MOST)
			return -EPROTO;
		if (!mismatch_check(&h->pieces[e.tag], &e))
			return -EPROTO;
		h->pieces[e.tag].state = TAKEN;
		b->at[b->n].e = e;
		b->at[b->n].late = false;
		b->n++;
	}
	ring_pulled(&h->ring);
	return b->n;
}

/* Ends what has been taken and may be told; the handle's lock is free. */
static void batch_end(struct image *h, struct batch *b)
{
	for (int i = 0; i < b->n; i++) {
		struct cqe *e = &b->at[i].e;
		struct piece *p = &h->pieces[e->tag];
		struct request *r = p->req;
		struct cursor at = p->at;

		if (e->result == 0 && p->op == OP_READ)
			vector_in(r->iov, r->iovcnt, &at, piece_data(h, p), p->len);
		if (e->flags & CQE_TIME && boot_ns() > e->time) {
			b->at[i].late = true;
			p->effected |= e->result == 0 && p->op != OP_READ;
			continue;
		}
		/* As Ceph has it: the object's beginning, and the distance from the range's. */
		if (p->op == OP_COMPARE && e->result == -EILSEQ && r->mismatch)
			*r->mismatch = p->off / h->object * h->object + e->mismatch;
		if (e->result < 0 && !r->error)
			r->error = (int)e->result;
		if (--r->left == 0)
			end(r);
	}
	events_tell(h);
}

/* Gives back the tags and the room of what has ended, and asks about what came too late. */
static void batch_give(struct image *h, struct batch *b)
{
	for (int i = 0; i < b->n; i++) {
		uint32_t tag = b->at[i].e.tag;
		struct piece *p = &h->pieces[tag];

		if (b->at[i].late) {
			struct sqe e = {.op = OP_TOO_LATE, .tag = tag};

			p->state = SENT;
			ring_push(&h->ring, &e);
			continue;
		}
		if (changes(p->op))
			h->writes--;
		if (p->units > 0)
			space_give(&h->space, p->unit, p->units);
		p->state = FREE;
		h->tags[h->ntags++] = tag;
	}
	if (b->n > 0) {
		image_pump_flushes(h);
		image_pump(h);
		ring_tell(&h->ring);
	}
	b->n = 0;
}

static void end_list(struct image *h, struct list *l)
{
	struct request *r;

	while ((r = list_take(l)))
		end(r);
	events_tell(h);
}

/* Nothing has begun and not ended. */
static bool quiet(const struct image *h)
{
	const struct request *r = h->queue.first;

	return h->ntags == h->ring.entries && h->again_pos == h->nagain && !h->flushes.first &&
	       (!r || r->pos == r->off);
}

static bool idle(const struct image *h)
{
	return !h->queue.first && !h->flushes.first && !h->failed.first &&
	       h->again_pos == h->nagain && (h->state != LIVE || h->ntags == h->ring.entries);
}

static int by_seq(const void *a, const void *b)
{
	const struct piece *p = a, *q = b;

	return p->seq < q->seq ? -1 : p->seq > q->seq;
}

/*
 * Keeps what was under way for the next ring, in order, before what still is from the last. Nothing
 * of it may be going on any more.
 */
static void keep_for_next(struct image *h)
{
	uint32_t rest = h->nagain - h->again_pos, n = 0;
	uint32_t sent = h->ring.entries - h->ntags;

	memmove(h->again + sent, h->again + h->again_pos, rest * sizeof *h->again);
	for (uint32_t i = 0; i < h->ring.entries; i++)
		if (h->pieces[i].state != FREE) {
			struct piece *p = &h->again[n++];

			*p = h->pieces[i];
			h->pieces[i].state = FREE;
			if (p->op == OP_COMPARE && ring_decided(&h->ring, i))
				p->decided = true;
		}
	qsort(h->again, n, sizeof *h->again, by_seq);
	h->again_pos = 0;
	h->nagain = n + rest;
	h->ntags = h->ring.entries;
	h->writes = 0;
}

/* All that waits and all that comes ends with error. */
static void die(struct image *h, int error)
{
	struct list queue, flushes;
	struct request *r;
	struct cut c;

	pthread_mutex_lock(&h->lock);
	keep_for_next(h);
	h->state = DEAD;
	h->dead = error;
	queue = h->queue;
	flushes = h->flushes;
	memset(&h->queue, 0, sizeof h->queue);
	memset(&h->flushes, 0, sizeof h->flushes);
	pthread_cond_broadcast(&h->changed);
	pthread_mutex_unlock(&h->lock);

	/*
	 * Nobody else looks at again while there is no ring. A request may be in both: its last
	 * piece ends it, and r is gone then.
	 */
	for (; h->again_pos < h->nagain; h->again_pos++) {
		r = h->again[h->again_pos].req;
		r->error = error;
		if (--r->left == 0)
			end(r);
	}
	while ((r = list_take(&queue))) {
		r->error = error;
		while (cut_next(r->op, r->pos, r->off + r->len, &c)) {
			r->pos += c.len;
			r->left--;
		}
		end(r);
	}
	while ((r = list_take(&flushes))) {
		r->error = error;
		end(r);
	}
	events_tell(h);
}

int64_t reconnect_ms(void)
{
	const char *v = secure_getenv("LSD_RECONNECT_TIMEOUT");
	char *end;
	long s;

	if (!v || !*v)
		return RECONNECT_DEFAULT * 1000;
	s = strtol(v, &end, 10);
	return *end || s < 0 || s > INT32_MAX ? RECONNECT_DEFAULT * 1000 : (int64_t)s * 1000;
}

/*
 * Whether an image that does not open again may yet: all but what says that it is another one
 * now, or none. A daemon that has just started may have no store, and may be busy.
 */
static bool passing(int e)
{
	switch (-e) {
	case EINVAL:
	case ENAMETOOLONG:
	case ENOENT:
	case EOPNOTSUPP:
	case EPERM:
	case EROFS:
	case ESHUTDOWN:
	case ESTALE:
		return false;
	}
	return true;
}

static void wake_clear(struct image *h)
{
	uint64_t n;

	if (read(h->wake, &n, sizeof n) < 0)
		return; /* nothing was there */
}

static void pause_for(struct image *h, int64_t ms)
{
	struct pollfd p = {.fd = h->wake, .events = POLLIN};

	if (poll(&p, 1, (int)ms) > 0)
		wake_clear(h);
}

/* Takes what a daemon that has ended had completed. */
static void drain(struct image *h, struct batch *b)
{
	for (;;) {
		int n;

		pthread_mutex_lock(&h->lock);
		batch_give(h, b);
		n = batch_take(h, b);
		pthread_mutex_unlock(&h->lock);
		batch_end(h, b);
		if (n <= 0)
			break;
	}
	pthread_mutex_lock(&h->lock);
	batch_give(h, b);
	pthread_mutex_unlock(&h->lock);
}

/* Makes o the handle's, which goes on with what it had under way. */
static void go_on(struct image *h, struct opened *o)
{
	struct batch b = {0};
	struct ring old;

	/* The daemon may have lived on, and have ended some of it only now, or decided on it. */
	drain(h, &b);
	pthread_mutex_lock(&h->lock);
	keep_for_next(h);
	old = h->ring;
	image_adopt(h, o);
	image_pump(h);
	image_pump_flushes(h);
	ring_tell(&h->ring);
	pthread_cond_broadcast(&h->changed);
	pthread_mutex_unlock(&h->lock);
	ring_unmap(&old);
}

/* One attempt at a daemon that may be there again; answered: it is. */
static int reconnect_once(struct image *h, int64_t deadline, bool *answered)
{
	struct target t = {
		.store = h->store,
		.image = h->id_text,
		.number = h->snapshot_number,
		.by_id = true,
		.read_only = h->read_only,
		.shared = h->shared,
		.again = h->id,
		.instead = h->number,
	};
	struct opened o;
	int e = image_connect(&t, deadline, true, &o);

	*answered = o.answered;
	if (e < 0)
		return e;
	if (memcmp(o.id, h->id, sizeof h->id) != 0) {
		opened_free(&o);
		return -ESTALE;
	}
	go_on(h, &o);
	return 0;
}

/* Forgets the connection; of what was under way the next daemon's answer to open tells more. */
static void let_go(struct image *h)
{
	pthread_mutex_lock(&h->lock);
	h->size = ring_image_size(&h->ring);
	h->state = LOST;
	if (h->call && !h->call->left) { /* it ends, and closes what is its own now */
		h->call->left = true;
		shutdown(h->conn.fd, SHUT_RDWR);
		h->conn.fd = -1;
	}
	conn_close(&h->conn);
	pthread_cond_broadcast(&h->changed);
	pthread_mutex_unlock(&h->lock);
}

/*
 * What waits for the daemon while there is none: ends what needs no daemon, and says how long
 * to wait before the next attempt, in ms, or a negative errno for all that waits. since is
 * when the oldest of what waits began to, 0: nothing does.
 */
static int64_t waiting_ms(struct image *h, int64_t limit, int64_t *since)
{
	struct list failed;
	bool waiting, closing;
	int64_t now = now_ms(), left;

	pthread_mutex_lock(&h->lock);
	failed = h->failed;
	memset(&h->failed, 0, sizeof h->failed);
	waiting = h->queue.first || h->flushes.first || h->again_pos < h->nagain ||
		  h->ntags < h->ring.entries || h->asking || h->change;
	closing = h->closing;
	pthread_mutex_unlock(&h->lock);
	end_list(h, &failed);

	if (!waiting) {
		*since = 0;
		return closing ? -ECONNRESET : PAUSE_MOST;
	}
	if (!*since)
		*since = now;
	left = *since + limit - now;
	if (!limit)
		return PAUSE_MOST;
	if (left <= 0)
		return -ETIMEDOUT;
	return left < PAUSE_MOST ? left : PAUSE_MOST;
}

/* Until when a daemon may take to open the image again. */
static int64_t patience(int64_t limit, int64_t since)
{
	if (!since)
		return now_ms() + IDLE_MS;
	return limit ? since + limit : now_ms() + OPEN_MS;
}

/*
 * How long to wait before the next attempt, in ms; begun is when the first one was, next what it is
 * the next time. A daemon that is started again at once listens some tens of ms later, and may have
 * recovered the image 100 ms after that: who looks after 100, 300 and 700 ms would wait for twice as
 * long as there is need to. To look costs next to nothing where nobody is. One that is there and
 * refuses is busy, and left alone.
 */
static int64_t pause_ms(int64_t begun, bool answered, int64_t *next)
{
	int64_t ms = *next;

	if (!answered && now_ms() - begun < SOON)
		return PAUSE_SOON;
	*next = ms * 2 < PAUSE_MOST ? ms * 2 : PAUSE_MOST;
	return ms;
}

/* The daemon has ended: connects anew until one answers, or the time is over. */
static void reconnect(struct image *h)
{
	int64_t limit = reconnect_ms(), begun = now_ms(), since = 0, wait;
	int64_t next = PAUSE_FIRST, pause;
	bool answered;
	int e;

	let_go(h);
	for (;;) {
		wait = waiting_ms(h, limit, &since);
		if (wait < 0)
			break;
		e = reconnect_once(h, patience(limit, since), &answered);
		if (e == 0)
			return;
		if (!passing(e)) {
			wait = e;
			break;
		}
		pause = pause_ms(begun, answered, &next);
		pause_for(h, pause < wait ? pause : wait);
	}
	die(h, (int)wait);
}

int goodbye(struct conn *c)
{
	struct answer a;
	bool broken;
	int e = conn_call(c, T_CLOSE, NULL, NULL, now_ms() + CLOSE_MS, &a, &broken);

	answer_free(&a);
	return broken ? 0 : e;
}

/* Another snapshot for the handle; nothing is under way, and no control call begins. */
static int change_snapshot(struct image *h, const struct change *ch)
{
	struct target t = {
		.store = h->store,
		.image = h->id_text,
		.snapshot = ch->snapshot,
		.number = ch->number,
		.by_id = true,
		.read_only = h->read_only,
		.shared = h->shared,
	};
	struct opened o;
	struct conn old;
	struct ring ring;
	int e = image_connect(&t, 0, true, &o);

	if (e < 0)
		return e;
	pthread_mutex_lock(&h->lock);
	old = h->conn;
	ring = h->ring;
	image_adopt(h, &o);
	h->snapshot_number = o.number;
	h->fixed = o.read_only || o.number;
	pthread_mutex_unlock(&h->lock);
	goodbye(&old);
	conn_close(&old);
	ring_unmap(&ring);
	return 0;
}

static void serve_change(struct image *h)
{
	struct change *ch;
	bool lost;

	pthread_mutex_lock(&h->lock);
	ch = h->change;
	lost = h->state != LIVE;
	pthread_mutex_unlock(&h->lock);
	ch->result = lost ? h->dead : change_snapshot(h, ch);
	pthread_mutex_lock(&h->lock);
	h->change = NULL;
	ch->done = true;
	image_pump(h);
	pthread_cond_broadcast(&h->changed);
	pthread_mutex_unlock(&h->lock);
}

/* Waits for the daemon, for other threads, and for the connection's end: true, it has come. */
static bool wait_events(struct image *h, bool live)
{
	struct pollfd p[3] = {
		{.fd = h->wake, .events = POLLIN},
		{.fd = live ? h->ring.client : -1, .events = POLLIN},
		{.fd = live ? h->conn.fd : -1, .events = POLLRDHUP},
	};
	uint64_t n;

	if (live && !ring_sleep(&h->ring))
		return false;
	if (poll(p, 3, -1) < 0)
		p[0].revents = p[1].revents = p[2].revents = 0;
	if (live)
		ring_awake(&h->ring);
	if (p[0].revents)
		wake_clear(h);
	if (p[1].revents & POLLIN && read(h->ring.client, &n, sizeof n) < 0)
		return errno != EAGAIN && errno != EINTR;
	return p[2].revents != 0 || p[1].revents & (POLLERR | POLLHUP | POLLNVAL);
}

static void finish(struct image *h)
{
	struct completion *c;
	int e = 0;

	if (h->conn.fd >= 0)
		e = goodbye(&h->conn);
	conn_close(&h->conn);
	ring_unmap(&h->ring);
	handles_remove(h);
	events_drop(h);
	c = h->closed;
	if (!c)
		return; /* rbd_close joins the thread and frees the handle */
	pthread_detach(pthread_self());
	image_free(h);
	completion_end(c, e);
}

/* One turn: true when the handle is to end. */
static bool turn(struct image *h, struct batch *b)
{
	struct list failed;
	bool change, close, live, watch = false;
	int n = 0;

	pthread_mutex_lock(&h->lock);
	live = h->state == LIVE;
	if (live) {
		batch_give(h, b);
		n = batch_take(h, b);
		watch = watches_due(h);
	}
	failed = h->failed;
	memset(&h->failed, 0, sizeof h->failed);
	change = h->change && (!live || (quiet(h) && !h->call));
	/* What a call's callback, or a watch's, asks for is answered until it returns. */
	close = n == 0 && !failed.first && !h->change && !h->call && !h->asking && !watch &&
		h->closing && idle(h);
	pthread_mutex_unlock(&h->lock);

	end_list(h, &failed);
	batch_end(h, b);
	if (watch)
		watches_call(h);
	if (n < 0 || (n == 0 && !failed.first && !change && !close && !watch && wait_events(h, live))) {
		drain(h, b);
		reconnect(h);
	} else if (change) {
		serve_change(h);
	}
	return close;
}

void *image_run(void *arg)
{
	struct image *h = arg;
	struct batch b = {0};

	pthread_setname_np(pthread_self(), "lsd-rbd");
	while (!turn(h, &b))
		;
	finish(h);
	return NULL;
}

int thread_start(pthread_t *thread, void *(*run)(void *), void *arg)
{
	sigset_t all, old;
	int e;

	/* Signals are for the program's own threads. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	e = pthread_create(thread, NULL, run, arg);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return -e;
}
