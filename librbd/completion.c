/* Completions, and the events of those who poll for them. */
#include "internal.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

/*
 * Of all handles: who releases a completion need not know whether its handle still is.
 * Taken for handles with set_image_notification only.
 */
static pthread_mutex_t event_lock = PTHREAD_ADAPTIVE_MUTEX_INITIALIZER_NP;

unsigned fork_generation;

static void futex_wait(_Atomic uint32_t *word, uint32_t value)
{
	syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word)
{
	syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

void completion_init(struct completion *c, rbd_callback_t fn, void *arg)
{
	memset(c, 0, sizeof *c);
	atomic_init(&c->refs, 1);
	c->fn = fn;
	c->arg = arg;
	c->generation = fork_generation;
}

int completion_use(struct completion *c)
{
	bool fresh = false;

	if (!c || !atomic_compare_exchange_strong(&c->used, &fresh, true))
		return -EINVAL;
	c->generation = fork_generation;
	atomic_fetch_add(&c->refs, 1);
	return 0;
}

static void unref(struct completion *c)
{
	if (atomic_fetch_sub(&c->refs, 1) == 1)
		free(c);
}

static void unlink_event(struct completion *c)
{
	struct image *h = c->events;

	if (c->prev)
		c->prev->next = c->next;
	else
		h->event_first = c->next;
	if (c->next)
		c->next->prev = c->prev;
	else
		h->event_last = c->prev;
	c->prev = c->next = NULL;
	c->queued = false;
}

/*
 * One event for one completion; none for one that its callback has released. The program is
 * told by events_tell.
 */
static void event_add(struct completion *c)
{
	struct image *h;

	pthread_mutex_lock(&event_lock);
	h = c->events;
	if (h && !c->released) {
		c->prev = h->event_last;
		*(h->event_last ? &h->event_last->next : &h->event_first) = c;
		h->event_last = c;
		c->queued = true;
		h->events_due++;
	}
	pthread_mutex_unlock(&event_lock);
}

/* Writes n events to a pipe, one byte for each, or to an eventfd, whose count they add to. */
static void event_write(int fd, int type, uint64_t n)
{
	static const char bytes[64];

	while (n > 0) {
		size_t run = n < sizeof bytes ? n : sizeof bytes;
		ssize_t done = type == EVENT_TYPE_PIPE ? write(fd, bytes, run) :
							 write(fd, &n, sizeof n);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0 || type != EVENT_TYPE_PIPE)
			return;
		n -= (uint64_t)done;
	}
}

void events_tell(struct image *h)
{
	uint64_t n;
	int fd, type;

	if (h->events_due == 0)
		return;
	pthread_mutex_lock(&event_lock);
	n = h->events_due;
	h->events_due = 0;
	fd = atomic_load(&h->event_fd);
	type = h->event_type;
	pthread_mutex_unlock(&event_lock);
	if (fd >= 0)
		event_write(fd, type, n);
}

void completion_end(struct completion *c, ssize_t value)
{
	bool events = c->events != NULL;

	c->value = value;
	if (c->sync) {
		/* From this store on it may be gone: it is on a stack. */
		atomic_store(&c->state, COMPLETE);
		futex_wake(&c->state);
		return;
	}
	atomic_store_explicit(&c->state, CALLING, memory_order_release);
	if (c->fn)
		c->fn(c, c->arg);
	atomic_store(&c->state, COMPLETE);
	if (atomic_load(&c->waiters) > 0)
		futex_wake(&c->state);
	if (events)
		event_add(c);
	unref(c);
}

/* A request of the parent's never ends in the child of a fork. */
static bool orphan(const struct completion *c)
{
	return c->generation != fork_generation;
}

ssize_t completion_wait(struct completion *c)
{
	uint32_t state;

	atomic_fetch_add(&c->waiters, 1);
	while ((state = atomic_load(&c->state)) != COMPLETE && !orphan(c))
		futex_wait(&c->state, state);
	atomic_fetch_sub(&c->waiters, 1);
	return orphan(c) ? -EIO : c->value;
}

void events_drop(struct image *h)
{
	pthread_mutex_lock(&event_lock);
	while (h->event_first) {
		struct completion *c = h->event_first;

		unlink_event(c);
		c->events = NULL;
	}
	atomic_store(&h->event_fd, -1);
	pthread_mutex_unlock(&event_lock);
}

void events_after_fork(void)
{
	pthread_mutex_init(&event_lock, NULL);
}

int rbd_aio_create_completion(void *cb_arg, rbd_callback_t complete_cb, rbd_completion_t *c)
{
	struct completion *n = malloc(sizeof *n);

	if (!n)
		return -ENOMEM;
	completion_init(n, complete_cb, cb_arg);
	*c = n;
	return 0;
}

int rbd_aio_is_complete(rbd_completion_t comp)
{
	struct completion *c = comp;

	return orphan(c) || atomic_load_explicit(&c->state, memory_order_acquire) != PENDING;
}

int rbd_aio_wait_for_complete(rbd_completion_t comp)
{
	completion_wait(comp);
	return 0;
}

ssize_t rbd_aio_get_return_value(rbd_completion_t comp)
{
	struct completion *c = comp;

	if (orphan(c))
		return -EIO;
	return atomic_load_explicit(&c->state, memory_order_acquire) == PENDING ? 0 : c->value;
}

void *rbd_aio_get_arg(rbd_completion_t comp)
{
	struct completion *c = comp;

	return c->arg;
}

void rbd_aio_release(rbd_completion_t comp)
{
	struct completion *c = comp;

	if (c->events && !orphan(c)) {
		pthread_mutex_lock(&event_lock);
		c->released = true;
		if (c->queued)
			unlink_event(c);
		pthread_mutex_unlock(&event_lock);
	}
	unref(c);
}

int rbd_set_image_notification(rbd_image_t image, int fd, int type)
{
	struct image *h = image;
	int e = 0;

	if (h->forked)
		return -EIO;
	if (fd < 0 || (type != EVENT_TYPE_PIPE && type != EVENT_TYPE_EVENTFD))
		return -EINVAL;
	pthread_mutex_lock(&event_lock);
	if (atomic_load(&h->event_fd) >= 0) {
		e = -EINVAL;
	} else {
		h->event_type = type;
		atomic_store(&h->event_fd, fd);
	}
	pthread_mutex_unlock(&event_lock);
	return e;
}

int rbd_poll_io_events(rbd_image_t image, rbd_completion_t *comps, int numcomp)
{
	struct image *h = image;
	int n = 0;

	if (h->forked)
		return -EIO;
	if (!comps || numcomp <= 0)
		return -EINVAL;
	pthread_mutex_lock(&event_lock);
	while (n < numcomp && h->event_first) {
		struct completion *c = h->event_first;

		unlink_event(c);
		comps[n++] = c;
	}
	pthread_mutex_unlock(&event_lock);
	return n;
}
