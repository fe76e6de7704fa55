/*
 * Tests of the library as its users have it, against a daemon that test/run has started:
 *
 *	librbd-stress SCENARIO SEED
 *
 * The image "vm1" is there, 64 MiB of zeroes.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <rados/librados.h>
#include <rbd/librbd.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MIB (1u << 20)
#define IMAGE (64u * MIB)

#define CHECK(x)                                                                      \
	do {                                                                          \
		if (!(x)) {                                                           \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x);       \
			_exit(1);                                                     \
		}                                                                     \
	} while (0)

#define EQUAL(x, want)                                                                \
	do {                                                                          \
		long long got_ = (x), want_ = (want);                                 \
		if (got_ != want_) {                                                  \
			fprintf(stderr, "%s:%d: %s is %lld, not %lld\n", __FILE__,    \
				__LINE__, #x, got_, want_);                           \
			_exit(1);                                                     \
		}                                                                     \
	} while (0)

static unsigned seed;
static rados_t cluster;
static rados_ioctx_t io;

/* With PATIENCE in the environment, in seconds, a daemon that is just away is waited for. */
static rbd_image_t open_image(const char *name)
{
	const char *patience = getenv("PATIENCE");
	rbd_image_t image;
	int e = rbd_open(io, name, &image, NULL);

	for (int i = patience ? 10 * atoi(patience) : 0;
	     i > 0 && (e == -ECONNREFUSED || e == -ECONNRESET); i--) {
		usleep(100000);
		e = rbd_open(io, name, &image, NULL);
	}
	EQUAL(e, 0);
	return image;
}

static uint32_t any(unsigned *r, uint32_t below)
{
	return ((uint32_t)rand_r(r) << 15 ^ (uint32_t)rand_r(r)) % below;
}

static void fill(unsigned *r, char *p, size_t n)
{
	for (size_t i = 0; i < n; i++)
		p[i] = (char)(i % 64 ? p[i - 1] * 5 + 1 : rand_r(r));
}

/* ---- random requests, each thread in a region of its own, checked against a copy ---- */

#define REGION (5u * MIB + 1000) /* so that neighbours share sectors */
#define SLOTS 24
#define ROUNDS 250

struct slot {
	int op;
	uint64_t off; /* in the region */
	size_t len;
	char *buf;
	struct iovec iov[4];
	rbd_completion_t c;
	_Atomic int called;
};

struct worker {
	pthread_t thread;
	rbd_image_t image;
	unsigned rnd;
	uint64_t base;
	char *shadow, *data;
	bool failing; /* the daemon dies: nothing else is different */
};

enum { WRITE, WRITEV, SAME, ZEROES, DISCARD, READ, READV, KINDS };

static void called(rbd_completion_t c, void *arg)
{
	struct slot *s = arg;

	CHECK(rbd_aio_is_complete(c));
	CHECK(rbd_aio_get_arg(c) == arg);
	s->called++;
}

/* A vector of four pieces, one of them empty. */
static void cut_vector(unsigned *r, struct slot *s)
{
	size_t a = s->len ? any(r, (uint32_t)s->len + 1) : 0;
	size_t b = s->len - a ? any(r, (uint32_t)(s->len - a) + 1) : 0;

	s->iov[0] = (struct iovec){s->buf, a};
	s->iov[1] = (struct iovec){s->buf + a, 0};
	s->iov[2] = (struct iovec){s->buf + a, b};
	s->iov[3] = (struct iovec){s->buf + a + b, s->len - a - b};
}

static void start(struct worker *w, struct slot *s)
{
	uint64_t at = w->base + s->off;
	size_t period;
	int e = -1;

	s->called = 0;
	EQUAL(rbd_aio_create_completion(s, called, &s->c), 0);
	switch (s->op) {
	case WRITE:
		fill(&w->rnd, s->buf, s->len);
		memcpy(w->shadow + s->off, s->buf, s->len);
		e = rbd_aio_write2(w->image, at, s->len, s->buf, s->c,
				   any(&w->rnd, 2) ? LIBRADOS_OP_FLAG_FADVISE_FUA : 0);
		break;
	case WRITEV:
		fill(&w->rnd, s->buf, s->len);
		memcpy(w->shadow + s->off, s->buf, s->len);
		cut_vector(&w->rnd, s);
		e = rbd_aio_writev(w->image, s->iov, 4, at, s->c);
		break;
	case SAME:
		period = 1 + any(&w->rnd, 600);
		if (period > s->len)
			period = s->len;
		s->len -= s->len % period;
		fill(&w->rnd, s->buf, period);
		for (size_t i = 0; i < s->len; i++)
			w->shadow[s->off + i] = s->buf[i % period];
		e = rbd_aio_writesame(w->image, at, s->len, s->buf, period, s->c, 0);
		break;
	case ZEROES:
		memset(w->shadow + s->off, 0, s->len);
		e = rbd_aio_write_zeroes(w->image, at, s->len, s->c, 0, 0);
		break;
	case DISCARD: {
		uint64_t from = (at + 511) / 512 * 512, to = (at + s->len) / 512 * 512;

		if (to > from)
			memset(w->shadow + (from - w->base), 0, to - from);
		e = rbd_aio_discard(w->image, at, s->len, s->c);
		break;
	}
	case READ:
		memset(s->buf, 0x55, s->len);
		e = rbd_aio_read(w->image, at, s->len, s->buf, s->c);
		break;
	case READV:
		memset(s->buf, 0x55, s->len);
		cut_vector(&w->rnd, s);
		e = rbd_aio_readv(w->image, s->iov, 4, at, s->c);
		break;
	}
	EQUAL(e, 0);
}

static void finish(struct worker *w, struct slot *s)
{
	bool reads = s->op == READ || s->op == READV;

	EQUAL(rbd_aio_wait_for_complete(s->c), 0);
	EQUAL(s->called, 1);
	EQUAL(rbd_aio_get_return_value(s->c), reads ? (ssize_t)s->len : 0);
	if (reads && memcmp(s->buf, w->shadow + s->off, s->len) != 0) {
		size_t i = 0;

		while (s->buf[i] == w->shadow[s->off + i])
			i++;
		fprintf(stderr, "read of %zu bytes at %llu differs at %zu\n", s->len,
			(unsigned long long)(w->base + s->off), i);
		_exit(1);
	}
	rbd_aio_release(s->c);
}

static void *work(void *arg)
{
	struct worker *w = arg;
	static struct slot none;
	struct slot *slots = malloc(SLOTS * sizeof *slots);

	for (int round = 0; round < ROUNDS; round++) {
		uint32_t n = any(&w->rnd, 5) ? 1 + any(&w->rnd, SLOTS) : 1;
		uint64_t room = REGION / n;

		for (uint32_t i = 0; i < n; i++) {
			struct slot *s = &slots[i];
			uint32_t most = any(&w->rnd, 3) ? 70000 : (uint32_t)room;
			uint32_t most_here = most < room ? most : (uint32_t)room;

			*s = none;
			s->op = (int)any(&w->rnd, KINDS);
			s->len = 1 + any(&w->rnd, most_here);
			s->off = i * room + any(&w->rnd, (uint32_t)(room - s->len) + 1);
			if (any(&w->rnd, 2)) {
				s->off -= (w->base + s->off) % 512 <= s->off - i * room ?
						  (w->base + s->off) % 512 :
						  0;
				s->len = s->len < 512 ? s->len : s->len / 512 * 512;
			}
			s->buf = w->data + s->off;
			start(w, s);
		}
		if (!any(&w->rnd, 4))
			EQUAL(rbd_flush(w->image), 0);
		for (uint32_t i = 0; i < n; i++)
			finish(w, &slots[i]);
		if (!any(&w->rnd, 4)) {
			size_t len = 1 + any(&w->rnd, 20000);
			uint64_t off = any(&w->rnd, REGION - (uint32_t)len);

			fill(&w->rnd, w->shadow + off, len);
			EQUAL(rbd_write(w->image, w->base + off, len, w->shadow + off),
			      (ssize_t)len);
			EQUAL(rbd_read(w->image, w->base + off, len, w->data), (ssize_t)len);
			CHECK(memcmp(w->data, w->shadow + off, len) == 0);
		}
	}
	free(slots);
	return NULL;
}

