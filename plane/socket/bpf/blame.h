/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Whose failures count for whom. A process can make its own connects fail in
 * many ways: options of its socket, an address that it bound, a packet filter
 * that means it alone, a network namespace of its own. So a failure speaks to
 * the client that met it, and to nobody else: a backend is ejected for that
 * client. Only what several clients found who cannot be the same person makes
 * others avoid the backend, and even that refuses nobody.
 *
 * A load says whether anybody blames its backend at all (blamed), so that the
 * others, which is nearly always all, never look here.
 */
#ifndef PENTAD_SOCKET_BLAME_H
#define PENTAD_SOCKET_BLAME_H

#include <stdbool.h>

#include <bpf/bpf_core_read.h>

#include "kernel.h"
#include "maps.h"

/* Ticks of bpf_jiffies64() in a second. */
const volatile __u32 hz;

/* The cookie of the host's own network namespace. */
const volatile __u64 host_netns;

/* How long a trial may go without an outcome before another may begin. */
#define TRIAL_SECONDS 10

/* An ejection is at most this many times the configured one. */
#define EJECTION_GROWTH 10

/* How deep user namespaces can be (kernel/user_namespace.c), and one. */
#define USER_NAMESPACES 33

/* Who owns a socket. */
struct identity {
	__u64 client;    /* network namespace, user and cgroup */
	__u32 principal; /* network namespace and user, hashed, even; 0: is no witness for others */
	__u32 pad;
};

/* How a connection failed its client. */
struct incident {
	__u64 backend; /* {generation << 32 | index} */
	__u32 age;     /* of the connection, in ticks */
	__u32 kind;    /* enum blame_kind */
};

