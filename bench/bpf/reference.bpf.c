// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * The classic sequence of connect-time load balancing, as a yardstick: the
 * service by a hash, its slot by the same hash, the backend by another, and an
 * LRU entry to find the way back. Map types and sizes are the usual ones. It
 * does nothing else, and so less than a product does.
 */
#include <stddef.h>

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct service_key {
	__be32 addr;
	__be16 port;
	__u16 slot;
	__u8 protocol;
	__u8 pad[3];
};

struct service_value {
	__u32 backend; /* of a slot; of slot 0: nothing */
	__u32 count;
	__u32 reverse;
};

struct backend_value {
	__be32 addr;
	__be16 port;
	__u8 protocol;
	__u8 flags;
};

struct reverse_key {
	__u64 cookie;
	__be32 addr;
	__be16 port;
	__u16 pad;
};

struct reverse_value {
	__be32 addr;
	__be16 port;
	__u16 reverse;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct service_key);
	__type(value, struct service_value);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, struct backend_value);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
} backends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct reverse_key);
	__type(value, struct reverse_value);
	__uint(max_entries, 262144);
} reverse SEC(".maps");

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct service_key key = {
		.addr = ctx->user_ip4,
		.port = ctx->user_port,
		.protocol = ctx->protocol,
	};
	struct service_value *s = bpf_map_lookup_elem(&services, &key);
	struct reverse_value back = {};
	struct reverse_key from = {};
	struct backend_value *b;

	if (!s || !s->count)
		return 1;
	key.slot = bpf_get_prandom_u32() % s->count + 1;
	s = bpf_map_lookup_elem(&services, &key);
	if (!s)
		return 1;
	b = bpf_map_lookup_elem(&backends, &s->backend);
	if (!b)
		return 1;
	from.cookie = bpf_get_socket_cookie(ctx);
	from.addr = b->addr;
	from.port = b->port;
	back.addr = key.addr;
	back.port = key.port;
	back.reverse = s->reverse;
	bpf_map_update_elem(&reverse, &from, &back, BPF_ANY);
	ctx->user_ip4 = b->addr;
	ctx->user_port = b->port;
	return 1;
}

/* The floor: what any program costs. */
SEC("cgroup/connect4")
int empty(struct bpf_sock_addr *ctx __attribute__((unused)))
{
	return 1;
}

char LICENSE[] SEC("license") = "GPL";
