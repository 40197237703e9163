// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * Direct routing. This program sees each packet that arrives at an interface. One to a
 * VIP goes on, unchanged but for its link-layer addresses, to a real server, which has
 * the VIP too and answers the client by itself.
 *
 *	addresses, vips --> states --> tables --> reals, leaving
 *						what to do (user space writes)
 *	flows, fragments, *_counters				what was done (this program writes)
 *
 * The hash of a packet's addresses and ports is its place in the table of its VIP, which
 * is the same on all directors: no packet needs to be remembered. When a table changes
 * the one before it stays for a while. A packet that begins a connection goes by the
 * new one; any other goes by the old one, and its connection is remembered if both differ.
 */
#include <stdbool.h>
#include <stddef.h>

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2
#define AF_INET6 10
#define MAPPED bpf_htonl(0xffff) /* third word of ::ffff:0:0/96, RFC 4291 2.5.5.2 */
#define ICMP_ECHOREPLY 0
#define ICMP_DEST_UNREACH 3
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12
#define ICMP_HEADER 8 /* of any type, that of IPv6 too */
#define IP_MF 0x2000
#define IP_OFFSET 0x1fff
#define IPV6_MORE 1
#define NSEC_PER_SEC 1000000000ULL

/* The size of a table: a prime (Maglev, section 3.4). */
#define SLOTS 65537
#define CHUNK 2048
#define CHUNKS 33
#define MAX_VIPS 16384
#define MAX_TABLES 16384
#define MAX_REALS 65535
#define MAX_FLOWS 262144
#define MAX_FRAGMENTS 8192
#define MAX_LEAVING 262144
#define PACKET_HOST 0 /* linux/if_packet.h */
#define NAME_LENGTH 160

_Static_assert(CHUNK *CHUNKS >= SLOTS && CHUNK * (CHUNKS - 1) < SLOTS, "a table is its chunks");

/* An IPv4 address is ::ffff:a.b.c.d here; ports are in network order. */
struct address {
	__be32 word[4];
};

struct vip_key {
	struct address addr;
	__be16 port;
	__u8 protocol;
	__u8 reserved;
};

#define REAL_LOCAL 1 /* it is this host */

/* What a real server is to one VIP that it has left, or is leaving. */
#define LEAVES_DRAINS 1 /* it keeps what it has */
#define LEAVES_DOWN 2

struct leaving_key {
	__u32 vip;
	__u32 real; /* one more than its index */
};

struct real {
	struct address addr;
	__u32 ifindex; /* 0: there is no way to it */
	__u32 traits;
	__u32 generation; /* grows each time that the place has another real server */
	__u32 reserved;
};

struct chunk {
	__u16 real[CHUNK]; /* one more than its index; 0: none */
};

/*
 * The table that a VIP has, and the one that it had, each one more than its index, with a
 * bit that says what is hashed for it; and when that changed last, in seconds since boot.
 */
#define STATE_SOURCE_HASH 0x8000 /* the client's address alone */

struct state {
	__u16 table;
	__u16 previous;
	__u32 changed;
};

/*
 * Of datagrams it is not known whether they begin something. What was there before a
 * change has sent something again within this time; what is heard of later is new.
 */
#define DATAGRAMS_WITHIN 30

/*
 * A SYN of a connection that has sent something within this time is none of a new one:
 * somebody else may have sent it.
 */
#define REOPENED_WITHIN 60

struct flow {
	__u32 real; /* one more than its index */
	__u32 generation;
	__u32 vip;
	__u32 seen; /* seconds since boot, when a packet of it came last */
};

struct fragment_key {
	struct address from;
	struct address to;
	__u32 id;
	__u32 protocol;
};

struct counters {
	__u64 packets;
	__u64 bytes;
	__u64 opened; /* connections, by their SYN */
};

struct vip_info {
	char name[NAME_LENGTH]; /* of the service; ends with 0 */
};

