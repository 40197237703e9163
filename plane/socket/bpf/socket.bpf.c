// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * Connect-time translation. The kernel runs these programs inside connect(),
 * sendmsg(), recvmsg(), getpeername() and close() of every process below one
 * cgroup. A destination that is a listener becomes one of its backends; what
 * the application is told stays the VIP. No packet is touched.
 *
 *	filter --> listeners --> slots --> backends	what to do (user space writes)
 *	sockets, sockets_more, udp_peers	what was done (these programs write)
 */
#include <stdbool.h>
#include <stddef.h>

#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#include "layout.h"

#define AF_INET 2
#define AF_INET6 10
#define ECONNREFUSED 111
#define SOL_SOCKET 1
#define SO_KEEPALIVE 9
#define TCP_KEEPIDLE 4
#define TCP_KEEPINTVL 5
#define TCP_KEEPCNT 6
#define NSEC_PER_SEC 1000000000ULL
#define MAPPED bpf_htonl(0xffff) /* third word of ::ffff:0:0/96, RFC 4291 2.5.5.2 */

/* Sockets with this mark are probes: they reach the backend that they name. */
const volatile __u32 probe_mark;

/*
 * filter: bit -> whether any listener may have it. Most connections on a host go
 * to no service; this spares them the hash. A bit is set before its listener is
 * there and cleared after it is gone. Written by user space, read by connect and
 * sendmsg.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, (1 << FILTER_BITS) / 64);
} filter SEC(".maps");

/*
 * listeners4, listeners6: VIP, port and protocol -> how to choose a backend.
 * Written by user space, one element at a time; read by connect and sendmsg.
 * Bound: the configured number, doubled and rounded up.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct listener4_key);
	__type(value, struct listener);
	__uint(max_entries, 1);
} listeners4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct listener6_key);
	__type(value, struct listener);
	__uint(max_entries, 1);
} listeners6 SEC(".maps");

/*
 * slots: the selection tables of all services, one range each. A range is
 * written before a listener names it, and reused only after an RCU grace
 * period, so no program ever sees half of one.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct slot);
	__uint(max_entries, 1);
} slots SEC(".maps");

/* backends: index -> address. The same rule for reuse as slots. Index 0 is nobody. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct backend);
	__uint(max_entries, 1);
} backends SEC(".maps");

/* backend_info: index -> what people want to know. User space only. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct backend_detail);
	__uint(max_entries, 1);
} backend_info SEC(".maps");

/* services: index -> name and settings. User space only. Index 0 is nobody. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct service_info);
	__uint(max_entries, 1);
} services SEC(".maps");

/* about: which layout these maps have, written by which pentad. User space only. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct about_info);
	__uint(max_entries, 1);
} about SEC(".maps");

/*
 * affinity: client and service -> backend. Written and read by connect and
 * sendmsg. Bound: fixed; the least recently used client is forgotten first.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct affinity_key);
	__type(value, struct affinity_entry);
	__uint(max_entries, 65536);
} affinity SEC(".maps");

/*
 * sockets: cookie & (SOCKETS - 1) -> translated socket. Socket storage or a
 * hash costs a connect() many times what an array does, and cookies count up,
 * so neighbours in time are neighbours here. A socket whose place is taken by
 * one that lives long goes to sockets_more. Written by connect and release.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct socket);
	__uint(max_entries, SOCKETS);
} sockets SEC(".maps");

/* sockets_more: cookie -> translated socket whose place in sockets was taken. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u64);
	__type(value, struct socket);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 19);
} sockets_more SEC(".maps");

/*
 * udp_peers: the names that an unconnected UDP socket used. It lives and dies
 * with the socket. Written by sendmsg, read by recvmsg, both of which run
 * without the socket's lock: hence the spin lock.
 */
struct udp_peers {
	struct bpf_spin_lock lock;
	__u32 next; /* the peer to forget when all places are taken */
	struct udp_peer peer[UDP_PEERS];
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__type(key, int);
	__type(value, struct udp_peers);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} udp_peers SEC(".maps");

