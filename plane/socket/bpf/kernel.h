/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What these programs read of the kernel's own structures. The loader finds the
 * offsets in the running kernel's type information.
 */
#ifndef PENTAD_SOCKET_KERNEL_H
#define PENTAD_SOCKET_KERNEL_H

#include <linux/types.h>
#include <bpf/bpf_core_read.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	long long counter;
} atomic64_t;

/* include/linux/uidgid_types.h */
typedef struct {
	__u32 val;
} kuid_t;

/* include/linux/user_namespace.h */
struct user_namespace {
	struct user_namespace *parent;
	int level; /* 0: the host's */
	kuid_t owner;
};

/* include/net/netns/ipv4.h */
struct netns_ipv4 {
	__u8 sysctl_tcp_syn_retries;
};

/* include/net/net_namespace.h */
struct net {
	struct netns_ipv4 ipv4;
	__u64 net_cookie;
	struct user_namespace *user_ns; /* whose root may configure it */
};

typedef struct {
	struct net *net;
} possible_net_t;

/* include/linux/cred.h, include/linux/fs.h, include/linux/net.h */
struct cred {
	kuid_t uid;
	struct user_namespace *user_ns;
};

struct file {
	const struct cred *f_cred;
};

struct socket___kernel {
	struct file *file;
};

/* include/linux/kernfs.h, include/linux/cgroup-defs.h */
struct kernfs_node {
	__u64 id;
};

struct cgroup {
	struct kernfs_node *kn;
};

struct sock_cgroup_data {
	struct cgroup *cgroup;
};

struct in6_addr {
	union {
		__be32 u6_addr32[4];
	} in6_u;
};

/* include/net/sock.h */
enum sock_flags {
	SOCK_KEEPOPEN = 3, /* SO_KEEPALIVE is on */
};

struct sock_common {
	__be32 skc_daddr;
	__be16 skc_dport;
	unsigned short skc_family;
	struct in6_addr skc_v6_daddr;
	possible_net_t skc_net;
	unsigned long skc_flags; /* bits, enum sock_flags */
	atomic64_t skc_cookie;
};

struct sock {
	struct sock_common __sk_common;
	struct socket___kernel *sk_socket;
	struct sock_cgroup_data sk_cgrp_data;
	kuid_t sk_uid;
	int sk_err;
	/* A bit-field until Linux 6.4, a byte since: read it with BPF_CORE_READ_BITFIELD. */
	__u8 sk_userlocks : 4;
};

/* net/mptcp/protocol.h */
struct mptcp_sock {
	struct sock *first; /* its first subflow, which is a socket of the kernel */
};

/* include/net/inet_connection_sock.h */
struct inet_connection_sock {
	struct {
		__u32 lrcvtime; /* jiffies, when the last data came */
	} icsk_ack;
	__u8 icsk_syn_retries; /* 0: the process has not set TCP_SYNCNT */
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
};

/* include/linux/filter.h: what a context of sock_ops really is */
struct bpf_sock_ops_kern {
	struct sock *sk;
};

/* and of the hooks on addresses */
struct bpf_sock_addr_kern {
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

/*
 * A context as what it really is, to be read only. The verifier trusts what is reached
 * from bpf_cast_to_kern_ctx(), which would let us hand it to helpers; but it searches
 * all types of the kernel at each step of the way, each time that it comes by.
 */
#define AS_KERNEL(ctx, type)                                                                       \
	((struct type *)bpf_rdonly_cast(bpf_cast_to_kern_ctx(ctx),                                 \
					bpf_core_type_id_kernel(struct type)))

/* The first subflow of an MPTCP socket, or NULL. */
static inline struct sock *first_subflow(struct sock *sk)
{
	struct mptcp_sock *m;

	if (!bpf_rdonly_cast || !bpf_core_type_exists(struct mptcp_sock))
		return NULL;
	m = (struct mptcp_sock *)bpf_rdonly_cast(sk, bpf_core_type_id_kernel(struct mptcp_sock));
	return m->first;
}

/* net/core/filter.c: close a socket from within an iterator (Linux 6.5). */
extern int bpf_sock_destroy(struct sock_common *sock) __attribute__((weak, section(".ksyms")));

#endif
