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

/*
 * How many names an unconnected UDP socket keeps by itself: with the kernel's own
 * words a quarter of a KiB. How many entries of udp_more it may have, how many there
 * are, for how many users, and how many one user may have.
 */
#define UDP_NAMES 3
#define UDP_MORE_EACH 10
#define UDP_MORE (1 << 15)
#define UDP_SHARES (1 << 12)
#define UDP_SHARE (UDP_MORE / 4)

/* The longest service name, and a zero: NAMESPACE/NAME:PORT/external of Kubernetes. */
#define NAME_LENGTH 192
#define ZONE_LENGTH 64
#define VERSION_LENGTH 48

enum backend_state {
	BACKEND_NONE = 0,    /* nobody lives here */
	BACKEND_SERVING = 1, /* takes new connections */
	BACKEND_STANDBY = 2, /* could serve; a lower group does */
	BACKEND_DRAINED = 3, /* takes no new connections; old ones finish */
	BACKEND_DOWN = 4,    /* its probe failed */
};

/* Which connections that a backend still has are to be closed. */
enum reset_scope {
	RESET_NONE = 0,
	RESET_ALL = 1,
	RESET_UDP = 2, /* connected UDP sockets: nothing else tells them to go elsewhere */
};

enum balance {
	BALANCE_RANDOM = 0,
	BALANCE_SOURCE_HASH = 1,
	BALANCE_LEAST_CONNECTIONS = 2,
	BALANCE_LEAST_LATENCY = 3,
};

enum limit {
	LOAD_CHUNK_BITS = 12,
	LOAD_CHUNK = 1 << LOAD_CHUNK_BITS, /* how many backends one map of loads holds */
	LOAD_CHUNKS = 1024,                /* how many of those maps there may be */
	FOLLOWERS = 8,                     /* how many processes may follow flows at a time */
};

enum counter {
	COUNTER_TRANSLATED = 0, /* connect() or first datagram sent to a backend */
	COUNTER_REFUSED = 1,    /* no usable backend: ECONNREFUSED */
	COUNTER_UNTRACKED = 2,  /* translated, but its VIP could not be remembered */
	COUNTER_PANICS = 3,     /* an ejected backend taken because too many are ejected */
	COUNTER_RESET = 4,      /* connections closed because their backend is down or gone */
	COUNTER_HELD = 5,       /* sockets of the host that bound a port of a service */
	COUNTERS = 6,
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
	__u32 slots;    /* first slot of the first table */
	__u32 count;    /* number of its slots; 0: no usable backend */
	__u32 length;   /* slots of all tables and of their heads */
	__u32 affinity; /* seconds; 0: none */
	struct keepalive keepalive;
	__u8 balance; /* enum balance */
	__u8 traits;  /* enum trait */
	__u32 sum;    /* listener_sum() */
};

/* What need not be looked up, because it is the usual case. */
enum trait {
	TRAIT_PLAIN = 1, /* no limit and no slow start: who is not blamed will do */
	TRAIT_EVEN = 2,  /* all backends have the same cost */
	TRAIT_TIMED = 4, /* the service has a connect_timeout */
	TRAIT_HOST = 8,  /* only for sockets in the host's network namespace */
	TRAIT_HELD = 16, /* sockets of the host may not bind it */
};

/* User space computes the same. The multiplier is a large odd number. */
static inline __u32 listener_sum(const struct listener *l, __u32 address4, __u32 port_protocol)
{
	const __u64 factor = 0x9e3779b97f4a7c15ULL;
	__u64 sum = ((__u64)address4 << 32 | port_protocol) * factor;

	sum = (sum ^ ((__u64)l->service << 32 | l->slots)) * factor;
	sum = (sum ^ sum >> 29 ^ ((__u64)l->count << 32 | l->affinity)) * factor;
	sum = (sum ^ sum >> 29 ^ l->length) * factor;
	sum = (sum ^ sum >> 29 ^
	       ((__u64)l->keepalive.idle << 48 | (__u64)l->keepalive.interval << 32 |
		(__u64)l->keepalive.probes << 16 | l->balance << 8 | l->traits)) *
	      factor;
	return sum >> 32;
}

/*
 * A slot of an alias table (A. J. Walker, "An efficient method for generating
 * discrete random variables with general distributions", 1977): the part below
 * the threshold belongs to first, the rest to second. In a consistent-hash
 * table both are the same backend. In an alias table every backend is first in
 * exactly one slot.
 *
 * After the slots of a table comes the head of the next one, the table of the
 * next failover group: first is the number of its slots, 0 at the end. With
 * BALANCE_SOURCE_HASH the second table is an alias table of the first group.
 */
struct slot {
	__u32 first; /* index into backends */
	__u32 second;
	__u32 threshold;
	__u32 pad;
};

