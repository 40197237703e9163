// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * Capture in connect(). The kernel runs these programs inside connect() and
 * getpeername() of every process below one cgroup, and inside getsockopt() of the
 * proxies. A destination that an entry is about becomes the address of its proxy; the
 * proxy is told where the connection wanted to go when it asks for SO_ORIGINAL_DST, as
 * after a REDIRECT of netfilter. No packet is touched.
 *
 *	entries, prefixes, services	what to do (user space writes)
 *	wanted, origins, told		what was done (these programs write)
 *
 *	connect4/6	wanted[socket] = destination; go to the proxy
 *	sock_ops	the socket has a port now: origins[tuple] = wanted[socket]
 *	accepted	the proxy has a socket, too: told[socket] = origins[tuple]
 *	original_dst	SO_ORIGINAL_DST of that = told[socket]
 *	getpeername4/6	the process is told where it wanted to go: origins[tuple]
 */
#include <stdbool.h>
#include <stddef.h>

#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define SOL_IP 0
#define SOL_IPV6 41
#define SO_ORIGINAL_DST 80 /* and IP6T_SO_ORIGINAL_DST */
#define ECONNREFUSED 111
#define MAPPED bpf_htonl(0xffff) /* third word of ::ffff:0:0/96, RFC 4291 2.5.5.2 */

#define MAX_ENTRIES 64
#define MAX_PORTS 32
#define NAME_LENGTH 64

#define ENTRY_USER 1   /* only of one user */
#define ENTRY_GROUP 2  /* only of one group */
#define ENTRY_OWN 4    /* the proxy is the agent's: its listener has proxy_mark */
#define ENTRY_DIRECT 8 /* without a proxy it goes where it wanted to go */
#define ENTRY_IPV4 16  /* the proxy listens at proxy4 */
#define ENTRY_IPV6 32

/* An IPv4 address is ::ffff:a.b.c.d here; ports are in network order. */
struct endpoint {
	__be32 addr[4];
	__be16 port;
	__u16 reserved;
};

struct ports {
	__u16 first; /* in host order, both included */
	__u16 last;
};

struct entry {
	char name[NAME_LENGTH]; /* ends with 0 */
	__u32 traits;           /* ENTRY_ bits */
	__u32 user;
	__u32 group;
	__u32 ports_count; /* 0: all */
	struct ports ports[MAX_PORTS];
	struct endpoint proxy4;
	struct endpoint proxy6;
};

#define PREFIX_EXCEPT 1
#define PREFIX_DESTINATION 2

struct prefix {
	__u32 length; /* of what follows, in bits; the head has 64 */
	__u32 entry;
	__u8 family;
	__u8 kind;
	__u16 reserved;
	__be32 addr[4]; /* of IPv4 the first word */
};

struct tuple {
	struct endpoint own;   /* of the process that connects */
	struct endpoint proxy; /* where it was led to */
	__u64 netns;
};

_Static_assert(sizeof(struct endpoint) == 20 && sizeof(struct tuple) == 48, "no padding in a key");
_Static_assert(sizeof(struct prefix) == 28 && sizeof(struct entry) == 248, "shared with Go");

/* By place, in the order of the file; written once, before the programs run. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct entry);
	__uint(max_entries, MAX_ENTRIES);
} entries SEC(".maps");

/* Which destinations entries are about; written once. What excepts wins. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct prefix);
	__type(value, __u8);
	__uint(max_entries, 1); /* set by user space */
	__uint(map_flags, BPF_F_NO_PREALLOC);
} prefixes SEC(".maps");

/* VIPs and backends of services, of TCP: user space follows them. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct endpoint);
	__type(value, __u8);
	__uint(max_entries, 1); /* set by user space */
	__uint(map_flags, BPF_F_NO_PREALLOC);
} services SEC(".maps");

struct intention {
	struct endpoint to;
	struct endpoint proxy; /* where it was led to instead */
};

/* Where a socket that is being led away wanted to go, until its SYN leaves. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__type(key, int);
	__type(value, struct intention);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wanted SEC(".maps");

/* The same of a socket of the proxy, which outlives that of the process. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__type(key, int);
	__type(value, struct endpoint);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} told SEC(".maps");

/*
 * The same by tuple, from one to the other. It is forgotten when the socket of the
 * process ends: who gets the port next would be taken for the one before.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct tuple);
	__type(value, struct endpoint);
	__uint(max_entries, 65536);
} origins SEC(".maps");

const volatile __u32 entries_count;
const volatile __u32 proxy_mark; /* of what proxies send, and of their listeners */
const volatile __u32 probe_mark;
const volatile __u64 host_netns; /* the only namespace in which the proxies are */