enum drop {
	DROP_NO_REAL,   /* no real server is usable */
	DROP_NO_WAY,    /* the real server is not on a segment of this host */
	DROP_TTL,       /* it has passed too many hosts: directors send it to each other */
	DROP_MALFORMED, /* it is shorter than its headers */
	DROP_END,
};

_Static_assert(sizeof(struct vip_key) == 20 && sizeof(struct state) == 8, "shared with Go");

#define ADDRESS_OWN 1    /* the host has it, and answers by itself */
#define ADDRESS_ECHOES 2 /* pings of it are answered here */

/* The addresses of VIPs, and what they are to this host. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct address);
	__type(value, __u8);
	__uint(max_entries, MAX_VIPS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} addresses SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct vip_key);
	__type(value, __u32); /* the index of states and vip_counters */
	__uint(max_entries, MAX_VIPS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} vips SEC(".maps");

/* By the index of a VIP. One word, which is written at once. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct state);
	__uint(max_entries, MAX_VIPS);
} states SEC(".maps");

/* By the index of a VIP, for people. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct vip_info);
	__uint(max_entries, MAX_VIPS);
} vip_infos SEC(".maps");

/* Its chunks, by number. */
struct table {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct chunk));
	__uint(max_entries, CHUNKS);
};

/* Tables never change: a VIP gets another one. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__type(key, __u32);
	__uint(max_entries, MAX_TABLES);
	__array(values, struct table);
} tables SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct real);
	__uint(max_entries, MAX_REALS);
} reals SEC(".maps");

/*
 * Connections that do not go where their hash says, by the hash of all that they are:
 * whoever makes his own the same as another's has it go elsewhere, and nobody else's.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, __u64);
	__type(value, struct flow);
	__uint(max_entries, MAX_FLOWS);
} flows SEC(".maps");

/* Who is not, or not fully, a real server of a VIP that its tables of before name. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct leaving_key);
	__type(value, __u8);
	__uint(max_entries, MAX_LEAVING);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} leaving SEC(".maps");

/* Where the first fragment of a packet went. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct fragment_key);
	__type(value, __u32);
	__uint(max_entries, MAX_FRAGMENTS);
} fragments SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct counters);
	__uint(max_entries, MAX_VIPS);
} vip_counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct counters);
	__uint(max_entries, MAX_REALS);
} real_counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, DROP_END);
} drops SEC(".maps");

/*
 * How many connections one processor may remember a second: who sends nothing but SYN
 * must not drive out those that are there.
 */
#define REMEMBERED_PER_SEC 20000

struct allowance {
	__u64 second;
	__u64 used;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct allowance);
	__uint(max_entries, 1);
} allowances SEC(".maps");

/* What is known of a packet to a VIP. */
struct packet {
	struct address from;
	struct address to;
	__be16 from_port;
	__be16 to_port;
	__u8 protocol;
	bool opens; /* a SYN */
	bool first; /* of several fragments */
	__u32 id;   /* of those */
	__u32 length;
	__u8 ttl;
};

/* Other programs at the interface, and then the host, have it as it is. */
#define GOES_ON TC_ACT_UNSPEC

static __always_inline int drop(enum drop why)
{
	__u32 key = why;
	__u64 *n = bpf_map_lookup_elem(&drops, &key);

	if (n)
		*n += 1;
	return TC_ACT_SHOT;
}

static __always_inline void count(void *map, __u32 index, const struct packet *p)
{
	struct counters *c = bpf_map_lookup_elem(map, &index);

	if (!c)
		return;
	c->packets += 1;
	c->bytes += p->length;
	c->opened += p->opens;
}

static __always_inline __u32 rotate(__u32 v, __u32 by)
{
	return v << by | v >> (32 - by);
}

/* MurmurHash3 (A. Appleby, in the public domain), 32 bits, of words. */
static __always_inline __u32 mix(__u32 hash, __u32 word)
{
	word *= 0xcc9e2d51;
	word = rotate(word, 15);
	word *= 0x1b873593;
	hash = rotate(hash ^ word, 13);
	return hash * 5 + 0xe6546b64;
}

