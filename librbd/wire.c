/* Frames and their fields: see docs/format-librbd.md, "The socket". */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>

/* CRC32C, four bits at a time: frames are few and short. */
static const uint32_t crc_table[16] = {
	0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3,
	0x61c69362, 0x7198540d, 0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9,
	0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75,
};

uint32_t crc32c(uint32_t crc, const void *p, size_t n)
{
	const uint8_t *b = p;

	crc = ~crc;
	while (n--) {
		crc ^= *b++;
		crc = crc >> 4 ^ crc_table[crc & 15];
		crc = crc >> 4 ^ crc_table[crc & 15];
	}
	return ~crc;
}

static void store(uint8_t *p, uint64_t v, size_t n)
{
	memcpy(p, &v, n);
}

static uint64_t load(const uint8_t *p, size_t n)
{
	uint64_t v = 0;

	memcpy(&v, p, n);
	return v;
}

static uint32_t frame_crc(const uint8_t header[FRAME_HEADER], const void *payload, uint32_t len)
{
	uint8_t h[FRAME_HEADER];

	memcpy(h, header, sizeof h);
	memset(h + 12, 0, 4);
	return crc32c(crc32c(0, h, sizeof h), payload, len);
}

void frame_encode(uint8_t header[FRAME_HEADER], uint16_t type, uint64_t number,
		  const void *payload, uint32_t len)
{
	memcpy(header, "LRBD", 4);
	store(header + 4, 1, 2);
	store(header + 6, type, 2);
	store(header + 8, len, 4);
	store(header + 16, number, 8);
	store(header + 12, frame_crc(header, payload, len), 4);
}

int frame_decode(const uint8_t header[FRAME_HEADER], struct frame *f)
{
	if (memcmp(header, "LRBD", 4) != 0 || load(header + 4, 2) != 1)
		return -EPROTO;
	f->type = (uint16_t)load(header + 6, 2);
	f->len = (uint32_t)load(header + 8, 4);
	f->crc = (uint32_t)load(header + 12, 4);
	f->number = load(header + 16, 8);
	return f->len > FRAME_MOST ? -EPROTO : 0;
}

bool frame_check(const uint8_t header[FRAME_HEADER], const void *payload, uint32_t len)
{
	return frame_crc(header, payload, len) == (uint32_t)load(header + 12, 4);
}

static void put(struct writer *w, const void *p, size_t n)
{
	if (w->bad || n > w->cap - w->n) {
		w->bad = true;
		return;
	}
	if (n > 0)
		memcpy(w->p + w->n, p, n);
	w->n += n;
}

void put_u32(struct writer *w, uint32_t v)
{
	put(w, &v, sizeof v);
}

void put_u64(struct writer *w, uint64_t v)
{
	put(w, &v, sizeof v);
}

void put_id(struct writer *w, const uint8_t id[16])
{
	put(w, id, 16);
}

void put_bytes(struct writer *w, const void *p, size_t n)
{
	if (n > NAME_MOST) {
		w->bad = true;
		return;
	}
	put_u32(w, (uint32_t)n);
	put(w, p, n);
}

void put_text(struct writer *w, const char *s)
{
	size_t n = strlen(s);

	if (n > FRAME_MOST) {
		w->bad = true;
		return;
	}
	put_u32(w, (uint32_t)n);
	put(w, s, n);
}

void put_name(struct writer *w, const char *s)
{
	put_bytes(w, s, s ? strlen(s) : 0);
}

static const uint8_t *take(struct reader *r, size_t n)
{
	const uint8_t *p = r->p;

	if (r->bad || n > r->n) {
		r->bad = true;
		return NULL;
	}
	r->p += n;
	r->n -= n;
	return p;
}

uint32_t get_u32(struct reader *r)
{
	const uint8_t *p = take(r, 4);

	return p ? (uint32_t)load(p, 4) : 0;
}

uint64_t get_u64(struct reader *r)
{
	const uint8_t *p = take(r, 8);

	return p ? load(p, 8) : 0;
}

void get_id(struct reader *r, uint8_t id[16])
{
	const uint8_t *p = take(r, 16);

	if (p)
		memcpy(id, p, 16);
	else
		memset(id, 0, 16);
}

const uint8_t *get_bytes(struct reader *r, uint32_t *n)
{
	const uint8_t *p;

	*n = get_u32(r);
	p = take(r, *n);
	if (!p)
		*n = 0;
	return p;
}

char *get_string(struct reader *r)
{
	uint32_t n;
	const uint8_t *p = get_bytes(r, &n);
	char *s;

	if (!p || n > NAME_MOST || memchr(p, 0, n)) {
		r->bad = true;
		return NULL;
	}
	s = malloc((size_t)n + 1);
	if (!s) {
		r->bad = true;
		return NULL;
	}
	memcpy(s, p, n);
	s[n] = 0;
	return s;
}

void id_format(const uint8_t id[16], char text[ID_TEXT])
{
	static const char digits[] = "0123456789abcdef";
	char *t = text;

	for (int i = 0; i < 16; i++) {
		if (i == 4 || i == 6 || i == 8 || i == 10)
			*t++ = '-';
		*t++ = digits[id[i] >> 4];
		*t++ = digits[id[i] & 15];
	}
	*t = 0;
}
