/* Those who want to know when an image changes: its size, its contents by a rollback, its snapshots. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>

struct watch {
	struct watch *next;
	uint64_t number;
	rbd_update_callback_t fn;
	void *arg;
};

/* Changes are counted off also while nobody watches: the thread would not sleep otherwise. */
bool watches_due(struct image *h)
{
	uint64_t n = ring_changes(&h->ring);
	bool due = h->watch_due || n != h->ring.seen;

	h->ring.seen = n;
	h->watch_due = false;
	return due;
}

/* The first watch with a higher number, or NULL; lock is held. */
static struct watch *after(struct image *h, uint64_t number)
{
	struct watch *w = h->watches;

	while (w && w->number <= number)
		w = w->next;
	return w;
}

/* Callbacks may end watches, and begin others, which are for later changes. */
void watches_call(struct image *h)
{
	uint64_t last;
	struct watch *w;

	pthread_mutex_lock(&h->lock);
	last = h->last_watch;
	w = after(h, 0);
	while (w && w->number <= last) {
		rbd_update_callback_t fn = w->fn;
		void *arg = w->arg;
		uint64_t number = w->number;

		h->watch_called = number;
		pthread_mutex_unlock(&h->lock);
		fn(arg);
		pthread_mutex_lock(&h->lock);
		h->watch_called = 0;
		pthread_cond_broadcast(&h->changed);
		w = after(h, number);
	}
	pthread_mutex_unlock(&h->lock);
}

void watches_free(struct image *h)
{
	while (h->watches) {
		struct watch *w = h->watches;

		h->watches = w->next;
		free(w);
	}
}

int rbd_update_watch(rbd_image_t image, uint64_t *handle, rbd_update_callback_t watch_cb, void *arg)
{
	struct image *h = image;
	struct watch *w, **end;
	int e = 0;

	if (h->forked)
		return -EIO;
	if (!handle || !watch_cb)
		return -EINVAL;
	w = malloc(sizeof *w);
	if (!w)
		return -ENOMEM;
	*w = (struct watch){.fn = watch_cb, .arg = arg};
	pthread_mutex_lock(&h->lock);
	if (h->state == DEAD) {
		e = h->dead;
	} else if (h->state == LIVE && h->ring.version < 2) {
		e = -EOPNOTSUPP; /* this daemon does not count changes */
	} else {
		*handle = w->number = ++h->last_watch;
		for (end = &h->watches; *end; end = &(*end)->next)
			;
		*end = w;
	}
	pthread_mutex_unlock(&h->lock);
	if (e < 0)
		free(w);
	return e;
}

int rbd_update_unwatch(rbd_image_t image, uint64_t handle)
{
	struct image *h = image;
	struct watch **at, *w;

	if (h->forked)
		return -EIO;
	pthread_mutex_lock(&h->lock);
	for (at = &h->watches; *at && (*at)->number != handle; at = &(*at)->next)
		;
	w = *at;
	if (w)
		*at = w->next;
	/* Its callback's argument may go as soon as this returns. */
	while (w && h->watch_called == handle && !image_own_thread(h))
		pthread_cond_wait(&h->changed, &h->lock);
	pthread_mutex_unlock(&h->lock);
	free(w);
	return w ? 0 : -EINVAL;
}
