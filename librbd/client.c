/* Connections to the daemon: one request at a time, and its answer. */
#include "internal.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SOCKET "/run/lsd/librbd.sock"
#define HELLO_MS 30000

int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

bool switched_on(const char *name)
{
	const char *v = secure_getenv(name);

	return v && *v && strcmp(v, "0") != 0;
}

bool debugging(void) { return switched_on("LSD_DEBUG"); }

/* An operator must learn why a disk does not open; once for each process is enough. */
static void say_unreachable(const char *path, int error)
{
	static atomic_flag said = ATOMIC_FLAG_INIT;

	if (!atomic_flag_test_and_set(&said))
		fprintf(stderr, "librbd of lsd: no daemon answers at %s: %s; is lsdd running?\n",
			path, strerror(error));
}

/* Waits until fd can do what is in events: 0, -ETIMEDOUT or another negative errno. */
static int wait_for(int fd, short events, int64_t deadline)
{
	for (;;) {
		struct pollfd p = {.fd = fd, .events = events};
		int64_t left = deadline ? deadline - now_ms() : -1;
		int n;

		if (deadline && left < 0)
			left = 0;
		n = poll(&p, 1, left > INT32_MAX ? INT32_MAX : (int)left);
		if (n > 0)
			return 0;
		if (n == 0 && deadline && now_ms() >= deadline)
			return -ETIMEDOUT;
		if (n < 0 && errno != EINTR)
			return -errno;
	}
}

static int send_all(int fd, struct iovec *v, int count, int64_t deadline)
{
	while (count > 0) {
		struct msghdr m = {.msg_iov = v, .msg_iovlen = (size_t)count};
		ssize_t n = sendmsg(fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n < 0) {
			int e = errno == EAGAIN ? wait_for(fd, POLLOUT, deadline) :
				errno == EINTR ? 0 : -errno;

			if (e < 0)
				return e;
			continue;
		}
		while (count > 0 && (size_t)n >= v->iov_len) {
			n -= (ssize_t)v->iov_len;
			v++;
			count--;
		}
		if (count > 0) {
			v->iov_base = (char *)v->iov_base + n;
			v->iov_len -= (size_t)n;
		}
	}
	return 0;
}

/* Keeps the descriptors of a message; more than an answer has are closed: -EPROTO. */
static int keep_fds(struct msghdr *m, struct answer *a)
{
	int e = m->msg_flags & MSG_CTRUNC ? -EPROTO : 0;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
		size_t n;

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (size_t i = 0; i < n; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
			if (a->nfds < 3) {
				a->fds[a->nfds++] = fd;
			} else {
				close(fd);
				e = -EPROTO;
			}
		}
	}
	return e;
}