/* Two handles with two threads each; at the end another handle sees it all. */
static void test_random(void)
{
	struct worker w[4];
	rbd_image_t images[2] = {open_image("vm1"), open_image("vm1")};

	for (unsigned i = 0; i < 4; i++) {
		w[i] = (struct worker){
			.image = images[i / 2],
			.rnd = seed * 100 + i,
			.base = 12345 + (uint64_t)i * REGION,
			.shadow = calloc(1, REGION),
			.data = malloc(REGION),
		};
		EQUAL(rbd_write_zeroes(w[i].image, w[i].base, REGION, 0, 0), REGION);
	}
	for (int i = 0; i < 4; i++)
		pthread_create(&w[i].thread, NULL, work, &w[i]);
	for (int i = 0; i < 4; i++)
		pthread_join(w[i].thread, NULL);
	EQUAL(rbd_close(images[0]), 0);
	EQUAL(rbd_close(images[1]), 0);
	images[0] = open_image("vm1");
	for (int i = 0; i < 4; i++) {
		EQUAL(rbd_read(images[0], w[i].base, REGION, w[i].data), REGION);
		CHECK(memcmp(w[i].data, w[i].shadow, REGION) == 0);
		free(w[i].data);
		free(w[i].shadow);
	}
	EQUAL(rbd_close(images[0]), 0);
}

/* ---- callbacks that submit more and release themselves ---- */

#define CHAINS 100
#define LINKS 200

struct chain {
	rbd_image_t image;
	pthread_t submitter; /* whose stack no callback may be in */
	_Atomic bool inside;
	int left;
	char buf[4096];
};

static _Atomic int chains_left;

static void next_link(rbd_completion_t c, void *arg);

static void submit_link(struct chain *ch)
{
	rbd_completion_t c;

	EQUAL(rbd_aio_create_completion(ch, next_link, &c), 0);
	ch->inside = true;
	if (ch->left % 3 == 0)
		EQUAL(rbd_aio_read(ch->image, 4096, 4096, ch->buf, c), 0);
	else if (ch->left % 3 == 1)
		EQUAL(rbd_aio_flush(ch->image, c), 0);
	else
		/* Ends without the daemon. */
		EQUAL(rbd_aio_read(ch->image, IMAGE, 4096, ch->buf, c), 0);
	ch->inside = false;
}

static void next_link(rbd_completion_t c, void *arg)
{
	struct chain *ch = arg;
	ssize_t r = rbd_aio_get_return_value(c);

	CHECK(!(ch->inside && pthread_equal(pthread_self(), ch->submitter)));
	EQUAL(r, ch->left % 3 == 0 ? 4096 : ch->left % 3 == 1 ? 0 : -EINVAL);
	/* Who would wait here would wait for ever. */
	EQUAL(rbd_read(ch->image, 0, 10, ch->buf), -EDEADLK);
	rbd_aio_release(c);
	ch->submitter = pthread_self();
	while (ch->inside && !pthread_equal(ch->submitter, pthread_self()))
		;
	if (--ch->left > 0)
		submit_link(ch);
	else
		chains_left--;
}

static void test_callbacks(void)
{
	rbd_image_t image = open_image("vm1");
	struct chain *ch = calloc(CHAINS, sizeof *ch);

	chains_left = CHAINS;
	for (int i = 0; i < CHAINS; i++) {
		ch[i].image = image;
		ch[i].left = LINKS;
		ch[i].submitter = pthread_self();
		submit_link(&ch[i]);
	}
	while (chains_left > 0)
		usleep(1000);
	EQUAL(rbd_close(image), 0);
	free(ch);
}

/* ---- a request larger than all room, from inside a callback, does not block ---- */

static _Atomic int big_done;

static void big_end(rbd_completion_t c, void *arg)
{
	EQUAL(rbd_aio_get_return_value(c), (long)arg);
	rbd_aio_release(c);
	big_done++;
}

struct big {
	rbd_image_t image;
	char *data, *back;
};

static void big_begin(rbd_completion_t c, void *arg)
{
	struct big *b = arg;
	rbd_completion_t n;

	rbd_aio_release(c);
	for (int i = 0; i < 4; i++) {
		EQUAL(rbd_aio_create_completion(NULL, big_end, &n), 0);
		EQUAL(rbd_aio_write(b->image, (uint64_t)i * 16 * MIB + 5, 16 * MIB - 5,
				    b->data + (size_t)i * 16 * MIB + 5, n), 0);
	}
	big_done++;
}

static void test_big(void)
{
	unsigned r = seed;
	struct big b = {.image = open_image("vm1"), .data = malloc(IMAGE), .back = malloc(IMAGE)};
	rbd_completion_t c;

	fill(&r, b.data, IMAGE);
	for (uint64_t i = 0; i < 4; i++)
		EQUAL(rbd_write(b.image, i * 16 * MIB, 5, b.data + i * 16 * MIB), 5);
	EQUAL(rbd_aio_create_completion(&b, big_begin, &c), 0);
	EQUAL(rbd_aio_flush(b.image, c), 0);
	while (big_done < 5)
		usleep(1000);
	EQUAL(rbd_aio_create_completion((void *)(long)(IMAGE - 3), big_end, &c), 0);
	EQUAL(rbd_aio_read(b.image, 3, IMAGE, b.back, c), 0); /* clipped */
	EQUAL(rbd_close(b.image), 0); /* waits for it */
	EQUAL(big_done, 6);
	CHECK(memcmp(b.back, b.data + 3, IMAGE - 3) == 0);
	free(b.data);
	free(b.back);
}

/* ---- polling ---- */

static _Atomic int polled_callbacks;

static void count_callback(rbd_completion_t c, void *arg)
{
	(void)c, (void)arg;
	polled_callbacks++;
}

/* One count of what rbd_set_image_notification has been given: false, there is none. */
static bool one_event(int fd, int type)
{
	uint64_t v;
	ssize_t n = read(fd, &v, type == EVENT_TYPE_PIPE ? 1 : sizeof v);

	if (n < 0)
		EQUAL(errno, EAGAIN);
	return n > 0;
}

static void poll_with(int type, int fd, int notify)
{
	rbd_image_t image = open_image("vm1");
	rbd_completion_t c, got[16];
	int seen = 0, n = 500;
	char buf[4096];
	bool *back = calloc((size_t)n, 1);

	polled_callbacks = 0;
	EQUAL(rbd_set_image_notification(image, notify, 7), -EINVAL);
	EQUAL(rbd_set_image_notification(image, notify, type), 0);
	EQUAL(rbd_set_image_notification(image, notify, type), -EINVAL);
	for (int i = 0; i < n; i++) {
		EQUAL(rbd_aio_create_completion(back + i, i % 2 ? count_callback : NULL, &c), 0);
		EQUAL(i % 5 ? rbd_aio_read(image, 0, sizeof buf, buf, c) :
			      rbd_aio_read(image, IMAGE, 1, buf, c), 0);
	}
	EQUAL(rbd_write(image, 0, 0, buf), 0);
	EQUAL(rbd_read(image, 0, 10, buf), 10); /* no event for who waits */
	while (seen < n) {
		struct pollfd p = {.fd = fd, .events = POLLIN};
		int k;

		EQUAL(poll(&p, 1, 10000), 1);
		k = rbd_poll_io_events(image, got, 16);
		CHECK(k >= 0);
		for (int i = 0; i < k; i++) {
			bool *b = rbd_aio_get_arg(got[i]);
			ssize_t r = rbd_aio_get_return_value(got[i]);

			CHECK(!*b);
			*b = true;
			CHECK(r == 4096 || r == -EINVAL);
			rbd_aio_release(got[i]);
			/* Each has its count, which may come a moment after it. */
			while (!one_event(fd, type))
				;
		}
		seen += k;
	}
	EQUAL(polled_callbacks, n / 2);
	EQUAL(rbd_poll_io_events(image, got, 16), 0);
	CHECK(!one_event(fd, type));
	/* One that has been released before it was asked for does not come back. */
	EQUAL(rbd_aio_create_completion(NULL, NULL, &c), 0);
	EQUAL(rbd_aio_flush(image, c), 0);
	EQUAL(rbd_aio_wait_for_complete(c), 0);
	rbd_aio_release(c);
	EQUAL(rbd_poll_io_events(image, got, 16), 0);
	/* One that nobody has asked for at the end. */
	EQUAL(rbd_aio_create_completion(NULL, NULL, &c), 0);
	EQUAL(rbd_aio_flush(image, c), 0);
	EQUAL(rbd_close(image), 0);
	rbd_aio_release(c);
	free(back);
}

