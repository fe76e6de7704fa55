/*
 * A small daemon for the library's tests: images are files of a directory, so they outlive it,
 * and it can be told to misbehave. It checks what the protocol asks of a client, and ends with
 * status 3 and a line where the client has broken it.
 *
 *	fakelsdd SOCKET DIR [key=value ...]
 *
 *	entries=N data=BYTES    what it allows at most
 *	die=N                   _exit(9) in the middle of the N-th request of the ring
 *	drop=N                  the connection's end instead, at each N-th request
 *	straggle=1              after that it goes on with what it has taken, slowly
 *	late=N                  each N-th completion has a time that is over
 *	garbage=N               each N-th time it writes nonsense into the completion queue
 *	badframe=N              a bit of about each N-th frame is another
 *	dieopen=N               _exit(9) instead of the answer to the N-th open
 *	lag=USEC                sleeps before each request
 *	ordered=1               the client writes from the lowest offset to the highest: what
 *	                        it submits again comes in order, too
 *	version=N               of the ring at most
 *	shuffle=1               completes what it has in random order
 *	seed=N
 */
#include "internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static const char *dir;
static long max_entries = 1024, max_data = 64 << 20, die_at, drop_at, late_at, lag, shuffle,
	garbage, badframe, ordered, straggle, dieopen,
	max_version = 2;
static unsigned seed = 1;
static _Atomic long requests;

static void fault(const char *what)
{
	fprintf(stderr, "fakelsdd: the client broke the protocol: %s\n", what);
	_exit(3);
}

static void check(bool ok, const char *what)
{
	if (!ok)
		fault(what);
}

struct handle {
	struct handle *next; /* in living */
	uint64_t number;
	bool straggles; /* lock */
	int fd;
	pthread_mutex_t lock;
	uint8_t *base;
	uint32_t version, entries;
	uint64_t start, data;
	struct sqe *sq;
	struct cqe *cq;
	int wake_daemon, wake_client;
	uint32_t head, tail;
	bool ending;
	uint64_t last; /* byte of a write that was taken */
	bool flying[1024], late[1024];
	pthread_t thread;
	/* the image */
	int file;
	uint8_t *image;
	uint64_t size;
	uint8_t id[16];
	char name[256];
	bool read_only;
	char snapshot[256];
};

/* The handles that have not ended; living_lock. */
static pthread_mutex_t living_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t died = PTHREAD_COND_INITIALIZER;
static struct handle *living;

static void living_add(struct handle *h)
{
	static uint32_t last;

	pthread_mutex_lock(&living_lock);
	h->number = (uint64_t)getpid() << 32 | ++last;
	h->next = living;
	living = h;
	pthread_mutex_unlock(&living_lock);
}

static void living_remove(struct handle *h)
{
	pthread_mutex_lock(&living_lock);
	for (struct handle **p = &living; *p; p = &(*p)->next)
		if (*p == h) {
			*p = h->next;
			break;
		}
	pthread_cond_broadcast(&died);
	pthread_mutex_unlock(&living_lock);
}

static bool lives(uint64_t number)
{
	for (struct handle *h = living; h; h = h->next)
		if (h->number == number)
			return true;
	return false;
}

/* Who comes back must not be before what its last handle has begun. */
static void await_end(uint64_t number)
{
	pthread_mutex_lock(&living_lock);
	while (lives(number))
		pthread_cond_wait(&died, &living_lock);
	pthread_mutex_unlock(&living_lock);
}

static _Atomic uint32_t *word(struct handle *h, size_t off)
{
	return (_Atomic uint32_t *)(h->base + off);
}

static void name_id(const char *name, uint8_t id[16])
{
	for (int i = 0; i < 4; i++) {
		uint32_t c = crc32c((uint32_t)i, name, strlen(name));

		memcpy(id + 4 * i, &c, 4);
	}
}

static void path_of(char *path, size_t n, const char *name, const char *snap)
{
	if (*snap)
		snprintf(path, n, "%s/%s@%s", dir, name, snap);
	else
		snprintf(path, n, "%s/%s", dir, name);
}

