// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * Connect-time translation. The kernel runs these programs inside connect(),
 * sendmsg(), recvmsg(), getpeername() and close() of every process below one
 * cgroup. A destination that is a listener becomes one of its backends; what
 * the application is told stays the VIP. No packet is touched.
 *
 *	filter --> listeners --> slots --> backends	what to do (user space writes)
 *	sockets, sockets_more, udp_peers, loads	what was done (these programs write)
 *
 *	maps.h		the maps
 *	choose.h	which backend a connection gets
 *	connection.h	what becomes of it, and what its backend learns from that
 *	this file	the hooks
 */
#include <stdbool.h>
#include <stddef.h>

#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "choose.h"
#include "connection.h"
#include "maps.h"

#define EADDRINUSE 98
#define AF_INET 2
#define AF_INET6 10
#define SOL_SOCKET 1
#define SO_KEEPALIVE 9
#define TCP_KEEPIDLE 4
#define TCP_KEEPINTVL 5
#define TCP_KEEPCNT 6
#define NSEC_PER_SEC 1000000000ULL
#define MAPPED bpf_htonl(0xffff) /* third word of ::ffff:0:0/96, RFC 4291 2.5.5.2 */

/* Sockets with this mark are probes: they reach the backend that they name. */
const volatile __u32 probe_mark;

/* The cookie of the host's own network namespace. */
const volatile __u64 host_netns;

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

/* A listener of the host's own namespace is nobody to the namespaces of pods. */
static __always_inline bool answers(struct bpf_sock_addr *ctx, const struct listener *l)
{
	return !(l->traits & TRAIT_HOST) || bpf_get_netns_cookie(ctx) == host_netns;
}

static __always_inline bool find4(struct bpf_sock_addr *ctx, __be32 addr, struct listener *to)
{
	struct listener4_key key = {
		.addr = addr,
		.port_protocol = port_protocol(ctx),
	};

	if (!passes_filter(key.addr, key.port_protocol))
		return false;
	return copy_listener(&listeners4, &key, key.addr, key.port_protocol, to) &&
	       answers(ctx, to);
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
	return copy_listener(&listeners6, &key, address4, key.port_protocol, to) &&
	       answers(ctx, to);
}

static __always_inline bool is_mapped(const __be32 *addr)
{
	return addr[0] == 0 && addr[1] == 0 && addr[2] == MAPPED;
}

