/* Tests of what has no daemon in it: frames, cutting, clipping, the data area, options. */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

static int failures;

#define CHECK(x)                                                                        \
	do {                                                                            \
		if (!(x)) {                                                             \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x);         \
			failures++;                                                     \
		}                                                                       \
	} while (0)

static unsigned rnd = 12345;

static uint32_t any(uint32_t below)
{
	return ((uint32_t)rand_r(&rnd) << 15 ^ (uint32_t)rand_r(&rnd)) % below;
}

static void test_crc(void)
{
	uint8_t zeroes[32] = {0};

	CHECK(crc32c(0, "123456789", 9) == 0xe3069283);
	CHECK(crc32c(0, zeroes, 32) == 0x8a9136aa); /* RFC 3720, B.4 */
	CHECK(crc32c(crc32c(0, "1234", 4), "56789", 5) == 0xe3069283);
}

static void test_frame(void)
{
	uint8_t h[FRAME_HEADER], bad[FRAME_HEADER], payload[100];
	struct frame f;

	for (size_t i = 0; i < sizeof payload; i++)
		payload[i] = (uint8_t)i;
	frame_encode(h, T_OPEN, 77, payload, sizeof payload);
	CHECK(memcmp(h, "LRBD\1\0\2\0\144\0\0\0", 12) == 0);
	CHECK(frame_decode(h, &f) == 0 && f.type == T_OPEN && f.number == 77 && f.len == 100);
	CHECK(frame_check(h, payload, 100));
	payload[50] ^= 1;
	CHECK(!frame_check(h, payload, 100));
	payload[50] ^= 1;
	for (int bit = 0; bit < 8 * (int)FRAME_HEADER; bit++) {
		memcpy(bad, h, sizeof bad);
		bad[bit / 8] ^= (uint8_t)(1 << bit % 8);
		CHECK(frame_decode(bad, &f) < 0 || f.len != 100 || !frame_check(bad, payload, 100));
	}
}

static void test_fields(void)
{
	uint8_t buf[64];
	struct writer w = {.p = buf, .cap = sizeof buf};
	struct reader r;
	uint8_t id[16] = {1, 2, 3}, back[16];
	char text[ID_TEXT], *s;

	put_u32(&w, 7);
	put_u64(&w, 1ull << 40);
	put_name(&w, "vm1");
	put_id(&w, id);
	CHECK(!w.bad && w.n == 4 + 8 + 7 + 16);
	r = (struct reader){.p = buf, .n = w.n};
	CHECK(get_u32(&r) == 7 && get_u64(&r) == 1ull << 40);
	s = get_string(&r);
	CHECK(s && strcmp(s, "vm1") == 0);
	free(s);
	get_id(&r, back);
	CHECK(memcmp(id, back, 16) == 0 && r.n == 0 && !r.bad);
	CHECK(get_u32(&r) == 0 && r.bad);
	put_name(&w, "this does not fit into what there is left of the buffer");
	CHECK(w.bad && w.n <= sizeof buf);
	id_format(id, text);
	CHECK(strcmp(text, "01020300-0000-0000-0000-000000000000") == 0);
	CHECK(3 * (4 + NAME_MOST) + 8 + 4 + 4 + 8 + 16 <= REQUEST_MOST); /* open */
	r = (struct reader){.p = (const uint8_t *)"\3\0\0\0a\0b", .n = 7};
	CHECK(get_string(&r) == NULL && r.bad); /* a zero byte inside */
}

/* Whatever the bytes, a reader stays inside them (the sanitizers look). */
static void test_random_fields(void)
{
	for (int round = 0; round < 200000; round++) {
		size_t n = any(64);
		uint8_t *buf = malloc(n ? n : 1), id[16];
		struct reader r = {.p = buf, .n = n};
		uint32_t len;

		for (size_t i = 0; i < n; i++)
			buf[i] = (uint8_t)(any(4) ? any(8) : any(256));
		while (!r.bad) {
			switch (any(5)) {
			case 0:
				get_u32(&r);
				break;
			case 1:
				get_u64(&r);
				break;
			case 2:
				get_id(&r, id);
				break;
			case 3:
				get_bytes(&r, &len);
				break;
			case 4:
				free(get_string(&r));
			}
		}
		CHECK(r.n <= n && r.p + r.n == buf + n);
		free(buf);
	}
}

