/*
 * What the parts of the library share: the language of docs/format-librbd.md, the ring,
 * requests, and the handle.
 *
 * Threads: any thread calls in; each handle has one thread of its own ("lsd-rbd"), which
 * alone takes completions, calls back, replaces the ring and ends the handle. What a field
 * is guarded by stands beside it.
 */
#ifndef LSD_LIBRBD_INTERNAL_H
#define LSD_LIBRBD_INTERNAL_H

#include <pthread.h>
#include <rbd/librbd.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the ring and the frames are little-endian"
#endif

#define SECTOR 512u
#define UNIT 4096u /* of the data area */
#define MIB (1u << 20)
#define GIB (1u << 30)
#define NAME_MOST 4096u   /* bytes of a name in a frame */
#define FRAME_MOST MIB    /* bytes of a frame's payload */
#define REQUEST_MOST 16640u /* bytes of a payload of ours: four names and a few numbers */
#define ENTRIES_LEAST 8u
#define ENTRIES_MOST 1024u
#define DATA_LEAST (2u * MIB)
#define DATA_MOST (64u * MIB)
#define UNITS_MOST (DATA_MOST / UNIT)
#define ERRNO_MOST 4095
#define RING_VERSION 2u /* the highest of ours; from 1 on */
#define COMPARE_MOST (MIB - UNIT) /* bytes of the whole sectors of a compare and write */

/* ---- frames: wire.c ---- */

enum {
	T_HELLO = 1,
	T_OPEN = 2,
	T_CLOSE = 3,
	T_CREATE = 4,
	T_REMOVE = 5,
	T_LIST = 6,
	T_RENAME = 7,
	T_CLONE = 8,
	T_TRASH_MOVE = 10,
	T_TRASH_LIST = 11,
	T_TRASH_REMOVE = 12,
	T_TRASH_RESTORE = 13,
	T_TRASH_PURGE = 14,
	T_STAT = 16,
	T_RESIZE = 17,
	T_SNAP_CREATE = 18,
	T_SNAP_REMOVE = 19,
	T_SNAP_LIST = 20,
	T_ROLLBACK = 21,
	T_SNAP_RENAME = 22,
	T_PARENT = 23,
	T_CHILDREN = 24,
	T_FLATTEN = 25,
	T_DIFF = 26,
	T_COPY = 27,
	T_META_LIST = 28,
	T_META_GET = 29,
	T_META_SET = 30,
	T_META_REMOVE = 31,
	T_LOCKS = 32,
	T_LOCK = 33,
	T_UNLOCK = 34,
	T_BREAK_LOCK = 35,
	T_TIMES = 36,
	T_WATCHERS = 37,
	T_FEATURES = 40,
	T_SWITCH_FEATURES = 41,
	T_PROGRESS = 0x4000,
	T_RESULT = 0x8000,
};

#define FRAME_HEADER 24u

struct frame {
	uint16_t type;
	uint32_t len; /* of the payload */
	uint32_t crc;
	uint64_t number;
};

uint32_t crc32c(uint32_t crc, const void *p, size_t n);
void frame_encode(uint8_t header[FRAME_HEADER], uint16_t type, uint64_t number,
		  const void *payload, uint32_t len);
/* 0, or -EPROTO where it is no header of ours; frame_check then checks the payload. */
int frame_decode(const uint8_t header[FRAME_HEADER], struct frame *f);
bool frame_check(const uint8_t header[FRAME_HEADER], const void *payload, uint32_t len);

/* Writes fields; what does not fit sets bad, and nothing is written from then on. */
struct writer {
	uint8_t *p;
	size_t n, cap;
	bool bad;
};
void put_u32(struct writer *w, uint32_t v);
void put_u64(struct writer *w, uint64_t v);
void put_id(struct writer *w, const uint8_t id[16]);
void put_bytes(struct writer *w, const void *p, size_t n);
void put_text(struct writer *w, const char *s); /* of any length */
void put_name(struct writer *w, const char *s); /* NULL is empty; too long sets bad */