static __always_inline bool same(const __be32 *a, const __be32 *b)
{
	return a[3] == b[3] && a[2] == b[2] && a[1] == b[1] && a[0] == b[0];
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
 * Whether a client that went to this backend may go there again: 0, or its index.
 * The element of an LRU map that names it may have gone to another client and
 * service.
 */
static __always_inline __u32 keeps(const struct search *s, __u32 family, __u64 ref)
{
	struct service_info *policy = bpf_map_lookup_elem(&services, &s->service);
	struct backend *b = follow(ref);
	struct load *load = load_of((__u32)ref);
	enum verdict v;

	if (!policy || !b || !load || b->state != BACKEND_SERVING || b->service != s->service ||
	    is_mapped(b->addr) != (family == AF_INET))
		return 0;
	v = judge(s, b, load, policy);
	return v == USABLE || v == WARMING ? (__u32)ref : 0;
}

static __always_inline __u64 refer(__u32 index)
{
	struct backend *b = index ? bpf_map_lookup_elem(&backends, &index) : NULL;

	return b ? reference(index, b) : 0;
}

/* As choose(), but a client that was here within the time-out goes where it went. */
__noinline __u32 choose_again(struct bpf_sock_addr *ctx, struct search *s, __u32 family,
			      __u32 seconds)
{
	struct affinity_key key = {
		.client = bpf_get_netns_cookie(ctx),
		.family = family,
	};
	__u64 now = bpf_ktime_get_coarse_ns();
	struct affinity_entry fresh = {};
	struct affinity_entry *e;
	__u64 old = 0, won;
	__u32 chosen, kept;

	if (!s)
		return 0;
	key.service = s->service;
	e = bpf_map_lookup_elem(&affinity, &key);
	if (e) {
		old = e->backend;
		kept = now - e->used < seconds * NSEC_PER_SEC ? keeps(s, family, old) : 0;
		e->used = now;
		if (kept)
			return kept;
	}
	chosen = choose(s);
	fresh.backend = refer(chosen);
	fresh.used = now;
	if (!e) {
		if (!bpf_map_update_elem(&affinity, &key, &fresh, BPF_NOEXIST))
			return chosen;
		e = bpf_map_lookup_elem(&affinity, &key);
		if (!e)
			return chosen;
	}
	won = __sync_val_compare_and_swap(&e->backend, old, fresh.backend);
	if (won == old || s->trial)
		return chosen;
	/* Another thread of this client was first: go with it. */
	return keeps(s, family, won) ?: chosen;
}

/* How often to look elsewhere when others took the last place of a backend. */
#define OVERTAKEN 3

/*
 * The backend for a new connection, counted in its load, or 0 when there is none.
 */
static __always_inline __u32 decide(struct bpf_sock_addr *ctx, const struct listener *l,
				    __u32 family, bool *trial)
{
	__u32 most = 0;
	int i;

	if (!l->count)
		return 0;
	if (l->traits & TRAIT_PLAIN && !l->affinity && l->balance != BALANCE_SOURCE_HASH) {
		__u32 index = choose_plain(l);
		struct load *load = load_of(index);

		if (!index || !load)
			return 0;
		__sync_fetch_and_add(&load->inflight, 1);
		__sync_fetch_and_add(&load->connections, 1);
		return index;
	}
	if (!(l->traits & TRAIT_PLAIN)) {
		struct service_info *policy = bpf_map_lookup_elem(&services, &l->service);

		if (!policy)
			return 0;
		most = policy->max_connections;
	}
	for (i = 0; i < OVERTAKEN; i++) {
		struct search s = {
			.service = l->service,
			.slots = l->slots,
			.count = l->count,
			.balance = l->balance,
			.traits = l->traits,
			.judged = ctx->protocol == IPPROTO_TCP,
		};
		struct load *load;
		__u32 index;

		if (s.balance == BALANCE_SOURCE_HASH)
			s.hash = client_hash(ctx);
		index = l->affinity ? choose_again(ctx, &s, family, l->affinity) : choose(&s);
		load = load_of(index);
		if (!index || !load)
			return 0;
		*trial = s.trial;
		if (__sync_fetch_and_add(&load->inflight, 1) < most || !most) {
			__sync_fetch_and_add(&load->connections, 1);
			return index;
		}
		__sync_fetch_and_sub(&load->inflight, 1);
	}
	return 0;
}

static __always_inline void fill(struct socket *s, struct bpf_sock_addr *ctx, const __be32 *vip,
				 const struct backend *b, __u64 ref, __u64 life)
{
	copy(s->vip, vip);
	copy(s->addr, b->addr);
	s->vip_port = ctx->user_port;
	s->port = b->port;
	s->protocol = ctx->protocol;
	s->backend = ref;
	*(volatile __u64 *)&s->life = life;
}

/* An empty entry in sockets_more, for a socket whose place is taken. */
static __noinline struct socket *make_more(__u64 cookie)
{
	struct socket more = {.cookie = cookie};

	if (bpf_map_update_elem(&sockets_more, &cookie, &more, BPF_ANY))
		return NULL;
	return bpf_map_lookup_elem(&sockets_more, &cookie);
}

/*
 * Keep the name that the application used, for getpeername and recvmsg, and what
 * is to be done when the connection ends. Returns NULL when there is no room.
 */
static __always_inline struct socket *remember(struct bpf_sock_addr *ctx, __u64 cookie,
					       const __be32 *vip, const struct backend *b,
					       __u64 ref, __u8 flags)
{
	__u64 life = bpf_jiffies64() << 32 | tag_of(cookie) | flags;
	struct socket *s = place_of(cookie);

	if (!s)
		return NULL;
	if (s->cookie != cookie && __sync_val_compare_and_swap(&s->cookie, 0, cookie)) {
		*(volatile __u8 *)&s->crowded = 1;
		s = make_more(cookie);
		if (!s) {
			count(COUNTER_UNTRACKED);
			return NULL;
		}
	}
	fill(s, ctx, vip, b, ref, life);
	return s;
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
		forget(bpf_get_socket_cookie(ctx), NULL);
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
 * their replies may be under way. A frame of its own: what calls it has little
 * left of the stack.
 */
static __noinline void name_peer(struct udp_peers *p, const __be32 *vip, __be16 vip_port,
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

/* Tell followers that there was no backend for a process. */
static __noinline void tell_refused(struct bpf_sock_addr *ctx, __u32 service, const __be32 *vip)
{
	struct service_info *policy = bpf_map_lookup_elem(&services, &service);
	struct event e = {
		.kind = EVENT_REFUSED,
		.protocol = ctx->protocol,
		.service = service,
		.vip_port = ctx->user_port,
		.error = ECONNREFUSED,
		.pid = bpf_get_current_pid_tgid() >> 32,
	};

	if (!policy || policy->silent)
		return;
	copy(e.vip, vip);
	bpf_get_current_comm(e.command, sizeof(e.command));
	publish(&e);
}

static __always_inline int refuse(struct bpf_sock_addr *ctx, const struct listener *l,
				  const __be32 *vip)
{
	count(COUNTER_REFUSED);
	if (is_followed())
		tell_refused(ctx, l->service, vip);
	bpf_set_retval(-ECONNREFUSED);
	return 0;
}

/* connect() to a listener: the chosen backend, or NULL to refuse. */
static __always_inline struct backend *
connect_to(struct bpf_sock_addr *ctx, const struct listener *l, const __be32 *vip, __u32 family)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct socket *s = recall(cookie);
	struct backend *b;
	struct load *load;
	bool trial = false;
	__u8 life = LIFE_COUNTED;
	__u32 index;

	/* It connects elsewhere: what it had is over, and does not count in this choice. */
	if (s)
		ended(s, cookie, NULL);
	index = decide(ctx, l, family, &trial);
	b = index ? bpf_map_lookup_elem(&backends, &index) : NULL;
	if (!b) {
		if (s)
			forget(cookie, NULL);
		return NULL;
	}
	if (trial)
		life |= LIFE_TRIAL;
	if (ctx->protocol == IPPROTO_TCP)
		life |= LIFE_JUDGED;
	if (l->traits & TRAIT_TIMED)
		life |= LIFE_TIMED;
	s = remember(ctx, cookie, vip, b, reference(index, b), life);
	if (!s) {
		/* Nothing would count it back. */
		load = load_of(index);
		if (load)
			__sync_fetch_and_sub(&load->inflight, 1);
	} else if (is_followed()) {
		tell(s, EVENT_CONNECT, 0, NULL);
	}
	if (l->keepalive.idle && (__u8)ctx->protocol == IPPROTO_TCP)
		keep_alive(ctx, &l->keepalive);
	count(COUNTER_TRANSLATED);
	return b;
}

/*
 * sendto() a listener on an unconnected UDP socket: a socket stays with its
 * backend. Nothing begins and nothing ends here, so that nothing is in flight.
 */
static __always_inline struct backend *send_to(struct bpf_sock_addr *ctx, const struct listener *l,
					       const __be32 *vip, __u32 family)
{
	struct bpf_sock *sk = ctx->sk;
	struct udp_peers *p;
	struct backend *b;
	struct load *load;
	bool trial = false;
	__u32 index;
	__u64 ref;

	if (!sk)
		return NULL;
	if (!sk->dst_port)
		forget(bpf_get_socket_cookie(ctx), NULL);
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
	index = decide(ctx, l, family, &trial);
	b = index ? bpf_map_lookup_elem(&backends, &index) : NULL;
	load = load_of(index);
	if (!b || !load)
		return NULL;
	__sync_fetch_and_sub(&load->inflight, 1);
	name_peer(p, vip, ctx->user_port, b, reference(index, b));
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

/*
 * A socket of the host binds a port that is held for a service: what it would
 * wait for never comes to it, so it is told at once.
 */
static __always_inline int holds(struct bpf_sock *ctx, const struct listener *l)
{
	if (!(l->traits & TRAIT_HELD) || bpf_get_netns_cookie(ctx) != host_netns)
		return 0;
	count(COUNTER_HELD);
	bpf_set_retval(-EADDRINUSE);
	return 1;
}

/* src_port of a socket is in host byte order, a key has it as it lies in memory. */
static __always_inline __u32 bound_port(const struct bpf_sock *ctx)
{
	return (__u32)bpf_htons(ctx->src_port) << 16 | (__u8)ctx->protocol;
}

SEC("cgroup/post_bind4")
int post_bind4(struct bpf_sock *ctx)
{
	struct listener4_key key = {
		.addr = ctx->src_ip4,
		.port_protocol = bound_port(ctx),
	};
	struct listener l;

	if (!passes_filter(key.addr, key.port_protocol) ||
	    !copy_listener(&listeners4, &key, key.addr, key.port_protocol, &l))
		return 1;
	return !holds(ctx, &l);
}

SEC("cgroup/post_bind6")
int post_bind6(struct bpf_sock *ctx)
{
	struct listener6_key key = {
		.addr = {ctx->src_ip6[0], ctx->src_ip6[1], ctx->src_ip6[2], ctx->src_ip6[3]},
		.port_protocol = bound_port(ctx),
	};
	__u32 address4 = key.addr[0] ^ key.addr[1] ^ key.addr[2] ^ key.addr[3];
	struct listener4_key key4 = {
		.addr = is_mapped(key.addr) ? key.addr[3] : 0,
		.port_protocol = key.port_protocol,
	};
	struct listener l;

	if (passes_filter(address4, key.port_protocol) &&
	    copy_listener(&listeners6, &key, address4, key.port_protocol, &l) && holds(ctx, &l))
		return 0;
	/* The unspecified address is bound for IPv4, too, and a mapped one for it alone. */
	if ((address4 && !is_mapped(key.addr)) || !passes_filter(key4.addr, key4.port_protocol) ||
	    !copy_listener(&listeners4, &key4, key4.addr, key4.port_protocol, &l))
		return 1;
	return !holds(ctx, &l);
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
		return refuse(ctx, &l, vip);
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
		return refuse(ctx, &l, vip);
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
		return refuse(ctx, &l, vip);
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
		return refuse(ctx, &l, vip);
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
	struct traffic t = {};
	__u64 cookie;

	/* Without a cookie it was never translated. Giving it one now would cost more than this. */
	if (bpf_cast_to_kern_ctx)
		cookie = ((struct sock *)bpf_cast_to_kern_ctx(sk))->__sk_common.skc_cookie.counter;
	else
		cookie = bpf_get_socket_cookie(sk);
	if (!cookie || !recall(cookie))
		return 1;
	if (sk->protocol == IPPROTO_TCP && bpf_cast_to_kern_ctx && bpf_rdonly_cast)
		read_traffic(&t, bpf_rdonly_cast(bpf_cast_to_kern_ctx(sk),
						 bpf_core_type_id_kernel(struct tcp_sock)));
	forget(cookie, &t);
	return 1;
}

/* The entry of the connection that a sock_ops callback is about, or NULL. */
static __always_inline struct socket *tracked(struct bpf_sock_ops *ctx, __u64 *cookie)
{
	struct bpf_sock_ops_kern *kernel;

	/* Without a cookie it was never translated. Giving it one now would cost more than this. */
	if (bpf_cast_to_kern_ctx) {
		kernel = bpf_cast_to_kern_ctx(ctx);
		*cookie = kernel->sk->__sk_common.skc_cookie.counter;
	} else {
		*cookie = bpf_get_socket_cookie(ctx);
	}
	return *cookie ? recall(*cookie) : NULL;
}

static __always_inline struct tcp_sock *tcp_sock_of(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	return sk ? bpf_skc_to_tcp_sock(sk) : NULL;
}

/* Callbacks that connections of services ask for. */
#define ASKED (BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG)

/* This one, which is rare, says that the connection is LIFE_TIMED: it spares others a look-up. */
#define IS_TIMED BPF_SOCK_OPS_RETRANS_CB_FLAG

/* A SYN is about to leave. The socket of no service asks for nothing more. */
static __always_inline void on_connect(struct bpf_sock_ops *ctx)
{
	__u64 cookie, life;
	struct socket *s = tracked(ctx, &cookie);

	life = s ? change_life(s, cookie, LIFE_SENT, 0) : 0;
	if (!(life & LIFE_COUNTED))
		return;
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | ASKED |
					       (life & LIFE_TIMED ? IS_TIMED : 0));
}

/* The first retransmission timer of a SYN, in jiffies, or -1 for the host's. */
static __always_inline int first_timeout(struct bpf_sock_ops *ctx)
{
	struct service_info *policy;
	struct socket *s;
	__u64 cookie;

	if (!(ctx->bpf_sock_ops_cb_flags & IS_TIMED))
		return -1;
	s = tracked(ctx, &cookie);
	policy = s ? service_of((__u32)s->backend) : NULL;
	if (!policy || !policy->connect_timeout)
		return -1;
	return ticks(policy->connect_timeout) ?: 1;
}

static __always_inline void on_timeout(struct bpf_sock_ops *ctx)
{
	__u64 cookie;
	struct socket *s;

	if (ctx->state != BPF_TCP_SYN_SENT)
		return;
	s = tracked(ctx, &cookie);
	if (s)
		failed(s, cookie, ETIMEDOUT);
}

static __always_inline bool is_subflow(struct tcp_sock *t)
{
	return t && bpf_core_field_exists(t->is_mptcp) && t->is_mptcp;
}

static __always_inline void on_established(struct bpf_sock_ops *ctx)
{
	__u64 cookie;
	struct socket *s = tracked(ctx, &cookie);

	if (s)
		established(s, cookie, ctx->srtt_us >> 3);
}

/* The connection is over, be its file closed or not. A subflow of MPTCP has no file. */
static __always_inline void on_close(struct bpf_sock_ops *ctx)
{
	struct traffic traffic = {};
	struct tcp_sock *t;
	struct socket *s;
	__u64 cookie;

	s = tracked(ctx, &cookie);
	if (!s)
		return;
	t = tcp_sock_of(ctx);
	if (ctx->args[0] == BPF_TCP_SYN_SENT && t) {
		__u16 error = ((struct sock *)t)->sk_err;

		/* Without an error it was the process that gave up. */
		if (error)
			failed(s, cookie, error);
	}
	if (t)
		read_traffic(&traffic, t);
	ended(s, cookie, &traffic);
	if (is_subflow(t))
		forget(cookie, &traffic);
}

static __always_inline void on_state(struct bpf_sock_ops *ctx)
{
	if (ctx->args[1] == BPF_TCP_ESTABLISHED)
		on_established(ctx);
	else if (ctx->args[1] == BPF_TCP_CLOSE)
		on_close(ctx);
}

/*
 * What becomes of TCP connections. The kernel calls this for every connection
 * below the cgroup; those of no service are let go with the first look.
 */
SEC("sockops")
int sock_ops(struct bpf_sock_ops *ctx)
{
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		on_connect(ctx);
		return 1;
	}
	if (!(ctx->bpf_sock_ops_cb_flags & BPF_SOCK_OPS_STATE_CB_FLAG))
		return 1;
	switch (ctx->op) {
	case BPF_SOCK_OPS_TIMEOUT_INIT:
		ctx->reply = first_timeout(ctx);
		break;
	case BPF_SOCK_OPS_RTO_CB:
		on_timeout(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		on_state(ctx);
		break;
	}
	return 1;
}

/* Leave closing to user space, as on a kernel without bpf_sock_destroy. */
const volatile bool by_diag;

/*
 * Close a socket if its connection goes to a backend from which connections are
 * to be taken away. Returns whether it did.
 */
static __always_inline bool reset(struct sock_common *sk, struct socket *s)
{
	__u32 index = (__u32)s->backend;
	struct backend *b = bpf_map_lookup_elem(&backends, &index);

	if (!b || !b->reset || !(s->life & LIFE_COUNTED))
		return false;
	/* The generation grows by one when a backend is removed. */
	if (b->generation - (__u32)(s->backend >> 32) > 1)
		return false;
	/* Where the kernel cannot do it from here, user space does it by sock_diag(7). */
	if (!bpf_sock_destroy || by_diag || bpf_sock_destroy(sk))
		return false;
	count(COUNTER_RESET);
	return true;
}

/* Which walk over all sockets this is; written by user space before it begins. */
volatile __u32 walk;

SEC("iter/tcp")
int reset_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	__u64 cookie = sk ? sk->skc_cookie.counter : 0;
	struct socket *s = cookie ? recall(cookie) : NULL;

	if (!s)
		return 0;
	s->seen = walk;
	if (reset(sk, s))
		ended(s, cookie, NULL);
	return 0;
}

SEC("iter/udp")
int reset_udp(struct bpf_iter__udp *ctx)
{
	struct sock_common *sk = (struct sock_common *)ctx->udp_sk;
	__u64 cookie = sk ? sk->skc_cookie.counter : 0;
	struct socket *s = cookie ? recall(cookie) : NULL;

	if (!s)
		return 0;
	s->seen = walk;
	/* No hook tells that a UDP socket is disconnected. */
	if (reset(sk, s) || !sk->skc_dport)
		ended(s, cookie, NULL);
	return 0;
}

/*
 * Whether an entry is of a socket that a complete walk did not meet: a UDP socket
 * that was disconnected, of which no hook tells, or one that was closed while
 * somebody had taken the hooks away.
 */
static __always_inline bool is_stale(struct socket *s, const struct expiry *e)
{
	__u32 started = s->life >> 32;

	if (!(s->life & LIFE_COUNTED) || s->seen == (__u8)walk || (__s32)(started - e->before) >= 0)
		return false;
	return s->protocol == IPPROTO_UDP || (e->tcp && s->life & LIFE_JUDGED);
}

static long expire_place(__u32 place, struct expiry *e)
{
	struct socket *s = bpf_map_lookup_elem(&sockets, &place);
	__u64 cookie = s ? s->cookie : 0;

	if (!cookie || !is_stale(s, e))
		return 0;
	ended(s, cookie, NULL);
	__sync_val_compare_and_swap(&s->cookie, cookie, 0);
	e->count++;
	return 0;
}

static long expire_more(void *map, const __u64 *key, struct socket *s, struct expiry *e)
{
	__u64 cookie = *key;

	if (!is_stale(s, e))
		return 0;
	ended(s, cookie, NULL);
	bpf_map_delete_elem(map, &cookie);
	e->count++;
	return 0;
}

/* Count back what the walk that has just ended did not meet. Run by user space. */
SEC("syscall")
int expire(struct expiry *e)
{
	struct expiry copy = *e;

	copy.count = 0;
	bpf_loop(SOCKETS, expire_place, &copy, 0);
	bpf_for_each_map_elem(&sockets_more, expire_more, &copy, 0);
	e->count = copy.count;
	return 0;
}

/* From here user space has the constants. */
const enum backend_state unused_backend_state __attribute__((unused));
const enum balance unused_balance __attribute__((unused));
const struct expiry unused_expiry __attribute__((unused));
const struct load unused_load __attribute__((unused));
const struct event unused_event __attribute__((unused));
const enum life unused_life __attribute__((unused));
const enum event_kind unused_event_kind __attribute__((unused));
const enum trait unused_trait __attribute__((unused));
const enum counter unused_counter __attribute__((unused));
const enum filter_size unused_filter_size __attribute__((unused));

char LICENSE[] SEC("license") = "GPL";