static __always_inline __u32 finish(__u32 hash)
{
	hash = (hash ^ hash >> 16) * 0x85ebca6b;
	hash = (hash ^ hash >> 13) * 0xc2b2ae35;
	return hash ^ hash >> 16;
}

static __always_inline bool is_mapped(const struct address *a)
{
	return a->word[2] == MAPPED && !a->word[0] && !a->word[1];
}

/* The same on every director: user space computes it, too, to explain. */
static __always_inline __u32 hash_of(const struct packet *p, __u32 seed, bool source_only)
{
	__u32 h = seed;

	if (!is_mapped(&p->from)) {
		h = mix(h, bpf_ntohl(p->from.word[0]));
		h = mix(h, bpf_ntohl(p->from.word[1]));
		h = mix(h, bpf_ntohl(p->from.word[2]));
	}
	h = mix(h, bpf_ntohl(p->from.word[3]));
	if (source_only)
		return finish(h);
	if (!is_mapped(&p->to)) {
		h = mix(h, bpf_ntohl(p->to.word[0]));
		h = mix(h, bpf_ntohl(p->to.word[1]));
		h = mix(h, bpf_ntohl(p->to.word[2]));
	}
	h = mix(h, bpf_ntohl(p->to.word[3]));
	h = mix(h, (__u32)bpf_ntohs(p->from_port) << 16 | bpf_ntohs(p->to_port));
	return finish(mix(h, p->protocol));
}

#define SEED 0x7065
#define SEED_OF_FLOWS 0x6e74

/* The place of a hash in a table: one more than the index of its real server, or 0. */
static __always_inline __u32 look_up(__u32 table, __u32 hash)
{
	__u32 slot = hash % SLOTS, number = slot / CHUNK, index = table - 1;
	struct chunk *c;
	void *inner;

	if (!table)
		return 0;
	inner = bpf_map_lookup_elem(&tables, &index);
	if (!inner)
		return 0;
	c = bpf_map_lookup_elem(inner, &number);
	return c ? c->real[slot % CHUNK] : 0;
}

static __always_inline struct real *real_at(__u32 place)
{
	__u32 index = place - 1;

	return place ? bpf_map_lookup_elem(&reals, &index) : NULL;
}

static __always_inline bool may_remember(void)
{
	__u64 second = bpf_ktime_get_coarse_ns() / NSEC_PER_SEC;
	__u32 key = 0;
	struct allowance *a = bpf_map_lookup_elem(&allowances, &key);

	if (!a)
		return false;
	if (a->second != second) {
		a->second = second;
		a->used = 0;
	}
	return a->used++ < REMEMBERED_PER_SEC;
}

/* How a real server leaves a VIP, by its place; 0: it does not. */
static __always_inline __u8 leaves(__u32 vip, __u32 place)
{
	struct leaving_key key = {
		.vip = vip,
		.real = place,
	};
	__u8 *how;

	if (!place)
		return LEAVES_DOWN;
	how = bpf_map_lookup_elem(&leaving, &key);
	return how ? *how : 0;
}

/* Whether it keeps what it has. */
static __always_inline bool keeps(const struct packet *p, __u32 vip, __u32 place)
{
	__u8 how = leaves(vip, place);

	/* Of datagrams it is not known whether they begin something: they leave. */
	return !how || (how == LEAVES_DRAINS && p->protocol == IPPROTO_TCP);
}

/* A flow that is remembered is that of this packet, and goes where it went. */
static __always_inline bool holds(const struct flow *f, const struct packet *p, __u32 vip,
				  __u32 now)
{
	struct real *r = real_at(f->real);

	if (!r || r->generation != f->generation || f->vip != vip || !keeps(p, vip, f->real))
		return false;
	return !p->opens || now - f->seen < REOPENED_WITHIN;
}

