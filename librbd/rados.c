/*
 * The few calls of librados that clients make before rbd_open, for LD_PRELOAD and stores that
 * are not Ceph: a cluster is nothing, and an ioctx is the name of a pool and a namespace.
 */
#include <errno.h>
/* librados.h says nothing of visibility. */
#pragma GCC visibility push(default)
#include <rados/librados.h>
#pragma GCC visibility pop
#include <stdlib.h>
#include <string.h>

#define POOL_ID 1 /* of each: there is no cluster that would count them */

struct cluster {
	char *id;
};

struct ioctx {
	struct cluster *cluster;
	char *pool;
	char *space;
};

void rados_version(int *major, int *minor, int *extra)
{
	if (major)
		*major = LIBRADOS_VER_MAJOR;
	if (minor)
		*minor = LIBRADOS_VER_MINOR;
	if (extra)
		*extra = LIBRADOS_VER_EXTRA;
}

int rados_create(rados_t *cluster, const char *const id)
{
	struct cluster *c = malloc(sizeof *c);

	if (!c)
		return -ENOMEM;
	c->id = strdup(id ? id : "admin");
	if (!c->id) {
		free(c);
		return -ENOMEM;
	}
	*cluster = c;
	return 0;
}

int rados_create2(rados_t *pcluster, const char *const clustername, const char *const name,
		  uint64_t flags)
{
	(void)clustername, (void)flags;
	/* The name is "client.admin" where rados_create has "admin". */
	return rados_create(pcluster, name && strncmp(name, "client.", 7) == 0 ? name + 7 : name);
}

int rados_connect(rados_t cluster)
{
	(void)cluster;
	return 0;
}

void rados_shutdown(rados_t cluster)
{
	struct cluster *c = cluster;

	if (c)
		free(c->id);
	free(c);
}

int rados_conf_read_file(rados_t cluster, const char *path)
{
	(void)cluster, (void)path;
	return 0;
}

int rados_conf_parse_argv(rados_t cluster, int argc, const char **argv)
{
	(void)cluster, (void)argc, (void)argv;
	return 0;
}

int rados_conf_parse_argv_remainder(rados_t cluster, int argc, const char **argv,
				    const char **remargv)
{
	(void)cluster;
	for (int i = 0; i < argc; i++)
		remargv[i] = argv[i];
	return 0;
}

int rados_conf_parse_env(rados_t cluster, const char *var)
{
	(void)cluster, (void)var;
	return 0;
}

int rados_conf_set(rados_t cluster, const char *option, const char *value)
{
	(void)cluster;
	return option && value ? 0 : -EINVAL;
}

int rados_conf_get(rados_t cluster, const char *option, char *buf, size_t len)
{
	(void)cluster, (void)option, (void)buf, (void)len;
	return -ENOENT;
}

int64_t rados_pool_lookup(rados_t cluster, const char *pool_name)
{
	(void)cluster;
	return pool_name ? POOL_ID : -EINVAL;
}

int rados_ioctx_create(rados_t cluster, const char *pool_name, rados_ioctx_t *ioctx)
{
	struct ioctx *io = calloc(1, sizeof *io);

	if (!io)
		return -ENOMEM;
	io->cluster = cluster;
	io->pool = strdup(pool_name ? pool_name : "");
	io->space = strdup("");
	if (!io->pool || !io->space) {
		rados_ioctx_destroy(io);
		return -ENOMEM;
	}
	*ioctx = io;
	return 0;
}

/* A pool's number says nothing here: only a fixed store can be meant. */
int rados_ioctx_create2(rados_t cluster, int64_t pool_id, rados_ioctx_t *ioctx)
{
	(void)pool_id;
	return rados_ioctx_create(cluster, "", ioctx);
}

void rados_ioctx_destroy(rados_ioctx_t ioctx)
{
	struct ioctx *io = ioctx;

	if (!io)
		return;
	free(io->pool);
	free(io->space);
	free(io);
}

rados_t rados_ioctx_get_cluster(rados_ioctx_t ioctx)
{
	struct ioctx *io = ioctx;

	return io->cluster;
}

void rados_ioctx_set_namespace(rados_ioctx_t ioctx, const char *nspace)
{
	struct ioctx *io = ioctx;
	char *space = strdup(nspace ? nspace : "");

	if (!space)
		abort(); /* there is no error to return, and another namespace would be wrong */
	free(io->space);
	io->space = space;
}

static int text(const char *s, char *buf, unsigned maxlen)
{
	size_t n = strlen(s);

	if (n >= maxlen)
		return -ERANGE;
	memcpy(buf, s, n + 1);
	return (int)n;
}

int rados_ioctx_get_namespace(rados_ioctx_t ioctx, char *buf, unsigned maxlen)
{
	struct ioctx *io = ioctx;

	return text(io->space, buf, maxlen);
}

int rados_ioctx_get_pool_name(rados_ioctx_t ioctx, char *buf, unsigned maxlen)
{
	struct ioctx *io = ioctx;

	return text(io->pool, buf, maxlen);
}

int64_t rados_ioctx_get_id(rados_ioctx_t ioctx)
{
	(void)ioctx;
	return POOL_ID;
}

void rados_buffer_free(char *buf)
{
	free(buf);
}