static void test_poll(void)
{
	int fd = eventfd(0, EFD_SEMAPHORE | EFD_NONBLOCK), fds[2];

	poll_with(EVENT_TYPE_EVENTFD, fd, fd);
	EQUAL(pipe2(fds, O_NONBLOCK), 0);
	poll_with(EVENT_TYPE_PIPE, fds[0], fds[1]);
	close(fd);
	close(fds[0]);
	close(fds[1]);
}

/* ---- a flush is for what was called before ---- */

static _Atomic int writes_done;

static void write_done(rbd_completion_t c, void *arg)
{
	(void)arg;
	EQUAL(rbd_aio_get_return_value(c), 0);
	rbd_aio_release(c);
	writes_done++;
}

static void flush_done(rbd_completion_t c, void *arg)
{
	long before = (long)arg;

	EQUAL(rbd_aio_get_return_value(c), 0);
	CHECK(writes_done >= before);
	rbd_aio_release(c);
}

static void test_flush(void)
{
	rbd_image_t image = open_image("vm1");
	static char buf[8192];
	rbd_completion_t c;

	for (long i = 0; i < 2000; i++) {
		EQUAL(rbd_aio_create_completion(NULL, write_done, &c), 0);
		EQUAL(rbd_aio_write(image, (uint64_t)(i % 1000) * 8192, 8192, buf, c), 0);
		if (i % 37 == 0) {
			EQUAL(rbd_aio_create_completion((void *)(i + 1), flush_done, &c), 0);
			EQUAL(rbd_aio_flush(image, c), 0);
		}
	}
	EQUAL(rbd_flush(image), 0);
	EQUAL(writes_done, 2000);
	EQUAL(rbd_close(image), 0);
}

/* ---- what is submitted, again or for the first time, is in order: fakelsdd looks ---- */

static void test_order(void)
{
	rbd_image_t image = open_image("vm1");
	static char buf[16 * 4096];
	rbd_completion_t c;
	int n = IMAGE / sizeof buf * 8;

	for (int i = 0; i < n; i++) {
		EQUAL(rbd_aio_create_completion(NULL, write_done, &c), 0);
		EQUAL(rbd_aio_write(image, (uint64_t)i * sizeof buf / 8, sizeof buf / 8, buf, c), 0);
	}
	EQUAL(rbd_close(image), 0);
	EQUAL(writes_done, n);
}

/* ---- a handle of a snapshot, whose name changes, finds it again when the daemon is back ---- */

static void test_snapshot(void)
{
	rbd_image_t image = open_image("vm1"), snap;
	char b[5];

	EQUAL(rbd_write(image, 7, 5, "first"), 5);
	while (rbd_snap_create(image, "s1") == -ECONNRESET)
		; /* it may have been made: the next attempt says so */
	EQUAL(rbd_open(io, "vm1", &snap, "s1"), 0);
	for (int i = 0; i < 1000; i++) {
		if (i == 100)
			while (rbd_snap_rename(image, "s1", "s2") == -ECONNRESET)
				;
		EQUAL(rbd_write(image, 7, 5, "other"), 5);
		EQUAL(rbd_read(snap, 7, 5, b), 5);
		CHECK(memcmp(b, "first", 5) == 0);
		EQUAL(rbd_write(snap, 7, 5, b), -EROFS);
	}
	EQUAL(rbd_close(snap), 0);
	EQUAL(rbd_snap_remove(image, "s2"), 0);
	EQUAL(rbd_close(image), 0);
}

/* ---- questions from many threads, and another snapshot, while connections end ---- */

static _Atomic bool control_over;

static void *ask(void *arg)
{
	rbd_image_info_t info;
	rbd_snap_info_t snaps[3];
	uint64_t size;

	while (!control_over) {
		int max = 3;

		EQUAL(rbd_stat(arg, &info, sizeof info), 0);
		EQUAL(info.size, IMAGE);
		EQUAL(rbd_get_size(arg, &size), 0);
		EQUAL(size, IMAGE);
		EQUAL(rbd_snap_list(arg, snaps, &max), 1);
		rbd_snap_list_end(snaps);
	}
	return NULL;
}

static void *read_some(void *arg)
{
	char b[3000];

	while (!control_over)
		EQUAL(rbd_read(arg, 1000, sizeof b, b), sizeof b);
	return NULL;
}

static void test_control(void)
{
	rbd_image_t image = open_image("vm1"), moving = open_image("vm1");
	pthread_t t[5];
	char b[3];

	EQUAL(rbd_write(image, 0, 3, "old"), 3);
	EQUAL(rbd_snap_create(image, "s"), 0);
	EQUAL(rbd_write(image, 0, 3, "new"), 3);
	for (int i = 0; i < 2; i++)
		pthread_create(&t[i], NULL, ask, image);
	pthread_create(&t[2], NULL, ask, moving);
	pthread_create(&t[3], NULL, read_some, image);
	pthread_create(&t[4], NULL, read_some, moving);
	for (int i = 0; i < 60; i++) {
		const char *snap = i % 2 ? NULL : "s";
		int e = rbd_snap_set(moving, snap);

		/* Where it fails because a daemon was just away, nothing has changed. */
		while (e == -ECONNREFUSED || e == -ECONNRESET)
			e = rbd_snap_set(moving, snap);
		EQUAL(e, 0);
		EQUAL(rbd_read(moving, 0, 3, b), 3);
		CHECK(memcmp(b, snap ? "old" : "new", 3) == 0);
		usleep(2000);
	}
	control_over = true;
	for (int i = 0; i < 5; i++)
		pthread_join(t[i], NULL);
	EQUAL(rbd_close(moving), 0);
	EQUAL(rbd_close(image), 0);
}

/* ---- fork ---- */

static void test_fork(void)
{
	rbd_image_t image = open_image("vm1"), own;
	rbd_completion_t c[50], n;
	static char buf[50][4096], b[10];
	int status;
	pid_t pid;

	/*
	 * The handle's thread is there: it allocates as it begins, and ASan's allocator, whose lock it
	 * has then, knows nothing of forks.
	 */
	EQUAL(rbd_read(image, 0, 10, b), 10);
	for (int i = 0; i < 50; i++) {
		EQUAL(rbd_aio_create_completion(NULL, NULL, &c[i]), 0);
		EQUAL(rbd_aio_write(image, (uint64_t)i * 4096, 4096, buf[i], c[i]), 0);
	}
	pid = fork();
	if (pid == 0) {
		rbd_image_info_t info;
		uint64_t size;

		alarm(20);
		EQUAL(rbd_read(image, 0, 10, b), -EIO);
		EQUAL(rbd_flush(image), -EIO);
		EQUAL(rbd_stat(image, &info, sizeof info), -EIO);
		EQUAL(rbd_get_size(image, &size), -EIO);
		EQUAL(rbd_snap_create(image, "x"), -EIO);
		EQUAL(rbd_snap_set(image, "x"), -EIO);
		EQUAL(rbd_aio_create_completion(NULL, NULL, &n), 0);
		EQUAL(rbd_aio_read(image, 0, 10, b, n), -EIO);
		EQUAL(rbd_aio_close(image, n), -EIO);
		rbd_aio_release(n);
		for (int i = 0; i < 50; i++) {
			EQUAL(rbd_aio_wait_for_complete(c[i]), 0);
			CHECK(rbd_aio_is_complete(c[i]));
			EQUAL(rbd_aio_get_return_value(c[i]), -EIO);
			rbd_aio_release(c[i]);
		}
		EQUAL(rbd_close(image), -EIO);
		own = open_image("vm1");
		EQUAL(rbd_write(own, 60 * MIB, 5, "child"), 5);
		EQUAL(rbd_close(own), 0);
		_exit(0);
	}
	EQUAL(waitpid(pid, &status, 0), pid);
	EQUAL(status, 0);
	for (int i = 0; i < 50; i++) {
		EQUAL(rbd_aio_wait_for_complete(c[i]), 0);
		EQUAL(rbd_aio_get_return_value(c[i]), 0);
		rbd_aio_release(c[i]);
	}
	EQUAL(rbd_read(image, 60 * MIB, 5, b), 5);
	CHECK(memcmp(b, "child", 5) == 0);
	EQUAL(rbd_close(image), 0);
}