static __always_inline bool remember(__u64 key, __u32 vip, __u32 place, __u32 now)
{
	struct real *r = real_at(place);
	struct flow fresh = {
		.real = place,
		.vip = vip,
		.seen = now,
	};

	if (!r || !may_remember())
		return false;
	fresh.generation = r->generation;
	return !bpf_map_update_elem(&flows, &key, &fresh, BPF_ANY);
}

/*
 * While a VIP has two tables: the real server of a packet, by its places in both. A
 * packet that was seen before goes where it went.
 */
static __always_inline __u32 choose_of_two(const struct packet *p, __u32 vip, __u32 current,
					   __u32 previous, __u32 changed)
{
	__u64 key = (__u64)hash_of(p, SEED, false) << 32 | hash_of(p, SEED_OF_FLOWS, false);
	__u32 now = bpf_ktime_get_coarse_ns() / NSEC_PER_SEC;
	struct flow *f = bpf_map_lookup_elem(&flows, &key);
	bool is_tcp = p->protocol == IPPROTO_TCP;

	if (f && holds(f, p, vip, now)) {
		if (f->seen != now)
			f->seen = now;
		return f->real;
	}
	/* It was an earlier one of the same ports. */
	if (f && p->opens)
		bpf_map_delete_elem(&flows, &key);
	if (current == previous)
		return current;
	if (!p->opens && keeps(p, vip, previous) &&
	    (is_tcp || (__s32)(now - changed) < DATAGRAMS_WITHIN)) {
		remember(key, vip, previous, now);
		return previous;
	}
	/* What goes by the new table is told from what goes by the old one; without that it
	 * would go there from its second packet on. */
	if ((p->opens || !is_tcp) && !remember(key, vip, current, now) && !leaves(vip, previous))
		return previous;
	return current;
}

/* Each hop takes one, so that directors that send to each other come to an end. */
static __always_inline int age(struct __sk_buff *skb, const struct packet *p)
{
	const __u32 ttl = ETH_HLEN + offsetof(struct iphdr, ttl);
	__u8 left = p->ttl - 1;

	if (p->ttl <= 1)
		return -1;
	if (skb->protocol != bpf_htons(ETH_P_IP))
		return bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, hop_limit),
					   &left, sizeof(left), 0);
	if (bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check),
				bpf_htons(p->ttl << 8), bpf_htons(left << 8), 2))
		return -1;
	return bpf_skb_store_bytes(skb, ttl, &left, sizeof(left), 0);
}

static __always_inline int send(struct __sk_buff *skb, const struct packet *p, __u32 place)
{
	struct bpf_redir_neigh hop = {};
	struct real *r = real_at(place);

	if (!r)
		return drop(DROP_NO_REAL);
	if (r->traits & REAL_LOCAL) {
		count(&real_counters, place - 1, p);
		return GOES_ON;
	}
	if (!r->ifindex)
		return drop(DROP_NO_WAY);
	if (age(skb, p))
		return drop(DROP_TTL);
	count(&real_counters, place - 1, p);
	if (is_mapped(&r->addr)) {
		hop.nh_family = AF_INET;
		hop.ipv4_nh = r->addr.word[3];
	} else {
		hop.nh_family = AF_INET6;
		__builtin_memcpy(hop.ipv6_nh, r->addr.word, sizeof(hop.ipv6_nh));
	}
	return bpf_redirect_neigh(r->ifindex, &hop, sizeof(hop), 0);
}

static __always_inline void note_fragment(const struct packet *p, __u32 place)
{
	struct fragment_key k = {
		.from = p->from,
		.to = p->to,
		.id = p->id,
		/* IPv6 numbers packets of a pair of hosts, RFC 8200 section 4.5. */
		.protocol = is_mapped(&p->to) ? p->protocol : 0,
	};

	bpf_map_update_elem(&fragments, &k, &place, BPF_ANY);
}

/* The place of a packet in a table. */
static __always_inline __u32 place_in(const struct packet *p, __u32 table)
{
	return look_up(table & ~STATE_SOURCE_HASH, hash_of(p, SEED, table & STATE_SOURCE_HASH));
}

