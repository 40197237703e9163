// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * Answers hosts of a segment that ask who has a VIP: by ARP (RFC 826, 5227) and by
 * neighbour discovery (RFC 4861). It sees each packet that arrives at an interface, and
 * lets all others pass.
 *
 *	vips, leases, devices	what to answer (user space writes)
 *	heard, answers	what was seen and done (this program writes)
 *
 * What this host has of a VIP is a lease: past its end nothing is answered, so that an
 * agent that hangs or dies needs nobody to take its place.
 */
#include <stdbool.h>
#include <stddef.h>

#include <linux/bpf.h>
#include <linux/icmpv6.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define GOES_ON TC_ACT_UNSPEC /* to the next program, and the stack */
#define MAX_VIPS 16384
#define MAX_DEVICES 256
#define MAPPED bpf_htonl(0xffff) /* third word of ::ffff:0:0/96, RFC 4291 2.5.5.2 */

#define ARP_ETHERNET 1 /* linux/if_arp.h needs a C library */
#define ARP_REQUEST 1
#define ARP_REPLY 2

#define ND_SOLICIT 135
#define ND_ADVERT 136
#define ND_TARGET_LLA 2 /* option, RFC 4861 4.6.1 */
#define NA_SOLICITED bpf_htonl(0x40000000)
#define NA_OVERRIDE bpf_htonl(0x20000000)

/* An IPv4 address is ::ffff:a.b.c.d here. */
struct address {
	__be32 word[4];
};

struct vip {
	__u64 owned; /* 0: others have it */
};

/* Until when this host has what it owns. */
struct lease {
	__u64 until; /* ns since boot; the greatest number: for ever */
};

struct device {
	__u8 mac[ETH_ALEN];
	__u8 reserved[2];
};

/* Who said last that it has a VIP, and was not this host. */
struct claim {
	__u64 at; /* ns since boot */
	__u32 ifindex;
	__u8 mac[ETH_ALEN];
	__u8 reserved[2];
};

_Static_assert(sizeof(struct address) == 16 && sizeof(struct device) == 8 &&
		       sizeof(struct claim) == 24,
	       "as user space has them");

struct arp {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_length;
	__u8 protocol_length;
	__be16 op;
	__u8 sha[ETH_ALEN];
	__u8 spa[4];
	__u8 tha[ETH_ALEN];
	__u8 tpa[4];
} __attribute__((packed));

/* A solicitation or advertisement, with the option that an answer has. */
struct nd {
	__u8 type;
	__u8 code;
	__be16 check;
	__be32 flags;
	struct address target;
};

struct nd_option {
	__u8 type;
	__u8 length; /* of 8 bytes */
	__u8 mac[ETH_ALEN];
};

/* Key: a VIP of the file. Writer: user space. Bound: MAX_VIPS. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_VIPS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct address);
	__type(value, struct vip);
} vips SEC(".maps");

/* One entry. Writer: user space, again and again while others could take over. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct lease);
} leases SEC(".maps");

/* Key: an interface that this program is attached to. Writer: user space. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_DEVICES);
	__type(key, __u32);
	__type(value, struct device);
} devices SEC(".maps");

/* Key: a VIP. Writer: this program. Reader: user space. The oldest goes. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_VIPS);
	__type(key, struct address);
	__type(value, struct claim);
} heard SEC(".maps");

#define ANSWERS_ARP 0
#define ANSWERS_ND 1

/* How many questions were answered. Writer: this program. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} answers SEC(".maps");

static __always_inline void count(__u32 what)
{
	__u64 *n = bpf_map_lookup_elem(&answers, &what);

	if (n)
		(*n)++;
}

static __always_inline bool is_ours(const struct vip *v)
{
	__u32 zero = 0;
	struct lease *l = bpf_map_lookup_elem(&leases, &zero);

	return v->owned && l && l->until > bpf_ktime_get_boot_ns();
}

static __always_inline bool same_mac(const __u8 *a, const __u8 *b)
{
	return ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]) |
		(a[5] ^ b[5])) == 0;
}

/* Notes that a neighbour says that it has an address, if that is one of the VIPs. */
static __always_inline void note(const struct address *a, const __u8 *mac, const struct device *own,
				 __u32 ifindex)
{
	struct claim c = {};

	if (same_mac(mac, own->mac) || !bpf_map_lookup_elem(&vips, a))
		return;
	c.at = bpf_ktime_get_boot_ns();
	c.ifindex = ifindex;
	__builtin_memcpy(c.mac, mac, ETH_ALEN);
	bpf_map_update_elem(&heard, a, &c, BPF_ANY);
}

static __always_inline void from_v4(struct address *to, const __u8 *a)
{
	to->word[0] = 0;
	to->word[1] = 0;
	to->word[2] = MAPPED;
	__builtin_memcpy(&to->word[3], a, 4);
}

