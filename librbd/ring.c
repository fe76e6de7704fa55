/* The ring in shared memory: see docs/format-librbd.md, "The ring". */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
	SQ_TAIL = 64,
	CQ_TAIL = 192,
	CQ_HEAD = 256,
	DAEMON_SLEEPS = 320,
	CLIENT_SLEEPS = 384,
	IMAGE_SIZE = 448,
	CHANGES = 456,
	DECIDED = 512,
	QUEUES = 4096,
};

static _Atomic uint32_t *word(const struct ring *r, size_t off)
{
	return (_Atomic uint32_t *)(r->base + off);
}

static uint32_t u32_at(const uint8_t *p)
{
	uint32_t v;

	memcpy(&v, p, sizeof v);
	return v;
}

static uint64_t u64_at(const uint8_t *p)
{
	uint64_t v;

	memcpy(&v, p, sizeof v);
	return v;
}

/* Checks the header against what open's answer has said and against the memory's size. */
static int header_check(const uint8_t *base, size_t size, uint32_t version, uint32_t entries,
			uint64_t data)
{
	uint8_t h[36];
	uint64_t start, queues;

	memcpy(h, base, sizeof h);
	if (memcmp(h, "LRNG", 4) != 0 || u32_at(h + 4) != version ||
	    crc32c(0, h, 32) != u32_at(h + 32))
		return -EPROTO;
	if (u32_at(h + 8) != entries || u64_at(h + 24) != data)
		return -EPROTO;
	if (entries < ENTRIES_LEAST || entries > ENTRIES_MOST || (entries & (entries - 1)))
		return -EPROTO;
	if (data < DATA_LEAST || data > DATA_MOST || data % UNIT)
		return -EPROTO;
	start = u64_at(h + 16);
	queues = QUEUES + (uint64_t)entries * (sizeof(struct sqe) + sizeof(struct cqe));
	if (start % UNIT || start < queues || start > size || size - start < data)
		return -EPROTO;
	return 0;
}

static int memory_map(struct ring *r, uint32_t version, uint32_t entries, uint64_t data)
{
	struct stat st;
	int seals = fcntl(r->memory, F_GET_SEALS), e;

	/* What could become smaller under us would kill the process. */
	if (seals < 0 || !(seals & F_SEAL_SHRINK))
		return -EPROTO;
	if (fstat(r->memory, &st) < 0)
		return -errno;
	if (st.st_size < QUEUES || st.st_size > (off_t)(DATA_MOST + MIB))
		return -EPROTO;
	r->size = (size_t)st.st_size;
	r->base = mmap(NULL, r->size, PROT_READ | PROT_WRITE, MAP_SHARED, r->memory, 0);
	if (r->base == MAP_FAILED) {
		r->base = NULL;
		return -errno;
	}
	/* A child of a fork must not have the ring; it gets an error of every call. */
	madvise(r->base, r->size, MADV_DONTFORK);
	e = header_check(r->base, r->size, version, entries, data);
	if (e < 0)
		return e;
	r->version = version;
	r->entries = entries;
	r->units = (uint32_t)(data / UNIT);
	r->data = r->base + u64_at(r->base + 16);
	if (r->data < r->base || (size_t)(r->data - r->base) > r->size - data)
		return -EPROTO; /* changed since it was checked */
	r->sq = (struct sqe *)(r->base + QUEUES);
	r->cq = (const struct cqe *)(r->sq + entries);
	return 0;
}

int ring_map(struct ring *r, const int fds[3], uint32_t version, uint32_t entries,
	     uint64_t data)
{
	int e;

	memset(r, 0, sizeof *r);
	r->memory = fds[0];
	r->daemon = fds[1];
	r->client = fds[2];
	e = memory_map(r, version, entries, data);
	if (e < 0) {
		ring_unmap(r);
		return e;
	}
	close(r->memory);
	r->memory = -1;
	return 0;
}

void ring_unmap(struct ring *r)
{
	if (r->base)
		munmap(r->base, r->size);
	r->base = NULL;
	if (r->memory >= 0)
		close(r->memory);
	if (r->daemon >= 0)
		close(r->daemon);
	if (r->client >= 0)
		close(r->client);
	r->memory = r->daemon = r->client = -1;
}