/* ---- many forks while other threads read and open ---- */

static _Atomic bool forks_over;

static void *read_and_open(void *arg)
{
	char b[512];

	while (!forks_over) {
		rbd_image_t image = open_image("vm1");

		EQUAL(rbd_read(arg, 0, sizeof b, b), sizeof b);
		EQUAL(rbd_close(image), 0);
	}
	return NULL;
}

static void test_forks(void)
{
	rbd_image_t image = open_image("vm1");
	pthread_t t[3];
	char b[512];

	for (int i = 0; i < 3; i++)
		pthread_create(&t[i], NULL, read_and_open, image);
	for (int i = 0; i < 100; i++) {
		int status;
		pid_t pid = fork();

		if (pid == 0) {
			alarm(20);
			_exit(rbd_read(image, 0, sizeof b, b) == -EIO && rbd_close(image) == -EIO ?
				      0 :
				      1);
		}
		EQUAL(waitpid(pid, &status, 0), pid);
		EQUAL(status, 0);
	}
	forks_over = true;
	for (int i = 0; i < 3; i++)
		pthread_join(t[i], NULL);
	EQUAL(rbd_close(image), 0);
}

/* ---- what has a name: images, snapshots, sizes, errors ---- */

static int progress_calls;
static rbd_image_t progress_image; /* that is asked for something */

static int on_progress(uint64_t done, uint64_t total, void *arg)
{
	rbd_image_info_t info;

	CHECK(done <= total && arg == &progress_calls);
	if (progress_image)
		EQUAL(rbd_stat(progress_image, &info, sizeof info), -EDEADLK);
	progress_calls++;
	return 0;
}

static void test_admin_images(void)
{
	char names[100], small[3];
	size_t n = sizeof names;
	rbd_image_spec_t specs[8];
	rbd_image_options_t o;
	int order = 0;

	EQUAL(rbd_create(io, "a", 10 * MIB, &order), 0);
	EQUAL(rbd_create(io, "a", 10 * MIB, &order), -EEXIST);
	order = 40;
	EQUAL(rbd_create(io, "b", 10 * MIB, &order), -EDOM);
	order = 22;
	EQUAL(rbd_create3(io, "b", 10 * MIB, RBD_FEATURE_LAYERING, &order, 0, 0), 0);
	EQUAL(rbd_create2(io, "e", 10 * MIB, 1ull << 50, &order), -ENOSYS);
	rbd_image_options_create(&o);
	EQUAL(rbd_image_options_set_uint64(o, RBD_IMAGE_OPTION_FORMAT, 1), 0);
	EQUAL(rbd_create4(io, "c", 10 * MIB, o), -EINVAL);
	EQUAL(rbd_image_options_set_uint64(o, RBD_IMAGE_OPTION_FORMAT, 2), 0);
	EQUAL(rbd_create4(io, "c", 10 * MIB, o), 0);
	rbd_image_options_destroy(o);
	EQUAL(rbd_list(io, names, &n), 10);
	CHECK(memcmp(names, "a\0b\0c\0vm1\0", 10) == 0);
	n = sizeof small;
	EQUAL(rbd_list(io, small, &n), -ERANGE);
	EQUAL(n, 10);
	n = 2;
	EQUAL(rbd_list2(io, specs, &n), -ERANGE);
	EQUAL(n, 4);
	EQUAL(rbd_list2(io, specs, &n), 0);
	EQUAL(n, 4);
	CHECK(strcmp(specs[3].name, "vm1") == 0 && strlen(specs[3].id) == 36);
	rbd_image_spec_list_cleanup(specs, n);
	EQUAL(rbd_rename(io, "b", "c"), -EEXIST);
	EQUAL(rbd_rename(io, "b", "d"), 0);
	EQUAL(rbd_rename(io, "b", "d2"), -ENOENT);
	progress_calls = 0;
	EQUAL(rbd_remove_with_progress(io, "d", on_progress, &progress_calls), 0);
	if (getenv("FAKE_PID"))
		EQUAL(progress_calls, 1); /* a daemon that is quick says nothing in between */
	EQUAL(rbd_remove(io, "d"), -ENOENT);
	EQUAL(rbd_remove(io, "c"), 0);
}

/* The fake's three images in the trash: a, b and c. */
static void test_trash(void)
{
	const char *first = "01000000-0000-0000-0000-000000000000";
	rbd_trash_image_info_t infos[4], one;
	size_t n = 2;

	EQUAL(rbd_trash_list(io, infos, &n), -ERANGE);
	EQUAL(n, 3);
	n = 4;
	EQUAL(rbd_trash_list(io, infos, &n), 3);
	EQUAL(n, 3);
	CHECK(strcmp(infos[0].id, first) == 0 && strcmp(infos[2].name, "c") == 0);
	CHECK(infos[1].deletion_time == 1000 && infos[1].deferment_end_time == 1002);
	EQUAL(infos[0].source, RBD_TRASH_IMAGE_SOURCE_USER);
	rbd_trash_list_cleanup(infos, n);
	EQUAL(rbd_trash_get(io, first, &one), 0);
	CHECK(strcmp(one.id, first) == 0 && strcmp(one.name, "a") == 0);
	rbd_trash_get_cleanup(&one);
	EQUAL(rbd_trash_get(io, "04000000-0000-0000-0000-000000000000", &one), -ENOENT);
	EQUAL(rbd_trash_remove(io, first, false), -EPERM);
	EQUAL(rbd_trash_remove(io, first, true), 0);
	EQUAL(rbd_trash_remove(io, "", true), -ENOENT);
	EQUAL(rbd_trash_move(io, "", 0), -ENOENT);
	EQUAL(rbd_trash_purge(io, 0, 2), -EINVAL);
	EQUAL(rbd_trash_purge(io, 0, 0.5f), -EOPNOTSUPP);
}

/* The fake's three clones: a, b, and c, which has been removed. */
static void test_children(rbd_image_t image)
{
	rbd_linked_image_spec_t linked[4];
	rbd_child_info_t infos[4];
	char pools[64], images[64];
	size_t p = 1, i = sizeof images, n = 2;
	int most = 3;

	EQUAL(rbd_list_children(image, pools, &p, images, &i), -ERANGE);
	EQUAL(i, 4);
	EQUAL(rbd_list_children(image, pools, &p, images, &i), 2);
	CHECK(memcmp(images, "a\0b", 4) == 0);
	EQUAL(rbd_list_children2(image, infos, &most), -ERANGE);
	EQUAL(most, 4);
	EQUAL(rbd_list_children2(image, infos, &most), 3);
	CHECK(strcmp(infos[2].image_name, "c") == 0 && infos[2].trash && !infos[0].trash);
	CHECK(strcmp(infos[0].image_id, "03000000-0000-0000-0000-000000000000") == 0);
	CHECK(!infos[3].image_name);
	rbd_list_children_cleanup(infos, 3);
	EQUAL(rbd_list_children3(image, linked, &n), -ERANGE);
	EQUAL(n, 3);
	EQUAL(rbd_list_children3(image, linked, &n), 0);
	CHECK(strcmp(linked[1].image_name, "b") == 0 && linked[2].trash);
	rbd_linked_image_spec_list_cleanup(linked, n);
	EQUAL(rbd_list_descendants(image, linked, &n), 0);
	rbd_linked_image_spec_list_cleanup(linked, n);
}

