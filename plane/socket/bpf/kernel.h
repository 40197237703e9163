/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What these programs read of the kernel's own structures. The loader finds the
 * offsets in the running kernel's type information.
 */
#ifndef PENTAD_SOCKET_KERNEL_H
#define PENTAD_SOCKET_KERNEL_H

#include <linux/types.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	long long counter;
} atomic64_t;

struct sock_common {
	__be16 skc_dport;
	atomic64_t skc_cookie;
};

struct sock {
	struct sock_common __sk_common;
	int sk_err;
};

/* include/net/inet_connection_sock.h */
struct inet_connection_sock {
	struct {
		__u32 lrcvtime; /* jiffies, when the last data came */
	} icsk_ack;
};

struct minmax_sample {
	__u32 v;
};

struct minmax {
	struct minmax_sample s[3];
};

/* include/linux/tcp.h */
struct tcp_sock {
	struct inet_connection_sock inet_conn;
	struct minmax rtt_min;  /* us */
	__u32 srtt_us;          /* smoothed round trip time, us << 3 */
	__u32 lsndtime;         /* jiffies, when the last data was sent */
	__u64 first_tx_mstamp;  /* us, when what was acknowledged last was sent; 0: nothing was */
	__u64 delivered_mstamp; /* us, when something was acknowledged last */
	struct {
		__u64 time; /* us; until a window is full: when the first data came */
	} rcv_rtt_est;
	__u64 bytes_sent;
	__u64 bytes_received;
	_Bool is_mptcp;
};

/* include/linux/filter.h: what a context of sock_ops really is */
struct bpf_sock_ops_kern {
	struct sock *sk;
};

struct udp_sock;
struct seq_file;

/* include/linux/bpf.h, net/ipv4/tcp_ipv4.c, net/ipv4/udp.c */
struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
};

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *udp_sk;
};

#pragma clang attribute pop

/*
 * kernel/bpf/helpers.c (Linux 6.2): what a context really is, and to look at it as
 * something that it is part of.
 */
extern void *bpf_cast_to_kern_ctx(void *ctx) __attribute__((weak, section(".ksyms")));
extern void *bpf_rdonly_cast(const void *object, __u32 type)
	__attribute__((weak, section(".ksyms")));

/* net/core/filter.c: close a socket from within an iterator (Linux 6.5). */
extern int bpf_sock_destroy(struct sock_common *sock) __attribute__((weak, section(".ksyms")));

#endif
