/* Where the caller's images are: its environment says, or else its ioctx. */
#include "internal.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

/*
 * The ioctx is of the librados that the caller has loaded; this library has none. The
 * default scope is that of whoever loaded this library, so librados is found where it was
 * loaded beside it; dlopen finds it where it was loaded elsewhere.
 */
static void *rados(const char *name)
{
	void *f = dlsym(RTLD_DEFAULT, name);

	if (!f) {
		void *lib = dlopen("librados.so.2", RTLD_NOW | RTLD_NOLOAD);

		if (lib) {
			f = dlsym(lib, name);
			dlclose(lib); /* whoever loaded it holds it */
		}
	}
	return f;
}

/* A text of the ioctx: 0 or a negative errno. The two calls have one shape. */
static int ask(rados_ioctx_t io, const char *function, char *buf, size_t n)
{
	int (*f)(rados_ioctx_t, char *, unsigned);
	void *p = rados(function);
	int e;

	if (!p)
		return -EOPNOTSUPP;
	memcpy(&f, &p, sizeof f);
	e = f(io, buf, (unsigned)n - 1);
	if (e < 0)
		return e;
	if ((size_t)e >= n)
		return -ERANGE;
	buf[e] = 0;
	return strlen(buf) == (size_t)e ? 0 : -EINVAL;
}

/* The store's URL has no escapes: what would change its meaning is refused. */
static bool plain(const char *s)
{
	for (; *s; s++)
		if ((unsigned char)*s <= ' ' || *s == 0x7f || strchr("/?#%", *s))
			return false;
	return true;
}

int store_url(rados_ioctx_t io, char *url, size_t n)
{
	const char *fixed = secure_getenv("LSD_STORE");
	char pool[1024], space[1024];
	int e;

	if (fixed && *fixed)
		return (size_t)snprintf(url, n, "%s", fixed) < n ? 0 : -ENAMETOOLONG;
	if (!io)
		return -EINVAL;
	e = ask(io, "rados_ioctx_get_pool_name", pool, sizeof pool);
	if (e < 0)
		return e;
	e = ask(io, "rados_ioctx_get_namespace", space, sizeof space);
	if (e < 0)
		return e;
	if (!*pool || !plain(pool) || !plain(space))
		return -EINVAL;
	e = snprintf(url, n, "rados://%s%s%s", pool, *space ? "/" : "", space);
	return (size_t)e < n ? 0 : -ENAMETOOLONG;
}

int64_t store_pool_id(rados_ioctx_t io)
{
	int64_t (*f)(rados_ioctx_t);
	void *p = io ? rados("rados_ioctx_get_id") : NULL;

	if (!p)
		return -EOPNOTSUPP;
	memcpy(&f, &p, sizeof f);
	return f(io);
}

int store_pool_names(rados_ioctx_t io, char **pool, char **space)
{
	char name[1024];

	*pool = strdup(io && ask(io, "rados_ioctx_get_pool_name", name, sizeof name) == 0 ? name : "");
	*space = strdup(io && ask(io, "rados_ioctx_get_namespace", name, sizeof name) == 0 ? name : "");
	return *pool && *space ? 0 : -ENOMEM;
}