static uint64_t boot_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_BOOTTIME, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- the ring ---- */

/* Where a compare and write compares and writes of all handles, and what it is to do. */
static pthread_mutex_t compare_lock = PTHREAD_MUTEX_INITIALIZER;

/* A compare and write; stop: before the decision (1), before the write (2), after it (3). */
static int compare(struct handle *h, const struct sqe *e, int stop, struct cqe *c)
{
	uint64_t first = e->off / 512 * 512, last = (e->off + e->len + 511) / 512 * 512;
	uint64_t at = e->data - e->off % 512, half = (last - first + 4095) / 4096 * 4096;
	const uint8_t *data = h->base + h->start + e->data, *want = data + half;
	uint8_t *have = h->image + e->off;
	bool decided = e->flags & SQE_DECIDED;

	check(h->version >= 2, "compare and write in the first version");
	check(e->len >= 1 && last - first <= COMPARE_MOST, "length of a compare and write");
	check(e->data % 512 == e->off % 512 && at % 4096 == 0, "place of the data");
	check(at + half + (last - first) <= h->data, "data outside the area");
	check(!(atomic_load(word(h, 512 + e->tag / 32 * 4)) >> e->tag % 32 & 1), "a bit is left");
	if (e->off > h->size || e->len > h->size - e->off)
		return -EINVAL;
	if (h->read_only)
		return -EROFS;
	if (stop == 1)
		_exit(9);
	if (memcmp(have, want, e->len) != 0 && !(decided && memcmp(have, data, e->len) == 0)) {
		while (have[c->mismatch] == want[c->mismatch])
			c->mismatch++;
		if (!decided)
			return -EILSEQ;
		c->mismatch = 0;
		return -EIO;
	}
	atomic_fetch_or(word(h, 512 + e->tag / 32 * 4), 1u << e->tag % 32);
	if (stop == 2)
		_exit(9);
	memcpy(have, data, e->len);
	if (stop == 3)
		_exit(9);
	return 0;
}

static int serve(struct handle *h, const struct sqe *e)
{
	uint64_t size = h->size;

	switch (e->op) {
	case OP_READ:
	case OP_WRITE: {
		uint64_t first = e->off / 512 * 512, last = (e->off + e->len + 511) / 512 * 512;
		uint64_t at = e->data - e->off % 512;
		uint8_t *d = h->base + h->start + e->data;

		check(e->len >= 1 && e->len <= MIB, "length of a read or write");
		check(last - first <= MIB + 512, "sectors of a read or write");
		check(e->data % 512 == e->off % 512 && at % 4096 == 0, "place of the data");
		check(at + (last - first) <= h->data, "data outside the area");
		if (e->off > size || e->len > size - e->off)
			return -EINVAL;
		if (e->op == OP_READ) {
			memcpy(d, h->image + e->off, e->len);
			return 0;
		}
		if (h->read_only)
			return -EROFS;
		memcpy(h->image + e->off, d, e->len);
		return 0;
	}
	case OP_FLUSH:
		check(e->off == 0 && e->len == 0, "a flush with a range");
		return 0;
	case OP_DISCARD:
	case OP_ZEROES:
		check(e->off % 512 == 0 && e->len % 512 == 0 && e->len > 0 && e->len <= GIB,
		      "range of a discard or zeroes");
		if (e->off > size || e->len > size - e->off)
			return -EINVAL;
		memset(h->image + e->off, 0, e->len);
		return 0;
	}
	fault("operation");
	return 0;
}

static void complete_with(struct handle *h, struct cqe c)
{
	static _Atomic long n;
	uint32_t tag = c.tag;
	bool timed = late_at && c.result == 0; /* only what went well can turn out not to have */

	if (timed && ++n % late_at == 0 && !h->late[tag]) {
		c.flags = CQE_TIME;
		c.time = boot_ns() - 1;
		h->late[tag] = true;
		h->flying[tag] = true; /* until it is asked about */
	} else {
		if (timed) {
			c.flags = CQE_TIME;
			c.time = boot_ns() + 60000000000; /* no client is that slow */
		}
		h->late[tag] = false;
		h->flying[tag] = false;
	}
	h->cq[h->tail & (h->entries - 1)] = c;
	h->tail++;
}