/* A packet whose ports are known. */
static __always_inline int direct_to(struct __sk_buff *skb, const struct packet *p)
{
	struct vip_key key = {
		.addr = p->to,
		.port = p->to_port,
		.protocol = p->protocol,
	};
	__u32 *index = bpf_map_lookup_elem(&vips, &key);
	struct state *s, now;
	__u32 place, vip;

	if (!index)
		return GOES_ON;
	vip = *index;
	s = bpf_map_lookup_elem(&states, &vip);
	if (!s)
		return GOES_ON;
	*(__u64 *)&now = *(volatile __u64 *)s;
	count(&vip_counters, vip, p);
	place = place_in(p, now.table);
	if (now.previous)
		place = choose_of_two(p, vip, place, place_in(p, now.previous), now.changed);
	if (p->first)
		note_fragment(p, place);
	return send(skb, p, place);
}

/* A fragment that is not the first follows that. */
static __always_inline int follow(struct __sk_buff *skb, const struct packet *p)
{
	struct fragment_key k = {
		.from = p->from,
		.to = p->to,
		.id = p->id,
		/* IPv6 numbers packets of a pair of hosts, RFC 8200 section 4.5. */
		.protocol = is_mapped(&p->to) ? p->protocol : 0,
	};
	__u32 *place = bpf_map_lookup_elem(&fragments, &k);

	/* The first may have been for somebody else. */
	return place ? send(skb, p, *place) : GOES_ON;
}

/* Ports stand first in TCP and UDP; at is where they do. */
static __always_inline int with_ports(struct __sk_buff *skb, struct packet *p, __u32 at)
{
	struct tcphdr h = {};

	if (p->protocol == IPPROTO_TCP) {
		if (bpf_skb_load_bytes(skb, at, &h, sizeof(h)))
			return drop(DROP_MALFORMED);
		p->opens = h.syn && !h.ack;
	} else if (bpf_skb_load_bytes(skb, at, &h, 4)) {
		return drop(DROP_MALFORMED);
	}
	p->from_port = h.source;
	p->to_port = h.dest;
	return direct_to(skb, p);
}

/*
 * An ICMP error is about a packet that a real server has sent from the VIP: it goes to
 * that. at is where the packet that it quotes begins to have ports.
 */
static __always_inline int about(struct __sk_buff *skb, struct packet *p, __u32 at)
{
	__be16 ports[2];

	if (p->protocol != IPPROTO_TCP && p->protocol != IPPROTO_UDP)
		return GOES_ON;
	if (bpf_skb_load_bytes(skb, at, ports, sizeof(ports)))
		return drop(DROP_MALFORMED);
	p->to_port = ports[0];
	p->from_port = ports[1];
	return direct_to(skb, p);
}

static __always_inline void set4(struct address *to, __be32 addr)
{
	to->word[0] = 0;
	to->word[1] = 0;
	to->word[2] = MAPPED;
	to->word[3] = addr;
}

static __always_inline __u8 kind_of(const struct address *a)
{
	__u8 *kind = bpf_map_lookup_elem(&addresses, a);

	return kind ? *kind : 0;
}

/* Exchange some bytes, up to 16, at two places of a packet. */
static __always_inline int swap(struct __sk_buff *skb, __u32 a, __u32 b, const __u32 size)
{
	__u8 left[16], right[16];

	if (bpf_skb_load_bytes(skb, a, left, size) || bpf_skb_load_bytes(skb, b, right, size))
		return -1;
	if (bpf_skb_store_bytes(skb, a, right, size, 0))
		return -1;
	return bpf_skb_store_bytes(skb, b, left, size, 0);
}

/*
 * Answer a ping of a VIP that this host has not: its type becomes that of an answer, and
 * it goes back where it came from. Addresses that change places change no checksum.
 */