/*
 * One backend, as user space wants it. An index is reused only with another
 * generation, so that a reference {generation, index} never finds a later
 * occupant, and only once no connection is left to the earlier one.
 */
struct backend {
	__be32 addr[4];
	__be16 port;
	__u8 state; /* enum backend_state */
	__u8 reset; /* enum reset_scope */
	__u32 generation;
	__u32 service; /* index into services */
	__u32 weight;
	__u32 cost; /* 256 * mean weight of the group / weight */
	__u32 pad;
	__u64 started; /* jiffies: when it began to take connections, or was removed; 0: long ago */
	__u64 leave;   /* jiffies: when unconnected senders go elsewhere; 0: they need not */
	__u32 pad2[2];
};

/*
 * One backend, as the programs find it. Only they write while anything refers to
 * it. Times are in jiffies, latencies in microseconds. What counts here counts
 * for every client; what one client has met with stands in struct blame.
 */
struct load {
	__u32 inflight; /* TCP connections from their SYN to their end */
	__u32 rtt;      /* smoothed, of handshakes; 0: unknown */
	__u32 response; /* smoothed, from the request to the first byte; 0: unknown */
	__u32 measured; /* when rtt or response was last measured */
	__u32 answer;   /* smoothed, bytes that a connection brought; 0: unknown */
	__u32 accuser;  /* the principal that found it dead last; 0: nobody, or it was well since */
	__u64 shunned;  /* until when << 1, because several clients found it dead; 0: not */
	__u32 accused;  /* when accuser did */
	__u32 last_response; /* as it was measured */
	__u64 connections;   /* all that were ever begun */
	__u32 failed;        /* of these, how many failed, modulo 2^32 */
	__u32 datagrams;     /* connected UDP sockets */
	__u32 ejected_ever;  /* how often a client ejected it, modulo 2^32 */
	__u32 blamed;        /* until when somebody's blame may count; 0: nobody's does */
};

/* Whose connects met with what: see blame.h. */
struct blame_key {
	__u64 client;
	__u64 backend; /* {generation << 32 | index} */
};

/* What one client has met with at one backend. */
struct blame {
	__u64 ejected;    /* 0: not; else until when << 1 | whether a trial is under way */
	__u64 failed;     /* when a connect failed last */
	__u64 readmitted; /* when the last ejection ended; 0: never */
	__u32 failures;   /* in a row */
	__u16 ejections;  /* in a row, which makes the next one longer */
	__u8 fruitless;   /* the last failure was a connection that brought nothing */
	__u8 unsent;      /* connects in a row that failed before a SYN left, up to 3 */
};

/*
 * Under a principal in place of a client stands what its clients found together:
 * failed and ejected, and in readmitted the client that failed last; 0 after one
 * that did not.
 */

/* How a connection failed its client. */
enum blame_kind {
	BLAME_TRIAL = 1,     /* it was a trial */
	BLAME_FRUITLESS = 2, /* it was accepted, and closed at once without a word */
	BLAME_UNSENT = 4,    /* no SYN left: at most the way to the backend is at fault */
};

/* One backend, cold part: only user space reads it. */
struct backend_detail {
	__u32 group;
	__u8 drained; /* by the operator, not by weight 0 */
	__u8 down;    /* by its probe, also while drained */
	__u8 pad[2];
	__u64 since;       /* Unix seconds of the last change of state */
	__u64 drain_until; /* Unix seconds: when to close what is left; 0: never */
	char zone[ZONE_LENGTH];
};

/* One service: what the programs obey, then what only user space reads. */
struct service_info {
	__u32 max_connections; /* per backend; 0: no limit */
	__u32 failures;        /* failed connects in a row that eject; 0: never */
	__u32 ejection;        /* ms */
	__u32 max_ejected;     /* percent */
	__u32 connect_timeout; /* ms; 0: the host's */
	__u32 slow_start;      /* ms; 0: none */
	__u64 joined;          /* jiffies: when the last backend joined; 0: long ago */
	__u8 silent;           /* 1: no events */
	__u8 keep;             /* 1: connections to a backend that is down are left alone */
	__u8 balance;
	__u8 source;    /* enum Source of service/merge.go; 0: not known */
	__u32 affinity; /* seconds */
	__u32 verdict; /* ms: how soon a living agent's probe takes a dead backend down; 0: no probe */
	struct keepalive keepalive;
	__u8 pad2[14]; /* what the programs obey is in one cache line */
	char name[NAME_LENGTH];
};

/*
 * A socket that was translated when it connected: which VIP the application
 * named, and what it became. cookie is the lock on the entry: whoever sets it
 * from 0 owns it. An entry says something of its socket only while the socket's
 * peer is addr and port; see "The life of an entry" in docs/ARCHITECTURE.md.
 */
