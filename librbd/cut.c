/* How a request is cut into the ring's entries, and how its data is copied: no state. */
#include "internal.h"

#include <errno.h>

static uint64_t least(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

bool cut_next(uint8_t op, uint64_t pos, uint64_t end, struct cut *out)
{
	uint64_t len = end - pos;

	if (pos >= end)
		return false;
	out->op = op;
	switch (op) {
	case OP_DISCARD:
		len = least(len, GIB - pos % GIB);
		break;
	case OP_ZEROES:
		/* Whole sectors are zeroes to the daemon, the edges ordinary writes. */
		if (pos % SECTOR || len < SECTOR) {
			out->op = OP_WRITE;
			len = least(len, SECTOR - pos % SECTOR);
		} else {
			len = least(len - len % SECTOR, GIB - pos % GIB);
		}
		break;
	case OP_COMPARE:
		break; /* all of it or nothing: prepare has seen to its length */
	default:
		len = least(len, MIB - pos % MIB);
	}
	out->len = (uint32_t)len;
	return true;
}

uint32_t cut_count(uint8_t op, uint64_t pos, uint64_t end)
{
	struct cut c;
	uint32_t n = 0;

	if (op == OP_FLUSH)
		return 1;
	while (cut_next(op, pos, end, &c)) {
		pos += c.len;
		n++;
	}
	return n;
}

int clip(uint64_t size, uint64_t off, uint64_t *len)
{
	if (*len == 0)
		return 0;
	if (off >= size)
		return -EINVAL;
	if (*len > size - off)
		*len = size - off;
	return 0;
}

static void vector(const struct iovec *v, int count, struct cursor *at, char *buf, size_t n,
		   bool out)
{
	while (n > 0 && at->index < count) {
		char *p = (char *)v[at->index].iov_base + at->off;
		size_t run = v[at->index].iov_len - at->off;

		if (run > n)
			run = n;
		if (run > 0) {
			if (out)
				memcpy(buf, p, run);
			else
				memcpy(p, buf, run);
		}
		buf += run;
		n -= run;
		at->off += run;
		if (at->off == v[at->index].iov_len) {
			at->index++;
			at->off = 0;
		}
	}
}

void vector_out(const struct iovec *v, int count, struct cursor *at, void *buf, size_t n)
{
	vector(v, count, at, buf, n, true);
}

void vector_in(const struct iovec *v, int count, struct cursor *at, const void *buf, size_t n)
{
	vector(v, count, at, (char *)(uintptr_t)buf, n, false);
}

void pattern_out(const char *pattern, size_t period, uint64_t at, void *buf, size_t n)
{
	char *p = buf;
	size_t from = (size_t)(at % period);

	while (n > 0) {
		size_t run = period - from < n ? period - from : n;

		memcpy(p, pattern + from, run);
		p += run;
		n -= run;
		from = 0;
	}
}