/* counters: enum counter -> count, per CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, COUNTERS);
} counters SEC(".maps");

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		(*value)++;
}

static __always_inline int refuse(void)
{
	count(COUNTER_REFUSED);
	bpf_set_retval(-ECONNREFUSED);
	return 0;
}

/* A key has one byte for the protocol, and what it cuts off turns MPTCP into TCP. */
_Static_assert((__u8)IPPROTO_MPTCP == IPPROTO_TCP, "to a service MPTCP is TCP");

static __always_inline __u32 port_protocol(const struct bpf_sock_addr *ctx)
{
	return ctx->user_port << 16 | (__u8)ctx->protocol;
}

static __always_inline bool is_probe(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	return sk && sk->mark == probe_mark;
}

static __always_inline bool passes_filter(__u32 address4, __u32 port_protocol)
{
	__u32 bit = filter_bit(address4, port_protocol);
	__u32 index = bit / 64;
	__u64 *word = bpf_map_lookup_elem(&filter, &index);

	return word && *word >> (bit % 64) & 1;
}

/*
 * Copy a listener as one whole. An element whose memory went to another listener
 * meanwhile does not have the right sum: look again. Each failure takes an update
 * in the same microsecond, so a few tries are plenty; then refuse.
 */
#define TRIES 4

static __always_inline bool copy_listener(void *map, const void *key, __u32 address4,
					  __u32 port_protocol, struct listener *to)
{
	int i;

	for (i = 0; i < TRIES; i++) {
		struct listener *l = bpf_map_lookup_elem(map, key);

		if (!l)
			return false;
		__builtin_memcpy(to, l, sizeof(*to));
		barrier();
		if (listener_sum(to, address4, port_protocol) == to->sum)
			return true;
	}
	to->count = 0;
	return true;
}

static __always_inline bool find4(struct bpf_sock_addr *ctx, __be32 addr, struct listener *to)
{
	struct listener4_key key = {
		.addr = addr,
		.port_protocol = port_protocol(ctx),
	};

	if (!passes_filter(key.addr, key.port_protocol))
		return false;
	return copy_listener(&listeners4, &key, key.addr, key.port_protocol, to);
}

static __always_inline bool find6(struct bpf_sock_addr *ctx, const __be32 *addr,
				  struct listener *to)
{
	struct listener6_key key = {
		.addr = {addr[0], addr[1], addr[2], addr[3]},
		.port_protocol = port_protocol(ctx),
	};
	__u32 address4 = addr[0] ^ addr[1] ^ addr[2] ^ addr[3];

	if (!passes_filter(address4, key.port_protocol))
		return false;
	return copy_listener(&listeners6, &key, address4, key.port_protocol, to);
}

static __always_inline bool is_mapped(const __be32 *addr)
{
	return addr[0] == 0 && addr[1] == 0 && addr[2] == MAPPED;
}

static __always_inline bool same(const __be32 *a, const __be32 *b)
{
	return a[3] == b[3] && a[2] == b[2] && a[1] == b[1] && a[0] == b[0];
}

static __always_inline void copy(__be32 *to, const __be32 *from)
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

static __always_inline __u64 reference(__u32 index, const struct backend *b)
{
	return (__u64)b->generation << 32 | index;
}

/* The backend of a reference, if it is still the one that was meant. */
static __always_inline struct backend *follow(__u64 ref)
{
	__u32 index = (__u32)ref;
	struct backend *b = bpf_map_lookup_elem(&backends, &index);

	if (!b || b->generation != (__u32)(ref >> 32))
		return NULL;
	return b;
}

/* The finalizer of MurmurHash3 (Appleby, public domain): every bit moves half of the others. */
static __always_inline __u64 mix(__u64 x)
{
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdULL;
	x ^= x >> 33;
	x *= 0xc4ceb9fe1a85ec53ULL;
	x ^= x >> 33;
	return x;
}

/* The client of a connection: the address that it bound, else its network namespace. */
static __always_inline __u64 client_hash(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (sk && sk->family == AF_INET && sk->src_ip4)
		return mix(sk->src_ip4);
	if (sk && sk->family == AF_INET6) {
		__u64 low = (__u64)sk->src_ip6[2] << 32 | sk->src_ip6[3];
		__u64 high = (__u64)sk->src_ip6[0] << 32 | sk->src_ip6[1];

		if (high == 0 && sk->src_ip6[2] == MAPPED)
			return mix(sk->src_ip6[3]);
		if (high | low)
			return mix(mix(high) ^ low);
	}
	return mix(bpf_get_netns_cookie(ctx));
}