/* Reads fields; what is not there sets bad, and reads as zero. */
struct reader {
	const uint8_t *p;
	size_t n;
	bool bad;
};
uint32_t get_u32(struct reader *r);
uint64_t get_u64(struct reader *r);
void get_id(struct reader *r, uint8_t id[16]);
const uint8_t *get_bytes(struct reader *r, uint32_t *n);
char *get_string(struct reader *r); /* malloc'ed; NULL sets bad too; no zero bytes inside */

#define ID_TEXT 37 /* a UUID's usual form and its zero */
void id_format(const uint8_t id[16], char text[ID_TEXT]);

/* ---- connections: client.c ---- */

struct conn {
	int fd; /* -1: none */
	uint64_t number; /* of the last request */
	uint32_t version; /* of the ring, as hello has agreed on */
	uint32_t entries; /* what hello's answer allows */
	uint64_t data;
};

struct progress {
	librbd_progress_fn_t fn;
	void *arg;
	bool ends; /* a negative result of fn ends the call, and the connection */
};

/* An answer: fields is behind the errno and the message; free payload. */
struct answer {
	uint8_t *payload;
	struct reader fields;
	int fds[3];
	int nfds;
};

/*
 * Connects and says hello. 0 or a negative errno; deadline in CLOCK_MONOTONIC ms, 0: none.
 * quiet: say nothing on standard error when nobody listens.
 */
int conn_open(struct conn *c, int64_t deadline, bool quiet);
void conn_close(struct conn *c);
/*
 * One request and its result: 0 or a negative errno, of the daemon's; *broken says that the
 * errno is of the connection, which is then of no use any more.
 */
int conn_call(struct conn *c, uint16_t type, const struct writer *w, const struct progress *pr,
	      int64_t deadline, struct answer *a, bool *broken);
void answer_free(struct answer *a); /* and closes descriptors that are still there */
/* A connection for one request: what create, remove, list and rename need. */
int call_once(uint16_t type, const struct writer *w, const struct progress *pr,
	      struct answer *a);
int64_t now_ms(void); /* CLOCK_MONOTONIC */
/* Whether a variable of the environment is set, to anything but 0. */
bool switched_on(const char *name);
bool debugging(void);
/* The store of the caller's ioctx as a URL: 0 or a negative errno. store.c */
int store_url(rados_ioctx_t io, char *url, size_t n);
int64_t store_pool_id(rados_ioctx_t io); /* -EOPNOTSUPP where there is none */

/* The names of its pool and namespace, malloc'ed, empty where there are none: 0 or -ENOMEM. */
int store_pool_names(rados_ioctx_t io, char **pool, char **space);

/* ---- requests on a store, and what is asked for of new images: admin.c ---- */

struct on_store {
	uint8_t buf[REQUEST_MOST];
	struct writer w;
};
/* Begins a request on the ioctx's store. */
int on_store(struct on_store *s, rados_ioctx_t io);
int check_layout(uint64_t features, uint64_t stripe_count);
int check_options(rbd_image_options_t opts);
uint64_t option(rbd_image_options_t opts, int name, uint64_t otherwise);

/*
 * A list of n elements of size bytes each, which has room for *room, with room for one more behind
 * them: where it is now, or NULL, and then at is what it was.
 */
void *list_room(void *at, size_t n, size_t *room, size_t size);

/* ---- the ring: ring.c ---- */

enum {
	OP_READ = 1,
	OP_WRITE = 2,
	OP_FLUSH = 3,
	OP_DISCARD = 4,
	OP_ZEROES = 5,
	OP_TOO_LATE = 6,
	OP_COMPARE = 7, /* compare and write */
};
#define SQE_FUA 1u
#define SQE_DECIDED 2u
#define CQE_TIME 1u

struct sqe {
	uint8_t op, flags;
	uint16_t zero;
	uint32_t tag;
	uint64_t off, len, data;
	uint64_t zeroes[4];
};

struct cqe {
	uint32_t tag, flags;
	int64_t result;
	uint64_t time;
	uint64_t mismatch; /* of a compare and write: from the range's first byte on */
};

