// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * Connect-time translation. The kernel runs these programs inside connect(),
 * sendmsg(), recvmsg(), getpeername() and close() of every process below one
 * cgroup. A destination that is a listener becomes one of its backends; what
 * the application is told stays the VIP. No packet is touched.
 *
 *	filter --> listeners --> slots --> backends	what to do (user space writes)
 *	sockets, sockets_more, udp_names, udp_more, loads
 *						what was done (these programs write)
 *
 *	maps.h		the maps
 *	caller.h	what a hook knows of the socket of its caller
 *	blame.h		whose failures count for whom
 *	choose.h	which backend a connection gets
 *	connection.h	what becomes of it, and what its backend learns from that
 *	names.h		which names an unconnected UDP socket has for backends
 *	this file	the hooks
 */
#include <stdbool.h>
#include <stddef.h>

#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "blame.h"
#include "caller.h"
#include "choose.h"
#include "connection.h"
#include "maps.h"
#include "names.h"

#define EADDRINUSE 98
#define SOL_SOCKET 1
#define SO_KEEPALIVE 9
#define TCP_KEEPIDLE 4
#define TCP_KEEPINTVL 5
#define TCP_KEEPCNT 6
#define TCP_SYNCNT 7
#define SOCK_BINDADDR_LOCK 4 /* include/net/sock.h: the process chose its source address */
#define NSEC_PER_SEC 1000000000ULL

/* Sockets with this mark are probes: they reach the backend that they name. */
const volatile __u32 probe_mark;

/* A key has one byte for the protocol, and what it cuts off turns MPTCP into TCP. */
_Static_assert((__u8)IPPROTO_MPTCP == IPPROTO_TCP, "to a service MPTCP is TCP");

static __always_inline __u32 port_protocol(const struct bpf_sock_addr *ctx)
{
	return ctx->user_port << 16 | (__u8)ctx->protocol;
}