/*
 * Take one slot: the integer part of random * count picks it, the fraction
 * decides between its two backends. One number serves both.
 */
static __always_inline __u64 choose(struct bpf_sock_addr *ctx, const struct listener *l)
{
	__u32 number =
		l->balance == BALANCE_SOURCE_HASH ? (__u32)client_hash(ctx) : bpf_get_prandom_u32();
	__u64 scaled = (__u64)number * l->count;
	__u32 index = l->slots + (__u32)(scaled >> 32);
	struct slot *s = bpf_map_lookup_elem(&slots, &index);
	struct backend *b;

	if (!s)
		return 0;
	index = (__u32)scaled < s->threshold ? s->first : s->second;
	b = bpf_map_lookup_elem(&backends, &index);
	return b ? reference(index, b) : 0;
}

/*
 * Whether a client that went to this backend may go there again. The element of
 * an LRU map that names it may have gone to another client and service.
 */
static __always_inline bool keeps(const struct listener *l, __u32 family, __u64 ref)
{
	struct backend *b = follow(ref);

	return b && b->state == BACKEND_SERVING && b->service == l->service &&
	       is_mapped(b->addr) == (family == AF_INET);
}

/* As choose(), but a client that was here within the time-out goes where it went. */
static __always_inline __u64 choose_again(struct bpf_sock_addr *ctx, const struct listener *l,
					  __u32 family)
{
	struct affinity_key key = {
		.client = bpf_get_netns_cookie(ctx),
		.service = l->service,
		.family = family,
	};
	__u64 now = bpf_ktime_get_coarse_ns();
	struct affinity_entry *e = bpf_map_lookup_elem(&affinity, &key);
	struct affinity_entry fresh = {};
	__u64 old, chosen, won;

	if (!e) {
		fresh.backend = choose(ctx, l);
		fresh.used = now;
		if (!bpf_map_update_elem(&affinity, &key, &fresh, BPF_NOEXIST))
			return fresh.backend;
		/* Another thread of this client was first: go with it. */
		e = bpf_map_lookup_elem(&affinity, &key);
		if (!e)
			return fresh.backend;
	}
	old = e->backend;
	if (now - e->used < l->affinity * NSEC_PER_SEC) {
		if (keeps(l, family, old)) {
			e->used = now;
			return old;
		}
	}
	chosen = choose(ctx, l);
	e->used = now;
	won = __sync_val_compare_and_swap(&e->backend, old, chosen);
	return won != old && keeps(l, family, won) ? won : chosen;
}

/* The backend for a new connection: its reference, or 0 when there is none. */
static __always_inline __u64 decide(struct bpf_sock_addr *ctx, const struct listener *l,
				    __u32 family)
{
	if (l->affinity)
		return choose_again(ctx, l, family);
	return choose(ctx, l);
}

static __always_inline struct socket *place_of(__u64 cookie)
{
	__u32 place = cookie & (SOCKETS - 1);

	return bpf_map_lookup_elem(&sockets, &place);
}

/* What was translated for this socket, or NULL. */
static __always_inline struct socket *recall(__u64 cookie)
{
	struct socket *s = place_of(cookie);

	if (!s)
		return NULL;
	if (s->cookie == cookie)
		return s;
	if (!s->crowded)
		return NULL;
	return bpf_map_lookup_elem(&sockets_more, &cookie);
}

static __always_inline void forget(__u64 cookie)
{
	struct socket *s = place_of(cookie);

	if (!s)
		return;
	if (s->crowded)
		bpf_map_delete_elem(&sockets_more, &cookie);
	if (s->cookie == cookie)
		*(volatile __u64 *)&s->cookie = 0;
}

static __always_inline void fill(struct socket *s, const __be32 *vip, __be16 vip_port,
				 const struct backend *b, __u64 ref)
{
	copy(s->vip, vip);
	copy(s->addr, b->addr);
	s->vip_port = vip_port;
	s->port = b->port;
	s->backend = ref;
}