static __always_inline bool is_mapped(const __be32 *addr)
{
	return addr[0] == 0 && addr[1] == 0 && addr[2] == MAPPED;
}

/*
 * The loopback, what names no host, and addresses of a link: the proxy is not told
 * which link was meant.
 */
static __always_inline bool is_never_captured(const struct endpoint *to)
{
	if (is_mapped(to->addr))
		return to->addr[3] == 0 ||
		       (to->addr[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	if ((to->addr[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000))
		return true;
	return !to->addr[0] && !to->addr[1] && !to->addr[2] && (to->addr[3] & ~bpf_htonl(1)) == 0;
}

static __always_inline bool has_prefix(__u32 entry, __u8 kind, const struct endpoint *to)
{
	struct prefix key = {
		.entry = entry,
		.kind = kind,
	};

	if (is_mapped(to->addr)) {
		key.length = 64 + 32;
		key.family = AF_INET;
		key.addr[0] = to->addr[3];
	} else {
		key.length = 64 + 128;
		key.family = AF_INET6;
		__builtin_memcpy(key.addr, to->addr, sizeof(key.addr));
	}
	return bpf_map_lookup_elem(&prefixes, &key);
}

static __always_inline bool has_port(const struct entry *e, __u16 port)
{
	__u32 i;

	if (!e->ports_count)
		return true;
	for (i = 0; i < MAX_PORTS && i < e->ports_count; i++)
		if (port >= e->ports[i].first && port <= e->ports[i].last)
			return true;
	return false;
}

/* Whether an entry, which stands at a place, is about a connection of this process. */
static __always_inline bool is_about(const struct entry *e, __u32 place, const struct endpoint *to)
{
	__u64 who = bpf_get_current_uid_gid();

	if ((e->traits & ENTRY_USER) && (__u32)who != e->user)
		return false;
	if ((e->traits & ENTRY_GROUP) && who >> 32 != e->group)
		return false;
	return has_port(e, bpf_ntohs(to->port)) && !has_prefix(place, PREFIX_EXCEPT, to) &&
	       has_prefix(place, PREFIX_DESTINATION, to);
}

/*
 * Whether the proxy listens. Of the agent's own it is looked at who does: with the
 * agent dead any process might take its port, and with it what others send.
 */
static __always_inline bool listens(struct bpf_sock_addr *ctx, const struct entry *e,
				    const struct endpoint *proxy)
{
	struct bpf_sock_tuple t = {};
	struct bpf_sock *sk;
	bool ok;

	if (is_mapped(proxy->addr)) {
		t.ipv4.daddr = proxy->addr[3];
		t.ipv4.dport = proxy->port;
		sk = bpf_sk_lookup_tcp(ctx, &t, sizeof(t.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		__builtin_memcpy(t.ipv6.daddr, proxy->addr, sizeof(t.ipv6.daddr));
		t.ipv6.dport = proxy->port;
		sk = bpf_sk_lookup_tcp(ctx, &t, sizeof(t.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return false;
	ok = sk->state == BPF_TCP_LISTEN && (!(e->traits & ENTRY_OWN) || sk->mark == proxy_mark);
	bpf_sk_release(sk);
	return ok;
}

static __always_inline int refuse(void)
{
	bpf_set_retval(-ECONNREFUSED);
	return 0;
}

/* What connect() is to do with a destination: go there, go to `to`, or fail. */
enum verdict {
	PASS,
	LEAD,
	REFUSE,
};

static __always_inline enum verdict lead(struct bpf_sock_addr *ctx, const struct entry *e,
					 struct endpoint *to)
{
	bool ipv4 = is_mapped(to->addr);
	struct endpoint proxy = ipv4 ? e->proxy4 : e->proxy6;
	struct intention *w;

	/* Of a family in which the proxy has no address it is refused: to let it go would
	 * be a way around the proxy. */
	if (!(e->traits & (ipv4 ? ENTRY_IPV4 : ENTRY_IPV6)))
		return REFUSE;
	if ((e->traits & (ENTRY_OWN | ENTRY_DIRECT)) && !listens(ctx, e, &proxy))
		return e->traits & ENTRY_DIRECT ? PASS : REFUSE;
	w = bpf_sk_storage_get(&wanted, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!w)
		return REFUSE;
	w->to = *to;
	w->proxy = proxy;
	*to = proxy;
	return LEAD;
}

static __always_inline bool same(const struct endpoint *a, const struct endpoint *b)
{
	return a->port == b->port && a->addr[3] == b->addr[3] && a->addr[2] == b->addr[2] &&
	       a->addr[1] == b->addr[1] && a->addr[0] == b->addr[0];
}

static __always_inline enum verdict decide(struct bpf_sock_addr *ctx, struct endpoint *to)
{
	struct bpf_sock *sk = ctx->sk;
	struct intention *w;
	__u32 i;

	/* What is cut off turns MPTCP into TCP. */
	if (!sk || (__u8)ctx->protocol != IPPROTO_TCP || ctx->type != SOCK_STREAM)
		return PASS;
	w = bpf_sk_storage_get(&wanted, sk, NULL, 0);
	if (w) {
		/* The program of a cgroup within this one has led it away. */
		if (same(&w->proxy, to))
			return PASS;
		/* No SYN has left when it was led away before. */
		bpf_sk_storage_delete(&wanted, sk);
	}
	/* Somebody has forbidden it: then nothing will become of it. */
	if (bpf_get_retval() || sk->mark == proxy_mark || sk->mark == probe_mark)
		return PASS;
	if (is_never_captured(to) || bpf_get_netns_cookie(ctx) != host_netns ||
	    bpf_map_lookup_elem(&services, to))
		return PASS;
	for (i = 0; i < MAX_ENTRIES && i < entries_count; i++) {
		__u32 place = i;
		struct entry *e = bpf_map_lookup_elem(&entries, &place);

		if (e && is_about(e, place, to))
			return lead(ctx, e, to);
	}
	return PASS;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct endpoint to = {
		.addr = {0, 0, MAPPED, ctx->user_ip4},
		.port = ctx->user_port,
	};

	switch (decide(ctx, &to)) {
	case PASS:
		return 1;
	case REFUSE:
		return refuse();
	case LEAD:
		break;
	}
	ctx->user_ip4 = to.addr[3];
	ctx->user_port = to.port;
	return 1;
}

static __always_inline void load_addr6(struct bpf_sock_addr *ctx, struct endpoint *to)
{
	to->addr[0] = ctx->user_ip6[0];
	to->addr[1] = ctx->user_ip6[1];
	to->addr[2] = ctx->user_ip6[2];
	to->addr[3] = ctx->user_ip6[3];
	to->port = ctx->user_port;
}

static __always_inline void store_addr6(struct bpf_sock_addr *ctx, const struct endpoint *from)
{
	ctx->user_ip6[0] = from->addr[0];
	ctx->user_ip6[1] = from->addr[1];
	ctx->user_ip6[2] = from->addr[2];
	ctx->user_ip6[3] = from->addr[3];
	ctx->user_port = from->port;
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct endpoint to = {};

	load_addr6(ctx, &to);
	switch (decide(ctx, &to)) {
	case PASS:
		return 1;
	case REFUSE:
		return refuse();
	case LEAD:
		break;
	}
	store_addr6(ctx, &to);
	return 1;
}

/* An address of a socket in one form, whatever family the socket has. */
static __always_inline void set_endpoint(struct endpoint *e, __u32 family, __be32 ip4, __be32 a,
					 __be32 b, __be32 c, __be32 d, __be16 port)
{
	e->port = port;
	if (family == AF_INET) {
		e->addr[2] = MAPPED;
		e->addr[3] = ip4;
		return;
	}
	e->addr[0] = a;
	e->addr[1] = b;
	e->addr[2] = c;
	e->addr[3] = d;
}

static __always_inline void tuple_of_ops(struct bpf_sock_ops *ctx, struct tuple *t)
{
	set_endpoint(&t->own, ctx->family, ctx->local_ip4, ctx->local_ip6[0], ctx->local_ip6[1],
		     ctx->local_ip6[2], ctx->local_ip6[3], bpf_htons(ctx->local_port));
	/* In network order, in the upper half of the word (net/core/filter.c). */
	set_endpoint(&t->proxy, ctx->family, ctx->remote_ip4, ctx->remote_ip6[0],
		     ctx->remote_ip6[1], ctx->remote_ip6[2], ctx->remote_ip6[3],
		     (__be16)(ctx->remote_port >> 16));
	t->netns = bpf_get_netns_cookie(ctx);
}

/* A SYN is about to leave: the socket has both its addresses. */
static __always_inline void on_connect(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct tuple t = {};
	struct intention *w;

	w = sk ? bpf_sk_storage_get(&wanted, sk, NULL, 0) : NULL;
	if (!w)
		return;
	tuple_of_ops(ctx, &t);
	bpf_map_update_elem(&origins, &t, &w->to, BPF_ANY);
	bpf_sk_storage_delete(&wanted, sk);
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

static __always_inline void on_close(struct bpf_sock_ops *ctx)
{
	struct tuple t = {};

	tuple_of_ops(ctx, &t);
	bpf_map_delete_elem(&origins, &t);
}

SEC("sockops")
int sock_ops(struct bpf_sock_ops *ctx)
{
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		on_connect(ctx);
	else if (ctx->op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] == BPF_TCP_CLOSE)
		on_close(ctx);
	return 1;
}

/*
 * The proxy has a socket for the connection, before anything that the process sends
 * arrives, its end included.
 */
SEC("sockops")
int accepted(struct bpf_sock_ops *ctx)
{
	struct endpoint *o;
	struct bpf_sock *sk;
	struct tuple t = {};

	if (ctx->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	sk = ctx->sk;
	if (!sk)
		return 1;
	/* Both ends, as the other side has them. */
	set_endpoint(&t.own, ctx->family, ctx->remote_ip4, ctx->remote_ip6[0], ctx->remote_ip6[1],
		     ctx->remote_ip6[2], ctx->remote_ip6[3], (__be16)(ctx->remote_port >> 16));
	set_endpoint(&t.proxy, ctx->family, ctx->local_ip4, ctx->local_ip6[0], ctx->local_ip6[1],
		     ctx->local_ip6[2], ctx->local_ip6[3], bpf_htons(ctx->local_port));
	t.netns = bpf_get_netns_cookie(ctx);
	o = bpf_map_lookup_elem(&origins, &t);
	if (o)
		bpf_sk_storage_get(&told, sk, o, BPF_SK_STORAGE_GET_F_CREATE);
	return 1;
}

/* Where the socket of a process wanted to go; NULL if it was not led away. */
static __always_inline struct endpoint *origin_of_peer(struct bpf_sock_addr *ctx,
						       const struct endpoint *peer)
{
	struct bpf_sock *sk = ctx->sk;
	struct tuple t = {.proxy = *peer};

	if (!sk || (__u8)ctx->protocol != IPPROTO_TCP)
		return NULL;
	set_endpoint(&t.own, sk->family, sk->src_ip4, sk->src_ip6[0], sk->src_ip6[1],
		     sk->src_ip6[2], sk->src_ip6[3], bpf_htons(sk->src_port));
	t.netns = bpf_get_netns_cookie(ctx);
	return bpf_map_lookup_elem(&origins, &t);
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	struct endpoint peer = {
		.addr = {0, 0, MAPPED, ctx->user_ip4},
		.port = ctx->user_port,
	};
	struct endpoint *o = origin_of_peer(ctx, &peer);

	if (o) {
		ctx->user_ip4 = o->addr[3];
		ctx->user_port = o->port;
	}
	return 1;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct endpoint peer = {};
	struct endpoint *o;

	load_addr6(ctx, &peer);
	o = origin_of_peer(ctx, &peer);
	if (o)
		store_addr6(ctx, o);
	return 1;
}

struct sockaddr4 {
	__u16 family;
	__be16 port;
	__be32 addr;
	__u8 zero[8];
};

struct sockaddr6 {
	__u16 family;
	__be16 port;
	__be32 flowinfo;
	__be32 addr[4];
	__u32 scope;
};

/*
 * What the answer does not change is passed on as the kernel gave it, also where it is
 * longer than what these programs are shown.
 */
static __always_inline int as_it_is(struct bpf_sockopt *ctx)
{
	if (ctx->optlen > ctx->optval_end - ctx->optval)
		ctx->optlen = 0;
	return 1;
}

SEC("cgroup/getsockopt")
int original_dst(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct endpoint *o;

	if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6) ||
	    !sk)
		return as_it_is(ctx);
	o = bpf_sk_storage_get(&told, sk, NULL, 0);
	if (!o)
		return as_it_is(ctx);
	if (ctx->level == SOL_IP) {
		struct sockaddr4 *a = ctx->optval;

		if ((void *)(a + 1) > ctx->optval_end || !is_mapped(o->addr))
			return as_it_is(ctx);
		*a = (struct sockaddr4){.family = AF_INET, .port = o->port, .addr = o->addr[3]};
		ctx->optlen = sizeof(*a);
	} else {
		struct sockaddr6 *a = ctx->optval;

		if ((void *)(a + 1) > ctx->optval_end)
			return as_it_is(ctx);
		*a = (struct sockaddr6){.family = AF_INET6, .port = o->port};
		__builtin_memcpy(a->addr, o->addr, sizeof(a->addr));
		ctx->optlen = sizeof(*a);
	}
	ctx->retval = 0;
	return 1;
}

char LICENSE[] SEC("license") = "GPL";