static __always_inline int echo(struct __sk_buff *skb, const struct packet *p, __u32 at, __u8 from,
				__u8 to)
{
	const __u32 type = at, sum = at + 2;
	bool ipv4 = is_mapped(&p->to);
	int failed;

	if (ipv4)
		failed = swap(skb, ETH_HLEN + offsetof(struct iphdr, saddr),
			      ETH_HLEN + offsetof(struct iphdr, daddr), 4);
	else
		failed = swap(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr),
			      ETH_HLEN + offsetof(struct ipv6hdr, daddr), 16);
	if (failed || swap(skb, 0, ETH_ALEN, ETH_ALEN) || age(skb, p))
		return drop(DROP_MALFORMED);
	if (bpf_l4_csum_replace(skb, sum, bpf_htons(from << 8), bpf_htons(to << 8), 2) ||
	    bpf_skb_store_bytes(skb, type, &to, sizeof(to), 0))
		return drop(DROP_MALFORMED);
	return bpf_redirect(skb->ifindex, 0);
}

/* RFC 792: the errors quote the header of the packet, and eight bytes. */
static __always_inline int icmp4(struct __sk_buff *skb, struct packet *p, __u32 at, __u8 kind)
{
	struct iphdr inner;
	__u8 type;

	if (bpf_skb_load_bytes(skb, at, &type, sizeof(type)))
		return drop(DROP_MALFORMED);
	if (type == ICMP_ECHO && kind == ADDRESS_ECHOES)
		return echo(skb, p, at, ICMP_ECHO, ICMP_ECHOREPLY);
	if (type != ICMP_DEST_UNREACH && type != ICMP_TIME_EXCEEDED && type != ICMP_PARAMETERPROB)
		return GOES_ON;
	at += ICMP_HEADER;
	if (bpf_skb_load_bytes(skb, at, &inner, sizeof(inner)) || inner.ihl < 5)
		return drop(DROP_MALFORMED);
	if (inner.frag_off & bpf_htons(IP_OFFSET))
		return GOES_ON;
	set4(&p->to, inner.saddr);
	set4(&p->from, inner.daddr);
	p->protocol = inner.protocol;
	return about(skb, p, at + inner.ihl * 4);
}

static __always_inline int direct4(struct __sk_buff *skb)
{
	struct packet p = {.length = skb->len};
	__u32 at = ETH_HLEN;
	struct iphdr ip;
	__u8 kind;

	if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)))
		return GOES_ON;
	set4(&p.to, ip.daddr);
	kind = kind_of(&p.to);
	if (!kind)
		return GOES_ON;
	if (ip.ihl < 5)
		return drop(DROP_MALFORMED);
	set4(&p.from, ip.saddr);
	p.protocol = ip.protocol;
	p.id = ip.id;
	p.ttl = ip.ttl;
	if (ip.frag_off & bpf_htons(IP_OFFSET))
		return follow(skb, &p);
	p.first = ip.frag_off & bpf_htons(IP_MF);
	at += ip.ihl * 4;
	switch (ip.protocol) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
		return with_ports(skb, &p, at);
	case IPPROTO_ICMP:
		return icmp4(skb, &p, at, kind);
	}
	return GOES_ON;
}

#define ICMPV6_UNREACH 1
#define ICMPV6_PARAMPROB 4
#define ICMPV6_ECHO 128
#define ICMPV6_ECHOREPLY 129
#define NEXTHDR_HOP 0
#define NEXTHDR_ROUTING 43
#define NEXTHDR_FRAGMENT 44
#define NEXTHDR_DEST 60
#define MAX_HEADERS 4

struct fragment_header {
	__u8 next;
	__u8 reserved;
	__be16 offset;
	__be32 id;
};

struct extension {
	__u8 next;
	__u8 length; /* in units of eight bytes, without the first */
};

static __always_inline void set6(struct address *to, const struct in6_addr *from)
{
	__builtin_memcpy(to, from, sizeof(*to));
}

/*
 * RFC 4443: errors have types 1 to 4, and quote as much of the packet as fits. The first
 * of several fragments says what an error is about.
 */
