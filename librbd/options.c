/* Options of images that are to be made: numbers and texts, kept until they are used. */
#include "internal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#define OPTIONS 14

struct options {
	bool set[OPTIONS];
	uint64_t number[OPTIONS];
	char *text[OPTIONS];
};

static bool known(int name)
{
	return name >= 0 && name < OPTIONS;
}

static bool is_text(int name)
{
	return name == RBD_IMAGE_OPTION_JOURNAL_POOL || name == RBD_IMAGE_OPTION_DATA_POOL;
}

void rbd_image_options_create(rbd_image_options_t *opts)
{
	*opts = calloc(1, sizeof(struct options));
}

void rbd_image_options_destroy(rbd_image_options_t opts)
{
	if (opts)
		rbd_image_options_clear(opts);
	free(opts);
}

int rbd_image_options_set_string(rbd_image_options_t opts, int optname, const char *optval)
{
	struct options *o = opts;
	char *end, *copy;
	long long v;

	if (!o || !known(optname) || !optval)
		return -EINVAL;
	if (!is_text(optname)) {
		errno = 0;
		v = strtoll(optval, &end, 10);
		if (errno || end == optval || *end)
			return -EINVAL;
		return rbd_image_options_set_uint64(opts, optname, (uint64_t)v);
	}
	copy = strdup(optval);
	if (!copy)
		return -ENOMEM;
	free(o->text[optname]);
	o->text[optname] = copy;
	o->set[optname] = true;
	return 0;
}

int rbd_image_options_set_uint64(rbd_image_options_t opts, int optname, uint64_t optval)
{
	struct options *o = opts;

	if (!o || !known(optname) || is_text(optname))
		return -EINVAL;
	o->number[optname] = optval;
	o->set[optname] = true;
	return 0;
}

int rbd_image_options_get_string(rbd_image_options_t opts, int optname, char *optval,
				 size_t maxlen)
{
	struct options *o = opts;
	int n;

	if (!o || !known(optname))
		return -EINVAL;
	if (!o->set[optname])
		return -ENOENT;
	if (is_text(optname))
		n = snprintf(optval, maxlen, "%s", o->text[optname]);
	else
		n = snprintf(optval, maxlen, "%" PRIu64, o->number[optname]);
	return (size_t)n < maxlen ? 0 : -E2BIG;
}

int rbd_image_options_get_uint64(rbd_image_options_t opts, int optname, uint64_t *optval)
{
	struct options *o = opts;

	if (!o || !known(optname) || is_text(optname))
		return -EINVAL;
	if (!o->set[optname])
		return -ENOENT;
	*optval = o->number[optname];
	return 0;
}

int rbd_image_options_is_set(rbd_image_options_t opts, int optname, bool *is_set)
{
	struct options *o = opts;

	if (!o || !known(optname))
		return -EINVAL;
	*is_set = o->set[optname];
	return 0;
}

int rbd_image_options_unset(rbd_image_options_t opts, int optname)
{
	struct options *o = opts;

	if (!o || !known(optname))
		return -EINVAL;
	if (!o->set[optname])
		return -ENOENT;
	free(o->text[optname]);
	o->text[optname] = NULL;
	o->set[optname] = false;
	return 0;
}

void rbd_image_options_clear(rbd_image_options_t opts)
{
	struct options *o = opts;

	for (int i = 0; o && i < OPTIONS; i++) {
		free(o->text[i]);
		o->text[i] = NULL;
		o->set[i] = false;
	}
}

int rbd_image_options_is_empty(rbd_image_options_t opts)
{
	struct options *o = opts;

	for (int i = 0; o && i < OPTIONS; i++)
		if (o->set[i])
			return 0;
	return 1;
}
