// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * Counts packets that the kernel drops: each time that one is freed for a reason
 * (tracepoint skb:kfree_skb, Linux 5.17), by that reason and by its addresses.
 *
 *	ours		addresses that are of interest (user space writes)
 *	totals		drops by reason, whatever their addresses (this program writes)
 *	counts		drops by reason and addresses (this program writes)
 *	homeless	drops for which counts had no room
 *
 * It only reads packets, and runs as long as somebody looks.
 */
#include <stdbool.h>

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#define MAX_COUNTS 65536
#define MAX_OURS 262144
#define MAX_REASONS 256          /* the last one: all that are higher */
#define MAPPED bpf_htonl(0xffff) /* third word of ::ffff:0:0/96, RFC 4291 2.5.5.2 */

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

/* include/net/net_namespace.h, include/linux/netdevice.h, include/linux/skbuff.h */
struct ns_common {
	unsigned int inum;
};

struct net {
	struct ns_common ns;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct net_device {
	possible_net_t nd_net;
	int ifindex;
};

struct sk_buff {
	struct net_device *dev;
	unsigned int len;
	__be16 protocol;
	__u16 network_header;
	unsigned char *head;
};

#pragma clang attribute pop

/* An IPv4 address is ::ffff:a.b.c.d here. */
struct address {
	__be32 word[4];
};

/* Of whom a drop is. */
struct what {
	struct address from, to;
	__u32 reason;
	__u32 namespace; /* of the network; 0: not known */
	__u32 interface; /* in it; 0: none */
	__be16 port;     /* of the destination */
	__u8 protocol;   /* of IP; 0: not known */
	__u8 family;     /* 4, 6; 0: it is no packet of IP, and there are no addresses */
};

struct count {
	__u64 packets;
	__u64 bytes;
	__u64 last; /* ns since boot */
};

_Static_assert(sizeof(struct what) == 48, "shared with user space");
_Static_assert(sizeof(struct count) == 24, "shared with user space");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_OURS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct address);
	__type(value, __u8);
} ours SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_REASONS);
	__type(key, __u32);
	__type(value, __u64);
} totals SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_COUNTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct what);
	__type(value, struct count);
} counts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} homeless SEC(".maps");

/* A packet that was freed because nobody needs it any more; -1: none is freed so. */
volatile const __s32 consumed = -1;
volatile const bool everybody; /* addresses do not matter */

static void set_v4(struct address *to, __be32 a)
{
	to->word[2] = MAPPED;
	to->word[3] = a;
}

/* Ports are read of first fragments only: others have none. */
static void read_v4(const unsigned char *at, struct what *w)
{
	unsigned char head[20];

	if (bpf_probe_read_kernel(head, sizeof(head), at) || head[0] >> 4 != 4)
		return;
	w->family = 4;
	w->protocol = head[9];
	set_v4(&w->from, *(__be32 *)(head + 12));
	set_v4(&w->to, *(__be32 *)(head + 16));
	if ((head[6] & 0x1f) || head[7])
		return;
	if (w->protocol == IPPROTO_TCP || w->protocol == IPPROTO_UDP)
		bpf_probe_read_kernel(&w->port, sizeof(w->port), at + (head[0] & 0xf) * 4 + 2);
}

/* Extension headers are not walked: with one the protocol is that of the header. */
static void read_v6(const unsigned char *at, struct what *w)
{
	unsigned char head[40];

	if (bpf_probe_read_kernel(head, sizeof(head), at) || head[0] >> 4 != 6)
		return;
	w->family = 6;
	w->protocol = head[6];
	__builtin_memcpy(&w->from, head + 8, 16);
	__builtin_memcpy(&w->to, head + 24, 16);
	if (w->protocol == IPPROTO_TCP || w->protocol == IPPROTO_UDP)
		bpf_probe_read_kernel(&w->port, sizeof(w->port), at + 40 + 2);
}

static bool concerns(const struct what *w)
{
	return everybody || (w->family && (bpf_map_lookup_elem(&ours, &w->to) ||
					   bpf_map_lookup_elem(&ours, &w->from)));
}

static void add(void *map, __u32 at)
{
	__u64 *n = bpf_map_lookup_elem(map, &at);

	if (n)
		(*n)++;
}

static void count_one(const struct what *w, unsigned int bytes)
{
	struct count first = {}, *c = bpf_map_lookup_elem(&counts, w);

	if (!c) {
		/* Another processor may have been faster: then its entry is found. */
		bpf_map_update_elem(&counts, w, &first, BPF_NOEXIST);
		c = bpf_map_lookup_elem(&counts, w);
	}
	if (!c) {
		add(&homeless, 0);
		return;
	}
	__sync_fetch_and_add(&c->packets, 1);
	__sync_fetch_and_add(&c->bytes, bytes);
	c->last = bpf_ktime_get_boot_ns();
}

SEC("tp_btf/kfree_skb")
int BPF_PROG(on_drop, struct sk_buff *skb, void *location, int reason)
{
	struct what w = {.reason = reason};
	struct net_device *dev = skb->dev;
	const unsigned char *at = skb->head + skb->network_header;

	(void)ctx;
	(void)location;
	if (reason == consumed)
		return 0;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		read_v4(at, &w);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		read_v6(at, &w);
	if (!concerns(&w))
		return 0;
	add(&totals, w.reason < MAX_REASONS ? w.reason : MAX_REASONS - 1);
	if (dev) {
		w.interface = BPF_CORE_READ(dev, ifindex);
		w.namespace = BPF_CORE_READ(dev, nd_net.net, ns.inum);
	}
	count_one(&w, skb->len);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