static void test_admin_handle(void)
{
	rbd_image_t image, other;
	rbd_image_info_t info;
	uint64_t size, u;
	char name[100], id[37], b[10] = "0123456789";
	size_t n = 1;
	uint8_t old = 9;

	EQUAL(rbd_open(io, "nothing", &image, NULL), -ENOENT);
	EQUAL(rbd_open(io, "a", &image, "nothing"), -ENOENT);
	image = open_image("a");
	EQUAL(rbd_stat(image, &info, 8), 0); /* a size that is wrong says nothing */
	EQUAL(info.size, 10 * MIB);
	EQUAL(info.obj_size, 8 * MIB);
	EQUAL(info.num_objs, 2);
	EQUAL(info.order, 23);
	EQUAL(info.parent_pool, -1);
	CHECK(strncmp(info.block_name_prefix, "lsd.", 4) == 0);
	EQUAL(rbd_get_name(image, name, &n), -ERANGE);
	EQUAL(n, 2);
	EQUAL(rbd_get_name(image, name, &n), 0);
	CHECK(strcmp(name, "a") == 0);
	EQUAL(rbd_get_id(image, id, 36), -ERANGE);
	EQUAL(rbd_get_id(image, id, 37), 0);
	EQUAL(rbd_get_old_format(image, &old), 0);
	EQUAL(old, 0);
	EQUAL(rbd_get_features(image, &u), 0);
	CHECK(u & RBD_FEATURE_LAYERING && u & RBD_FEATURE_FAST_DIFF);
	EQUAL(rbd_get_stripe_unit(image, &u), 0);
	EQUAL(u, 8 * MIB);
	EQUAL(rbd_get_parent_info(image, name, 1, name, 1, name, 1), -ENOENT);
	EQUAL(rbd_get_parent(image, NULL, NULL), -ENOENT);
	if (getenv("FAKE_PID"))
		test_children(image);
	EQUAL(rbd_metadata_set(image, "k", "v"), -EOPNOTSUPP);
	EQUAL(rbd_list_lockers(image, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
	      -EOPNOTSUPP);
	progress_calls = 0;
	EQUAL(rbd_resize2(image, 5 * MIB, false, on_progress, &progress_calls), -EINVAL);
	EQUAL(rbd_resize(image, 11 * MIB + 1), 0);
	EQUAL(rbd_get_size(image, &size), 0);
	EQUAL(size, 11 * MIB + 512);
	EQUAL(rbd_resize(image, UINT64_MAX), -EINVAL);
	EQUAL(rbd_resize(image, 12 * MIB), 0);
	progress_image = image;
	EQUAL(rbd_resize_with_progress(image, 11 * MIB, on_progress, &progress_calls), 0);
	progress_image = NULL;
	if (getenv("FAKE_PID"))
		CHECK(progress_calls > 0);
	EQUAL(rbd_get_size(image, &size), 0);
	EQUAL(size, 11 * MIB);
	/* the end */
	EQUAL(rbd_write(image, 11 * MIB - 4, 10, b), 4);
	EQUAL(rbd_write(image, 11 * MIB, 10, b), -EINVAL);
	EQUAL(rbd_read(image, 11 * MIB - 4, 10, b + 5), 4);
	EQUAL(rbd_read(image, 11 * MIB + 1, 10, b), -EINVAL);
	EQUAL(rbd_discard(image, 11 * MIB - 512, 4096), 512);
	EQUAL(rbd_discard(image, 0, 1ull << 31), -EINVAL);
	EQUAL(rbd_write_zeroes(image, 0, 10, 8, 0), -EINVAL);
	EQUAL(rbd_writesame(image, 0, 10, b, 3, 0), -EINVAL);
	EQUAL(rbd_writesame(image, 0, 10, b, 0, 0), -EINVAL);
	EQUAL(rbd_aio_write(image, 0, 1, b, NULL), -EINVAL);
	/* read-only, and by id */
	EQUAL(rbd_open_by_id_read_only(io, id, &other, NULL), 0);
	EQUAL(rbd_write(other, 0, 1, b), -EROFS);
	EQUAL(rbd_resize(other, 1), -EROFS);
	EQUAL(rbd_snap_create(other, "s"), -EROFS);
	EQUAL(rbd_flush(other), 0);
	EQUAL(rbd_close(other), 0);
	EQUAL(rbd_close(image), 0);
	EQUAL(rbd_open_by_id(io, "00000000-0000-0000-0000-000000000000", &image, NULL), -ENOENT);
}

static void test_admin_snapshots(void)
{
	rbd_image_t image = open_image("a"), other;
	rbd_snap_info_t snaps[4];
	char b[10], name[20];
	int n = 1, prot = 7;
	uint64_t id;
	size_t len = sizeof name;
	bool exists;
	struct timespec t;

	EQUAL(rbd_write(image, 100, 4, "one!"), 4);
	EQUAL(rbd_snap_create(image, "s1"), 0);
	EQUAL(rbd_snap_create(image, "s1"), -EEXIST);
	EQUAL(rbd_write(image, 100, 4, "two!"), 4);
	EQUAL(rbd_snap_list(image, snaps, &n), -ERANGE);
	EQUAL(n, 2);
	EQUAL(rbd_snap_list(image, NULL, &n), -EINVAL);
	n = 0;
	EQUAL(rbd_snap_list(image, NULL, &n), -ERANGE);
	EQUAL(n, 2);
	EQUAL(rbd_snap_list(image, snaps, &n), 1);
	CHECK(strcmp(snaps[0].name, "s1") == 0 && snaps[1].name == NULL);
	EQUAL(snaps[0].size, 11 * MIB);
	EQUAL(rbd_snap_get_id(image, "s1", &id), 0);
	EQUAL(id, snaps[0].id);
	rbd_snap_list_end(snaps);
	EQUAL(rbd_snap_get_name(image, id, name, &len), 0);
	CHECK(strcmp(name, "s1") == 0);
	EQUAL(rbd_snap_get_timestamp(image, id, &t), 0);
	CHECK(t.tv_sec > 1000000000);
	EQUAL(rbd_snap_exists(image, "s1", &exists), 0);
	CHECK(exists);
	EQUAL(rbd_snap_exists(image, "s2", &exists), 0);
	CHECK(!exists);
	EQUAL(rbd_snap_protect(image, "s1"), 0);
	EQUAL(rbd_snap_protect(image, "s2"), -ENOENT);
	EQUAL(rbd_snap_is_protected(image, "s1", &prot), 0);
	EQUAL(prot, 0);
	EQUAL(rbd_snap_unprotect(image, "s1"), 0);
	/* a handle of the snapshot, by each way */
	EQUAL(rbd_open(io, "a", &other, "s1"), 0);
	EQUAL(rbd_read(other, 100, 4, b), 4);
	CHECK(memcmp(b, "one!", 4) == 0);
	EQUAL(rbd_write(other, 100, 4, b), -EROFS);
	EQUAL(rbd_snap_set(other, NULL), 0);
	EQUAL(rbd_read(other, 100, 4, b), 4);
	CHECK(memcmp(b, "two!", 4) == 0);
	EQUAL(rbd_write(other, 200, 4, b), 4);
	EQUAL(rbd_snap_set_by_id(other, id), 0);
	EQUAL(rbd_read(other, 100, 4, b), 4);
	CHECK(memcmp(b, "one!", 4) == 0);
	EQUAL(rbd_snap_set(other, "s2"), -ENOENT);
	EQUAL(rbd_read(other, 100, 4, b), 4);
	EQUAL(rbd_close(other), 0);
	/* back, another name, gone */
	EQUAL(rbd_snap_rollback(image, "s1"), 0);
	EQUAL(rbd_read(image, 100, 4, b), 4);
	CHECK(memcmp(b, "one!", 4) == 0);
	EQUAL(rbd_snap_rename(image, "s1", "s3"), 0);
	EQUAL(rbd_snap_remove(image, "s1"), -ENOENT);
	EQUAL(rbd_snap_remove2(image, "s3", RBD_SNAP_REMOVE_FORCE, NULL, NULL), 0);
	EQUAL(rbd_close(image), 0);
}

/* What the callback of rbd_read_iterate2 is told: a hole, data, a hole. */
static int see(uint64_t off, size_t len, const char *buf, void *arg)
{
	char *seen = arg;

	CHECK(len <= MIB);
	seen[off / MIB] = buf ? 'd' : '-';
	return off / MIB == 9 ? -ECANCELED : 0;
}

static void test_admin_iterate(void)
{
	rbd_image_t image = open_image("a");
	char seen[12] = "...........";

	EQUAL(rbd_write_zeroes(image, 0, 11 * MIB, 0, 0), 11 * MIB);
	EQUAL(rbd_write(image, 3 * MIB + 7, 3, "abc"), 3);
	EQUAL(rbd_read_iterate2(image, 2 * MIB, 3 * MIB, see, seen), 0);
	CHECK(strcmp(seen, "..-d-......") == 0);
	EQUAL(rbd_read_iterate(image, 8 * MIB + 5, MIB - 5, see, seen), MIB - 5);
	EQUAL(rbd_read_iterate2(image, 8 * MIB, 3 * MIB, see, seen), -ECANCELED);
	CHECK(strcmp(seen, "..-d-...--.") == 0);
	EQUAL(rbd_read_iterate2(image, 12 * MIB, 1, see, seen), -EINVAL);
	EQUAL(rbd_close(image), 0);
}

static void test_admin_aio(void)
{
	rbd_image_t image = NULL;
	rbd_completion_t c;

	EQUAL(rbd_aio_create_completion(NULL, NULL, &c), 0);
	EQUAL(rbd_aio_open(io, "nothing", &image, NULL, c), 0);
	EQUAL(rbd_aio_wait_for_complete(c), 0);
	EQUAL(rbd_aio_get_return_value(c), -ENOENT);
	rbd_aio_release(c);
	EQUAL(rbd_aio_create_completion(NULL, NULL, &c), 0);
	EQUAL(rbd_aio_open(io, "a", &image, NULL, c), 0);
	EQUAL(rbd_aio_wait_for_complete(c), 0);
	EQUAL(rbd_aio_get_return_value(c), 0);
	EQUAL(rbd_aio_flush(image, c), -EINVAL); /* it has had its request */
	rbd_aio_release(c);
	EQUAL(rbd_aio_create_completion(NULL, NULL, &c), 0);
	EQUAL(rbd_aio_close(image, c), 0);
	EQUAL(rbd_aio_wait_for_complete(c), 0);
	EQUAL(rbd_aio_get_return_value(c), 0);
	rbd_aio_release(c);
}

/* Of an image beside its block device, as the small daemon of the tests has it. */
static void test_shared(void)
{
	rbd_image_t image;

	EQUAL(rbd_rename(io, "a", "device"), 0);
	EQUAL(rbd_open(io, "device", &image, NULL), -EBUSY);
	setenv("LSD_SHARED", "0", 1);
	EQUAL(rbd_open(io, "device", &image, NULL), -EBUSY);
	setenv("LSD_SHARED", "1", 1);
	EQUAL(rbd_open(io, "device", &image, NULL), 0);
	EQUAL(rbd_write(image, 1, 1, "x"), 1);
	EQUAL(rbd_close(image), 0);
	EQUAL(rbd_open_read_only(io, "device", &image, NULL), 0);
	EQUAL(rbd_close(image), 0);
	unsetenv("LSD_SHARED");
	EQUAL(rbd_open_read_only(io, "device", &image, NULL), 0);
	EQUAL(rbd_close(image), 0);
	EQUAL(rbd_rename(io, "device", "a"), 0);
}

static void test_admin(void)
{
	test_admin_images();
	if (getenv("FAKE_PID")) {
		test_trash();
		test_shared();
	}
	test_admin_handle();
	test_admin_snapshots();
	test_admin_iterate();
	test_admin_aio();
	EQUAL(rbd_remove(io, "a"), 0);
}

/* ---- a daemon that ends and does not come back: LSD_RECONNECT_TIMEOUT is 1 ---- */

static void test_gone(void)
{
	rbd_image_t image = open_image("vm1"), other;
	rbd_image_info_t info;
	rbd_completion_t c[100];
	static char buf[100][4096];
	struct timespec from, to;
	double took;

	for (int i = 0; i < 100; i++) {
		EQUAL(rbd_aio_create_completion(NULL, NULL, &c[i]), 0);
		EQUAL(rbd_aio_write(image, (uint64_t)i * 4096, 4096, buf[i], c[i]), 0);
	}
	kill((pid_t)atoi(getenv("FAKE_PID")), SIGKILL);
	clock_gettime(CLOCK_MONOTONIC, &from);
	for (int i = 0; i < 100; i++) {
		ssize_t r;

		EQUAL(rbd_aio_wait_for_complete(c[i]), 0);
		r = rbd_aio_get_return_value(c[i]);
		CHECK(r == 0 || r == -ETIMEDOUT);
		if (i == 99)
			EQUAL(r, -ETIMEDOUT);
		rbd_aio_release(c[i]);
	}
	clock_gettime(CLOCK_MONOTONIC, &to);
	took = (double)(to.tv_sec - from.tv_sec) + (double)(to.tv_nsec - from.tv_nsec) / 1e9;
	CHECK(took > 0.9 && took < 5);
	EQUAL(rbd_read(image, 0, 10, buf[0]), -ETIMEDOUT);
	EQUAL(rbd_stat(image, &info, sizeof info), -ETIMEDOUT);
	EQUAL(rbd_snap_set(image, "x"), -ETIMEDOUT);
	EQUAL(rbd_close(image), 0);
	EQUAL(rbd_open(io, "vm1", &other, NULL), -ECONNREFUSED);
	EQUAL(rbd_remove(io, "vm1"), -ECONNREFUSED);
}

/* ---- frames that are not what the daemon has sent ---- */

static int open_fds(void)
{
	int n = 0;

	for (int fd = 0; fd < 1000; fd++)
		n += fcntl(fd, F_GETFD) >= 0;
	return n;
}

static bool hung_up(int e)
{
	return e == -EPROTO || e == -EPROTONOSUPPORT || e == -ECONNRESET;
}

static void test_frames(void)
{
	int before = open_fds(), good = 0, bad = 0;

	for (int i = 0; i < 300; i++) {
		rbd_image_t image;
		rbd_image_info_t info;
		rbd_image_spec_t spec[4];
		rbd_snap_info_t snaps[4];
		size_t n = 4;
		int max = 4, e = rbd_list2(io, spec, &n);

		if (e == 0) {
			EQUAL(n, 1);
			CHECK(strcmp(spec[0].name, "vm1") == 0);
			rbd_image_spec_list_cleanup(spec, n);
		} else {
			CHECK(hung_up(e));
		}
		e = rbd_open(io, "vm1", &image, NULL);
		if (e < 0) {
			CHECK(hung_up(e));
			bad++;
			continue;
		}
		good++;
		/* Questions are asked again on another connection. */
		EQUAL(rbd_stat(image, &info, sizeof info), 0);
		EQUAL(info.size, IMAGE);
		EQUAL(rbd_snap_list(image, snaps, &max), 0);
		EQUAL(rbd_close(image), 0);
	}
	CHECK(good > 50 && bad > 20);
	EQUAL(open_fds(), before);
}

/* ---- the end of the program with requests under way ---- */

static void test_exit(void)
{
	rbd_image_t image = open_image("vm1");
	static char buf[100][4096];

	for (int i = 0; i < 100; i++) {
		rbd_completion_t c;

		EQUAL(rbd_aio_create_completion(NULL, NULL, &c), 0);
		EQUAL(rbd_aio_read(image, (uint64_t)i * 4096, 4096, buf[i], c), 0);
	}
	exit(0);
}

/* ---- compare and write: what it says, and handles that count together ---- */

ssize_t rbd_aio_compare_and_writev(rbd_image_t image, uint64_t off, const struct iovec *cmp_iov,
				   int cmp_iovcnt, const struct iovec *iov, int iovcnt,
				   rbd_completion_t c, uint64_t *mismatch_off, int op_flags);

#define OBJECT (8u << 20)
#define COUNTERS 4

static ssize_t compare_wait(int e, rbd_completion_t c)
{
	EQUAL(e, 0);
	rbd_aio_wait_for_complete(c);
	e = (int)rbd_aio_get_return_value(c);
	rbd_aio_release(c);
	return e;
}

static void compare_ranges(rbd_image_t image)
{
	static char old[MIB], new[MIB], got[MIB];
	static const struct {
		uint64_t off;
		size_t len;
	} ranges[] = {{0, 512}, {OBJECT + 100, 1}, {2 * OBJECT + 511, 2}, {4096 + 7, 20000},
		      {3 * OBJECT, MIB - 4096}, {OBJECT - 1, 1}};
	struct iovec a[2], b[3];
	rbd_completion_t c;
	uint64_t at;

	for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
		uint64_t off = ranges[i].off;
		size_t len = ranges[i].len;

		memset(new, (int)i + 1, len);
		EQUAL(rbd_read(image, off, len, old), (ssize_t)len);
		at = 777;
		EQUAL(rbd_compare_and_write(image, off, len, old, new, &at, 0), (ssize_t)len);
		EQUAL(at, 777);
		EQUAL(rbd_read(image, off, len, got), (ssize_t)len);
		CHECK(memcmp(got, new, len) == 0);
		got[len / 2]++;
		EQUAL(rbd_compare_and_write(image, off, len, got, old, &at, 0), -EILSEQ);
		EQUAL(at, off / OBJECT * OBJECT + len / 2);
		EQUAL(rbd_compare_and_write(image, off, len, got, old, NULL, 0), -EILSEQ);
		got[len / 2]--;
		EQUAL(rbd_aio_create_completion(NULL, NULL, &c), 0);
		a[0] = (struct iovec){got, len / 3};
		a[1] = (struct iovec){got + len / 3, len - len / 3};
		b[0] = (struct iovec){old, len / 2};
		b[1] = (struct iovec){NULL, 0};
		b[2] = (struct iovec){old + len / 2, len - len / 2};
		EQUAL(rbd_aio_compare_and_writev(image, off, a, 2, b, 2, c, &at, 0), -EINVAL);
		EQUAL(compare_wait((int)rbd_aio_compare_and_writev(image, off, a, 2, b, 3, c, &at, 0), c), 0);
		EQUAL(rbd_aio_create_completion(NULL, NULL, &c), 0);
		EQUAL(compare_wait((int)rbd_aio_compare_and_write(image, off, len, old, new, c, &at,
							    LIBRADOS_OP_FLAG_FADVISE_FUA), c), 0);
	}
	memset(old, 0, sizeof old);
	EQUAL(rbd_compare_and_write(image, OBJECT - 1, 2, old, new, &at, 0), -EINVAL);
	EQUAL(rbd_compare_and_write(image, 3, MIB - 4096, old, new, &at, 0), -EINVAL);
	EQUAL(rbd_compare_and_write(image, 0, MIB, old, new, &at, 0), -EINVAL);
	EQUAL(rbd_compare_and_write(image, IMAGE, 512, old, new, &at, 0), -EINVAL);
	EQUAL(rbd_compare_and_write(image, IMAGE - 256, 512, old, new, &at, 0), 256);
	EQUAL(rbd_compare_and_write(image, 0, 0, old, new, &at, 0), 0);
}