static __always_inline __u32 ticks(__u32 ms)
{
	return (__u64)ms * hz / 1000;
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

/*
 * Whether a network namespace was made by root: the host's own, one made by
 * `ip netns` or a container runtime, also for a container in a user namespace that
 * root made for it. In all others whoever made them has the network that he likes,
 * with any address on it, and what happens there says nothing of a backend.
 */
static __always_inline bool is_roots(const struct net *net)
{
	struct user_namespace *ns = net->user_ns;

	return ns->level == 0 || (ns->level == 1 && ns->owner.val == 0);
}

/* The user of the host who is behind a user namespace that was not there first. */
static __always_inline __u32 maker_of(struct user_namespace *ns)
{
	int i;

	for (i = 0; i < USER_NAMESPACES; i++) {
		if (!ns || ns->level <= 1)
			break;
		ns = ns->parent;
	}
	return ns ? ns->owner.val : 0;
}

/*
 * All network namespaces of one user's own making are one: there is no end of
 * them, and what is kept of each client is bounded.
 */
static __always_inline __u64 network_of(const struct net *net)
{
	return is_roots(net) ? net->net_cookie : (__u64)maker_of(net->user_ns) << 32 | 1ULL << 31;
}

/*
 * Who opened a socket; NULL when its file is closed. The owner of a socket, sk_uid, is
 * whom a user makes it: fchown() gives it to any of his subordinate numbers.
 */
static __always_inline const struct cred *opener_of(struct sock *sk)
{
	struct socket___kernel *s = sk->sk_socket;
	struct file *f = s ? s->file : NULL;

	return f ? f->f_cred : NULL;
}

/*
 * In whose share of what is bounded a socket is. However many numbers somebody has in
 * user namespaces of his own, or in a container, he is one.
 */
static __always_inline __u64 share_of(struct sock *sk)
{
	const struct cred *opener = opener_of(sk);
	__u64 uid = opener ? opener->uid.val : sk->sk_uid.val;

	if (sk->__sk_common.skc_net.net->net_cookie != host_netns)
		uid = 1ULL << 33;
	else if (opener && opener->user_ns->level)
		uid = maker_of(opener->user_ns) | 1ULL << 32;
	return mix(network_of(sk->__sk_common.skc_net.net)) ^ mix(uid << 1 | 1);
}

/* Who opened it in another user namespace may have many numbers, and is no witness. */
static __always_inline void identify(struct sock *sk, struct identity *to)
{
	struct net *net = sk->__sk_common.skc_net.net;
	const struct cred *opener = opener_of(sk);
	__u32 uid = opener ? opener->uid.val : sk->sk_uid.val;
	__u64 principal = mix(network_of(net)) ^ mix((__u64)uid << 1 | 1);

	to->client = mix(principal ^ mix(sk->sk_cgrp_data.cgroup->kn->id));
	to->principal = 0;
	if (opener && opener->user_ns->level == 0 && is_roots(net))
		to->principal = ((__u32)mix(principal) & ~1U) | 2;
}

/* Before Linux 6.2 a socket's owner cannot be read: then a namespace is one client. */
static __always_inline void identify_network(__u64 netns, struct identity *to)
{
	to->client = mix(netns);
	to->principal = ((__u32)mix(netns) & ~1U) | 2;
}

/* The kernel's own socket behind a sock_ops callback. */
static __always_inline struct sock *sock_of_ops(struct bpf_sock_ops *ctx)
{
	return AS_KERNEL(ctx, bpf_sock_ops_kern)->sk;
}

static __always_inline struct load *load_of(__u32 backend)
{
	__u32 chunk = backend >> LOAD_CHUNK_BITS, place = backend & (LOAD_CHUNK - 1);
	void *loads_of_chunk = bpf_map_lookup_elem(&loads, &chunk);

	return loads_of_chunk ? bpf_map_lookup_elem(loads_of_chunk, &place) : NULL;
}

static __always_inline bool is_agent_alive(__u64 now)
{
	__u32 zero = 0;
	__u64 *until = bpf_map_lookup_elem(&heartbeat, &zero);

	return until && now < *until;
}

/* Whether anybody's blame may count. It only spares the look at blames: a wrong yes does no harm. */
static __always_inline bool is_blamed(struct load *load)
{
	__u32 until = *(volatile __u32 *)&load->blamed;

	if (!until)
		return false;
	if ((__s32)(until - (__u32)bpf_jiffies64()) > 0)
		return true;
	__sync_val_compare_and_swap(&load->blamed, until, 0);
	return false;
}

static __always_inline struct blame *blame_of(__u64 client, __u64 backend)
{
	struct blame_key key = {.client = client, .backend = backend};

	return bpf_map_lookup_elem(&blames, &key);
}

/*
 * When an ejection ends. While a living agent probes the backend it has not gone
 * on longer than the probe takes to say so: what the probe finds well is tried.
 */
static __always_inline __u64 ejected_until(const struct blame *b, const struct service_info *policy,
					   __u64 now)
{
	__u64 until = b->ejected >> 1;
	__u64 vouched = b->failed + ticks(policy->verdict);

	return policy->verdict && vouched < until && is_agent_alive(now) ? vouched : until;
}

static __always_inline struct blame *make_blame(__u64 client, __u64 backend)
{
	struct blame_key key = {.client = client, .backend = backend};
	struct blame *b = bpf_map_lookup_elem(&blames, &key);
	struct blame fresh = {};

	if (b)
		return b;
	bpf_map_update_elem(&blames, &key, &fresh, BPF_NOEXIST);
	return bpf_map_lookup_elem(&blames, &key);
}

/*
 * A client that can be a witness met with a failure. When another one did so shortly
 * before, and none succeeded in between, it is the backend's: then those avoid it who
 * have the same principal, if both witnesses had, or all, if they had not. Who only
 * avoids is not refused for it. What a living agent probes is for the agent to judge.
 */
static __noinline void testify(struct load *load, const struct service_info *policy,
			       const struct identity *who, __u64 backend, bool fruitless)
{
	__u64 base = ticks(policy->ejection), now = bpf_jiffies64(), last;
	__u32 earlier = load->accuser, when = load->accused;
	struct blame *common;

	if (!who->principal || (policy->verdict && is_agent_alive(now)))
		return;
	load->accuser = who->principal | fruitless;
	load->accused = now;
	if (earlier && earlier >> 1 != who->principal >> 1 && (__u32)now - when <= base)
		*(volatile __u64 *)&load->shunned = (now + base) << 1;
	common = make_blame(who->principal, backend);
	if (!common)
		return;
	last = common->readmitted;
	if (last && last != who->client && now - common->failed <= base)
		*(volatile __u64 *)&common->ejected = (now + base) << 1;
	common->readmitted = who->client;
	common->failed = now;
	common->fruitless = fruitless;
}

/*
 * Eject for twice as long as the last time, unless the backend has done well for
 * long. old is the value of ejected that the caller saw: only one of those who
 * see the same reason ejects.
 */
static __always_inline bool eject(struct load *load, struct blame *b,
				  const struct service_info *policy, __u64 old)
{
	__u64 base = ticks(policy->ejection), now = bpf_jiffies64();
	__u32 times = b->ejections, growth;
	__u64 until;

	if (!old && times && now - b->readmitted > EJECTION_GROWTH * base)
		times = 0;
	growth = times < 4 ? 1 << times : EJECTION_GROWTH;
	if (growth > EJECTION_GROWTH)
		growth = EJECTION_GROWTH;
	until = now + base * growth;
	if (__sync_val_compare_and_swap(&b->ejected, old, until << 1) != old)
		return false;
	b->ejections = times < 100 ? times + 1 : times;
	b->failures = 0;
	__sync_fetch_and_add(&load->ejected_ever, 1);
	return true;
}

/*
 * A client's connect to a backend failed, or brought nothing. Returns whether the
 * backend is ejected now for that client.
 */
static __noinline bool blame(struct load *load, const struct service_info *policy,
			     const struct identity *who, const struct incident *what)
{
	struct blame *b = make_blame(who->client, what->backend);
	__u64 now = bpf_jiffies64(), old;

	if (!b)
		return false;
	/* What began before the backend came back says nothing about it now. */
	if (now - what->age < b->readmitted)
		return false;
	/* As long as an ejection may last, and what comes after it is measured by it. */
	load->blamed = (__u32)(now + 2 * EJECTION_GROWTH * (__u64)ticks(policy->ejection) +
			       2 * TRIAL_SECONDS * hz)
			       ?: 1;
	b->failed = now;
	if (what->kind & BLAME_UNSENT) {
		b->unsent = b->unsent < 3 ? b->unsent + 1 : 3;
		return false;
	}
	b->fruitless = what->kind & BLAME_FRUITLESS ? 1 : 0;
	testify(load, policy, who, what->backend, b->fruitless);
	old = *(volatile __u64 *)&b->ejected;
	if (what->kind & BLAME_TRIAL)
		return eject(load, b, policy, old);
	if (__sync_fetch_and_add(&b->failures, 1) + 1 < policy->failures || !policy->failures ||
	    old)
		return false;
	return eject(load, b, policy, 0);
}

/*
 * A client's connection to a backend went well; fruitful: it brought something. began,
 * in jiffies, is since when what is said of the backend holds: what a connection
 * brought before the backend failed says nothing about it now. Returns whether that
 * ended an ejection.
 */
static __always_inline bool acquit(struct load *load, __u64 backend, const struct identity *who,
				   bool fruitful, __u32 began)
{
	struct blame *b = blame_of(who->client, backend);
	bool ended = false;

	/* Of who accepts and says nothing it is known when the connection is over. */
	if (b && (fruitful || !b->fruitless) && (__s32)(began - (__u32)b->failed) >= 0) {
		ended = b->ejected;
		b->failures = 0;
		b->fruitless = 0;
		b->unsent = 0;
		if (ended) {
			b->readmitted = bpf_jiffies64();
			*(volatile __u64 *)&b->ejected = 0;
		}
	}
	if (!who->principal)
		return ended;
	if (load->accuser && (fruitful || !(load->accuser & 1)) &&
	    (__s32)(began - load->accused) >= 0) {
		ended = ended || load->shunned;
		*(volatile __u64 *)&load->shunned = 0;
		load->accuser = 0;
	}
	b = blame_of(who->principal, backend);
	if (b && (fruitful || !b->fruitless) && (__s32)(began - (__u32)b->failed) >= 0) {
		b->readmitted = 0;
		*(volatile __u64 *)&b->ejected = 0;
	}
	return ended;
}

#endif