static __always_inline int answer_arp(struct __sk_buff *skb, const struct device *own)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	struct arp *a = (void *)(eth + 1);
	struct address sender, target;
	__u8 spa[4];
	struct vip *v;

	if ((void *)(a + 1) > end)
		return GOES_ON;
	if (a->hardware != bpf_htons(ARP_ETHERNET) || a->protocol != bpf_htons(ETH_P_IP) ||
	    a->hardware_length != ETH_ALEN || a->protocol_length != 4)
		return GOES_ON;
	from_v4(&sender, a->spa);
	note(&sender, a->sha, own, skb->ifindex);
	from_v4(&target, a->tpa);
	if (a->op != bpf_htons(ARP_REQUEST) || sender.word[3] == target.word[3])
		return GOES_ON;
	v = bpf_map_lookup_elem(&vips, &target);
	if (!v)
		return GOES_ON;
	if (!is_ours(v))
		return TC_ACT_SHOT; /* nor does the kernel answer, whatever it has */
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, own->mac, ETH_ALEN);
	a->op = bpf_htons(ARP_REPLY);
	__builtin_memcpy(spa, a->spa, 4);
	__builtin_memcpy(a->tha, a->sha, ETH_ALEN);
	__builtin_memcpy(a->sha, own->mac, ETH_ALEN);
	__builtin_memcpy(a->spa, a->tpa, 4);
	__builtin_memcpy(a->tpa, spa, 4);
	count(ANSWERS_ARP);
	return bpf_redirect(skb->ifindex, 0);
}

/* The checksum of an ICMPv6 message, over its pseudo header (RFC 8200, 8.1). */
static __always_inline __sum16 nd_checksum(struct ipv6hdr *ip, void *message, __u32 length)
{
	__be32 tail[2] = {bpf_htonl(length), bpf_htonl(IPPROTO_ICMPV6)};
	__s64 sum = bpf_csum_diff(NULL, 0, (__be32 *)&ip->saddr, 32, 0);

	sum = bpf_csum_diff(NULL, 0, tail, sizeof(tail), sum);
	sum = bpf_csum_diff(NULL, 0, message, length, sum);
	sum = (sum & 0xffff) + (sum >> 16 & 0xffff);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

#define ADVERT_SIZE (sizeof(struct nd) + sizeof(struct nd_option))

static __always_inline int answer_nd(struct __sk_buff *skb, const struct device *own)
{
	const __u32 size = sizeof(struct ethhdr) + sizeof(struct ipv6hdr) + ADVERT_SIZE;
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ethhdr *eth = data;
	struct ipv6hdr *ip = (void *)(eth + 1);
	struct nd *n = (void *)(ip + 1);
	struct nd_option *o;
	struct address target, asker;
	__u8 mac[ETH_ALEN];
	struct vip *v;

	if ((void *)(n + 1) > end || ip->nexthdr != IPPROTO_ICMPV6 || ip->hop_limit != 255 ||
	    n->code != 0)
		return GOES_ON;
	target = n->target;
	if (n->type == ND_ADVERT) {
		note(&target, eth->h_source, own, skb->ifindex);
		return GOES_ON;
	}
	if (n->type != ND_SOLICIT)
		return GOES_ON;
	v = bpf_map_lookup_elem(&vips, &target);
	if (!v)
		return GOES_ON;
	if (!is_ours(v))
		return TC_ACT_SHOT; /* nor does the kernel answer, for a neighbour by proxy */
	__builtin_memcpy(mac, eth->h_source, ETH_ALEN);
	__builtin_memcpy(&asker, &ip->saddr, sizeof(asker));
	/* Other options of the question are of no use to the answer. */
	if (bpf_skb_change_tail(skb, size, 0))
		return GOES_ON;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	if (data + size > end && bpf_skb_pull_data(skb, size))
		return GOES_ON;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	eth = data;
	ip = (void *)(eth + 1);
	n = (void *)(ip + 1);
	o = (void *)(n + 1);
	if ((void *)(o + 1) > end)
		return GOES_ON;
	__builtin_memcpy(eth->h_dest, mac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, own->mac, ETH_ALEN);
	ip->payload_len = bpf_htons(ADVERT_SIZE);
	__builtin_memcpy(&ip->saddr, &target, sizeof(target));
	__builtin_memcpy(&ip->daddr, &asker, sizeof(asker));
	n->flags = NA_SOLICITED | NA_OVERRIDE;
	/* Who has no address yet asks whether it may have this one: all are told that it
	 * is taken (RFC 4861, 7.2.4).
	 */
	if ((asker.word[0] | asker.word[1] | asker.word[2] | asker.word[3]) == 0) {
		ip->daddr.in6_u.u6_addr32[0] = bpf_htonl(0xff020000);
		ip->daddr.in6_u.u6_addr32[3] = bpf_htonl(1);
		n->flags = NA_OVERRIDE;
		eth->h_dest[0] = 0x33;
		eth->h_dest[1] = 0x33;
		eth->h_dest[2] = 0;
		eth->h_dest[3] = 0;
		eth->h_dest[4] = 0;
		eth->h_dest[5] = 1;
	}
	n->type = ND_ADVERT;
	n->check = 0;
	o->type = ND_TARGET_LLA;
	o->length = 1;
	__builtin_memcpy(o->mac, own->mac, ETH_ALEN);
	n->check = nd_checksum(ip, n, ADVERT_SIZE);
	count(ANSWERS_ND);
	return bpf_redirect(skb->ifindex, 0);
}

SEC("tc")
int neighbours(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct device *own;

	/* Most packets are neither: those are let go before anything is looked up. */
	if (skb->protocol != bpf_htons(ETH_P_ARP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return GOES_ON;
	/* What is tagged is of another interface, but for what has a priority only. */
	if (skb->vlan_present && ((skb->vlan_tci & 0xfff) != 0 || bpf_skb_vlan_pop(skb)))
		return GOES_ON;
	own = bpf_map_lookup_elem(&devices, &ifindex);
	if (!own)
		return GOES_ON;
	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return answer_arp(skb, own);
	return answer_nd(skb, own);
}

char LICENSE[] SEC("license") = "GPL";