static void test_clip(void)
{
	static const struct {
		uint64_t size, off, len;
		int e;
		uint64_t out;
	} cases[] = {
		{100, 0, 100, 0, 100},	  {100, 0, 101, 0, 100},
		{100, 99, 5, 0, 1},	  {100, 100, 1, -EINVAL, 1},
		{100, 100, 0, 0, 0},	  {100, 500, 0, 0, 0},
		{100, 50, UINT64_MAX, 0, 50}, {0, 0, 1, -EINVAL, 1},
		{UINT64_MAX, UINT64_MAX - 1, UINT64_MAX, 0, 1},
	};

	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		uint64_t len = cases[i].len;

		CHECK(clip(cases[i].size, cases[i].off, &len) == cases[i].e);
		CHECK(len == cases[i].out);
	}
}

/* The pieces are the request, without gaps, and each obeys the ring's rules. */
static void test_cut(void)
{
	static const uint8_t ops[] = {OP_READ, OP_WRITE, OP_DISCARD, OP_ZEROES};

	for (int round = 0; round < 100000; round++) {
		uint8_t op = ops[any(4)];
		uint64_t off = (uint64_t)any(1 << 20) << any(16), len = (uint64_t)any(4096) << any(20);
		uint64_t pos, end;
		uint32_t n = 0;
		struct cut c;

		if (op == OP_DISCARD)
			off = off / SECTOR * SECTOR, len = len / SECTOR * SECTOR;
		end = off + len;
		for (pos = off; cut_next(op, pos, end, &c); pos += c.len, n++) {
			CHECK(c.len > 0 && c.len <= end - pos);
			if (c.op == OP_READ || c.op == OP_WRITE)
				CHECK(c.len <= MIB &&
				      (pos + c.len + 511) / 512 * 512 - pos / 512 * 512 <= MIB);
			else
				CHECK(pos % SECTOR == 0 && c.len % SECTOR == 0 && c.len <= GIB);
			CHECK(c.op == op || (op == OP_ZEROES && c.op == OP_WRITE && c.len < SECTOR));
		}
		CHECK(pos == end);
		CHECK(n == cut_count(op, off, end));
	}
	CHECK(cut_count(OP_FLUSH, 0, 0) == 1);
	CHECK(cut_count(OP_WRITE, 0, MIB) == 1);
	CHECK(cut_count(OP_WRITE, 1, 1 + MIB) == 2);
	CHECK(cut_count(OP_ZEROES, 100, 100 + 4 * SECTOR) == 3);
	CHECK(cut_count(OP_DISCARD, 0, 3ull * GIB + SECTOR) == 4);
}

/* Against an array of bytes that does it the slow way. */
static void test_space(void)
{
	static struct space s;
	static uint8_t used[UNITS_MOST];
	static struct {
		uint32_t first, n;
	} have[UNITS_MOST];
	uint32_t units = 600, count = 0;

	space_init(&s, units);
	for (int round = 0; round < 100000; round++) {
		if (any(2)) {
			uint32_t n = any(10) ? 1 + any(8) : 1 + any(257), i = 0, run = 0;
			int64_t got = space_take(&s, n);

			while (i < units && run < n)
				run = used[i++] ? 0 : run + 1;
			CHECK(got == (run == n ? (int64_t)(i - n) : -1));
			if (got < 0)
				continue;
			memset(used + got, 1, n);
			have[count].first = (uint32_t)got;
			have[count++].n = n;
		} else if (count > 0) {
			uint32_t i = any(count);

			space_give(&s, have[i].first, have[i].n);
			memset(used + have[i].first, 0, have[i].n);
			have[i] = have[--count];
		}
	}
	space_init(&s, 512);
	CHECK(space_take(&s, 513) == -1);
	CHECK(space_take(&s, 512) == 0);
	CHECK(space_take(&s, 1) == -1);
}