static _Atomic uint64_t unknown;

/* Each number is its own: the count, and behind it what nobody else writes. */
static void *count(void *arg)
{
	unsigned r = seed + (unsigned)(uintptr_t)arg;
	rbd_image_t image = open_image("vm1");
	uint64_t n[2], next[2], at;

	for (uintptr_t done = 0; done < 200;) {
		EQUAL(rbd_read(image, 5000, sizeof n, (char *)n), sizeof n);
		next[0] = n[0] + 1;
		next[1] = (uint64_t)(uintptr_t)arg << 32 | any(&r, 1 << 30);
		ssize_t e = rbd_compare_and_write(image, 5000, sizeof n, (char *)n, (char *)next, &at, 0);

		if (e == sizeof n)
			done++;
		else if (e == -EIO)
			unknown++; /* the daemon died, and another handle was faster */
		else
			EQUAL(e, -EILSEQ);
	}
	EQUAL(rbd_close(image), 0);
	return NULL;
}

static void test_compare(void)
{
	static const char nothing[16];
	rbd_image_t image = open_image("vm1"), fixed;
	pthread_t t[COUNTERS];
	uint64_t n[2], at;

	compare_ranges(image);
	EQUAL(rbd_open_read_only(io, "vm1", &fixed, NULL), 0);
	EQUAL(rbd_compare_and_write(fixed, 0, 16, nothing, nothing, &at, 0), -EROFS);
	EQUAL(rbd_close(fixed), 0);
	EQUAL(rbd_write(image, 5000, sizeof nothing, nothing), sizeof nothing);
	for (uintptr_t i = 0; i < COUNTERS; i++)
		EQUAL(pthread_create(&t[i], NULL, count, (void *)(i + 1)), 0);
	for (int i = 0; i < COUNTERS; i++)
		pthread_join(t[i], NULL);
	EQUAL(rbd_read(image, 5000, sizeof n, (char *)n), sizeof n);
	CHECK(n[0] >= COUNTERS * 200 && n[0] <= COUNTERS * 200 + unknown);
	EQUAL(rbd_close(image), 0);
}