_Static_assert(sizeof(struct sqe) == 64, "an entry of the submission queue");
_Static_assert(sizeof(struct cqe) == 32, "an entry of the completion queue");

/* A mapped ring; tail and head are our own counts, what is in the memory is for the daemon. */
struct ring {
	uint8_t *base;
	size_t size;
	uint32_t version;
	uint32_t entries;
	uint32_t units; /* of the data area */
	uint8_t *data;
	struct sqe *sq;
	const struct cqe *cq;
	uint32_t tail; /* next entry of the submission queue */
	uint32_t told; /* the tail that the daemon knows */
	uint32_t head; /* next entry of the completion queue */
	uint64_t seen; /* changes of the image that the handle's thread knows of */
	int memory, daemon, client; /* descriptors; memory is closed once mapped */
};

/* Takes the three descriptors in any case. 0, -EPROTO or another negative errno. */
int ring_map(struct ring *r, const int fds[3], uint32_t version, uint32_t entries,
	     uint64_t data);
void ring_unmap(struct ring *r);
uint64_t ring_image_size(const struct ring *r);
uint64_t ring_changes(const struct ring *r); /* of the image, a count; 0 in version 1 */
/* A tag's bit: what it says when the daemon has died is in docs/format-librbd.md, "Death". */
bool ring_decided(const struct ring *r, uint32_t tag);
void ring_undecide(struct ring *r, uint32_t tag);
void ring_push(struct ring *r, const struct sqe *e);
void ring_tell(struct ring *r); /* makes pushed entries known, wakes the daemon */
/* How many completions are there: at most entries, or -EPROTO. */
int ring_ready(const struct ring *r);
struct cqe ring_pull(struct ring *r);
void ring_pulled(struct ring *r);
/* Says that the client sleeps; true: there is nothing to take, so it may wait. */
bool ring_sleep(struct ring *r);
void ring_awake(struct ring *r);

/* The data area's units: a bitmap, first fit from the lowest. */
struct space {
	uint32_t units;
	uint32_t low; /* below it nothing is free */
	uint64_t used[UNITS_MOST / 64];
};
void space_init(struct space *s, uint32_t units);
int64_t space_take(struct space *s, uint32_t n); /* the first unit, or -1 */
void space_give(struct space *s, uint32_t first, uint32_t n);

/* ---- requests: io.c ---- */

/* What of [pos, end) goes into one entry of the ring. */
struct cut {
	uint8_t op;
	uint32_t len;
};
bool cut_next(uint8_t op, uint64_t pos, uint64_t end, struct cut *out);
uint32_t cut_count(uint8_t op, uint64_t pos, uint64_t end);
/* librbd's clipping: 0 and a shorter len, or -EINVAL. */
int clip(uint64_t size, uint64_t off, uint64_t *len);

struct cursor {
	int index;
	size_t off;
};
/* Copies n bytes between buf and the vector from at on, and moves at. */
void vector_out(const struct iovec *v, int count, struct cursor *at, void *buf, size_t n);
void vector_in(const struct iovec *v, int count, struct cursor *at, const void *buf, size_t n);
void pattern_out(const char *pattern, size_t period, uint64_t at, void *buf, size_t n);

struct request {
	struct request *next;  /* in one of the handle's lists; lock */
	uint64_t off, len;     /* what is cut: set before it is submitted */
	uint64_t pos;          /* what is before it has been cut; lock */
	uint64_t before;       /* a flush that waits: for writes numbered below; lock */
	struct cursor at;      /* pos in iov; lock */
	const struct iovec *iov; /* the caller's, or one */
	struct iovec one;
	const char *pattern;   /* instead of iov: what is written again and again */
	size_t period;
	int iovcnt;
	int cmpcnt;
	const struct iovec *cmp; /* what a compare and write compares: the caller's, or cmp_one */
	struct iovec cmp_one;
	uint64_t *mismatch;    /* where a compare and write says what differs, NULL: nowhere */
	uint32_t left;         /* pieces that have not ended; the handle's thread, once submitted */
	int error;             /* of the first that failed; the handle's thread */
	ssize_t value;         /* what the caller gets if none fails */
	uint8_t op, flags;
};

