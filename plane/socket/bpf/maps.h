/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The maps: key, value, who writes, who reads, and the bound.
 */
#ifndef PENTAD_SOCKET_MAPS_H
#define PENTAD_SOCKET_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "layout.h"

/*
 * filter: bit -> whether any listener may have it. Most connections on a host go
 * to no service; this spares them the hash. A bit is set before its listener is
 * there and cleared after it is gone. Written by user space, read by connect and
 * sendmsg.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, (1 << FILTER_BITS) / 64);
} filter SEC(".maps");

/*
 * listeners4, listeners6: VIP, port and protocol -> how to choose a backend.
 * Written by user space, one element at a time; read by connect and sendmsg.
 * Bound: the configured number, doubled and rounded up.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct listener4_key);
	__type(value, struct listener);
	__uint(max_entries, 1);
} listeners4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct listener6_key);
	__type(value, struct listener);
	__uint(max_entries, 1);
} listeners6 SEC(".maps");

/*
 * slots: the selection tables of all services, one range each. A range is
 * written before a listener names it, and reused only after an RCU grace
 * period, so no program ever sees half of one.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct slot);
	__uint(max_entries, 1);
} slots SEC(".maps");

/* backends: index -> address. The same rule for reuse as slots. Index 0 is nobody. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct backend);
	__uint(max_entries, 1);
} backends SEC(".maps");

/* backend_info: index -> what people want to know. User space only. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct backend_detail);
	__uint(max_entries, 1);
} backend_info SEC(".maps");

/*
 * services: index -> what its connections obey, and its name. Written by user
 * space, read where a connection begins, fails or ends. Index 0 is nobody.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct service_info);
	__uint(max_entries, 1);
} services SEC(".maps");

/*
 * loads: index of a backend >> LOAD_CHUNK_BITS -> array of its neighbours'
 * loads. Unlike what user space writes, counts cannot be copied to a larger map
 * while connections come and go; so room is made by adding arrays. Written and
 * read where a connection begins, fails or ends. Bound: LOAD_CHUNKS arrays.
 */
struct loads_chunk {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct load));
	__uint(max_entries, LOAD_CHUNK);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__type(key, __u32);
	__uint(max_entries, LOAD_CHUNKS);
	__array(values, struct loads_chunk);
} loads SEC(".maps");

/*
 * blames: client and backend -> what that client met with there. Written where a
 * connect fails or succeeds after failures; read by connect, but only of backends
 * whose load says that somebody blames them. Bound: fixed; what was not asked for
 * longest is forgotten first.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct blame_key);
	__type(value, struct blame);
	__uint(max_entries, 32768);
} blames SEC(".maps");

/*
 * heartbeat: 0 -> until when the agent counts as alive and probing, in jiffies.
 * Written by the agent, read of backends that are blamed.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1);
} heartbeat SEC(".maps");

/*
 * flows: place of a follower -> its ring buffer. A follower brings its own and
 * takes it away again. Written by user space, read where events arise.
 */
struct flows_ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__type(key, __u32);
	__uint(max_entries, FOLLOWERS);
	__array(values, struct flows_ring);
} flows SEC(".maps");

/*
 * followers: place of a follower -> until when it counts as there, in jiffies,
 * unless it says so again. Written by followers, read where events arise.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, FOLLOWERS);
} followers SEC(".maps");

/* lost: place of a follower -> events for which its ring had no room, ever. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, FOLLOWERS);
} lost SEC(".maps");

/*
 * followed: 0 -> the latest until of all followers, in jiffies. One look at it is
 * what a connection pays when nobody follows. Written by followers.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1);
} followed SEC(".maps");

/* about: which layout these maps have, written by which pentad. User space only. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct about_info);
	__uint(max_entries, 1);
} about SEC(".maps");

/*
 * affinity: client and service -> backend. Written and read by connect and
 * sendmsg. Bound: fixed; the least recently used client is forgotten first.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct affinity_key);
	__type(value, struct affinity_entry);
	__uint(max_entries, 65536);
} affinity SEC(".maps");

/*
 * sockets: cookie & (SOCKETS - 1) -> translated socket. Socket storage or a
 * hash costs a connect() many times what an array does, and cookies count up,
 * so neighbours in time are neighbours here. A socket whose place is taken by
 * one that lives long goes to sockets_more. Written by connect and release.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct socket);
	__uint(max_entries, SOCKETS);
} sockets SEC(".maps");

/* sockets_more: cookie -> translated socket whose place in sockets was taken. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u64);
	__type(value, struct socket);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 19);
} sockets_more SEC(".maps");

/*
 * The names that an unconnected UDP socket used. Few sockets use more than one or
 * two, and what a socket keeps is charged to whoever made the map: so the first few
 * are kept with the socket, and more of them in a map of a fixed size, of which one
 * user gets a part. Written by sendmsg, read by recvmsg, both of which run without
 * the socket's lock: hence the spin lock.
 */
struct udp_names {
	struct bpf_spin_lock lock;
	__u8 next; /* the name to forget when all places are taken */
	__u8 more; /* of a socket's first names: how many entries of udp_more it has */
	__u8 seen; /* number of the walk over all sockets that met the socket last */
	__u8 pad;
	__u64 share; /* of an entry of udp_more: whose share of the map it is in */
	struct udp_name name[UDP_NAMES];
};

/* udp_names: the first names of a socket. It lives and dies with the socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__type(key, int);
	__type(value, struct udp_names);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} udp_names SEC(".maps");

/*
 * udp_more: cookie and number -> further names of a socket; number 0: its first
 * ones, if there was no memory to keep them with it. Bound: fixed.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct udp_more_key);
	__type(value, struct udp_names);
	__uint(max_entries, UDP_MORE);
} udp_more SEC(".maps");

/* udp_shares: user of the host, or pod -> entries of udp_more. Bound: fixed. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u64);
	__type(value, __u32);
	__uint(max_entries, UDP_SHARES);
} udp_shares SEC(".maps");

/*
 * refusals: index of a service -> connections and datagrams that were refused because
 * no backend of it was usable. Written where one is refused, and by user space, which
 * forgets what another service had at the same index. Bound: fixed; beyond it nothing
 * is counted.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 16384);
} refusals SEC(".maps");

/* counters: enum counter -> count, per CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, COUNTERS);
} counters SEC(".maps");

#endif