static void test_features(void)
{
	static const struct {
		const char *text;
		int e;
		uint64_t bits;
	} cases[] = {
		{"layering", 0, 1},
		{"layering,exclusive-lock", 0, 5},
		{" layering , striping ", 0, 3},
		{"61", 0, 61},
		{"", 0, RBD_FEATURES_DEFAULT},
		{"layering,", -EINVAL, 0},
		{",", -EINVAL, 0},
		{"0x3d", -EINVAL, 0},
		{"nonsense", -EINVAL, 0},
		{"4096", -EINVAL, 0},
		{"99999999999999999999", -EINVAL, 0},
	};
	char text[256];
	uint64_t bits;
	size_t n;

	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		bits = 0;
		CHECK(rbd_features_from_string(cases[i].text, &bits) == cases[i].e);
		CHECK(bits == cases[i].bits);
	}
	for (bits = 0; bits < 4096; bits++) {
		uint64_t again = 0;

		n = 0;
		CHECK(rbd_features_to_string(bits, text, &n) == -ERANGE && n <= sizeof text);
		CHECK(rbd_features_to_string(bits, text, &n) == 0 && n == strlen(text) + 1);
		CHECK(bits == 0 || (rbd_features_from_string(text, &again) == 0 && again == bits));
	}
	CHECK(rbd_features_to_string(4096, text, &n) == -EINVAL);
}

static void test_copies(void)
{
	char a[10], b[1], c[20], all[31], want[31], out[31];
	struct iovec v[4] = {{a, 10}, {NULL, 0}, {b, 1}, {c, 20}};

	for (int i = 0; i < 31; i++)
		want[i] = (char)(i * 7);
	for (size_t step = 1; step <= 31; step++) {
		struct cursor in = {0}, from = {0};

		memset(a, 0, sizeof a), memset(b, 0, sizeof b), memset(c, 0, sizeof c);
		for (size_t i = 0; i < 31; i += step) {
			size_t n = 31 - i < step ? 31 - i : step;

			vector_in(v, 4, &in, want + i, n);
		}
		for (size_t i = 0; i < 31; i += step)
			vector_out(v, 4, &from, out + i, 31 - i < step ? 31 - i : step);
		memcpy(all, a, 10), memcpy(all + 10, b, 1), memcpy(all + 11, c, 20);
		CHECK(memcmp(all, want, 31) == 0);
		CHECK(memcmp(out, want, 31) == 0);
	}
	pattern_out("abc", 3, 4, out, 8);
	CHECK(memcmp(out, "bcabcabc", 8) == 0);
}