static int receive_all(int fd, void *buf, size_t len, int64_t deadline, struct answer *a)
{
	char *p = buf;

	while (len > 0) {
		union {
			char space[CMSG_SPACE(4 * sizeof(int))];
			struct cmsghdr align;
		} control;
		struct iovec v = {.iov_base = p, .iov_len = len};
		struct msghdr m = {
			.msg_iov = &v,
			.msg_iovlen = 1,
			.msg_control = control.space,
			.msg_controllen = sizeof control.space,
		};
		ssize_t n = recvmsg(fd, &m, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
		int e = 0;

		if (n == 0)
			return -ECONNRESET;
		if (n < 0)
			e = errno == EAGAIN ? wait_for(fd, POLLIN, deadline) :
			    errno == EINTR ? 0 : -errno;
		else
			e = keep_fds(&m, a);
		if (e < 0)
			return e;
		if (n > 0) {
			p += n;
			len -= (size_t)n;
		}
	}
	return 0;
}

/* One frame into a->payload and *f. */
static int receive(int fd, int64_t deadline, struct frame *f, struct answer *a)
{
	uint8_t header[FRAME_HEADER];
	int e = receive_all(fd, header, sizeof header, deadline, a);

	if (e < 0)
		return e;
	e = frame_decode(header, f);
	if (e < 0)
		return e;
	free(a->payload);
	a->payload = malloc(f->len ? f->len : 1);
	if (!a->payload)
		return -ENOMEM;
	e = receive_all(fd, a->payload, f->len, deadline, a);
	if (e < 0)
		return e;
	a->fields = (struct reader){.p = a->payload, .n = f->len};
	return frame_check(header, a->payload, f->len) ? 0 : -EPROTO;
}

static int result(uint16_t type, struct answer *a)
{
	int64_t e = (int64_t)get_u64(&a->fields);
	uint32_t n;
	const uint8_t *text = get_bytes(&a->fields, &n);

	if (a->fields.bad || e > 0 || e < -ERRNO_MOST)
		return -EPROTO;
	if (e < 0 && debugging())
		fprintf(stderr, "librbd of lsd: request of type %u: %s: %.*s\n", type,
			strerror((int)-e), (int)(n < 1024 ? n : 1024), (const char *)text);
	return (int)e;
}

static int exchange(struct conn *c, uint16_t type, const struct writer *w,
		    const struct progress *pr, int64_t deadline, struct answer *a)
{
	uint8_t header[FRAME_HEADER];
	struct iovec v[2] = {
		{.iov_base = header, .iov_len = sizeof header},
		{.iov_base = w->p, .iov_len = w->n},
	};
	struct frame f;
	int e;

	c->number++;
	frame_encode(header, type, c->number, w->p, (uint32_t)w->n);
	e = send_all(c->fd, v, 2, deadline);
	while (e == 0) {
		e = receive(c->fd, deadline, &f, a);
		if (e < 0)
			break;
		if (f.number != c->number)
			return -EPROTO;
		if (f.type == type + T_RESULT)
			return 0;
		if (f.type != type + T_PROGRESS)
			return -EPROTO;
		if (pr && pr->fn) {
			uint64_t done = get_u64(&a->fields), total = get_u64(&a->fields);

			if (!a->fields.bad)
				e = pr->fn(done, total, pr->arg);
			if (!pr->ends || e > 0)
				e = 0;
		}
	}
	/* A daemon that ends in the middle is one error, however the kernel tells. */
	return e == -EPIPE ? -ECONNRESET : e;
}

int conn_call(struct conn *c, uint16_t type, const struct writer *w, const struct progress *pr,
	      int64_t deadline, struct answer *a, bool *broken)
{
	static const struct writer nothing;
	int e;

	memset(a, 0, sizeof *a);
	*broken = false;
	if (!w)
		w = &nothing;
	if (w->bad)
		return -ENAMETOOLONG;
	e = exchange(c, type, w, pr, deadline, a);
	if (e == 0)
		e = result(type, a);
	else
		*broken = true;
	if (e == 0 && a->nfds != (type == T_OPEN ? 3 : 0)) {
		*broken = true;
		e = -EPROTO;
	}
	if (e < 0)
		answer_free(a);
	return e;
}

void answer_free(struct answer *a)
{
	for (int i = 0; i < a->nfds; i++)
		close(a->fds[i]);
	a->nfds = 0;
	free(a->payload);
	a->payload = NULL;
}

static int dial(const char *path)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	int fd;

	if (strlen(path) >= sizeof addr.sun_path)
		return -ENAMETOOLONG;
	strcpy(addr.sun_path, path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	while (connect(fd, (struct sockaddr *)&addr, sizeof addr) < 0) {
		int e = -errno;

		if (e == -EINTR)
			continue;
		close(fd);
		return e;
	}
	return fd;
}

static int hello(struct conn *c, int64_t deadline)
{
	uint8_t buf[NAME_MOST + 16];
	struct writer w = {.p = buf, .cap = sizeof buf};
	struct answer a;
	bool broken;
	int e;

	put_u32(&w, 1);
	put_u32(&w, RING_VERSION);
	put_name(&w, program_invocation_short_name);
	if (!deadline)
		deadline = now_ms() + HELLO_MS;
	e = conn_call(c, T_HELLO, &w, NULL, deadline, &a, &broken);
	if (e < 0)
		return e;
	c->version = get_u32(&a.fields);
	if (c->version < 1 || c->version > RING_VERSION)
		e = -EPROTONOSUPPORT;
	c->entries = get_u32(&a.fields);
	c->data = get_u64(&a.fields);
	if (e == 0 && (a.fields.bad || c->entries < ENTRIES_LEAST || c->data < DATA_LEAST))
		e = -EPROTO;
	answer_free(&a);
	return e;
}

int conn_open(struct conn *c, int64_t deadline, bool quiet)
{
	const char *path = secure_getenv("LSD_LIBRBD_SOCKET");
	int e;

	if (!path || !*path)
		path = SOCKET;
	memset(c, 0, sizeof *c);
	c->fd = dial(path);
	if (c->fd < 0) {
		e = c->fd;
		c->fd = -1;
		if (!quiet)
			say_unreachable(path, -e);
		/* "No such image" would be a lie. */
		return e == -ENOENT || e == -ENOTDIR ? -ECONNREFUSED : e;
	}
	e = hello(c, deadline);
	if (e < 0)
		conn_close(c);
	return e;
}

void conn_close(struct conn *c)
{
	if (c->fd >= 0) {
		shutdown(c->fd, SHUT_RDWR); /* the child of a fork may have it as well */
		close(c->fd);
	}
	c->fd = -1;
}

int call_once(uint16_t type, const struct writer *w, const struct progress *pr,
	      struct answer *a)
{
	struct conn c;
	bool broken;
	int e = conn_open(&c, 0, false);

	if (e < 0)
		return e;
	e = conn_call(&c, type, w, pr, 0, a, &broken);
	conn_close(&c);
	return e;
}