static __always_inline bool is_tcp(const struct bpf_sock_addr *ctx)
{
	return (__u8)ctx->protocol == IPPROTO_TCP;
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

/* The backend of a reference, if it is still the one that was meant. */
static __always_inline struct backend *follow(__u64 ref)
{
	__u32 index = (__u32)ref;
	struct backend *b = bpf_map_lookup_elem(&backends, &index);

	if (!b || b->generation != (__u32)(ref >> 32))
		return NULL;
	return b;
}

/*
 * The client of a connection: the address that it bound, else its network
 * namespace. What the kernel chose for an earlier connection is not the client's.
 */
static __always_inline __u64 client_hash(struct bpf_sock_addr *ctx)
{
	struct sock *kernel = sock_of(ctx);
	struct bpf_sock *sk = ctx->sk;

	if (kernel && !(BPF_CORE_READ_BITFIELD(kernel, sk_userlocks) & SOCK_BINDADDR_LOCK))
		return mix(bpf_get_netns_cookie(ctx));
	if (sk->family == AF_INET && sk->src_ip4)
		return mix(sk->src_ip4);
	if (sk->family == AF_INET6) {
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
	v = judge(s, (__u32)ref, b, load, policy);
	return v == USABLE || v == WARMING ? (__u32)ref : 0;
}

static __always_inline __u64 refer(__u32 index)
{
	struct backend *b = index ? bpf_map_lookup_elem(&backends, &index) : NULL;

	return b ? reference(index, b) : 0;
}

static __always_inline void affinity_of(struct bpf_sock_addr *ctx, const struct search *s,
					__u32 family, struct affinity_key *to)
{
	struct sock *sk = sock_of(ctx);

	to->client = sk ? network_of(sk->__sk_common.skc_net.net) : bpf_get_netns_cookie(ctx);
	if (s->apart)
		to->client = s->client;
	to->service = s->service;
	to->family = family;
}

/* Whether a backend serves all but this client, by its own failures there. */
static __always_inline bool fails_only(const struct search *s, __u64 ref)
{
	struct service_info *policy = bpf_map_lookup_elem(&services, &s->service);
	struct backend *b = follow(ref);
	struct load *load = load_of((__u32)ref);
	enum verdict v;

	if (!policy || !b || !load || b->state != BACKEND_SERVING || b->service != s->service)
		return false;
	v = judge(s, (__u32)ref, b, load, policy);
	return v == EJECTED || v == DUE;
}

/*
 * Where a client that was here within the time-out went, if it may go there again, or 0.
 * Who is kept from there by nothing but his own failures goes elsewhere, and leaves
 * the others in his network namespace where they are.
 */
__noinline __u32 remembered(struct bpf_sock_addr *ctx, struct search *s, __u32 family,
			    __u32 seconds)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	struct affinity_key key = {};
	struct affinity_entry *e;
	__u32 kept;

	if (!s)
		return 0;
	affinity_of(ctx, s, family, &key);
	e = bpf_map_lookup_elem(&affinity, &key);
	if (!e)
		return 0;
	kept = now - e->used < seconds * NSEC_PER_SEC ? keeps(s, family, e->backend) : 0;
	if (!kept && now - e->used < seconds * NSEC_PER_SEC && fails_only(s, e->backend)) {
		s->apart = true;
		affinity_of(ctx, s, family, &key);
		e = bpf_map_lookup_elem(&affinity, &key);
		if (!e)
			return 0;
		kept = now - e->used < seconds * NSEC_PER_SEC ? keeps(s, family, e->backend) : 0;
	}
	s->remembered = e->backend;
	e->used = now;
	return kept;
}

/* Remember what was chosen for a client. Returns it, or what another thread of it got first. */
__noinline __u32 settled(struct bpf_sock_addr *ctx, struct search *s, __u32 family, __u32 chosen)
{
	struct affinity_entry fresh = {};
	struct affinity_key key = {};
	struct affinity_entry *e;
	__u64 won;

	if (!s)
		return 0;
	affinity_of(ctx, s, family, &key);
	fresh.backend = refer(chosen);
	fresh.used = bpf_ktime_get_coarse_ns();
	if (!s->remembered && !bpf_map_update_elem(&affinity, &key, &fresh, BPF_NOEXIST))
		return chosen;
	e = bpf_map_lookup_elem(&affinity, &key);
	if (!e)
		return chosen;
	won = __sync_val_compare_and_swap(&e->backend, s->remembered, fresh.backend);
	if (won == s->remembered || s->trial)
		return chosen;
	/* Another thread of this client was first: go with it. */
	return keeps(s, family, won) ?: chosen;
}

/* What decide() returns beside the backend: this connection tries it. */
#define TRIES_IT (1ULL << 32)

/*
 * The backend for a new connection, or 0 when there is none. A global function, which
 * the verifier looks at once and by itself: that is most of what it takes to load this.
 */
__noinline __u64 decide(struct bpf_sock_addr *ctx, struct listener *l, __u32 family)
{
	struct search s = {.judged = is_tcp(ctx)};
	struct identity who = {};
	__u32 index;

	if (!l || !l->count)
		return 0;
	s.service = l->service;
	s.slots = l->slots;
	s.count = l->count;
	s.balance = l->balance;
	s.traits = l->traits;
	if (!l->affinity && l->balance != BALANCE_SOURCE_HASH) {
		index = choose_plain(&s);
		if (index)
			return index;
	}
	identify_caller(ctx, &who);
	s.client = who.client;
	s.principal = who.principal;
	if (s.balance == BALANCE_SOURCE_HASH)
		s.hash = client_hash(ctx);
	index = l->affinity ? remembered(ctx, &s, family, l->affinity) : 0;
	if (index)
		return index;
	index = choose(&s);
	if (l->affinity)
		index = settled(ctx, &s, family, index);
	return s.trial ? TRIES_IT | index : index;
}

static __always_inline void fill(struct socket *s, struct bpf_sock_addr *ctx, const __be32 *vip,
				 const struct backend *b, __u64 ref, __u64 life)
{
	copy(s->vip, vip);
	copy(s->addr, b->addr);
	s->vip_port = ctx->user_port;
	s->port = b->port;
	s->protocol = ctx->protocol;
	if (ctx->protocol == IPPROTO_UDP)
		s->udp |= UDP_COUNTED;
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

/* An entry for a socket that has none, or NULL when there is no room. */
static __always_inline struct socket *claim_place(__u64 cookie)
{
	struct socket *s = place_of(cookie);

	if (!s || !__sync_val_compare_and_swap(&s->cookie, 0, cookie))
		return s;
	*(volatile __u8 *)&s->crowded = 1;
	return make_more(cookie);
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
	struct socket *s = recall(cookie);

	if (!s) {
		s = claim_place(cookie);
		if (!s) {
			count(COUNTER_UNTRACKED);
			return NULL;
		}
		s->udp = 0;
	}
	fill(s, ctx, vip, b, ref, life);
	return s;
}

/* An entry says something of its socket only while that is connected to its backend. */
static __always_inline bool is_live(const struct socket *s, const struct endpoint *peer)
{
	return s->port == peer->port && same(s->addr, peer->addr);
}

/*
 * Put the entry of a UDP socket out of the way of the next one: it holds again if
 * the connect() that is under way fails. It takes its count along. Returns whether
 * there is room for it.
 */
static __noinline bool set_aside(struct socket *s, __u64 cookie)
{
	struct socket *place = place_of(cookie);
	struct socket *earlier = place ? make_more(cookie | EARLIER) : NULL;

	if (!earlier)
		return false;
	*(volatile __u8 *)&place->crowded = 1;
	*earlier = *s;
	earlier->udp &= ~UDP_EARLIER;
	change_life(s, cookie, 0, LIFE_COUNTED);
	s->udp |= UDP_EARLIER;
	return true;
}

/*
 * Which of the two entries that a UDP socket may have holds. The kernel keeps the
 * old peer when a connect() fails after the hook, and tells nobody; so the peer
 * decides. Returns the entry that says something of the socket as it is, or NULL.
 */
static __noinline struct socket *settle(struct socket *s, __u64 cookie, const struct endpoint *peer)
{
	__u64 key = cookie | EARLIER;
	bool holds = is_live(s, peer);
	struct socket *earlier;

	if (!(s->udp & UDP_EARLIER))
		return holds ? s : NULL;
	earlier = bpf_map_lookup_elem(&sockets_more, &key);
	if (earlier && !holds && is_live(earlier, peer))
		return earlier;
	s->udp &= ~UDP_EARLIER;
	if (earlier) {
		ended(earlier, cookie, NULL, NULL);
		bpf_map_delete_elem(&sockets_more, &key);
	}
	return holds ? s : NULL;
}

/* What this socket was told of its peer, if the peer is still the one it was. */
static __always_inline struct socket *recall_peer(struct bpf_sock_addr *ctx)
{
	__u64 cookie = cookie_of(ctx);
	struct socket *s = cookie ? recall(cookie) : NULL;
	struct endpoint peer = {};

	if (!s)
		return NULL;
	peer_of_socket(ctx, &peer);
	return settle(s, cookie, &peer);
}

/*
 * A UDP socket is about to have another peer, or none. What its former one sent may
 * still wait to be read.
 */
static __noinline void name_former(struct bpf_sock_addr *ctx, const struct socket *s)
{
	struct udp_name name = {
		.vip_port = s->vip_port,
		.port = s->port,
		.current = 1,
		.backend = s->backend,
	};

	copy(name.addr, s->addr);
	copy(name.vip, s->vip);
	name_peer(ctx, &name);
}

/* For how long, in seconds, replies of a backend that was removed may still be under way. */
#define LATE 5

/* Whether a backend still answers for the VIP under which a datagram was sent to it. */
static __always_inline bool answers_for(__u64 ref, const __be32 *vip, __be16 vip_port)
{
	__u32 index = (__u32)ref, generation = ref >> 32;
	struct backend *b = bpf_map_lookup_elem(&backends, &index);
	__u32 address4 = vip[3];

	if (!b)
		return false;
	/* The generation grows by one when a backend is removed. */
	if (b->generation != generation)
		return b->generation == generation + 1 &&
		       bpf_jiffies64() - b->started < LATE * (__u64)hz;
	if (!is_mapped(vip))
		address4 ^= vip[0] ^ vip[1] ^ vip[2];
	return passes_filter(address4, (__u32)vip_port << 16 | IPPROTO_UDP);
}

/*
 * The entry of a UDP socket that has no peer any more, and had this one; NULL when it
 * has another or never had one.
 */
static __always_inline struct socket *former_peer(struct bpf_sock_addr *ctx, const __be32 *addr,
						  __be16 port)
{
	__u64 cookie = cookie_of(ctx);
	struct socket *s = cookie ? recall(cookie) : NULL;

	return s && s->port == port && same(s->addr, addr) ? s : NULL;
}

/* Whether a socket is connected to a VIP that stands for this address. */
static __always_inline bool is_peer(struct bpf_sock_addr *ctx, const __be32 *addr, __be16 port)
{
	struct socket *s = recall_peer(ctx);

	return s && s->port == port && same(s->addr, addr);
}

/* The application now uses addr by its own name: replies from there are not the VIP's. */
static __noinline void unname_peer(struct bpf_sock_addr *ctx, const __be32 *addr)
{
	struct udp_name name = {.port = ctx->user_port};
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return;
	/* Before Linux 6.2 looking for a cookie makes one. */
	if (bpf_cast_to_kern_ctx && !sk->dst_port && former_peer(ctx, addr, name.port))
		forget(cookie_of(ctx), NULL, NULL);
	/*
	 * What a connected socket sends to an IPv4-mapped peer, the kernel sends to that
	 * by its address (udpv6_sendmsg): the application still means the VIP.
	 */
	if (sk->dst_port == name.port && is_peer(ctx, addr, name.port))
		return;
	copy(name.addr, addr);
	unname(ctx, &name);
}

/*
 * A socket connects to no listener. Of TCP, what it had is over: nobody connects
 * who is connected. A UDP socket keeps its entry, because it keeps its peer if this
 * fails; but the backend by its own name is not the VIP any more.
 */
static __noinline void connects_elsewhere(struct bpf_sock_addr *ctx, const __be32 *addr)
{
	struct identity who = {};
	struct socket *s;
	__u64 cookie;

	/* Before Linux 6.2 looking for a cookie makes one. */
	if (!bpf_cast_to_kern_ctx && ctx->sk && !ctx->sk->dst_port)
		return;
	cookie = cookie_of(ctx);
	s = cookie ? recall(cookie) : NULL;
	if (!s)
		return;
	if (s->protocol == IPPROTO_UDP) {
		struct socket *holds = recall_peer(ctx);

		if (holds)
			s = holds;
		if (s->port != (__be16)ctx->user_port || !same(s->addr, addr)) {
			name_former(ctx, s);
			if (holds)
				return;
		}
	}
	identify_caller(ctx, &who);
	unsent(s, cookie, &who);
	forget(cookie, NULL, &who);
}

/*
 * Keepalive of the service, unless the application has chosen for itself. A frame of
 * its own, as the next one: connect() has little left of the stack.
 */
static __noinline void keep_alive(struct bpf_sock_addr *ctx, const struct keepalive *k)
{
	int on = 0, idle = k->idle, interval = k->interval, probes = k->probes;
	struct sock *sk = sock_of(ctx);

	/* To look oneself costs a fraction of asking. */
	if (sk)
		on = sk->__sk_common.skc_flags >>
			     bpf_core_enum_value(enum sock_flags, SOCK_KEEPOPEN) &
		     1;
	else
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

/*
 * With a shorter first time-out as many SYNs are sent sooner. More of them keep a
 * process as patient as it was (tcp_syn_retries; each waits twice as long), unless
 * it has chosen for itself.
 */
static __noinline void keep_patience(struct bpf_sock_addr *ctx, __u32 timeout)
{
	struct sock *sk = sock_of(ctx);
	struct inet_connection_sock *own;
	int retries, i;

	if (!bpf_rdonly_cast || !sk)
		return;
	own = (struct inet_connection_sock *)bpf_rdonly_cast(
		sk, bpf_core_type_id_kernel(struct inet_connection_sock));
	if (own->icsk_syn_retries)
		return;
	retries = sk->__sk_common.skc_net.net->ipv4.sysctl_tcp_syn_retries;
	for (i = 0; i < 7 && timeout < 1000; i++) {
		timeout *= 2;
		retries++;
	}
	bpf_setsockopt(ctx, IPPROTO_TCP, TCP_SYNCNT, &retries, sizeof(retries));
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

static __noinline void count_refusal(__u32 service)
{
	__u64 *n = bpf_map_lookup_elem(&refusals, &service);
	__u64 none = 0;

	if (!n) {
		/* Whoever is first, the place is there afterwards. */
		bpf_map_update_elem(&refusals, &service, &none, BPF_NOEXIST);
		n = bpf_map_lookup_elem(&refusals, &service);
	}
	if (n)
		__sync_fetch_and_add(n, 1);
}

static __always_inline int refuse(struct bpf_sock_addr *ctx, const struct listener *l,
				  const __be32 *vip)
{
	count(COUNTER_REFUSED);
	count_refusal(l->service);
	if (is_followed())
		tell_refused(ctx, l->service, vip);
	bpf_set_retval(-ECONNREFUSED);
	return 0;
}

/* connect() of TCP to a listener: its entry, which says nothing before a SYN has left. */
static __always_inline void begin_tcp(struct bpf_sock_addr *ctx, const struct listener *l,
				      const __be32 *vip, const struct backend *b, __u64 ref,
				      __u64 cookie, bool trial)
{
	__u8 life = LIFE_JUDGED;
	struct socket *s;

	if (trial)
		life |= LIFE_TRIAL;
	if (l->traits & TRAIT_TIMED)
		life |= LIFE_TIMED;
	s = remember(ctx, cookie, vip, b, ref, life);
	if (s && is_followed())
		tell(s, EVENT_CONNECT, 0, NULL);
	if (l->keepalive.idle)
		keep_alive(ctx, &l->keepalive);
	if (l->traits & TRAIT_TIMED) {
		struct service_info *policy = bpf_map_lookup_elem(&services, &l->service);

		if (policy)
			keep_patience(ctx, policy->connect_timeout);
	}
}

/*
 * connect() of UDP to a listener: nothing will tell whether it succeeds. A frame of
 * its own, too.
 */
static __noinline void begin_udp(struct bpf_sock_addr *ctx, const __be32 *vip,
				 const struct backend *b, __u64 ref, __u64 cookie)
{
	struct load *load = load_of((__u32)ref);
	struct socket *s = recall(cookie);

	if (s) {
		name_former(ctx, s);
		if (recall_peer(ctx) != s || !set_aside(s, cookie))
			ended(s, cookie, NULL, NULL);
	}
	if (!load)
		return;
	/* Counted first: who sees the mark may count it back at once. */
	__sync_fetch_and_add(&load->datagrams, 1);
	s = remember(ctx, cookie, vip, b, ref, LIFE_COUNTED);
	if (!s) {
		__sync_fetch_and_sub(&load->datagrams, 1);
		return;
	}
	__sync_fetch_and_add(&load->connections, 1);
	if (is_followed())
		tell(s, EVENT_CONNECT, 0, NULL);
}

/* Nobody connects who is connected: what a TCP socket had is over. */
__noinline int is_over(struct bpf_sock_addr *ctx, __u64 cookie)
{
	struct socket *s = recall(cookie);
	struct identity who = {};

	if (!s)
		return 0;
	identify_caller(ctx, &who);
	unsent(s, cookie, &who);
	forget(cookie, NULL, &who);
	return 0;
}

/* connect() to a listener: the chosen backend, or NULL to refuse. */
static __always_inline struct backend *connect_to(struct bpf_sock_addr *ctx, struct listener *l,
						  const __be32 *vip, __u32 family)
{
	struct sock *sk = sock_of(ctx);
	/* Who has no cookie yet was never translated: nearly every socket. */
	bool first = sk && !sk->__sk_common.skc_cookie.counter;
	__u64 cookie = bpf_get_socket_cookie(ctx);
	bool tcp = is_tcp(ctx);
	struct backend *b;
	__u64 decision;
	__u32 index;

	if (tcp && !first)
		is_over(ctx, cookie);
	decision = decide(ctx, l, family);
	index = decision;
	b = index ? bpf_map_lookup_elem(&backends, &index) : NULL;
	if (!b)
		return NULL;
	if (tcp)
		begin_tcp(ctx, l, vip, b, reference(index, b), cookie, decision & TRIES_IT);
	else
		begin_udp(ctx, vip, b, reference(index, b), cookie);
	count(COUNTER_TRANSLATED);
	return b;
}

/* Whether an unconnected socket that sent to this backend may go on doing so. */
static __always_inline bool may_stay(const struct backend *b)
{
	if (b->reset == RESET_ALL || (b->leave && bpf_jiffies64() >= b->leave))
		return false;
	return b->state == BACKEND_SERVING || b->state == BACKEND_DRAINED;
}

/* No hook told that a UDP socket was disconnected: now it is seen. */
static __noinline void disconnected(struct bpf_sock_addr *ctx)
{
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct socket *s = recall(cookie);

	if (!s)
		return;
	name_former(ctx, s);
	forget(cookie, NULL, NULL);
}

/*
 * A connected socket that names its own VIP means its backend: the kernel takes
 * replies from nobody else. name has the VIP, and gets the backend. Returns whether
 * that is so. A frame of its own.
 */
static __noinline bool send_to_peer(struct bpf_sock_addr *ctx, struct udp_name *name)
{
	struct socket *s = recall_peer(ctx);
	struct bpf_sock *sk = ctx->sk;

	if (s && s->vip_port == name->vip_port && same(s->vip, name->vip)) {
		copy(name->addr, s->addr);
		name->port = s->port;
		return true;
	}
	if (!s && sk && !sk->dst_port)
		disconnected(ctx);
	return false;
}

/*
 * sendto() a listener. An unconnected socket stays with the backend that it had.
 * Nothing begins and nothing ends here, so that nothing is in flight. name has the
 * VIP, and gets the backend. Returns whether there is one.
 */
static __always_inline bool send_to(struct bpf_sock_addr *ctx, struct listener *l, __u32 family,
				    struct udp_name *name)
{
	struct backend *b;
	__u32 index;
	__u64 ref;

	if (send_to_peer(ctx, name))
		return true;
	ref = peer_of(ctx, name);
	b = ref ? follow(ref) : NULL;
	if (b && may_stay(b)) {
		copy(name->addr, b->addr);
		name->port = b->port;
		return true;
	}
	index = decide(ctx, l, family);
	b = index ? bpf_map_lookup_elem(&backends, &index) : NULL;
	if (!b)
		return false;
	copy(name->addr, b->addr);
	name->port = b->port;
	name->current = 1;
	name->backend = reference(index, b);
	if (!name_peer(ctx, name)) {
		count(COUNTER_UNTRACKED);
		return false;
	}
	count(COUNTER_TRANSLATED);
	return true;
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
		connects_elsewhere(ctx, vip);
		return 1;
	}
	/* A probe, or somebody has forbidden it: then nothing will become of it. */
	if (is_probe(ctx) || bpf_get_retval())
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
		connects_elsewhere(ctx, vip);
		return 1;
	}
	/* A probe, or somebody has forbidden it: then nothing will become of it. */
	if (is_probe(ctx) || bpf_get_retval())
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
	struct udp_name name = {
		.vip = {0, 0, MAPPED, ctx->user_ip4},
		.vip_port = ctx->user_port,
	};
	struct listener l;

	if (!find4(ctx, name.vip[3], &l)) {
		unname_peer(ctx, name.vip);
		return 1;
	}
	if (is_probe(ctx) || bpf_get_retval())
		return 1;
	if (!send_to(ctx, &l, AF_INET, &name))
		return refuse(ctx, &l, name.vip);
	store_addr4(ctx, name.addr, name.port);
	return 1;
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct udp_name name = {.vip_port = ctx->user_port};
	struct listener l;

	load_addr6(ctx, name.vip);
	if (!find6(ctx, name.vip, &l)) {
		unname_peer(ctx, name.vip);
		return 1;
	}
	if (is_probe(ctx) || bpf_get_retval())
		return 1;
	if (!send_to(ctx, &l, AF_INET6, &name))
		return refuse(ctx, &l, name.vip);
	store_addr6(ctx, name.addr, name.port);
	return 1;
}

/*
 * The name of the sender of a datagram, into vip. What comes from the peer of a
 * connected socket has the name under which that was connected; all else has the
 * name under which this socket sent something there, or was connected there before.
 */
static __always_inline bool sender_name(struct bpf_sock_addr *ctx, const __be32 *from, __be32 *vip,
					__be16 *vip_port)
{
	struct udp_name name = {.port = ctx->user_port};
	struct bpf_sock *sk = ctx->sk;
	struct endpoint peer = {};
	struct socket *s;

	if (!sk)
		return false;
	peer_of_socket(ctx, &peer);
	if (peer.port && peer.port == (__be16)ctx->user_port && same(peer.addr, from)) {
		s = recall_peer(ctx);
		if (!s)
			return false;
		copy(vip, s->vip);
		*vip_port = s->vip_port;
		return true;
	}
	copy(name.addr, from);
	if (name_of(ctx, &name) && answers_for(name.backend, name.vip, name.vip_port)) {
		copy(vip, name.vip);
		*vip_port = name.vip_port;
		return true;
	}
	s = former_peer(ctx, from, ctx->user_port);
	if (!s || !answers_for(s->backend, s->vip, s->vip_port))
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
	struct socket *s = recall_peer(ctx);

	if (s)
		store_addr4(ctx, s->vip, s->vip_port);
	return 1;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct socket *s = recall_peer(ctx);

	if (s)
		store_addr6(ctx, s->vip, s->vip_port);
	return 1;
}

/* Tell what becomes of an entry whose socket the kernel is about to release. */
static __always_inline void release(struct sock *sk, __u64 cookie, bool tcp)
{
	struct socket *s = cookie ? recall(cookie) : NULL;
	struct identity who = {};
	struct traffic t = {};

	if (!s)
		return;
	if (tcp && bpf_rdonly_cast)
		read_traffic(&t, bpf_rdonly_cast(sk, bpf_core_type_id_kernel(struct tcp_sock)));
	if (tcp && (is_unanswered(s) || !(s->life & LIFE_SENT)))
		identify(sk, &who);
	else
		identify_if_blamed(sk, s, &who);
	if (tcp && is_unanswered(s))
		failed(s, cookie, ETIMEDOUT, &who);
	else if (tcp && !(s->life & LIFE_SENT))
		unsent(s, cookie, &who);
	forget(cookie, &t, who.client ? &who : NULL);
}

SEC("cgroup/sock_release")
int sock_release(struct bpf_sock *ctx)
{
	struct sock *sk;
	__u64 cookie;

	if (!bpf_cast_to_kern_ctx) {
		cookie = bpf_get_socket_cookie(ctx);
		if (cookie && recall(cookie))
			forget(cookie, NULL, NULL);
		if (cookie && ctx->protocol == IPPROTO_UDP)
			forget_names(ctx, cookie);
		return 1;
	}
	sk = AS_KERNEL(ctx, sock);
	cookie = sk->__sk_common.skc_cookie.counter;
	if (cookie && ctx->protocol == IPPROTO_UDP)
		forget_names(ctx, cookie);
	/* For a subflow, which is a socket of the kernel, this is not called. */
	if (ctx->protocol == IPPROTO_MPTCP) {
		struct sock *subflow = first_subflow(sk);

		if (subflow)
			release(subflow, subflow->__sk_common.skc_cookie.counter, true);
		return 1;
	}
	release(sk, cookie, ctx->protocol == IPPROTO_TCP);
	return 1;
}

/* The entry of the connection that a sock_ops callback is about, or NULL. */
static __always_inline struct socket *tracked(struct bpf_sock_ops *ctx, __u64 *cookie)
{
	/* Without a cookie it was never translated. Giving it one now would cost more than this. */
	if (bpf_cast_to_kern_ctx)
		*cookie = sock_of_ops(ctx)->__sk_common.skc_cookie.counter;
	else
		*cookie = bpf_get_socket_cookie(ctx);
	return *cookie ? recall(*cookie) : NULL;
}

static __always_inline void identify_ops(struct bpf_sock_ops *ctx, struct identity *to)
{
	if (bpf_cast_to_kern_ctx)
		identify(sock_of_ops(ctx), to);
	else
		identify_network(bpf_get_netns_cookie(ctx), to);
}

/* As identify_ops(), if it matters to anybody whose connection it is. */
static __always_inline void identify_ops_if_blamed(struct bpf_sock_ops *ctx, const struct socket *s,
						   struct identity *to)
{
	struct load *load = load_of((__u32)s->backend);

	if (load && is_blamed(load))
		identify_ops(ctx, to);
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

/*
 * What happens in a network namespace that root did not make is not counted: whoever
 * made it has every address there that he likes.
 */
static __always_inline bool counts(struct bpf_sock_ops *ctx)
{
	return !bpf_cast_to_kern_ctx || is_roots(sock_of_ops(ctx)->__sk_common.skc_net.net);
}

static __always_inline void peer_of_ops(struct bpf_sock_ops *ctx, struct endpoint *to)
{
	/* The port lies in the upper half (net/core/filter.c, sock_ops_convert_ctx_access). */
	to->port = ctx->remote_port >> 16;
	if (ctx->family == AF_INET) {
		to->addr[2] = MAPPED;
		to->addr[3] = READ_HERE(ctx->remote_ip4, "IPv4");
		return;
	}
	to->addr[0] = ctx->remote_ip6[0];
	to->addr[1] = ctx->remote_ip6[1];
	to->addr[2] = ctx->remote_ip6[2];
	to->addr[3] = ctx->remote_ip6[3];
}

/*
 * A SYN is about to leave: here a connection begins. What an earlier connect(), one
 * that found no way, left behind says nothing of it. The socket of no service asks
 * for nothing more.
 */
static __always_inline void on_connect(struct bpf_sock_ops *ctx)
{
	struct endpoint peer = {};
	struct load *load;
	struct socket *s;
	__u64 cookie, life;

	s = tracked(ctx, &cookie);
	if (!s)
		return;
	peer_of_ops(ctx, &peer);
	if (!is_live(s, &peer)) {
		forget(cookie, NULL, NULL);
		return;
	}
	load = load_of((__u32)s->backend);
	if (!load)
		return;
	/* Counted first: who sees the mark may count it back at once. */
	if (counts(ctx)) {
		__sync_fetch_and_add(&load->inflight, 1);
		life = change_life(s, cookie, LIFE_SENT | LIFE_COUNTED, 0);
		if (!life || life & LIFE_COUNTED)
			__sync_fetch_and_sub(&load->inflight, 1);
		else
			__sync_fetch_and_add(&load->connections, 1);
	} else {
		life = change_life(s, cookie, LIFE_SENT, 0);
	}
	if (life)
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
	struct identity who = {};
	struct socket *s;
	__u64 cookie;

	if (ctx->state != BPF_TCP_SYN_SENT)
		return;
	s = tracked(ctx, &cookie);
	if (!s || s->life & LIFE_FAILED)
		return;
	identify_ops(ctx, &who);
	failed(s, cookie, ETIMEDOUT, &who);
}

static __always_inline void on_established(struct bpf_sock_ops *ctx)
{
	struct identity who = {};
	struct socket *s;
	__u64 cookie;

	s = tracked(ctx, &cookie);
	if (!s)
		return;
	identify_ops_if_blamed(ctx, s, &who);
	established(s, cookie, ctx->srtt_us >> 3, &who);
}

/* A FIN counts as a byte (net/ipv4/tcp_input.c, tcp_data_queue). */
static __always_inline bool said_nothing(const struct tcp_sock *t)
{
	return t && t->bytes_received <= 1;
}

/* The server has closed its side first. */
static __always_inline void on_hang_up(struct bpf_sock_ops *ctx)
{
	struct identity who = {};
	struct socket *s;
	__u64 cookie;

	s = tracked(ctx, &cookie);
	if (!s || !said_nothing(tcp_sock_of(ctx)))
		return;
	identify_ops(ctx, &who);
	hung_up(s, cookie, &who);
}

/* The connection is over, be its file closed or not: nobody asks for its name again. */
static __always_inline void on_close(struct bpf_sock_ops *ctx)
{
	struct traffic traffic = {};
	struct identity who = {};
	struct tcp_sock *t;
	struct socket *s;
	__u16 error = 0;
	__u64 cookie;

	s = tracked(ctx, &cookie);
	if (!s)
		return;
	t = tcp_sock_of(ctx);
	if (t) {
		error = ((struct sock *)t)->sk_err;
		read_traffic(&traffic, t);
	}
	if (!error && is_unanswered(s))
		error = ETIMEDOUT;
	if (error)
		identify_ops(ctx, &who);
	else
		identify_ops_if_blamed(ctx, s, &who);
	/* Without an error it was the process that gave up, sooner than silence says anything. */
	if (ctx->args[0] == BPF_TCP_SYN_SENT && error)
		failed(s, cookie, error, &who);
	if (ctx->args[0] == BPF_TCP_ESTABLISHED && error == ECONNRESET && said_nothing(t))
		hung_up(s, cookie, &who);
	forget(cookie, &traffic, who.client ? &who : NULL);
}

static __always_inline void on_state(struct bpf_sock_ops *ctx)
{
	switch (ctx->args[1]) {
	case BPF_TCP_ESTABLISHED:
		on_established(ctx);
		break;
	case BPF_TCP_CLOSE_WAIT:
		on_hang_up(ctx);
		break;
	case BPF_TCP_CLOSE:
		on_close(ctx);
		break;
	}
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
 * to be taken away; s is live. Returns whether it did.
 */
static __always_inline bool reset(struct sock_common *sk, struct socket *s)
{
	__u32 index = (__u32)s->backend;
	struct backend *b = bpf_map_lookup_elem(&backends, &index);

	if (!b || !b->reset || (b->reset == RESET_UDP && s->protocol != IPPROTO_UDP))
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

static __always_inline void peer_of_common(const struct sock_common *sk, struct endpoint *to)
{
	to->port = sk->skc_dport;
	if (sk->skc_family == AF_INET) {
		to->addr[2] = MAPPED;
		to->addr[3] = READ_HERE(sk->skc_daddr, "IPv4");
		return;
	}
	to->addr[0] = sk->skc_v6_daddr.in6_u.u6_addr32[0];
	to->addr[1] = sk->skc_v6_daddr.in6_u.u6_addr32[1];
	to->addr[2] = sk->skc_v6_daddr.in6_u.u6_addr32[2];
	to->addr[3] = sk->skc_v6_daddr.in6_u.u6_addr32[3];
}

SEC("iter/tcp")
int reset_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	__u64 cookie = sk ? sk->skc_cookie.counter : 0;
	struct socket *s = cookie ? recall(cookie) : NULL;
	struct endpoint peer = {};

	if (!s)
		return 0;
	s->seen = walk;
	peer_of_common(sk, &peer);
	if (is_live(s, &peer) && reset(sk, s))
		ended(s, cookie, NULL, NULL);
	return 0;
}

SEC("iter/udp")
int reset_udp(struct bpf_iter__udp *ctx)
{
	struct sock_common *sk = (struct sock_common *)ctx->udp_sk;
	__u64 cookie = sk ? sk->skc_cookie.counter : 0;
	struct socket *s, *holds;
	struct endpoint peer = {};

	if (!cookie)
		return 0;
	keep_names(cookie);
	s = recall(cookie);
	if (!s)
		return 0;
	peer_of_common(sk, &peer);
	holds = settle(s, cookie, &peer);
	s->seen = walk;
	if (holds)
		holds->seen = walk;
	/* No hook tells that a UDP socket was disconnected, or connected elsewhere. */
	if (!holds || reset(sk, holds))
		forget(cookie, NULL, NULL);
	return 0;
}

/*
 * Whether an entry is of a socket that a complete walk did not meet: one that found
 * no way and was closed without a word, as sockets of the kernel are, or one that
 * was closed while somebody had taken the hooks away.
 */
static __always_inline bool is_stale(struct socket *s, const struct expiry *e)
{
	__u32 started = s->life >> 32;

	if (s->seen == (__u8)walk || (__s32)(started - e->before) >= 0)
		return false;
	return s->protocol == IPPROTO_UDP || (e->tcp && s->life & LIFE_JUDGED);
}

static long expire_place(__u32 place, struct expiry *e)
{
	struct socket *s = bpf_map_lookup_elem(&sockets, &place);
	__u64 cookie = s ? s->cookie : 0;

	if (!cookie || !is_stale(s, e))
		return 0;
	ended(s, cookie, NULL, NULL);
	vacate(s, cookie);
	e->count++;
	return 0;
}

static long expire_more(void *map, const __u64 *key, struct socket *s, struct expiry *e)
{
	__u64 place = *key;

	if (!is_stale(s, e))
		return 0;
	ended(s, place & ~EARLIER, NULL, NULL);
	bpf_map_delete_elem(map, &place);
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
const enum reset_scope unused_reset_scope __attribute__((unused));
const struct expiry unused_expiry __attribute__((unused));
const struct load unused_load __attribute__((unused));
const struct event unused_event __attribute__((unused));
const enum life unused_life __attribute__((unused));
const enum event_kind unused_event_kind __attribute__((unused));
const enum limit unused_limit __attribute__((unused));
const enum trait unused_trait __attribute__((unused));
const enum counter unused_counter __attribute__((unused));
const enum filter_size unused_filter_size __attribute__((unused));

char LICENSE[] SEC("license") = "GPL";
