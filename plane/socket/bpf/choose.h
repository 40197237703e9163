/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Which backend a new connection gets. The usual case is one or two draws from
 * the table of the serving group. Only when a draw meets a backend that may not
 * be used at this moment is the group looked at as a whole, and the groups after
 * it.
 */
#ifndef PENTAD_SOCKET_CHOOSE_H
#define PENTAD_SOCKET_CHOOSE_H

#include "connection.h"

/* Draws before the group is looked at as a whole. */
#define DRAWS 6

/*
 * Differences of latency below this are scheduling, not distance; in
 * microseconds, added to every latency.
 */
#define NOISE 200

/* A latency above this, in microseconds, is as bad as this. */
#define SLOWEST (1 << 20)

/*
 * What a backend can be to a new connection. Its state is not asked for: what
 * stands in a table could serve when the table was looked up.
 */
enum verdict {
	USABLE,
	FULL,    /* has maxConnections */
	EJECTED, /* by its failures */
	DUE,     /* ejected, and one connection may try it */
	WARMING, /* slow start: not this time */
};

/* One search for a backend. */
struct search {
	__u32 service;
	__u32 slots; /* the table at hand */
	__u32 count;
	__u32 balance;
	__u32 traits; /* of the listener */
	__u64 hash;   /* of the client, for BALANCE_SOURCE_HASH */
	bool judged;  /* the outcome of this connection will be known */
	bool met_ejected;
	bool trial;      /* the chosen backend is on trial */
	__u32 desperate; /* best of the groups in panic; 0: none */
	/* Of the table at hand, as a whole: */
	__u32 offset;
	__u32 members;
	__u32 ejected;
	__u32 usable; /* any usable backend; 0: none */
	__u32 any;    /* any backend that is at least not full */
	__u64 best;   /* BALANCE_SOURCE_HASH: the weight of usable, by lot */
	__u64 best_any;
};

static __always_inline __u64 reference(__u32 index, const struct backend *b)
{
	return (__u64)b->generation << 32 | index;
}

static __always_inline bool in_slow_start(const struct backend *b, const struct load *load,
					  const struct service_info *policy, __u32 now)
{
	__u32 window = ticks(policy->slow_start);
	__u32 age;

	if (!window)
		return false;
	/* Usually nobody is new: then the backend itself need not be looked at. */
	if (!load->readmitted && (!policy->joined || now - policy->joined >= window))
		return false;
	age = now - b->started;
	if (load->readmitted && (!b->started || now - load->readmitted < age))
		age = now - load->readmitted;
	else if (!b->started)
		return false;
	/* It begins with a tenth. */
	return age < window && bpf_get_prandom_u32() % window > age + window / 10;
}

static __always_inline enum verdict judge(const struct search *s, const struct backend *b,
					  const struct load *load,
					  const struct service_info *policy)
{
	__u64 ejected = load->ejected;
	__u64 now = bpf_jiffies64();

	if (policy->max_connections && load->inflight >= policy->max_connections)
		return FULL;
	if (ejected && policy->failures) {
		if (now < ejected >> 1)
			return EJECTED;
		/* What has no outcome cannot be a trial, and does not wait for one. */
		return s->judged ? DUE : USABLE;
	}
	return in_slow_start(b, load, policy, now) ? WARMING : USABLE;
}

/* Whether this connection is the one that tries an ejected backend. */
static __always_inline bool claim_trial(struct search *s, struct load *load)
{
	__u64 old = load->ejected, now = bpf_jiffies64();
	__u64 patience = now + TRIAL_SECONDS * (__u64)hz;

	if (!old || now < old >> 1)
		return false;
	if (__sync_val_compare_and_swap(&load->ejected, old, patience << 1 | 1) != old)
		return false;
	s->trial = true;
	return true;
}

/*
 * Take one slot: the integer part of number * count picks it, the fraction
 * decides between its two backends. One number serves both.
 */