static void test_options(void)
{
	rbd_image_options_t o;
	uint64_t v;
	char s[8];
	bool set;

	rbd_image_options_create(&o);
	CHECK(rbd_image_options_is_empty(o) == 1);
	CHECK(rbd_image_options_get_uint64(o, RBD_IMAGE_OPTION_ORDER, &v) == -ENOENT);
	CHECK(rbd_image_options_set_uint64(o, RBD_IMAGE_OPTION_ORDER, 22) == 0);
	CHECK(rbd_image_options_get_uint64(o, RBD_IMAGE_OPTION_ORDER, &v) == 0 && v == 22);
	CHECK(rbd_image_options_get_string(o, RBD_IMAGE_OPTION_ORDER, s, sizeof s) == 0);
	CHECK(strcmp(s, "22") == 0);
	CHECK(rbd_image_options_set_string(o, RBD_IMAGE_OPTION_ORDER, "23x") == -EINVAL);
	CHECK(rbd_image_options_set_string(o, RBD_IMAGE_OPTION_ORDER, "23") == 0);
	CHECK(rbd_image_options_get_uint64(o, RBD_IMAGE_OPTION_ORDER, &v) == 0 && v == 23);
	CHECK(rbd_image_options_set_uint64(o, RBD_IMAGE_OPTION_DATA_POOL, 1) == -EINVAL);
	CHECK(rbd_image_options_set_string(o, RBD_IMAGE_OPTION_DATA_POOL, "a-long-name") == 0);
	CHECK(rbd_image_options_get_string(o, RBD_IMAGE_OPTION_DATA_POOL, s, sizeof s) == -E2BIG);
	CHECK(rbd_image_options_set_uint64(o, 99, 1) == -EINVAL);
	CHECK(rbd_image_options_set_uint64(o, -1, 1) == -EINVAL);
	CHECK(rbd_image_options_is_set(o, RBD_IMAGE_OPTION_ORDER, &set) == 0 && set);
	CHECK(rbd_image_options_unset(o, RBD_IMAGE_OPTION_ORDER) == 0);
	CHECK(rbd_image_options_unset(o, RBD_IMAGE_OPTION_ORDER) == -ENOENT);
	CHECK(rbd_image_options_is_empty(o) == 0);
	rbd_image_options_clear(o);
	CHECK(rbd_image_options_is_empty(o) == 1);
	rbd_image_options_destroy(o);
}

/*
 * With the next daemon, what a late completion has said took effect is not done again: others may
 * have written over it.
 */
static void test_effected(void)
{
	static const uint8_t ops[] = {OP_WRITE, OP_WRITE, OP_DISCARD, OP_COMPARE, OP_FLUSH};
	static const bool effected[] = {true, false, true, true, false};
	enum { N = sizeof ops };
	static struct completion c[N];
	struct image *h = calloc(1, sizeof *h);
	uint8_t *memory = aligned_alloc(UNIT, 2 * MIB);
	static char data[SECTOR];

	memset(memory, 0, 2 * MIB);
	h->state = LIVE;
	h->ring = (struct ring){.base = memory, .version = 2, .entries = 16, .units = 256,
				.data = memory + MIB, .sq = (struct sqe *)(memory + UNIT)};
	for (uint32_t tag = 0; tag < h->ring.entries; tag++)
		h->tags[h->ntags++] = tag;
	space_init(&h->space, h->ring.units);
	for (int i = 0; i < N; i++) {
		struct request *r = &c[i].req;

		r->one = (struct iovec){.iov_base = data, .iov_len = sizeof data};
		r->iov = r->cmp = &r->one;
		r->iovcnt = r->cmpcnt = 1;
		h->again[h->nagain++] = (struct piece){.req = r, .op = ops[i], .seq = (uint64_t)i,
						       .effected = effected[i],
						       .off = i * SECTOR, .len = SECTOR};
	}
	h->again[N - 1].off = h->again[N - 1].len = 0;
	image_pump(h);
	CHECK(h->ring.tail == N && h->again_pos == N && h->writes == 1);
	for (int i = 0; i < N; i++) {
		const struct sqe *e = &h->ring.sq[i];
		bool flush = effected[i] || ops[i] == OP_FLUSH;

		CHECK(e->op == (flush ? OP_FLUSH : ops[i]));
		CHECK(e->off == (flush ? 0 : i * SECTOR) && e->len == (flush ? 0 : SECTOR));
		CHECK(h->pieces[e->tag].req == &c[i].req && h->pieces[e->tag].state == SENT);
		/* And not with the one after the next either. */
		CHECK(h->pieces[e->tag].effected == effected[i]);
	}
	free(memory);
	free(h);
}

int main(void)
{
	test_crc();
	test_frame();
	test_fields();
	test_random_fields();
	test_clip();
	test_cut();
	test_space();
	test_features();
	test_copies();
	test_options();
	test_effected();
	if (failures)
		fprintf(stderr, "unit: %d failures\n", failures);
	else
		puts("unit: ok");
	return failures != 0;
}
