/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What the programs and user space both read: keys and values of the maps.
 * User space gets these types by `bpf2go -type`; nothing here is written twice.
 *
 * Addresses are kept in one form: IPv6 in network byte order, IPv4 as
 * IPv4-mapped IPv6 (::ffff:a.b.c.d), so that word[3] is the IPv4 address.
 */
#ifndef PENTAD_SOCKET_LAYOUT_H
#define PENTAD_SOCKET_LAYOUT_H

#include <linux/types.h>

/* How many connected sockets have their own place in the map sockets. */
#define SOCKETS (1 << 17)

enum filter_size {
	FILTER_BITS = 20, /* 2^20 bits: 100 for each of 10,000 listeners */
};

/* How many pairs of VIP and backend one unconnected UDP socket remembers. */
#define UDP_PEERS 32

/* The longest service name: a DNS label (RFC 1035, 2.3.4). */
#define NAME_LENGTH 64
#define ZONE_LENGTH 64
#define VERSION_LENGTH 48

enum backend_state {
	BACKEND_NONE = 0,    /* nobody lives here */
	BACKEND_SERVING = 1, /* takes new connections */
	BACKEND_STANDBY = 2, /* could serve; a lower group does */
	BACKEND_DRAINED = 3, /* takes no new connections; old ones finish */
	BACKEND_DOWN = 4,    /* its probe failed */
};

enum balance {
	BALANCE_RANDOM = 0,
	BALANCE_SOURCE_HASH = 1,
};

enum counter {
	COUNTER_TRANSLATED = 0, /* connect() or first datagram sent to a backend */
	COUNTER_REFUSED = 1,    /* no usable backend: ECONNREFUSED */
	COUNTER_UNTRACKED = 2,  /* translated, but its VIP could not be remembered */
	COUNTERS = 3,
};

/*
 * Which bit of the filter a listener sets; address4 is an IPv4 address, or the
 * words of an IPv6 address folded by exclusive or. User space computes the same.
 * The multipliers are large odd numbers, and the upper bits of a product depend
 * on all bits of its factors.
 */
static inline __u32 filter_bit(__u32 address4, __u32 port_protocol)
{
	return (address4 * 0x9e3779b1u ^ port_protocol * 0x85ebca77u) >> (32 - FILTER_BITS);
}

/*
 * Keys are written and hashed in whole words: bytes that are written one by one
 * and read as a word cost a connect() a stalled load. The last word is the port,
 * as it lies in memory in network byte order, << 16 | the protocol.
 */
struct listener4_key {
	__be32 addr;
	__u32 port_protocol;
};

struct listener6_key {
	__be32 addr[4];
	__u32 port_protocol;
};

/* What connect() sets on a TCP socket. 0 in a field leaves it; idle 0: nothing is set. */
struct keepalive {
	__u16 idle;     /* seconds */
	__u16 interval; /* seconds */
	__u16 probes;
};

/*
 * One listener. Replaced as a whole by one hash update: that write is the
 * switch from one mapping to the next. The kernel may give the memory of a
 * replaced element to another listener while a program still looks at it
 * (kernel/bpf/hashtab.c); hence the sum over the key and all other fields,
 * which a reader checks on its own copy.
 */
struct listener {
	__u32 service;  /* index into services */
	__u32 slots;    /* first slot */
	__u32 count;    /* number of slots; 0: no usable backend */
	__u32 affinity; /* seconds; 0: none */
	struct keepalive keepalive;
	__u8 balance; /* enum balance */
	__u8 pad;
	__u32 sum; /* listener_sum() */
};

/* User space computes the same. The multiplier is a large odd number. */
static inline __u32 listener_sum(const struct listener *l, __u32 address4, __u32 port_protocol)
{
	const __u64 factor = 0x9e3779b97f4a7c15ULL;
	__u64 sum = ((__u64)address4 << 32 | port_protocol) * factor;

	sum = (sum ^ ((__u64)l->service << 32 | l->slots)) * factor;
	sum = (sum ^ sum >> 29 ^ ((__u64)l->count << 32 | l->affinity)) * factor;
	sum = (sum ^ sum >> 29 ^
	       ((__u64)l->keepalive.idle << 48 | (__u64)l->keepalive.interval << 32 |
		(__u64)l->keepalive.probes << 16 | l->balance)) *
	      factor;
	return sum >> 32;
}

/*
 * A slot of an alias table (A. J. Walker, "An efficient method for generating
 * discrete random variables with general distributions", 1977): the part below
 * the threshold belongs to first, the rest to second. In a consistent-hash
 * table both are the same backend.
 */
struct slot {
	__u32 first; /* index into backends */
	__u32 second;
	__u32 threshold;
	__u32 pad;
};

/*
 * One backend, hot part. An index is reused only with another generation, so
 * that a reference {generation, index} never finds a later occupant.
 */
struct backend {
	__be32 addr[4];
	__be16 port;
	__u8 state; /* enum backend_state */
	__u8 pad;
	__u32 generation;
	__u32 service; /* index into services */
	__u32 weight;
};

/* One backend, cold part: only user space reads it. */
struct backend_detail {
	__u32 group;
	__u8 drained; /* by the operator, not by weight 0 */
	__u8 down;    /* by its probe, also while drained */
	__u8 pad[2];
	__u64 since; /* Unix seconds of the last change of state */
	char zone[ZONE_LENGTH];
};

/* One service: only user space reads it. */
struct service_info {
	char name[NAME_LENGTH];
	__u32 balance;
	__u32 affinity; /* seconds */
	struct keepalive keepalive;
	__u8 pad[2];
};

/*
 * A connected socket that was translated: which VIP the application named, and
 * what it became. cookie is the lock on the entry: whoever sets it from 0 owns
 * it.
 */
struct socket {
	__u64 cookie;
	__be32 vip[4];
	__be32 addr[4]; /* the backend; a socket with another peer has moved on */
	__be16 vip_port;
	__be16 port;
	__u8 crowded; /* other sockets of this place are in sockets_more */
	__u8 pad[3];
	__u64 backend;  /* {generation << 32 | index} */
	__u64 reserved; /* one entry is one cache line */
};

/* A name that an unconnected UDP socket used for a backend. */
struct udp_peer {
	__be32 vip[4];
	__be32 addr[4];
	__be16 vip_port;
	__be16 port;   /* 0: empty */
	__u32 current; /* 1: where the next datagram to the VIP goes */
	__u64 backend; /* {generation << 32 | index} */
};

struct affinity_key {
	__u64 client; /* cookie of the network namespace */
	__u32 service;
	__u32 family; /* AF_INET or AF_INET6 of the listener */
};

struct affinity_entry {
	__u64 backend; /* {generation << 32 | index} */
	__u64 used;    /* CLOCK_MONOTONIC_COARSE, ns */
};

/*
 * What lies in this set of pins. The first word never moves: it tells every
 * pentad, older or newer, whether it can read the rest.
 */
struct about_info {
	__u32 layout;
	__u32 pad;
	char version[VERSION_LENGTH];
};

_Static_assert(sizeof(struct listener4_key) == 8, "no hidden padding in a key");
_Static_assert(sizeof(struct listener6_key) == 20, "no hidden padding in a key");
_Static_assert(sizeof(struct affinity_key) == 16, "no hidden padding in a key");
_Static_assert(sizeof(struct slot) == 16, "four to a cache line");
_Static_assert(sizeof(struct backend) == 32, "two to a cache line");
_Static_assert(sizeof(struct socket) == 64, "one to a cache line");
_Static_assert((SOCKETS & (SOCKETS - 1)) == 0, "place = cookie & (SOCKETS - 1)");

#endif