static void complete(struct handle *h, uint32_t tag, int result)
{
	complete_with(h, (struct cqe){.tag = tag, .result = result});
}

/* What no daemon says: the client must hang up, and come again. */
static void nonsense(struct handle *h)
{
	static _Atomic unsigned kind;
	struct cqe c = {.tag = 0};

	switch (kind++ % 5) {
	case 0:
		c.tag = h->entries;
		break;
	case 1:
		c.tag = UINT32_MAX;
		break;
	case 2:
		c.result = INT64_MIN;
		break;
	case 3: /* what has just been completed, again */
		c = h->cq[(h->tail - 1) & (h->entries - 1)];
		break;
	case 4:
		h->tail += h->entries * 2;
	}
	h->cq[h->tail & (h->entries - 1)] = c;
	h->tail++;
}

static void publish(struct handle *h)
{
	uint64_t one = 1;
	static _Atomic long n;

	if (garbage && ++n % garbage == 0)
		nonsense(h);
	atomic_store_explicit(word(h, 192), h->tail, memory_order_release);
	atomic_thread_fence(memory_order_seq_cst);
	if (atomic_load(word(h, 384)) == 1 && atomic_exchange(word(h, 384), 0) == 1)
		if (write(h->wake_client, &one, 8) < 0)
			perror("wake");
}

/* A change of the image is known to its own client alone. */
static void changed(struct handle *h)
{
	uint64_t one = 1;

	if (h->version < 2)
		return;
	atomic_fetch_add((_Atomic uint64_t *)(h->base + 456), 1);
	if (atomic_load(word(h, 384)) == 1 && atomic_exchange(word(h, 384), 0) == 1)
		if (write(h->wake_client, &one, 8) < 0)
			perror("wake");
}

/* It is known as soon as it has ended: what follows it must not be before it. */
static void compare_entry(struct handle *h, const struct sqe *e, long n)
{
	struct cqe c = {.tag = e->tag};

	pthread_mutex_lock(&compare_lock);
	c.result = compare(h, e, die_at && n >= die_at ? 1 + (int)(rand() % 3) : 0, &c);
	complete_with(h, c);
	publish(h);
	pthread_mutex_unlock(&compare_lock);
}

/* One request: false where the connection is to end. */
static bool handle_entry(struct handle *h, const struct sqe *e)
{
	long n = ++requests;

	check(e->tag < h->entries, "tag");
	check(e->zero == 0 && !e->zeroes[0] && !e->zeroes[1] && !e->zeroes[2] && !e->zeroes[3],
	      "zeroes");
	if (e->op == OP_TOO_LATE) {
		check(h->late[e->tag] && h->flying[e->tag], "too late without reason");
		check(!e->off && !e->len && !e->data && !e->flags, "too late with fields");
		complete(h, e->tag, 0);
		return true;
	}
	check(!h->flying[e->tag], "tag is under way");
	h->flying[e->tag] = true;
	if (lag)
		usleep((useconds_t)lag);
	if (die_at && n >= die_at && e->op != OP_COMPARE) {
		/* Half of it is done, and nobody knows. */
		if (e->op == OP_WRITE)
			memcpy(h->image + e->off, h->base + h->start + e->data, e->len / 2);
		_exit(9);
	}
	if (drop_at && n % drop_at == 0) {
		shutdown(h->fd, SHUT_RDWR);
		h->straggles = straggle;
		if (!straggle)
			return false;
	}
	if (h->straggles)
		usleep(5000);
	if (e->op == OP_COMPARE) {
		compare_entry(h, e, n);
		return true;
	}
	complete(h, e->tag, serve(h, e));
	return true;
}