/* Keep the name that the application used, for getpeername and recvmsg. */
static __always_inline void remember(__u64 cookie, const __be32 *vip, __be16 vip_port,
				     const struct backend *b, __u64 ref)
{
	struct socket *s = place_of(cookie);
	struct socket more = {.cookie = cookie};

	if (!s)
		return;
	if (s->cookie == cookie || !__sync_val_compare_and_swap(&s->cookie, 0, cookie)) {
		fill(s, vip, vip_port, b, ref);
		return;
	}
	fill(&more, vip, vip_port, b, ref);
	*(volatile __u8 *)&s->crowded = 1;
	if (bpf_map_update_elem(&sockets_more, &cookie, &more, BPF_ANY))
		count(COUNTER_UNTRACKED);
}

/*
 * A socket that connects to no listener must not keep the name of an earlier
 * connection. Only a socket that had a peer can have one, and making a cookie
 * for all others would be most of what they pay.
 */
static __always_inline void forget_earlier(struct bpf_sock_addr *ctx, bool v4)
{
	struct bpf_sock *sk = ctx->sk;

	if (sk &&
	    (v4 ? sk->dst_ip4 : sk->dst_ip6[0] | sk->dst_ip6[1] | sk->dst_ip6[2] | sk->dst_ip6[3]))
		forget(bpf_get_socket_cookie(ctx));
}

/* What this socket was told of its peer, if the peer is still the one it was. */
static __always_inline struct socket *recall_peer(struct bpf_sock_addr *ctx, const __be32 *addr)
{
	struct socket *s = recall(bpf_get_socket_cookie(ctx));

	if (!s || s->port != (__be16)ctx->user_port || !same(s->addr, addr))
		return NULL;
	return s;
}

/* Where an unconnected UDP socket's datagrams to this VIP went so far. */
static __always_inline __u64 peer_of(struct udp_peers *p, const __be32 *vip, __be16 port)
{
	__u64 ref = 0;
	int i;

	bpf_spin_lock(&p->lock);
	for (i = 0; i < UDP_PEERS; i++) {
		struct udp_peer *peer = &p->peer[i];

		if (peer->current && peer->vip_port == port && same(peer->vip, vip)) {
			ref = peer->backend;
			break;
		}
	}
	bpf_spin_unlock(&p->lock);
	return ref;
}

/*
 * Note the name under which a backend is reached. A backend has one name a
 * socket: the last. Earlier backends of the same VIP keep theirs, because
 * their replies may be under way.
 */
static __always_inline void name_peer(struct udp_peers *p, const __be32 *vip, __be16 vip_port,
				      const struct backend *b, __u64 ref)
{
	__be32 addr[4];
	__be16 port = b->port;
	__u32 place;
	int i;

	copy(addr, b->addr);
	bpf_spin_lock(&p->lock);
	for (i = 0; i < UDP_PEERS; i++) {
		struct udp_peer *peer = &p->peer[i];

		if (peer->vip_port == vip_port && same(peer->vip, vip))
			peer->current = 0;
	}
	/* One search a loop: the verifier follows every combination of outcomes. */
	for (place = 0; place < UDP_PEERS; place++) {
		struct udp_peer *peer = &p->peer[place];

		if (peer->port == port && same(peer->addr, addr))
			goto found;
	}
	for (place = 0; place < UDP_PEERS; place++) {
		if (!p->peer[place].port)
			goto found;
	}
	place = p->next++ & (UDP_PEERS - 1);
found:
	copy(p->peer[place].vip, vip);
	copy(p->peer[place].addr, addr);
	p->peer[place].vip_port = vip_port;
	p->peer[place].port = port;
	p->peer[place].backend = ref;
	p->peer[place].current = 1;
	bpf_spin_unlock(&p->lock);
}

/* The name under which this socket knows addr, into vip; false when it has none. */
static __always_inline bool name_of(struct udp_peers *p, const __be32 *addr, __be16 port,
				    __be32 *vip, __be16 *vip_port)
{
	bool found = false;
	int i;

	bpf_spin_lock(&p->lock);
	for (i = 0; i < UDP_PEERS; i++) {
		struct udp_peer *peer = &p->peer[i];

		if (peer->port == port && same(peer->addr, addr)) {
			copy(vip, peer->vip);
			*vip_port = peer->vip_port;
			found = true;
			break;
		}
	}
	bpf_spin_unlock(&p->lock);
	return found;
}