static __always_inline int icmp6(struct __sk_buff *skb, struct packet *p, __u32 at, __u8 kind)
{
	struct fragment_header f;
	struct ipv6hdr inner;
	struct extension e;
	__u8 type;
	int i;

	if (bpf_skb_load_bytes(skb, at, &type, sizeof(type)))
		return drop(DROP_MALFORMED);
	if (type == ICMPV6_ECHO && kind == ADDRESS_ECHOES)
		return echo(skb, p, at, ICMPV6_ECHO, ICMPV6_ECHOREPLY);
	if (type < ICMPV6_UNREACH || type > ICMPV6_PARAMPROB)
		return GOES_ON;
	at += ICMP_HEADER;
	if (bpf_skb_load_bytes(skb, at, &inner, sizeof(inner)))
		return drop(DROP_MALFORMED);
	set6(&p->to, &inner.saddr);
	set6(&p->from, &inner.daddr);
	p->protocol = inner.nexthdr;
	at += sizeof(inner);
	for (i = 0; i < MAX_HEADERS; i++) {
		if (p->protocol == NEXTHDR_FRAGMENT) {
			if (bpf_skb_load_bytes(skb, at, &f, sizeof(f)))
				return drop(DROP_MALFORMED);
			if (f.offset & bpf_htons(~7))
				return GOES_ON;
			p->protocol = f.next;
			at += sizeof(f);
		} else if (p->protocol == NEXTHDR_DEST || p->protocol == NEXTHDR_HOP) {
			if (bpf_skb_load_bytes(skb, at, &e, sizeof(e)))
				return drop(DROP_MALFORMED);
			p->protocol = e.next;
			at += 8 + e.length * 8;
		} else {
			break;
		}
	}
	return about(skb, p, at);
}

static __always_inline int direct6(struct __sk_buff *skb)
{
	struct packet p = {.length = skb->len};
	__u32 at = ETH_HLEN;
	struct ipv6hdr ip;
	__u8 kind, next;
	int i;

	if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)))
		return GOES_ON;
	set6(&p.to, &ip.daddr);
	kind = kind_of(&p.to);
	if (!kind || is_mapped(&p.to))
		return GOES_ON;
	set6(&p.from, &ip.saddr);
	p.ttl = ip.hop_limit;
	at += sizeof(ip);
	next = ip.nexthdr;
	for (i = 0; i < MAX_HEADERS; i++) {
		struct fragment_header f;
		struct extension e;

		p.protocol = next;
		switch (next) {
		case IPPROTO_TCP:
		case IPPROTO_UDP:
			return with_ports(skb, &p, at);
		case IPPROTO_ICMPV6:
			return icmp6(skb, &p, at, kind);
		case NEXTHDR_FRAGMENT:
			if (bpf_skb_load_bytes(skb, at, &f, sizeof(f)))
				return drop(DROP_MALFORMED);
			p.id = f.id;
			p.protocol = f.next;
			if (f.offset & bpf_htons(~7))
				return follow(skb, &p);
			p.first = f.offset & bpf_htons(IPV6_MORE);
			next = f.next;
			at += sizeof(f);
			break;
		case NEXTHDR_HOP:
		case NEXTHDR_ROUTING:
		case NEXTHDR_DEST:
			if (bpf_skb_load_bytes(skb, at, &e, sizeof(e)))
				return drop(DROP_MALFORMED);
			next = e.next;
			at += 8 + e.length * 8;
			break;
		default:
			return GOES_ON;
		}
	}
	return GOES_ON;
}

SEC("tc")
int direct(struct __sk_buff *skb)
{
	/* A switch that does not know the way sends everybody a copy of what is for one. */
	if (skb->pkt_type != PACKET_HOST)
		return GOES_ON;
	/* It is of another interface, which is on top of this one. */
	if (skb->vlan_present)
		return GOES_ON;
	switch (skb->protocol) {
	case bpf_htons(ETH_P_IP):
		return direct4(skb);
	case bpf_htons(ETH_P_IPV6):
		return direct6(skb);
	}
	return GOES_ON;
}

char LICENSE[] SEC("license") = "GPL";
