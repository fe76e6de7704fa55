/* Features, and options, of which there are none. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>

/* In the order in which librbd names them. */
static const struct {
	const char *name;
	uint64_t bit;
} named[] = {
	{"data-pool", RBD_FEATURE_DATA_POOL},
	{"deep-flatten", RBD_FEATURE_DEEP_FLATTEN},
	{"dirty-cache", RBD_FEATURE_DIRTY_CACHE},
	{"exclusive-lock", RBD_FEATURE_EXCLUSIVE_LOCK},
	{"fast-diff", RBD_FEATURE_FAST_DIFF},
	{"journaling", RBD_FEATURE_JOURNALING},
	{"layering", RBD_FEATURE_LAYERING},
	{"migrating", RBD_FEATURE_MIGRATING},
	{"non-primary", RBD_FEATURE_NON_PRIMARY},
	{"object-map", RBD_FEATURE_OBJECT_MAP},
	{"operations", RBD_FEATURE_OPERATIONS},
	{"striping", RBD_FEATURE_STRIPINGV2},
};
#define FEATURES (sizeof named / sizeof *named)

static uint64_t known_features(void)
{
	uint64_t all = 0;

	for (size_t i = 0; i < FEATURES; i++)
		all |= named[i].bit;
	return all;
}

int rbd_features_to_string(uint64_t bits, char *str_features, size_t *size)
{
	char text[256] = "";
	size_t n = 0, room = *size;

	if (bits & ~known_features())
		return -EINVAL;
	for (size_t i = 0; i < FEATURES; i++) {
		if (!(bits & named[i].bit))
			continue;
		if (n > 0)
			text[n++] = ',';
		strcpy(text + n, named[i].name);
		n += strlen(named[i].name);
	}
	*size = n + 1;
	if (room < n + 1)
		return -ERANGE;
	memcpy(str_features, text, n + 1);
	return 0;
}

/* The feature whose name is the n bytes at s, 0 if there is none. */
static uint64_t feature_named(const char *s, size_t n)
{
	while (n > 0 && *s == ' ')
		s++, n--;
	while (n > 0 && s[n - 1] == ' ')
		n--;
	for (size_t i = 0; i < FEATURES; i++)
		if (strlen(named[i].name) == n && memcmp(named[i].name, s, n) == 0)
			return named[i].bit;
	return 0;
}

static int names_to_features(const char *s, uint64_t *bits)
{
	uint64_t all = 0, one;

	for (;;) {
		size_t n = strcspn(s, ",");

		one = feature_named(s, n);
		if (!one)
			return -EINVAL;
		all |= one;
		if (!s[n])
			break;
		s += n + 1;
	}
	*bits = all;
	return 0;
}

int rbd_features_from_string(const char *str_features, uint64_t *bits)
{
	size_t digits = strspn(str_features, "0123456789");
	uint64_t v;

	if (!*str_features) { /* librbd's default */
		*bits = RBD_FEATURES_DEFAULT;
		return 0;
	}
	if (str_features[digits] || digits > 19)
		return names_to_features(str_features, bits);
	v = strtoull(str_features, NULL, 10);
	if (v & ~known_features())
		return -EINVAL;
	*bits = v;
	return 0;
}

/*
 * What an image has until it is switched off, which nothing depends on. But for layering these say
 * that differences are known without a look at each object, which QEMU and libvirt ask before they
 * use them.
 */
#define FEATURES_ALL (RBD_FEATURE_LAYERING | FEATURES_SWITCHED)
#define FEATURES_SWITCHED \
	(RBD_FEATURE_EXCLUSIVE_LOCK | RBD_FEATURE_OBJECT_MAP | RBD_FEATURE_FAST_DIFF)

int rbd_get_features(rbd_image_t image, uint64_t *features)
{
	struct answer a;
	int e = image_call(image, T_FEATURES, NULL, NULL, true, &a);

	if (e == -EOPNOTSUPP) { /* a daemon of an older release */
		*features = FEATURES_ALL;
		return 0;
	}
	if (e < 0)
		return e;
	*features = get_u64(&a.fields);
	e = a.fields.bad ? -EPROTO : 0;
	answer_free(&a);
	return e;
}

/*
 * As librbd: what is there already, or is not, is refused, and so is what cannot be switched at
 * all, or would be without what it needs.
 */
int rbd_update_features(rbd_image_t image, uint64_t bits, uint8_t enabled)
{
	struct image *h = image;
	uint8_t buf[12];
	struct writer w = {.p = buf, .cap = sizeof buf};
	struct answer a;
	int e;

	if (h->forked)
		return -EIO;
	if (h->read_only)
		return -EROFS;
	if (bits == 0 || bits & ~(uint64_t)RBD_FEATURES_MUTABLE)
		return -EINVAL;
	if (bits & ~(uint64_t)FEATURES_SWITCHED) /* journaling, which is never on */
		return enabled ? -EOPNOTSUPP : -EINVAL;
	put_u64(&w, bits);
	put_u32(&w, enabled != 0);
	e = image_call(h, T_SWITCH_FEATURES, &w, NULL, false, &a);
	if (e == 0)
		answer_free(&a);
	return e;
}

/* There are no options of images and pools: the lists are empty. */
int rbd_config_image_list(rbd_image_t image, rbd_config_option_t *options, int *max_options)
{
	struct image *h = image;

	(void)options;
	*max_options = 0;
	return h->forked ? -EIO : 0;
}

int rbd_config_pool_list(rados_ioctx_t io, rbd_config_option_t *options, int *max_options)
{
	char url[NAME_MOST + 1];

	(void)options;
	*max_options = 0;
	return store_url(io, url, sizeof url);
}

void rbd_config_image_list_cleanup(rbd_config_option_t *options, int max_options)
{
	for (int i = 0; i < max_options; i++) {
		free(options[i].name);
		free(options[i].value);
		options[i].name = options[i].value = NULL;
	}
}

void rbd_config_pool_list_cleanup(rbd_config_option_t *options, int max_options)
{
	rbd_config_image_list_cleanup(options, max_options);
}

/* The daemon makes what a store needs with its first image. */
int rbd_pool_init(rados_ioctx_t io, bool force)
{
	char url[NAME_MOST + 1];

	(void)force;
	return store_url(io, url, sizeof url);
}

/* An image has no limit of its own: what takes it away changes nothing. */
int rbd_snap_set_limit(rbd_image_t image, uint64_t limit)
{
	struct image *h = image;

	if (h->forked)
		return -EIO;
	if (h->read_only)
		return -EROFS;
	return limit == UINT64_MAX ? 0 : -EOPNOTSUPP;
}