/* The application now uses addr by its own name: replies from there are not the VIP's. */
static __always_inline void unname_peer(struct bpf_sock_addr *ctx, const __be32 *addr)
{
	struct bpf_sock *sk = ctx->sk;
	__be16 port = ctx->user_port;
	struct udp_peers *p;
	int i;

	if (!sk)
		return;
	p = bpf_sk_storage_get(&udp_peers, sk, NULL, 0);
	if (!p)
		return;
	bpf_spin_lock(&p->lock);
	for (i = 0; i < UDP_PEERS; i++) {
		struct udp_peer *peer = &p->peer[i];

		if (peer->port == port && same(peer->addr, addr)) {
			peer->port = 0;
			peer->current = 0;
		}
	}
	bpf_spin_unlock(&p->lock);
}

/* Keepalive of the service, unless the application has chosen for itself. */
static __always_inline void keep_alive(struct bpf_sock_addr *ctx, const struct keepalive *k)
{
	int on = 0, idle = k->idle, interval = k->interval, probes = k->probes;

	bpf_getsockopt(ctx, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
	if (on)
		return;
	on = 1;
	bpf_setsockopt(ctx, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
	bpf_setsockopt(ctx, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
	if (interval)
		bpf_setsockopt(ctx, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
	if (probes)
		bpf_setsockopt(ctx, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
}

/* connect() to a listener: the chosen backend, or NULL to refuse. */
static __always_inline struct backend *
connect_to(struct bpf_sock_addr *ctx, const struct listener *l, const __be32 *vip, __u32 family)
{
	__u64 ref = l->count ? decide(ctx, l, family) : 0;
	__u64 cookie = bpf_get_socket_cookie(ctx);
	__u32 index = (__u32)ref;
	struct backend *b = ref ? bpf_map_lookup_elem(&backends, &index) : NULL;

	if (!b) {
		forget(cookie);
		return NULL;
	}
	remember(cookie, vip, ctx->user_port, b, ref);
	if (l->keepalive.idle && (__u8)ctx->protocol == IPPROTO_TCP)
		keep_alive(ctx, &l->keepalive);
	count(COUNTER_TRANSLATED);
	return b;
}

/* sendto() a listener on an unconnected UDP socket: a socket stays with its backend. */
static __always_inline struct backend *send_to(struct bpf_sock_addr *ctx, const struct listener *l,
					       const __be32 *vip, __u32 family)
{
	struct bpf_sock *sk = ctx->sk;
	struct udp_peers *p;
	struct backend *b;
	__u32 index;
	__u64 ref;

	if (!sk)
		return NULL;
	p = bpf_sk_storage_get(&udp_peers, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!p) {
		count(COUNTER_UNTRACKED);
		return NULL;
	}
	ref = peer_of(p, vip, ctx->user_port);
	if (ref) {
		b = follow(ref);
		if (b && (b->state == BACKEND_SERVING || b->state == BACKEND_DRAINED))
			return b;
	}
	ref = l->count ? decide(ctx, l, family) : 0;
	index = (__u32)ref;
	b = ref ? bpf_map_lookup_elem(&backends, &index) : NULL;
	if (!b)
		return NULL;
	name_peer(p, vip, ctx->user_port, b, ref);
	count(COUNTER_TRANSLATED);
	return b;
}

static __always_inline void load_addr6(const struct bpf_sock_addr *ctx, __be32 *addr)
{
	addr[0] = ctx->user_ip6[0];
	addr[1] = ctx->user_ip6[1];
	addr[2] = ctx->user_ip6[2];
	addr[3] = ctx->user_ip6[3];
}

static __always_inline void store_addr6(struct bpf_sock_addr *ctx, const __be32 *addr, __be16 port)
{
	ctx->user_ip6[0] = addr[0];
	ctx->user_ip6[1] = addr[1];
	ctx->user_ip6[2] = addr[2];
	ctx->user_ip6[3] = addr[3];
	ctx->user_port = port;
}

static __always_inline void store_addr4(struct bpf_sock_addr *ctx, const __be32 *addr, __be16 port)
{
	ctx->user_ip4 = addr[3];
	ctx->user_port = port;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	__be32 vip[4] = {0, 0, MAPPED, ctx->user_ip4};
	struct listener l;
	struct backend *b;

	if (!find4(ctx, vip[3], &l)) {
		forget_earlier(ctx, true);
		return 1;
	}
	if (is_probe(ctx))
		return 1;
	b = connect_to(ctx, &l, vip, AF_INET);
	if (!b)
		return refuse();
	store_addr4(ctx, b->addr, b->port);
	return 1;
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	__u32 family = AF_INET6;
	struct listener l;
	struct backend *b;
	__be32 vip[4];
	bool found;

	load_addr6(ctx, vip);
	if (is_mapped(vip)) {
		family = AF_INET;
		found = find4(ctx, vip[3], &l);
	} else {
		found = find6(ctx, vip, &l);
	}
	if (!found) {
		forget_earlier(ctx, false);
		return 1;
	}
	if (is_probe(ctx))
		return 1;
	b = connect_to(ctx, &l, vip, family);
	if (!b)
		return refuse();
	store_addr6(ctx, b->addr, b->port);
	return 1;
}

/* IPv4-mapped destinations of IPv6 sockets come here too (net/ipv6/udp.c, udpv6_sendmsg). */
SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	__be32 vip[4] = {0, 0, MAPPED, ctx->user_ip4};
	struct listener l;
	struct backend *b;

	if (!find4(ctx, vip[3], &l)) {
		unname_peer(ctx, vip);
		return 1;
	}
	if (is_probe(ctx))
		return 1;
	b = send_to(ctx, &l, vip, AF_INET);
	if (!b)
		return refuse();
	store_addr4(ctx, b->addr, b->port);
	return 1;
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct listener l;
	struct backend *b;
	__be32 vip[4];

	load_addr6(ctx, vip);
	if (!find6(ctx, vip, &l)) {
		unname_peer(ctx, vip);
		return 1;
	}
	if (is_probe(ctx))
		return 1;
	b = send_to(ctx, &l, vip, AF_INET6);
	if (!b)
		return refuse();
	store_addr6(ctx, b->addr, b->port);
	return 1;
}

/*
 * The name of the sender of a datagram, into vip: from what this socket sent
 * without being connected, or because it is connected to a backend.
 */
static __always_inline bool sender_name(struct bpf_sock_addr *ctx, const __be32 *from, __be32 *vip,
					__be16 *vip_port)
{
	struct bpf_sock *sk = ctx->sk;
	struct udp_peers *p;
	struct socket *s;

	if (!sk)
		return false;
	p = bpf_sk_storage_get(&udp_peers, sk, NULL, 0);
	if (p && name_of(p, from, ctx->user_port, vip, vip_port))
		return true;
	/* A socket that was disconnected since (connect to AF_UNSPEC) has no peer. */
	if (!sk->dst_port || sk->dst_port != (__be16)ctx->user_port)
		return false;
	s = recall_peer(ctx, from);
	if (!s)
		return false;
	copy(vip, s->vip);
	*vip_port = s->vip_port;
	return true;
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	__be32 from[4] = {0, 0, MAPPED, ctx->user_ip4};
	__be32 vip[4] = {};
	__be16 port = 0;

	if (sender_name(ctx, from, vip, &port))
		store_addr4(ctx, vip, port);
	return 1;
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	__be32 from[4], vip[4] = {};
	__be16 port = 0;

	load_addr6(ctx, from);
	if (sender_name(ctx, from, vip, &port))
		store_addr6(ctx, vip, port);
	return 1;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	__be32 peer[4] = {0, 0, MAPPED, ctx->user_ip4};
	struct socket *s = recall_peer(ctx, peer);

	if (s)
		store_addr4(ctx, s->vip, s->vip_port);
	return 1;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct socket *s;
	__be32 peer[4];

	load_addr6(ctx, peer);
	s = recall_peer(ctx, peer);
	if (s)
		store_addr6(ctx, s->vip, s->vip_port);
	return 1;
}

SEC("cgroup/sock_release")
int sock_release(struct bpf_sock *sk)
{
	forget(bpf_get_socket_cookie(sk));
	return 1;
}

/* From here user space has the constants. */
const enum backend_state unused_backend_state __attribute__((unused));
const enum balance unused_balance __attribute__((unused));
const enum counter unused_counter __attribute__((unused));
const enum filter_size unused_filter_size __attribute__((unused));

char LICENSE[] SEC("license") = "GPL";
