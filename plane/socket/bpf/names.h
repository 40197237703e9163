/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The names that an unconnected UDP socket used for backends: where its datagrams to
 * a VIP went so far, and under which VIP it knows the sender of a reply. The first
 * few lie with the socket, further ones in entries of udp_more, numbered from 1.
 */
#ifndef PENTAD_SOCKET_NAMES_H
#define PENTAD_SOCKET_NAMES_H

#include <stdbool.h>

#include "blame.h"
#include "caller.h"
#include "connection.h"
#include "kernel.h"
#include "maps.h"

/* Which walk over all sockets this is; written by user space before it begins. */
volatile __u32 walk;

/* What a new entry of udp_more is. Too much for the stack of where one is made. */
const __u64 no_names[sizeof(struct udp_names) / sizeof(__u64)] = {};

static __always_inline struct udp_names *more_names(__u64 cookie, __u32 number)
{
	struct udp_more_key key = {.cookie = cookie, .number = number};

	return bpf_map_lookup_elem(&udp_more, &key);
}

/* How many entries of udp_more whoever has this socket has; NULL when there is no room to count. */
static __always_inline __u32 *held_by(__u64 share)
{
	__u32 *held = bpf_map_lookup_elem(&udp_shares, &share);
	__u32 none = 0;

	if (held)
		return held;
	bpf_map_update_elem(&udp_shares, &share, &none, BPF_NOEXIST);
	return bpf_map_lookup_elem(&udp_shares, &share);
}

static __always_inline void give_share_back(__u64 share)
{
	__u32 *held = bpf_map_lookup_elem(&udp_shares, &share);

	if (held && *held)
		__sync_fetch_and_sub(held, 1);
}

/*
 * Another entry for a socket, or NULL when there is none left for whoever has it.
 * Before Linux 6.2 that is everybody in its network namespace.
 */
static __noinline struct udp_names *make_more_names(struct bpf_sock_addr *ctx, __u64 cookie,
						    __u32 number)
{
	struct udp_more_key key = {.cookie = cookie, .number = number};
	struct sock *sk = sock_of(ctx);
	__u64 share = sk ? share_of(sk) : bpf_get_netns_cookie(ctx);
	__u32 *held = held_by(share);
	struct udp_names *n;

	if (!cookie || !held || *held >= UDP_SHARE)
		return NULL;
	__sync_fetch_and_add(held, 1);
	if (bpf_map_update_elem(&udp_more, &key, no_names, BPF_NOEXIST))
		give_share_back(share);
	n = bpf_map_lookup_elem(&udp_more, &key);
	if (!n)
		return NULL;
	n->share = share;
	n->seen = walk;
	return n;
}

/* The first names of a socket that has some, or NULL. */
static __always_inline struct udp_names *first_names(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct udp_names *n = sk ? bpf_sk_storage_get(&udp_names, sk, NULL, 0) : NULL;
	__u64 cookie;

	if (n || !sk)
		return n;
	cookie = cookie_of(ctx);
	return cookie ? more_names(cookie, 0) : NULL;
}