enum { PENDING, CALLING, COMPLETE };

struct completion {
	_Atomic int refs;       /* the caller's and the request's */
	_Atomic uint32_t state; /* a futex */
	_Atomic int waiters;
	_Atomic bool used;      /* a completion is for one request */
	bool sync;              /* on the stack of one who waits */
	bool released;          /* by the caller; event_lock */
	unsigned generation;    /* fork_generation at the submission */
	ssize_t value;          /* before state is COMPLETE */
	rbd_callback_t fn;
	void *arg;
	struct image *events;   /* whose poll_io_events is to give it; event_lock */
	bool queued;            /* in events' list; event_lock */
	struct completion *prev, *next; /* event_lock */
	struct request req;
};

extern unsigned fork_generation; /* number of forks between the first process and this one */

void completion_init(struct completion *c, rbd_callback_t fn, void *arg);
/* Claims it for a request: 0 or -EINVAL. */
int completion_use(struct completion *c);
void completion_end(struct completion *c, ssize_t value); /* in a thread of ours */
ssize_t completion_wait(struct completion *c);
void events_tell(struct image *h); /* tells the program of its events; in the handle's thread */
void events_drop(struct image *h); /* forgets what poll_io_events has not been asked for */
void events_after_fork(void);

/* ---- handles: image.c, thread.c ---- */

/* A part of a request that has a tag. */
struct piece {
	struct request *req;
	uint64_t seq;  /* order of submission */
	uint64_t off;
	uint32_t len;
	uint32_t unit; /* its place in the data area */
	uint32_t units;
	struct cursor at;
	uint8_t op;
	uint8_t state; /* FREE, SENT, TAKEN */
	/* when the daemon has ended: */
	bool decided;  /* a compare and write may have taken effect */
	bool effected; /* it has: the daemon said so, too late for the user */
};
enum { FREE, SENT, TAKEN };

struct list {
	struct request *first, *last;
};
void list_add(struct list *l, struct request *r);
struct request *list_take(struct list *l);

/* LIVE: the daemon answers. LOST: it is waited for. DEAD: no more. */
enum { LIVE, LOST, DEAD };

/* Another snapshot for an open handle; on the stack of the one who waits. */
struct change {
	const char *snapshot; /* NULL: the image itself */
	uint64_t number;
	int result;
	bool done;
};

struct image {
	struct image *prev, *next; /* all handles; the list's lock */
	bool forked;     /* of another process: set in the child of a fork, no thread runs */

	pthread_mutex_t lock;
	pthread_cond_t changed; /* state, life, change, call */

	int state;           /* lock */
	int dead;            /* errno of all that comes, negative; lock */
	unsigned life;       /* counts connections; lock */
	unsigned asking;     /* control calls that wait for the daemon; lock */
	struct call *call;   /* the control call that is under way, NULL: none; lock */
	struct ring ring;    /* lock; replaced by the thread; the last one while LOST */
	struct piece pieces[ENTRIES_MOST]; /* by tag; lock, and what is TAKEN the thread's */
	uint32_t tags[ENTRIES_MOST]; /* those that are free; lock */
	uint32_t ntags;      /* lock */
	struct space space;  /* lock */
	uint64_t seq;        /* of the next piece; lock */
	uint32_t writes;     /* pieces that change the image and have not ended; lock */
	struct list queue;   /* not or not wholly cut; lock */
	struct list flushes; /* wait for writes; lock */
	struct list failed;  /* end without the daemon, with their error or value; lock */
	struct piece again[ENTRIES_MOST]; /* were under way when the daemon died, in order; lock */
	uint32_t nagain, again_pos;
	struct change *change; /* lock */
	struct watch *watches; /* by number; lock */
	uint64_t last_watch;   /* number of the last one; lock */
	uint64_t watch_called; /* number of the one that is called now, 0: none; lock */
	bool watch_due;        /* there is another ring: who knows what has changed; lock */
	bool closing;        /* lock */
	struct completion *closed; /* of aio_close; lock */