struct socket {
	__u64 cookie;
	__be32 vip[4];
	__be32 addr[4]; /* the backend; a socket with another peer has moved on */
	__be16 vip_port;
	__be16 port;
	__u8 crowded;  /* other sockets of this place are in sockets_more */
	__u8 protocol; /* IPPROTO_TCP also for MPTCP; 0: an entry from before there was this field */
	__u8 seen;     /* number of the walk over all sockets that met this one last */
	__u8 udp;      /* enum udp_entry */
	__u64 backend; /* {generation << 32 | index} */
	__u64 life;    /* started << 32 | tag << 8 | enum life; one entry is one cache line */
};

/* What an entry of UDP has beside it. */
enum udp_entry {
	UDP_EARLIER = 1, /* what the socket was before is kept until it is known which holds */
	UDP_COUNTED = 2, /* counted in datagrams; an entry of layout 3 is so in inflight */
};

/*
 * What became of a connection. Several CPUs may come to its end at once, and
 * its place may have another owner by then: life is changed by compare-and-
 * exchange alone, and the tag, 24 bits of a hash of the cookie, tells owners
 * apart.
 */
enum life {
	LIFE_COUNTED = 1, /* in inflight or datagrams of its backend */
	LIFE_TRIAL = 2,   /* its outcome decides on the backend's return */
	LIFE_JUDGED = 4,  /* TCP, whose outcome these programs are told */
	LIFE_SENT = 8,    /* a SYN has left */
	LIFE_ESTABLISHED = 16,
	LIFE_FAILED = 32,     /* its failure is counted */
	LIFE_TIMED = 64,      /* its service has a connect_timeout */
	LIFE_FRUITLESS = 128, /* the server hung up at once, without a word */
};

/* An address and a port, as in struct socket. */
struct endpoint {
	__be32 addr[4];
	__be16 port;
	__u16 pad;
};

/*
 * Where in sockets_more a UDP socket's earlier entry is. Cookies count sockets
 * from 1 and never get there.
 */
#define EARLIER (1ULL << 63)

/* A name that an unconnected UDP socket used for a backend. */
struct udp_name {
	__be32 vip[4];
	__be32 addr[4];
	__be16 vip_port;
	__be16 port;   /* 0: empty */
	__u32 current; /* 1: where the next datagram to the VIP goes */
	__u64 backend; /* {generation << 32 | index} */
};

struct udp_more_key {
	__u64 cookie;
	__u32 number; /* from 1; 0: the names that a socket would have kept by itself */
	__u32 pad;
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

/* What the program expire is told. */
struct expiry {
	__u32 before; /* jiffies: entries that are younger stay */
	__u32 tcp;    /* 1: of TCP, too */
	__u32 count;  /* out: how many were counted back */
};

enum event_kind {
	EVENT_CONNECT = 0,     /* a backend was chosen */
	EVENT_REFUSED = 1,     /* none could be */
	EVENT_ESTABLISHED = 2, /* the handshake is complete */
	EVENT_FAILED = 3,      /* the connect failed */
	EVENT_CLOSED = 4,      /* the socket was closed, reset or connected elsewhere */
	EVENT_EJECTED = 5,     /* the backend takes no connections for a while */
	EVENT_READMITTED = 6,  /* and does again */
};

/* What followers get. */
struct event {
	__u64 time; /* CLOCK_MONOTONIC, ns */
	__u64 cookie;
	__be32 vip[4];
	__be32 addr[4];
	__be16 vip_port;
	__be16 port;
	__u32 service; /* index into services; 0: the backend was removed since */
	__u32 pid;     /* 0: not known in this place */
	__u8 kind;     /* enum event_kind */
	__u8 protocol;
	__u16 error;    /* errno of a failure; 0: unknown or none */
	__u32 rtt;      /* us */
	__u32 duration; /* ms */
	__u64 sent;
	__u64 received;
	char command[16];
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
_Static_assert(sizeof(struct udp_more_key) == 16, "no hidden padding in a key");
_Static_assert(sizeof(struct slot) == 16, "four to a cache line");
_Static_assert(sizeof(struct backend) == 64, "one to a cache line");
_Static_assert(sizeof(struct load) == 64, "one to a cache line");
_Static_assert(sizeof(struct blame_key) == 16, "no hidden padding in a key");
_Static_assert(sizeof(struct service_info) == 256,
	       "what is obeyed in one line, the name in others");
_Static_assert(sizeof(struct socket) == 64, "one to a cache line");
_Static_assert((SOCKETS & (SOCKETS - 1)) == 0, "place = cookie & (SOCKETS - 1)");

#endif
