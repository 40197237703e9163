/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* What a hook on addresses knows of the socket of its caller. */
#ifndef PENTAD_SOCKET_CALLER_H
#define PENTAD_SOCKET_CALLER_H

#include <stdbool.h>

#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>

#include "blame.h"
#include "kernel.h"

#define AF_INET 2
#define AF_INET6 10
#define MAPPED bpf_htonl(0xffff) /* third word of ::ffff:0:0/96, RFC 4291 2.5.5.2 */

static __always_inline bool is_mapped(const __be32 *addr)
{
	return addr[0] == 0 && addr[1] == 0 && addr[2] == MAPPED;
}

static __always_inline bool same(const __be32 *a, const __be32 *b)
{
	return a[3] == b[3] && a[2] == b[2] && a[1] == b[1] && a[0] == b[0];
}

/* The kernel's own socket behind a hook on addresses; NULL before Linux 6.2. */
static __always_inline struct sock *sock_of(struct bpf_sock_addr *ctx)
{
	if (!bpf_cast_to_kern_ctx)
		return NULL;
	return AS_KERNEL(ctx, bpf_sock_addr_kern)->sk;
}

static __always_inline void identify_caller(struct bpf_sock_addr *ctx, struct identity *to)
{
	struct sock *sk = sock_of(ctx);

	if (sk)
		identify(sk, to);
	else
		identify_network(bpf_get_netns_cookie(ctx), to);
}

/*
 * The cookie of a socket, 0 when it has none: then it was never translated. Making
 * one would cost more than all else that is done for sockets of no service. Of
 * MPTCP it is the first subflow that is translated, a socket of the kernel.
 */
static __always_inline __u64 cookie_of(struct bpf_sock_addr *ctx)
{
	struct sock *sk = sock_of(ctx);

	if (!sk)
		return bpf_get_socket_cookie(ctx);
	if (ctx->protocol == IPPROTO_MPTCP) {
		sk = first_subflow(sk);
		return sk ? sk->__sk_common.skc_cookie.counter : 0;
	}
	return sk->__sk_common.skc_cookie.counter;
}

/*
 * A value that the compiler must read here, and not by an offset that it computes
 * from what came before: the verifier would not let it.
 */
#define READ_HERE(value, name)                                                                     \
	({                                                                                         \
		__u32 read = value;                                                                \
		asm volatile("/* " name " */" : "+r"(read));                                       \
		read;                                                                              \
	})

/* Where a socket is connected to, as the kernel has it. */
static __always_inline void peer_of_socket(struct bpf_sock_addr *ctx, struct endpoint *to)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return;
	to->port = sk->dst_port;
	if (sk->family == AF_INET) {
		to->addr[2] = MAPPED;
		to->addr[3] = READ_HERE(sk->dst_ip4, "IPv4");
		return;
	}
	to->addr[0] = sk->dst_ip6[0];
	to->addr[1] = sk->dst_ip6[1];
	to->addr[2] = sk->dst_ip6[2];
	to->addr[3] = sk->dst_ip6[3];
}

#endif