uint64_t ring_image_size(const struct ring *r)
{
	return atomic_load_explicit((_Atomic uint64_t *)(r->base + IMAGE_SIZE),
				    memory_order_acquire);
}

uint64_t ring_changes(const struct ring *r)
{
	if (r->version < 2)
		return 0;
	return atomic_load_explicit((_Atomic uint64_t *)(r->base + CHANGES), memory_order_acquire);
}

bool ring_decided(const struct ring *r, uint32_t tag)
{
	return atomic_load(word(r, DECIDED + tag / 32 * 4)) >> (tag % 32) & 1;
}

void ring_undecide(struct ring *r, uint32_t tag)
{
	atomic_fetch_and(word(r, DECIDED + tag / 32 * 4), ~(1u << (tag % 32)));
}

void ring_push(struct ring *r, const struct sqe *e)
{
	/*
	 * There is room: no more entries than tags are under way, and one whose tag is free
	 * again has been taken from the queue.
	 */
	r->sq[r->tail & (r->entries - 1)] = *e;
	r->tail++;
}

void ring_tell(struct ring *r)
{
	_Atomic uint32_t *sleeps = word(r, DAEMON_SLEEPS);

	if (r->told == r->tail)
		return;
	r->told = r->tail;
	atomic_store_explicit(word(r, SQ_TAIL), r->tail, memory_order_release);
	atomic_thread_fence(memory_order_seq_cst);
	if (atomic_load_explicit(sleeps, memory_order_relaxed) == 1 &&
	    atomic_exchange(sleeps, 0) == 1) {
		uint64_t one = 1;

		while (write(r->daemon, &one, sizeof one) < 0 && errno == EINTR)
			;
	}
}

int ring_ready(const struct ring *r)
{
	uint32_t n = atomic_load_explicit(word(r, CQ_TAIL), memory_order_acquire) - r->head;

	return n <= r->entries ? (int)n : -EPROTO;
}

struct cqe ring_pull(struct ring *r)
{
	return r->cq[r->head++ & (r->entries - 1)];
}

void ring_pulled(struct ring *r)
{
	atomic_store_explicit(word(r, CQ_HEAD), r->head, memory_order_release);
}

bool ring_sleep(struct ring *r)
{
	atomic_store_explicit(word(r, CLIENT_SLEEPS), 1, memory_order_relaxed);
	atomic_thread_fence(memory_order_seq_cst);
	if (ring_ready(r) == 0 && ring_changes(r) == r->seen)
		return true;
	ring_awake(r);
	return false;
}

void ring_awake(struct ring *r)
{
	atomic_store_explicit(word(r, CLIENT_SLEEPS), 0, memory_order_relaxed);
}

void space_init(struct space *s, uint32_t units)
{
	memset(s->used, 0, sizeof s->used);
	s->units = units;
	s->low = 0;
}

/* The first bit of kind (0: free, 1: used) in [from, end), or end. */
static uint32_t find(const struct space *s, uint32_t from, uint32_t end, bool kind)
{
	while (from < end) {
		uint64_t w = s->used[from / 64];

		w = (kind ? w : ~w) >> (from % 64);
		if (w) {
			from += (uint32_t)__builtin_ctzll(w);
			return from < end ? from : end;
		}
		from = (from / 64 + 1) * 64;
	}
	return end;
}

static void mark(struct space *s, uint32_t first, uint32_t n, bool used)
{
	while (n > 0) {
		uint32_t bit = first % 64, run = 64 - bit < n ? 64 - bit : n;
		uint64_t mask = (run == 64 ? ~0ull : (1ull << run) - 1) << bit;

		if (used)
			s->used[first / 64] |= mask;
		else
			s->used[first / 64] &= ~mask;
		first += run;
		n -= run;
	}
}

int64_t space_take(struct space *s, uint32_t n)
{
	uint32_t i = find(s, s->low, s->units, false);

	s->low = i;
	while (n <= s->units && i <= s->units - n) {
		uint32_t end = find(s, i, i + n, true);

		if (end == i + n) {
			mark(s, i, n, true);
			if (i == s->low)
				s->low = i + n;
			return i;
		}
		i = find(s, end, s->units, false);
	}
	return -1;
}

void space_give(struct space *s, uint32_t first, uint32_t n)
{
	mark(s, first, n, false);
	if (first < s->low)
		s->low = first;
}