/* ---- a daemon of an older release ---- */

static void nobody(void *arg)
{
	(void)arg;
	CHECK(false);
}

static void test_old(void)
{
	static char b[512];
	rbd_image_t image = open_image("vm1");
	rbd_completion_t c;
	uint64_t at;

	EQUAL(rbd_compare_and_write(image, 0, 512, b, b, &at, 0), -EOPNOTSUPP);
	EQUAL(rbd_aio_create_completion(NULL, NULL, &c), 0);
	EQUAL(compare_wait((int)rbd_aio_compare_and_write(image, 0, 512, b, b, c, &at, 0), c), -EOPNOTSUPP);
	EQUAL(rbd_update_watch(image, &at, nobody, NULL), -EOPNOTSUPP);
	EQUAL(rbd_write(image, 0, 512, b), 512);
	EQUAL(rbd_resize(image, IMAGE + MIB), 0);
	EQUAL(rbd_close(image), 0);
}

/* ---- watches ---- */

struct watcher {
	rbd_image_t image;
	uint64_t handle, size;
	_Atomic int calls;
	_Atomic bool running;
	bool leaves;
};

static void on_update(void *arg)
{
	struct watcher *w = arg;
	rbd_image_info_t info;

	w->running = true;
	CHECK(rbd_stat(w->image, &info, sizeof info) <= 0);
	w->size = info.size;
	if (w->leaves)
		EQUAL(rbd_update_unwatch(w->image, w->handle), 0);
	usleep(5000);
	w->running = false;
	w->calls++;
}

static void await_call(struct watcher *w, int before)
{
	for (int i = 0; w->calls <= before; i++) {
		CHECK(i < 10000);
		usleep(1000);
	}
}

static void test_watch(void)
{
	rbd_image_t image = open_image("vm1");
	struct watcher a = {.image = image}, b = {.image = image, .leaves = true};
	char buf[512] = "";
	int n;

	EQUAL(rbd_update_watch(image, &a.handle, NULL, NULL), -EINVAL);
	EQUAL(rbd_resize(image, IMAGE + 1 * MIB), 0); /* nobody watches */
	EQUAL(rbd_update_watch(image, &a.handle, on_update, &a), 0);
	EQUAL(rbd_update_watch(image, &b.handle, on_update, &b), 0);
	EQUAL(rbd_resize(image, IMAGE + 2 * MIB), 0);
	await_call(&b, 0);
	EQUAL(a.size, IMAGE + 2 * MIB);
	EQUAL(rbd_update_unwatch(image, b.handle), -EINVAL);
	n = a.calls;
	EQUAL(rbd_snap_create(image, "s1"), 0);
	await_call(&a, n);
	n = a.calls;
	EQUAL(rbd_snap_rename(image, "s1", "s2"), 0);
	await_call(&a, n);
	n = a.calls;
	EQUAL(rbd_snap_remove(image, "s2"), 0);
	await_call(&a, n);
	usleep(50000);
	n = a.calls;
	for (int i = 0; i < 100; i++)
		EQUAL(rbd_write(image, 0, sizeof buf, buf), sizeof buf);
	EQUAL(a.calls, n);
	EQUAL(rbd_resize(image, IMAGE), 0);
	while (!a.running && a.calls == n)
		;
	EQUAL(rbd_update_unwatch(image, a.handle), 0);
	CHECK(!a.running);
	EQUAL(b.calls, 1);
	n = a.calls;
	EQUAL(rbd_resize(image, IMAGE + MIB), 0);
	usleep(20000);
	EQUAL(a.calls, n);
	EQUAL(rbd_update_watch(image, &a.handle, on_update, &a), 0);
	EQUAL(rbd_close(image), 0); /* with a watch */
}