static __always_inline __u32 draw(__u32 slots_at, __u32 slots_count, __u32 number)
{
	__u64 scaled = (__u64)number * slots_count;
	__u32 index = slots_at + (__u32)(scaled >> 32);
	struct slot *s = bpf_map_lookup_elem(&slots, &index);

	if (!s)
		return 0;
	return (__u32)scaled < s->threshold ? s->first : s->second;
}

/* As sample(), when every member will do. */
static __always_inline __u32 draw_other(__u32 slots_at, __u32 slots_count, __u32 other)
{
	int i;

	for (i = 0; i < DRAWS; i++) {
		__u32 index = draw(slots_at, slots_count, bpf_get_prandom_u32());

		if (index != other)
			return index;
	}
	return 0;
}

/*
 * A member of the table by its weight that is usable and not the one given, or 0.
 * Trials are for first choices only.
 */
__noinline __u32 sample(struct search *s, __u32 other, __u32 despite_ejection)
{
	struct service_info *policy;
	int i;

	if (!s)
		return 0;
	if (s->traits & TRAIT_PLAIN)
		return draw_other(s->slots, s->count, other);
	policy = bpf_map_lookup_elem(&services, &s->service);
	if (!policy)
		return 0;
	for (i = 0; i < DRAWS; i++) {
		__u32 index = draw(s->slots, s->count, bpf_get_prandom_u32());
		struct backend *b = bpf_map_lookup_elem(&backends, &index);
		struct load *load = load_of(index);
		enum verdict v;

		if (!b || !load || index == other)
			continue;
		v = judge(s, b, load, policy);
		if (v == USABLE)
			return index;
		if (v != EJECTED && v != DUE)
			continue;
		if (despite_ejection)
			return index;
		if (v == DUE && !other && claim_trial(s, load))
			return index;
		s->met_ejected = true;
	}
	return 0;
}

/* One member of the table at hand, for census(). */
static long consider(__u32 i, struct search *s)
{
	struct service_info *policy;
	struct backend *b;
	struct load *load;
	struct slot *slot;
	enum verdict v;
	__u64 lot = 0;
	__u32 index;

	i += s->offset;
	if (i >= s->count)
		i -= s->count;
	index = s->slots + i;
	slot = bpf_map_lookup_elem(&slots, &index);
	if (!slot)
		return 1;
	index = slot->first;
	policy = bpf_map_lookup_elem(&services, &s->service);
	b = bpf_map_lookup_elem(&backends, &index);
	load = load_of(index);
	if (!policy || !b || !load)
		return 0;
	v = judge(s, b, load, policy);
	s->members++;
	if (v == FULL)
		return 0;
	/* Rendezvous hashing: a client's second choice stays the same as well. */
	if (s->balance == BALANCE_SOURCE_HASH)
		lot = mix(s->hash ^ mix(index + 1));
	if (!s->any || lot > s->best_any) {
		s->any = index;
		s->best_any = lot;
	}
	if (v == EJECTED || v == DUE) {
		s->ejected++;
		return 0;
	}
	if (!s->usable || lot > s->best) {
		s->usable = index;
		s->best = lot;
	}
	return 0;
}

/* Look at the table as a whole. Returns whether too many of it are ejected. */
static __always_inline bool census(struct search *s, const struct service_info *policy)
{
	s->members = 0;
	s->ejected = 0;
	s->usable = 0;
	s->any = 0;
	s->best = 0;
	s->best_any = 0;
	s->offset = s->count ? bpf_get_prandom_u32() % s->count : 0;
	bpf_loop(s->count, consider, s, 0);
	return s->ejected * 100 > policy->max_ejected * s->members;
}

/* How long a connection would wait at a backend, in no particular unit. */
__noinline __u64 score(__u32 index, __u32 balance, __u32 even)
{
	struct backend *b = bpf_map_lookup_elem(&backends, &index);
	struct load *load = load_of(index);
	__u32 latency = 0;
	__u64 crowd;

	if (!b || !load)
		return ~0ULL;
	/*
	 * One more than it has, in shares of the mean weight. The one is not
	 * divided by the weight: weight has its say in the draw already, and a
	 * light backend would get nothing at all while there is little to do.
	 */
	crowd = (__u64)load->inflight * (even ? 256 : b->cost) + 256;
	if (balance == BALANCE_LEAST_LATENCY) {
		latency = aged(load->rtt + load->response, load, bpf_jiffies64());
		if (latency > SLOWEST)
			latency = SLOWEST;
	}
	return crowd * (latency + NOISE);
}