	struct conn conn;    /* lock; its descriptor is call's while there is one */

	pthread_t thread;
	int wake;            /* eventfd: something for the thread in the lists above */
	_Atomic int event_fd; /* of set_image_notification, -1: none */
	int event_type;      /* event_lock */
	uint64_t events_due; /* of which the program has not been told; the thread's */
	struct completion *event_first, *event_last; /* event_lock */

	/* set at open, then constant but for the thread at a change of the snapshot (lock) */
	char *store;
	char *name; /* lock: rename is another handle's business, open's answer renews it */
	uint64_t snapshot_number; /* 0: the image itself; a name may become another */
	uint64_t number; /* of the handle, as the daemon has it; the thread's */
	bool read_only; /* as the caller has opened it */
	bool shared;    /* LSD_SHARED, as it was then */
	bool fixed;     /* read-only or a snapshot: no writes */
	uint8_t id[16];
	char id_text[ID_TEXT];
	uint64_t size; /* while there is no ring; lock */
	uint64_t object;
	int64_t pool;
	char *pool_name, *pool_space;
};

/*
 * A control call, on the stack of its caller: one at a time asks on the handle's connection. The
 * handle's thread never waits for it, for its progress callback may wait for that thread.
 */
struct call {
	struct conn conn;
	unsigned life;     /* of the handle, when it began */
	pthread_t thread;
	bool calls_back;   /* it has a progress callback */
	bool left;         /* the handle's thread has let go of the connection; lock */
};

/* What open needs beside the image. */
struct target {
	const char *store, *image, *snapshot;
	uint64_t number;
	bool by_id, read_only;
	bool shared;          /* to write, also beside a block device that is shared */
	const uint8_t *again; /* the id: flag 4 */
	uint64_t instead;     /* with it, the number of the handle that the client had, 0: none */
};

/* What open's answer says. */
struct opened {
	struct conn conn;
	struct ring ring;
	uint8_t id[16];
	char *name;
	uint64_t size, object;
	uint64_t number; /* of the snapshot, 0: the image itself */
	uint64_t handle; /* the daemon's number of it, 0: it is of an older release */
	bool read_only;
	bool answered;   /* by the daemon, also if it has refused */
};
int image_connect(const struct target *t, int64_t deadline, bool quiet, struct opened *o);
int64_t reconnect_ms(void); /* for how long a daemon that has died is waited for; 0: for ever */
void opened_free(struct opened *o);
/* Says goodbye to the daemon, which answers when the handle has ended there. */
int goodbye(struct conn *c);
/* Makes o the handle's; lock is held. */
void image_adopt(struct image *h, struct opened *o);

void *image_run(void *h); /* what a handle's thread does */
int thread_start(pthread_t *thread, void *(*run)(void *), void *arg); /* 0 or a negative errno */
bool image_own_thread(struct image *h);
void image_wake(struct image *h);
/* Whether watches are to be called; lock is held, and the handle LIVE. watch.c */
bool watches_due(struct image *h);
void watches_call(struct image *h); /* in the handle's thread */
void watches_free(struct image *h);
/* A control call: 0 or a negative errno. query: it may be asked twice. */
int image_call(struct image *h, uint16_t type, const struct writer *w, const struct progress *pr,
	       bool query, struct answer *a);
uint64_t image_size(struct image *h);
/* The number of a snapshot by its name, asked on a handle's connection. snap.c */
int snap_number(struct conn *c, int64_t deadline, const char *name, uint64_t *number);
int image_change(struct image *h, const char *snapshot, uint64_t number);
void handles_add(struct image *h);
void handles_remove(struct image *h);
void image_free(struct image *h);

/* Hands c's request to the handle; its fields are set, c has been claimed. */
void image_submit(struct image *h, struct completion *c);
void image_pump(struct image *h); /* lock is held */
void image_pump_flushes(struct image *h);

static inline struct completion *completion_of(struct request *r)
{
	return (struct completion *)((char *)r - offsetof(struct completion, req));
}

#endif