static void *ring_thread(void *arg)
{
	struct handle *h = arg;
	struct sqe batch[64];
	unsigned rnd = seed;

	for (;;) {
		uint32_t tail = atomic_load_explicit(word(h, 64), memory_order_acquire);
		uint32_t n = tail - h->head, took = 0;

		check(n <= h->entries, "tail of the submission queue");
		while (took < n && took < 64) {
			struct sqe *e = &batch[took++];

			*e = h->sq[h->head & (h->entries - 1)];
			if (ordered && e->op == OP_WRITE) {
				check(e->off >= h->last, "not in the order of submission");
				h->last = e->off;
			}
			h->head++;
		}
		atomic_store_explicit(word(h, 128), h->head, memory_order_release);
		pthread_mutex_lock(&h->lock);
		if (h->ending) {
			pthread_mutex_unlock(&h->lock);
			return NULL;
		}
		for (uint32_t i = 0; i < took; i++) {
			uint32_t pick = i;

			if (shuffle) {
				struct sqe x;

				pick = i + (uint32_t)rand_r(&rnd) % (took - i);
				x = batch[i];
				batch[i] = batch[pick];
				batch[pick] = x;
			}
			if (!handle_entry(h, &batch[i])) {
				pthread_mutex_unlock(&h->lock);
				return NULL;
			}
		}
		pthread_mutex_unlock(&h->lock);
		if (took) {
			publish(h);
			continue;
		}
		atomic_store(word(h, 320), 1);
		atomic_thread_fence(memory_order_seq_cst);
		if (atomic_load_explicit(word(h, 64), memory_order_acquire) == h->head) {
			struct pollfd p = {.fd = h->wake_daemon, .events = POLLIN};
			uint64_t v;

			poll(&p, 1, -1);
			if (read(h->wake_daemon, &v, 8) < 0)
				perror("read");
		}
		atomic_store(word(h, 320), 0);
	}
}