/* The first names of a socket; NULL when there is room for none. */
static __always_inline struct udp_names *need_names(struct bpf_sock_addr *ctx)
{
	struct udp_names *n = first_names(ctx);
	struct bpf_sock *sk = ctx->sk;

	if (n || !sk)
		return n;
	n = bpf_sk_storage_get(&udp_names, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	/* The memory is that of whoever made the map, and may be at an end. */
	return n ?: make_more_names(ctx, bpf_get_socket_cookie(ctx), 0);
}

/* Where datagrams to a VIP go, as far as these names know: a reference, or 0. */
static __always_inline __u64 peer_in(struct udp_names *n, const struct udp_name *vip)
{
	__u64 ref = 0;
	int i;

	bpf_spin_lock(&n->lock);
	for (i = 0; i < UDP_NAMES; i++) {
		struct udp_name *name = &n->name[i];

		if (name->current && name->vip_port == vip->vip_port && same(name->vip, vip->vip)) {
			ref = name->backend;
			break;
		}
	}
	bpf_spin_unlock(&n->lock);
	return ref;
}

/* Where an unconnected UDP socket's datagrams to this VIP went so far: a reference, or 0. */
__noinline __u64 peer_of(struct bpf_sock_addr *ctx, struct udp_name *vip)
{
	struct udp_names *n = first_names(ctx);
	__u64 cookie, ref;
	__u32 more, i;

	if (!n || !vip)
		return 0;
	ref = peer_in(n, vip);
	more = n->more;
	if (ref || !more)
		return ref;
	cookie = cookie_of(ctx);
	for (i = 1; i <= UDP_MORE_EACH && i <= more && !ref; i++) {
		n = more_names(cookie, i);
		if (n)
			ref = peer_in(n, vip);
	}
	return ref;
}

/*
 * No datagram to the VIP goes where it went so far; but if the backend has a name
 * here already, it gets this one. Returns whether it had.
 */
static __always_inline bool rename(struct udp_names *n, const struct udp_name *to)
{
	bool found = false;
	int i;

	bpf_spin_lock(&n->lock);
	for (i = 0; i < UDP_NAMES; i++) {
		struct udp_name *name = &n->name[i];

		if (name->port == to->port && same(name->addr, to->addr)) {
			*name = *to;
			found = true;
		} else if (name->vip_port == to->vip_port && same(name->vip, to->vip)) {
			name->current = 0;
		}
	}
	bpf_spin_unlock(&n->lock);
	return found;
}

/* Give a backend a name in a free place, or by force in place of the oldest. Returns whether. */
static __always_inline bool add_name(struct udp_names *n, const struct udp_name *to, bool force)
{
	__u32 place;

	bpf_spin_lock(&n->lock);
	for (place = 0; place < UDP_NAMES; place++) {
		if (!n->name[place].port)
			goto found;
	}
	if (!force) {
		bpf_spin_unlock(&n->lock);
		return false;
	}
	place = n->next < UDP_NAMES ? n->next : 0;
	n->next = place + 1;
found:
	n->name[place] = *to;
	bpf_spin_unlock(&n->lock);
	return true;
}

/* As rename() and add_name(), by a number. Global, so that each is verified once and not a loop long. */
__noinline int rename_more(__u64 cookie, __u32 number, struct udp_name *to)
{
	struct udp_names *n = more_names(cookie, number);

	return n && to && rename(n, to);
}

__noinline int add_more(__u64 cookie, __u32 number, struct udp_name *to)
{
	struct udp_names *n = more_names(cookie, number);

	return n && to && add_name(n, to, false);
}

/*
 * Note the name under which a backend is reached. A backend has one name a socket:
 * the last. Earlier backends of the same VIP keep theirs, because their replies may
 * be under way. Returns whether there was room.
 */
__noinline int name_peer(struct bpf_sock_addr *ctx, struct udp_name *to)
{
	struct udp_names *first, *n;
	__u32 more, i, last = 0;
	bool done = false;
	__u64 cookie;

	if (!to)
		return 0;
	first = need_names(ctx);
	if (!first)
		return 0;
	more = first->more;
	done = rename(first, to);
	if (!more && (done || add_name(first, to, false)))
		return 1;
	cookie = bpf_get_socket_cookie(ctx);
	for (i = 1; i <= UDP_MORE_EACH && i <= more; i++) {
		if (rename_more(cookie, i, to))
			done = true;
	}
	if (done || add_name(first, to, false))
		return 1;
	for (i = 1; i <= UDP_MORE_EACH && i <= more; i++) {
		if (add_more(cookie, i, to))
			return 1;
	}
	n = more < UDP_MORE_EACH ? make_more_names(ctx, cookie, more + 1) : NULL;
	if (n) {
		first->more = more + 1;
		return add_name(n, to, true);
	}
	last = bpf_get_prandom_u32() % (more + 1);
	n = last ? more_names(cookie, last) : first;
	return add_name(n ?: first, to, true);
}

/* What these names know of the backend at an address, into name. Returns whether they do. */
static __always_inline bool name_in(struct udp_names *n, struct udp_name *name)
{
	bool found = false;
	int i;

	bpf_spin_lock(&n->lock);
	for (i = 0; i < UDP_NAMES; i++) {
		struct udp_name *known = &n->name[i];

		if (known->port == name->port && same(known->addr, name->addr)) {
			*name = *known;
			found = true;
			break;
		}
	}
	bpf_spin_unlock(&n->lock);
	return found;
}

/*
 * What a socket knows of the backend whose address and port stand in name, into it.
 * Returns whether it knows it.
 */
__noinline int name_of(struct bpf_sock_addr *ctx, struct udp_name *name)
{
	struct udp_names *n = first_names(ctx);
	__u32 more, i;
	__u64 cookie;

	if (!n || !name)
		return 0;
	if (name_in(n, name))
		return 1;
	more = n->more;
	if (!more)
		return 0;
	cookie = cookie_of(ctx);
	for (i = 1; i <= UDP_MORE_EACH && i <= more; i++) {
		n = more_names(cookie, i);
		if (n && name_in(n, name))
			return 1;
	}
	return 0;
}

/* Take a backend's name away. */
static __always_inline void drop_name(struct udp_names *n, const struct udp_name *name)
{
	int i;

	bpf_spin_lock(&n->lock);
	for (i = 0; i < UDP_NAMES; i++) {
		struct udp_name *known = &n->name[i];

		if (known->port == name->port && same(known->addr, name->addr)) {
			known->port = 0;
			known->current = 0;
		}
	}
	bpf_spin_unlock(&n->lock);
}

/* The backend whose address and port stand in name has none any more. */
__noinline int unname(struct bpf_sock_addr *ctx, struct udp_name *name)
{
	struct udp_names *n = first_names(ctx);
	__u32 more, i;
	__u64 cookie;

	if (!n || !name)
		return 0;
	drop_name(n, name);
	more = n->more;
	if (!more)
		return 0;
	cookie = cookie_of(ctx);
	for (i = 1; i <= UDP_MORE_EACH && i <= more; i++) {
		n = more_names(cookie, i);
		if (n)
			drop_name(n, name);
	}
	return 0;
}

static __always_inline void drop_more_names(__u64 cookie, __u32 number)
{
	struct udp_more_key key = {.cookie = cookie, .number = number};
	struct udp_names *n = bpf_map_lookup_elem(&udp_more, &key);
	__u64 share;

	if (!n)
		return;
	share = n->share;
	if (!bpf_map_delete_elem(&udp_more, &key))
		give_share_back(share);
}

/* A UDP socket is about to be released; what lies with it goes by itself. */
static __always_inline void forget_names(struct bpf_sock *sk, __u64 cookie)
{
	struct udp_names *n = bpf_sk_storage_get(&udp_names, sk, NULL, 0);
	bool apart = !n;
	__u32 more, i;

	if (!n)
		n = more_names(cookie, 0);
	if (!n)
		return;
	more = n->more;
	if (apart)
		drop_more_names(cookie, 0);
	for (i = 1; i <= UDP_MORE_EACH && i <= more; i++)
		drop_more_names(cookie, i);
}

/* The walk over all sockets has met this one: user space drops the names of those it has not. */
static __always_inline void keep_names(__u64 cookie)
{
	struct udp_names *n = more_names(cookie, 0);
	__u32 i;

	if (n)
		n->seen = walk;
	for (i = 1; i <= UDP_MORE_EACH; i++) {
		n = more_names(cookie, i);
		if (!n)
			break;
		n->seen = walk;
	}
}

#endif