/* The daemon dies: who knows what has changed meanwhile. */
static void test_rewatch(void)
{
	rbd_image_t image = open_image("vm1");
	struct watcher a = {.image = image};
	char buf[512] = "";

	EQUAL(rbd_update_watch(image, &a.handle, on_update, &a), 0);
	for (int i = 0; i < 200; i++)
		EQUAL(rbd_write(image, 0, sizeof buf, buf), sizeof buf);
	await_call(&a, 0);
	EQUAL(rbd_close(image), 0);
}

/* ---- opens at which the daemon dies ---- */

static void test_opening(void)
{
	rbd_image_t image;
	rbd_completion_t c;
	char b[3];

	for (int i = 0; i < 10; i++) {
		EQUAL(rbd_open(io, "vm1", &image, NULL), 0);
		EQUAL(rbd_write(image, 100, 3, "abc"), 3);
		EQUAL(rbd_close(image), 0);
		EQUAL(rbd_open(io, "none", &image, NULL), -ENOENT);
		EQUAL(rbd_aio_create_completion(NULL, NULL, &c), 0);
		EQUAL(rbd_aio_open_read_only(io, "vm1", &image, NULL, c), 0);
		EQUAL(rbd_aio_wait_for_complete(c), 0);
		EQUAL(rbd_aio_get_return_value(c), 0);
		rbd_aio_release(c);
		EQUAL(rbd_read(image, 100, 3, b), 3);
		EQUAL(rbd_close(image), 0);
	}
}

/* ---- progress callbacks that use their own handle ---- */

static _Atomic int busy_calls;
static _Atomic bool busy_over;

static int busy_progress(uint64_t done, uint64_t total, void *arg)
{
	char b[4096], c[sizeof b];

	(void)done, (void)total;
	memset(b, ++busy_calls, sizeof b);
	for (unsigned i = 0; i < 30; i++) {
		EQUAL(rbd_write(arg, i * sizeof b, sizeof b, b), sizeof b);
		EQUAL(rbd_read(arg, i * sizeof b, sizeof c, c), sizeof c);
		CHECK(memcmp(b, c, sizeof b) == 0);
	}
	EQUAL(rbd_snap_set(arg, NULL), -EDEADLK);
	return 0;
}

/* Another snapshot waits for the call, and nothing waits for that. */
static void *set_snapshots(void *arg)
{
	while (!busy_over) {
		int e = rbd_snap_set(arg, NULL);

		CHECK(e == 0 || hung_up(e) || e == -ECONNREFUSED);
		usleep(2000);
	}
	return NULL;
}

/* A progress callback that closes its own handle: what is asked after that gets an error. */
struct closer {
	rbd_image_t image;
	rbd_completion_t c; /* NULL: rbd_close */
	int calls;
};

static int closing_progress(uint64_t done, uint64_t total, void *arg)
{
	struct closer *k = arg;
	char b[16];

	(void)done, (void)total;
	if (k->calls++ > 0)
		return 0;
	EQUAL(k->c ? rbd_aio_close(k->image, k->c) : rbd_close(k->image), 0);
	EQUAL(rbd_read(k->image, 0, sizeof b, b), -ESHUTDOWN);
	return 0;
}

static void close_in_progress(bool aio)
{
	struct closer k = {.image = open_image("vm1")};
	int e;

	if (aio)
		EQUAL(rbd_aio_create_completion(NULL, NULL, &k.c), 0);
	e = rbd_resize_with_progress(k.image, IMAGE + MIB, closing_progress, &k);
	CHECK(e == 0 || hung_up(e));
	if (k.calls == 0) { /* the daemon has died before it said anything */
		CHECK(e < 0);
		EQUAL(rbd_close(k.image), 0);
	} else if (aio) {
		EQUAL(rbd_aio_wait_for_complete(k.c), 0);
	}
	if (aio)
		rbd_aio_release(k.c);
}

/* A thread that is cancelled in a call ends behind it. */
static int cancelling_progress(uint64_t done, uint64_t total, void *arg)
{
	(void)done, (void)total, (void)arg;
	pthread_cancel(pthread_self());
	return 0;
}

static void *cancelled(void *arg)
{
	int e = rbd_resize_with_progress(arg, IMAGE, cancelling_progress, NULL);

	pthread_testcancel();
	CHECK(e < 0); /* nobody has said anything */
	return NULL;
}

static void cancel_in_progress(void)
{
	rbd_image_t image = open_image("vm1");
	char b[16];
	pthread_t t;

	pthread_create(&t, NULL, cancelled, image);
	pthread_join(t, NULL);
	EQUAL(rbd_read(image, 0, sizeof b, b), sizeof b);
	CHECK(rbd_flatten(image) < 0); /* another call, of what is no clone */
	EQUAL(rbd_close(image), 0);
}

static void test_progress(void)
{
	rbd_image_t image = open_image("vm1");
	pthread_t t;
	int e;

	pthread_create(&t, NULL, set_snapshots, image);
	for (unsigned i = 0; i < 20; i++) {
		e = rbd_resize_with_progress(image, IMAGE + (i % 2) * MIB, busy_progress, image);
		CHECK(e == 0 || hung_up(e));
	}
	CHECK(busy_calls > 0);
	busy_over = true;
	pthread_join(t, NULL);
	EQUAL(rbd_close(image), 0);
	close_in_progress(false);
	close_in_progress(true);
	cancel_in_progress();
}

/* ---- beside a block device ---- */

/* A handle stays what it was opened as, whatever becomes of the environment and the daemon. */
static void test_doors(void)
{
	rbd_image_t image;

	EQUAL(rbd_rename(io, "vm1", "device"), 0);
	setenv("LSD_SHARED", "1", 1);
	image = open_image("device");
	unsetenv("LSD_SHARED");
	for (uint64_t i = 0; i < 200; i++)
		EQUAL(rbd_write(image, i * 512, 5, "lsd00"), 5);
	EQUAL(rbd_close(image), 0);
	EQUAL(rbd_rename(io, "device", "vm1"), 0);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} tests[] = {
		{"admin", test_admin},	   {"big", test_big},	{"callbacks", test_callbacks},
		{"compare", test_compare}, {"old", test_old},	{"rewatch", test_rewatch}, {"watch", test_watch},
		{"control", test_control}, {"doors", test_doors}, {"exit", test_exit},	   {"flush", test_flush}, {"fork", test_fork},
		{"forks", test_forks},	   {"frames", test_frames}, {"gone", test_gone},
		{"order", test_order},	   {"poll", test_poll}, {"progress", test_progress},
		{"opening", test_opening},
		{"random", test_random}, {"snapshot", test_snapshot},
	};

	if (argc != 3)
		return 2;
	seed = (unsigned)atoi(argv[2]);
	EQUAL(rados_create(&cluster, NULL), 0);
	EQUAL(rados_conf_read_file(cluster, NULL), 0);
	EQUAL(rados_connect(cluster), 0);
	EQUAL(rados_ioctx_create(cluster, "rbd", &io), 0);
	for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
		if (strcmp(tests[i].name, argv[1]) == 0) {
			tests[i].run();
			rados_ioctx_destroy(io);
			rados_shutdown(cluster);
			return 0;
		}
	}
	fprintf(stderr, "no such scenario: %s\n", argv[1]);
	return 2;
}