/* Power of two choices: the second only if it is clearly better. */
static __always_inline __u32 better(__u32 balance, __u32 traits, __u32 first, __u32 second)
{
	__u64 a = score(first, balance, traits & TRAIT_EVEN);
	__u64 b = score(second, balance, traits & TRAIT_EVEN);

	return b * 5 / 4 < a ? second : first;
}

/* The usual case, without limits: nothing counts but weight, load and latency. */
static __always_inline __u32 choose_plain(const struct listener *l)
{
	__u32 first = draw(l->slots, l->count, bpf_get_prandom_u32());
	__u32 second;

	if (l->balance == BALANCE_RANDOM || l->count < 2)
		return first;
	second = draw_other(l->slots, l->count, first);
	return second ? better(l->balance, l->traits, first, second) : first;
}

/* A backend of the table at hand, or 0. */
static __noinline __u32 from_table(struct search *s)
{
	struct service_info *policy;
	__u32 first = 0, second;

	if (!s->count)
		return 0;
	s->met_ejected = false;
	if (s->balance != BALANCE_SOURCE_HASH)
		first = sample(s, 0, false);
	if (s->trial)
		return first;
	if (!first || s->met_ejected) {
		policy = bpf_map_lookup_elem(&services, &s->service);
		if (!policy)
			return 0;
		if (census(s, policy)) {
			if (!s->desperate)
				s->desperate =
					s->balance == BALANCE_SOURCE_HASH ? 0 : sample(s, 0, true);
			if (!s->desperate)
				s->desperate = s->any;
			return 0;
		}
		if (!first)
			return s->usable;
	}
	if (s->balance == BALANCE_RANDOM || s->count < 2)
		return first;
	second = sample(s, first, false);
	return second ? better(s->balance, s->traits, first, second) : first;
}

/* The groups after the first, one by one. */
static long try_next_group(__u32 i __attribute__((unused)), struct search *s)
{
	__u32 head = s->slots + s->count;
	struct slot *next = bpf_map_lookup_elem(&slots, &head);

	s->slots = head + 1;
	s->count = next ? next->first : 0;
	if (!s->count)
		return 1;
	s->usable = from_table(s);
	return s->usable != 0;
}

#define MAX_TABLES 258 /* groups 0 to 255, and one more for BALANCE_SOURCE_HASH */

/* Where a client with this hash belongs, if that backend is usable. */
static __always_inline __u32 at_home(struct search *s)
{
	struct service_info *policy = bpf_map_lookup_elem(&services, &s->service);
	__u32 index = draw(s->slots, s->count, (__u32)s->hash);
	struct backend *b = bpf_map_lookup_elem(&backends, &index);
	struct load *load = load_of(index);
	enum verdict v;

	if (!policy || !b || !load)
		return 0;
	v = judge(s, b, load, policy);
	if (v == USABLE || v == WARMING)
		return index;
	return v == DUE && claim_trial(s, load) ? index : 0;
}

/* A backend for a new connection, or 0 when there is none. */
__noinline __u32 choose(struct search *wanted)
{
	struct search s;
	__u32 found;

	if (!wanted)
		return 0;
	s = *wanted;
	found = s.balance == BALANCE_SOURCE_HASH ? at_home(&s) : from_table(&s);
	if (!found) {
		s.usable = 0;
		bpf_loop(MAX_TABLES, try_next_group, &s, 0);
		found = s.usable;
	}
	if (!found && s.desperate) {
		count(COUNTER_PANICS);
		found = s.desperate;
	}
	wanted->trial = s.trial;
	return found;
}

#endif