static void ring_make(struct handle *h, uint32_t entries, uint64_t data, int fds[3])
{
	uint64_t start = (4096 + (uint64_t)entries * 96 + 4095) / 4096 * 4096;
	int fd = memfd_create("ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	uint32_t crc;

	if (fd < 0 || ftruncate(fd, (off_t)(start + data)) < 0 ||
	    fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
		perror("memfd");
	h->base = mmap(NULL, start + data, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	h->entries = entries;
	h->start = start;
	h->data = data;
	memcpy(h->base, "LRNG", 4);
	memcpy(h->base + 4, &h->version, 4);
	memcpy(h->base + 8, &entries, 4);
	memcpy(h->base + 16, &start, 8);
	memcpy(h->base + 24, &data, 8);
	crc = crc32c(0, h->base, 32);
	memcpy(h->base + 32, &crc, 4);
	memcpy(h->base + 448, &h->size, 8);
	h->sq = (struct sqe *)(h->base + 4096);
	h->cq = (struct cqe *)(h->sq + entries);
	h->wake_daemon = eventfd(0, EFD_CLOEXEC);
	h->wake_client = eventfd(0, EFD_CLOEXEC);
	fds[0] = fd;
	fds[1] = h->wake_daemon;
	fds[2] = h->wake_client;
}

/* ---- the socket ---- */

static bool receive(int fd, void *p, size_t n)
{
	return n == 0 || recv(fd, p, n, MSG_WAITALL) == (ssize_t)n;
}

static void answer(int fd, const struct frame *f, int error, const struct writer *w,
		   const int *fds)
{
	uint8_t buf[1 << 16], header[FRAME_HEADER];
	struct writer o = {.p = buf, .cap = sizeof buf};
	struct iovec v[2];
	union {
		char space[CMSG_SPACE(3 * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct msghdr m = {.msg_iov = v, .msg_iovlen = 2};

	put_u64(&o, (uint64_t)(int64_t)error);
	put_name(&o, error ? strerror(-error) : "");
	if (!error && w) {
		memcpy(buf + o.n, w->p, w->n);
		o.n += w->n;
	}
	frame_encode(header, (uint16_t)(f->type + T_RESULT), f->number, buf, (uint32_t)o.n);
	if (badframe && rand() % badframe == 0) {
		size_t bit = (size_t)rand() % (8 * (sizeof header + o.n));

		/* A longer frame than there is would only be waited for. */
		if (bit / 8 >= 8 && bit / 8 < 12)
			bit = 8 * 12;
		*(bit / 8 < sizeof header ? &header[bit / 8] : &buf[bit / 8 - sizeof header]) ^=
			(uint8_t)(1 << bit % 8);
	}
	v[0] = (struct iovec){header, sizeof header};
	v[1] = (struct iovec){buf, o.n};
	if (fds && !error) {
		struct cmsghdr *c;

		m.msg_control = control.space;
		m.msg_controllen = sizeof control.space;
		c = CMSG_FIRSTHDR(&m);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(3 * sizeof(int));
		memcpy(CMSG_DATA(c), fds, 3 * sizeof(int));
	}
	if (sendmsg(fd, &m, MSG_NOSIGNAL) < 0)
		perror("sendmsg");
}

static void progress(int fd, const struct frame *f, uint64_t done, uint64_t total)
{
	uint8_t buf[16], header[FRAME_HEADER];

	memcpy(buf, &done, 8);
	memcpy(buf + 8, &total, 8);
	frame_encode(header, (uint16_t)(f->type + T_PROGRESS), f->number, buf, 16);
	send(fd, header, sizeof header, MSG_NOSIGNAL | MSG_MORE);
	send(fd, buf, 16, MSG_NOSIGNAL);
}

static char *take_name(struct reader *r)
{
	char *s = get_string(r);

	check(s != NULL, "a name");
	return s;
}

static int open_file(struct handle *h, const char *name, const char *snap)
{
	char path[512];
	struct stat st;

	path_of(path, sizeof path, name, snap);
	h->file = open(path, O_RDWR | O_CLOEXEC);
	if (h->file < 0)
		return -errno;
	fstat(h->file, &st);
	h->size = (uint64_t)st.st_size;
	/* Room to grow into. */
	h->image = mmap(NULL, 8ull << 30, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
			h->file, 0);
	snprintf(h->name, sizeof h->name, "%s", name);
	snprintf(h->snapshot, sizeof h->snapshot, "%s", snap);
	name_id(name, h->id);
	return 0;
}

/* The name of the image with an id: there are few. */
static bool by_id(const char *text, char *name, size_t n)
{
	DIR *d = opendir(dir);
	struct dirent *e;
	bool found = false;

	while (d && !found && (e = readdir(d))) {
		uint8_t id[16];
		char t[ID_TEXT];

		name_id(e->d_name, id);
		id_format(id, t);
		found = strcmp(t, text) == 0;
		if (found)
			snprintf(name, n, "%s", e->d_name);
	}
	closedir(d);
	return found;
}

/* A snapshot's number is its file's, which stays when its name changes. */
static uint32_t list_snaps(const char *name, struct writer *w, uint64_t number, char *found)
{
	DIR *d = opendir(dir);
	struct dirent *e;
	size_t len = strlen(name);
	uint32_t n = 0;

	while (d && (e = readdir(d))) {
		char path[600];
		struct stat st;

		if (strncmp(e->d_name, name, len) != 0 || e->d_name[len] != '@')
			continue;
		snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
		if (stat(path, &st) < 0)
			continue;
		if (found && (uint64_t)st.st_ino == number)
			snprintf(found, 256, "%s", e->d_name + len + 1);
		if (w) {
			put_u64(w, (uint64_t)st.st_ino);
			put_u64(w, (uint64_t)st.st_size);
			put_u64(w, (uint64_t)st.st_mtim.tv_sec * 1000000000);
			put_name(w, e->d_name + len + 1);
		}
		n++;
	}
	closedir(d);
	return n;
}

static void do_open(struct handle *h, const struct frame *f, struct reader *r)
{
	uint8_t buf[1024], id[16];
	struct writer w = {.p = buf, .cap = sizeof buf};
	char *store = take_name(r), *image = take_name(r), *snap = take_name(r);
	uint64_t number = get_u64(r);
	uint32_t flags = get_u32(r), entries = get_u32(r);
	uint64_t data = get_u64(r);
	static _Atomic long opens;
	char name[256], found[256] = "";
	int fds[3], e = 0;

	get_id(r, id);
	if (flags & 8)
		await_end(get_u64(r));
	check(!r->bad, "open is too short");
	check(!(flags & 4) == !(flags & 8), "it does not say instead of what");
	check(!h->base, "a second open");
	if (dieopen && ++opens == dieopen)
		_exit(9);
	check(entries >= 8 && entries <= max_entries && !(entries & (entries - 1)), "entries");
	check(data >= DATA_LEAST && data <= (uint64_t)max_data && data % 4096 == 0, "data");
	snprintf(name, sizeof name, "%s", image);
	check(!(flags & 4) || !*snap, "a snapshot is opened again by its name, not its number");
	check(!(flags & ~31u), "flags that there are not");
	check((flags & 17) != 17, "it is read-only, and shared");
	if (flags & 2 && !by_id(image, name, sizeof name))
		e = -ENOENT;
	snprintf(found, sizeof found, "%s", snap);
	if (e == 0 && number) {
		list_snaps(name, NULL, number, found);
		e = *found ? 0 : -ENOENT;
	}
	/* as if there were a block device, which is shared */
	if (e == 0 && strcmp(name, "device") == 0 && !(flags & 17))
		e = -EBUSY;
	if (e == 0)
		e = open_file(h, name, found);
	if (e == 0) {
		if (flags & 4)
			check(memcmp(id, h->id, 16) == 0, "another image is opened again");
		h->read_only = flags & 1 || *found;
		ring_make(h, entries, data, fds);
		put_id(&w, h->id);
		put_name(&w, h->name);
		put_u64(&w, h->size);
		put_u32(&w, 512);
		put_u64(&w, 8 << 20);
		put_u32(&w, entries);
		put_u64(&w, data);
		put_u32(&w, h->read_only);
		living_add(h);
		put_u64(&w, h->number);
		pthread_create(&h->thread, NULL, ring_thread, h);
	}
	answer(h->fd, f, e, &w, fds);
	if (e == 0)
		close(fds[0]);
	free(store);
	free(image);
	free(snap);
}

static int copy_file(const char *from, const char *to)
{
	char cmd[1300];

	snprintf(cmd, sizeof cmd, "cp --sparse=always '%s' '%s'", from, to);
	return system(cmd) == 0 ? 0 : -EIO;
}

static void do_list(struct handle *h, const struct frame *f, struct reader *r)
{
	uint8_t buf[60000];
	struct writer w = {.p = buf, .cap = sizeof buf};
	char *store = take_name(r), *last = take_name(r);
	struct dirent **names;
	int n = scandir(dir, &names, NULL, alphasort), rest = 0, count = 0;

	/* Two at a time, so that there are more. */
	put_u32(&w, 0);
	put_u32(&w, 0);
	for (int i = 0; i < n; i++) {
		const char *s = names[i]->d_name;
		uint8_t id[16];

		if (*s != '.' && !strchr(s, '@') && strcmp(s, last) > 0) {
			if (count < 2) {
				put_name(&w, s);
				name_id(s, id);
				put_id(&w, id);
				count++;
			} else {
				rest++;
			}
		}
		free(names[i]);
	}
	free(names);
	memcpy(buf, &(uint32_t){rest > 0}, 4);
	memcpy(buf + 4, &count, 4);
	answer(h->fd, f, 0, &w, NULL);
	free(store);
	free(last);
}

/* Three images in the trash, one for each page. */
static void list_trash(struct reader *r, struct writer *w)
{
	uint8_t id[16];
	char name[2] = "a";

	get_id(r, id);
	name[0] = (char)('a' + id[0]);
	id[0]++;
	put_u32(w, id[0] < 3);
	put_u32(w, 1);
	put_id(w, id);
	put_name(w, name);
	put_u64(w, 1000);
	put_u64(w, 1000 + id[0]);
}

/* Three clones, one for each page, of which the last by name comes first and has been removed. */
static void list_children(struct reader *r, struct writer *w)
{
	uint8_t id[16];
	char name[2] = "c";

	get_id(r, id);
	id[0]++;
	name[0] = (char)('c' - id[0] + 1);
	put_u32(w, id[0] < 3);
	put_u32(w, 1);
	put_name(w, name);
	put_id(w, id);
	put_u32(w, id[0] == 1);
}

static int do_admin(struct handle *h, const struct frame *f, struct reader *r, struct writer *w)
{
	char a[512], b[512], *s = NULL, *t = NULL;
	uint64_t v;
	int e = 0, fd;

	if (f->type < T_STAT) {
		free(take_name(r)); /* the store */
	} else {
		check(h->base, "no handle");
	}
	switch (f->type) {
	case T_CREATE:
		s = take_name(r);
		v = get_u64(r);
		get_u64(r);
		path_of(a, sizeof a, s, "");
		fd = open(a, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
		e = fd < 0 || ftruncate(fd, (off_t)v) < 0 ? -errno : 0;
		if (fd >= 0)
			close(fd);
		name_id(s, (uint8_t *)a);
		put_id(w, (uint8_t *)a);
		break;
	case T_REMOVE:
		s = take_name(r);
		path_of(a, sizeof a, s, "");
		progress(h->fd, f, 1, 2);
		e = unlink(a) < 0 ? -errno : 0;
		break;
	case T_RENAME:
		s = take_name(r);
		t = take_name(r);
		path_of(a, sizeof a, s, "");
		path_of(b, sizeof b, t, "");
		e = access(b, F_OK) == 0 ? -EEXIST : rename(a, b) < 0 ? -errno : 0;
		break;
	case T_TRASH_LIST:
		list_trash(r, w);
		break;
	case T_TRASH_REMOVE:
		s = take_name(r);
		e = strncmp(s, "01", 2) ? -ENOENT : get_u32(r) == 1 ? 0 : -EPERM;
		break;
	case T_STAT:
		put_id(w, h->id);
		put_name(w, h->name);
		put_u64(w, h->size);
		put_u32(w, 512);
		put_u64(w, 8 << 20);
		break;
	case T_RESIZE:
		v = get_u64(r);
		if (v < h->size && get_u32(r) != 1)
			e = -EINVAL;
		else if (ftruncate(h->file, (off_t)v) < 0)
			e = -errno;
		if (e == 0) {
			h->size = v;
			atomic_store((_Atomic uint64_t *)(h->base + 448), v);
		}
		progress(h->fd, f, 1, 1);
		put_u64(w, h->size);
		break;
	case T_SNAP_CREATE:
	case T_SNAP_REMOVE:
	case T_ROLLBACK:
	case T_SNAP_RENAME:
		s = take_name(r);
		path_of(a, sizeof a, h->name, "");
		path_of(b, sizeof b, h->name, s);
		if (f->type == T_SNAP_CREATE) {
			e = access(b, F_OK) == 0 ? -EEXIST : copy_file(a, b);
		} else if (access(b, F_OK) < 0) {
			e = -ENOENT;
		} else if (f->type == T_SNAP_REMOVE) {
			e = unlink(b) < 0 ? -errno : 0;
		} else if (f->type == T_ROLLBACK) {
			fd = open(b, O_RDONLY | O_CLOEXEC);
			v = (uint64_t)lseek(fd, 0, SEEK_END);
			if (pread(fd, h->image, v, 0) != (ssize_t)v)
				e = -EIO;
			close(fd);
			put_u64(w, h->size);
		} else {
			t = take_name(r);
			path_of(a, sizeof a, h->name, t);
			e = rename(b, a) < 0 ? -errno : 0;
		}
		break;
	case T_SNAP_LIST:
		put_u32(w, list_snaps(h->name, NULL, 0, NULL));
		list_snaps(h->name, w, 0, NULL);
		break;
	case T_PARENT:
		e = -ENOENT;
		break;
	case T_CHILDREN:
		list_children(r, w);
		break;
	default:
		e = -EOPNOTSUPP;
	}
	if (e == 0 && f->type > T_STAT && f->type != T_SNAP_LIST)
		changed(h);
	free(s);
	free(t);
	return e;
}

static void ring_end(struct handle *h)
{
	uint64_t one = 1;

	if (!h->base)
		return;
	pthread_mutex_lock(&h->lock);
	h->ending = true;
	pthread_mutex_unlock(&h->lock);
	if (write(h->wake_daemon, &one, 8) < 0)
		perror("wake");
	pthread_join(h->thread, NULL);
	munmap(h->base, h->start + h->data);
	munmap(h->image, 8ull << 30);
	close(h->file);
	close(h->wake_daemon);
	close(h->wake_client);
	h->base = NULL;
	living_remove(h);
}

static void *conn_thread(void *arg)
{
	struct handle *h = arg;
	uint8_t header[FRAME_HEADER], *payload = malloc(FRAME_MOST), buf[60000];
	struct frame f;
	bool hello = false;

	pthread_mutex_init(&h->lock, NULL);
	while (receive(h->fd, header, sizeof header)) {
		struct reader r;
		struct writer w = {.p = buf, .cap = sizeof buf};
		bool bye = false;

		check(frame_decode(header, &f) == 0, "header of a frame");
		if (!receive(h->fd, payload, f.len))
			break;
		check(frame_check(header, payload, f.len), "checksum of a frame");
		r = (struct reader){.p = payload, .n = f.len};
		check(hello == (f.type != T_HELLO), "hello comes first, and once");
		switch (f.type) {
		case T_HELLO:
			hello = true;
			check(get_u32(&r) == 1 && get_u32(&r) == 2, "versions");
			h->version = (uint32_t)max_version;
			free(take_name(&r));
			put_u32(&w, h->version);
			put_u32(&w, (uint32_t)max_entries);
			put_u64(&w, (uint64_t)max_data);
			put_name(&w, "fake");
			answer(h->fd, &f, 0, &w, NULL);
			break;
		case T_OPEN:
			do_open(h, &f, &r);
			break;
		case T_CLOSE:
			check(h->base, "close of no handle");
			ring_end(h);
			answer(h->fd, &f, 0, NULL, NULL);
			bye = true;
			break;
		case T_LIST:
			do_list(h, &f, &r);
			break;
		default: {
			int e = do_admin(h, &f, &r, &w);

			answer(h->fd, &f, e, &w, NULL);
		}
		}
		if (bye)
			break;
	}
	ring_end(h);
	close(h->fd);
	free(payload);
	free(h);
	return NULL;
}

int main(int argc, char **argv)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	static const struct {
		const char *name;
		long *to;
	} keys[] = {
		{"entries", &max_entries}, {"data", &max_data}, {"die", &die_at},
		{"drop", &drop_at},	   {"late", &late_at},	{"lag", &lag},
		{"shuffle", &shuffle},	   {"garbage", &garbage}, {"badframe", &badframe},
		{"ordered", &ordered},	   {"version", &max_version}, {"straggle", &straggle},
		{"dieopen", &dieopen},
	};
	int s;

	if (argc < 3)
		return 2;
	signal(SIGPIPE, SIG_IGN);
	dir = argv[2];
	srand((unsigned)getpid());
	for (int i = 3; i < argc; i++) {
		char *eq = strchr(argv[i], '=');

		if (!eq)
			return 2;
		*eq = 0;
		for (size_t k = 0; k < sizeof keys / sizeof *keys; k++)
			if (strcmp(keys[k].name, argv[i]) == 0)
				*keys[k].to = atol(eq + 1);
		if (strcmp(argv[i], "seed") == 0)
			seed = (unsigned)atol(eq + 1);
	}
	snprintf(addr.sun_path, sizeof addr.sun_path, "%s", argv[1]);
	unlink(argv[1]);
	s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(s, (struct sockaddr *)&addr, sizeof addr) < 0 || listen(s, 64) < 0) {
		perror(argv[1]);
		return 1;
	}
	for (;;) {
		struct handle *h = calloc(1, sizeof *h);
		pthread_t t;

		h->fd = accept4(s, NULL, NULL, SOCK_CLOEXEC);
		if (h->fd < 0) {
			free(h);
			continue;
		}
		pthread_create(&t, NULL, conn_thread, h);
		pthread_detach(t);
	}
}
