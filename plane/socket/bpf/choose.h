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
	EJECTED, /* by this client's failures */
	DUE,     /* ejected, and one connection may try it */
	SHUNNED, /* several clients found it dead; this one has not */
	WARMING, /* slow start: not this time */
};

/* One search for a backend. */
struct search {
	__u32 service;
	__u32 slots; /* the table at hand */
	__u32 count;
	__u32 balance;
	__u32 traits; /* of the listener */
	__u32 principal;
	__u64 client; /* whose blame counts */
	__u64 hash;   /* of the client, for BALANCE_SOURCE_HASH */
	__u32 drawn;  /* what was drawn already, and its fellow; 0: nothing */
	__u32 fellow;
	__u64 remembered; /* the backend that this client had before, as affinity has it; 0: none */
	bool judged;      /* the outcome of this connection will be known */
	bool apart;       /* affinity: goes elsewhere than its network namespace does */
	bool met_ejected;
	bool trial;      /* the chosen backend is on trial */
	__u32 desperate; /* best of the groups in panic; 0: none */
	__u32 shunned;   /* any backend that only others found dead; 0: none */
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

/* Whether any backend of a service that nobody blames can be in slow start. */
static __always_inline bool in_slow_start_at_all(const struct service_info *policy, __u64 now)
{
	__u64 window = ticks(policy->slow_start);

	return window && policy->joined && now - policy->joined < window;
}

static __always_inline bool in_slow_start(const struct backend *b, __u64 readmitted,
					  const struct service_info *policy, __u64 now)
{
	__u64 window = ticks(policy->slow_start);
	__u64 age;

	if (!window)
		return false;
	/* Usually nobody is new: then the backend itself need not be looked at. */
	if (!readmitted && !in_slow_start_at_all(policy, now))
		return false;
	age = now - b->started;
	if (readmitted && (!b->started || now - readmitted < age))
		age = now - readmitted;
	else if (!b->started)
		return false;
	/* It begins with a tenth. */
	return age < window && bpf_get_prandom_u32() % window > age + window / 10;
}

/* Whether several clients found a backend dead, of the same principal or of two. */
static __always_inline bool is_shunned(const struct search *s, const struct load *load,
				       __u64 backend, __u64 now)
{
	struct blame *common = s->principal ? blame_of(s->principal, backend) : NULL;

	return now < load->shunned >> 1 || (common && now < common->ejected >> 1);
}

static __always_inline enum verdict judge(const struct search *s, __u32 index,
					  const struct backend *b, struct load *load,
					  const struct service_info *policy)
{
	bool ejects = policy->failures && is_blamed(load);
	struct blame *own = NULL;
	__u64 now = bpf_jiffies64();

	/* Only a TCP connection is known to have begun. */
	if (policy->max_connections && s->judged && load->inflight >= policy->max_connections)
		return FULL;
	if (ejects)
		own = blame_of(s->client, reference(index, b));
	if (own && own->ejected) {
		if (now < ejected_until(own, policy, now))
			return EJECTED;
		/* What has no outcome cannot be a trial, and does not wait for one. */
		return s->judged ? DUE : USABLE;
	}
	if (ejects && s->judged && is_shunned(s, load, reference(index, b), now))
		return SHUNNED;
	return in_slow_start(b, own ? own->readmitted : 0, policy, now) ? WARMING : USABLE;
}

/* Whether this connection is the one that tries an ejected backend. */
static __always_inline bool claim_trial(struct search *s, __u32 index, const struct backend *b,
					const struct service_info *policy)
{
	struct blame *own = blame_of(s->client, reference(index, b));
	__u64 old = own ? own->ejected : 0, now = bpf_jiffies64();
	__u64 patience = now + TRIAL_SECONDS * (__u64)hz;

	if (!old || now < ejected_until(own, policy, now))
		return false;
	if (__sync_val_compare_and_swap(&own->ejected, old, patience << 1 | 1) != old)
		return false;
	/* The time of the trial does not end by what was vouched for before it. */
	own->failed = now;
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

/* Draw a member by its weight that is not the one given, or 0. */
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
	policy = bpf_map_lookup_elem(&services, &s->service);
	if (!policy)
		return 0;
	for (i = 0; i < DRAWS; i++) {
		__u32 index = i ? 0 : other ? s->fellow : s->drawn;
		struct backend *b;
		struct load *load;
		enum verdict v;

		/* A second draw in place of the first would halve the share of whom somebody blames. */
		if (!index)
			index = draw(s->slots, s->count, bpf_get_prandom_u32());
		b = bpf_map_lookup_elem(&backends, &index);
		load = load_of(index);
		if (!b || !load || index == other)
			continue;
		v = judge(s, index, b, load, policy);
		if (v == USABLE)
			return index;
		if (v != EJECTED && v != DUE && v != SHUNNED)
			continue;
		if (despite_ejection)
			return index;
		if (v == DUE && !other && claim_trial(s, index, b, policy))
			return index;
		s->met_ejected = true;
	}
	return 0;
}

/* One member of the table at hand, for census(). */
static long consider(__u32 i, struct search **search)
{
	struct service_info *policy;
	struct search *s = *search;
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
	v = judge(s, index, b, load, policy);
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
	if (v == SHUNNED && !s->shunned)
		s->shunned = index;
	if (v == EJECTED || v == DUE || v == SHUNNED) {
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
	/* What a callback is handed lies on the stack; the search itself need not. */
	bpf_loop(s->count, consider, &s, 0);
	return s->ejected * 100 > policy->max_ejected * s->members;
}

/* How many times as long a failure makes a connection wait, in bits: 16, 256, ... */
#define FAILURE_BITS 4

/* What a client's own failures at a backend add to its score, in bits. It wears off by the second. */
static __always_inline __u32 penalty(struct load *load, __u64 backend, __u64 client)
{
	struct blame *own = is_blamed(load) ? blame_of(client, backend) : NULL;
	__u32 bits;
	__u64 age;

	if (!own)
		return 0;
	bits = own->failures + own->unsent;
	bits = bits < 3 ? bits * FAILURE_BITS : 3 * FAILURE_BITS;
	age = (bpf_jiffies64() - own->failed) / hz;
	return age < bits ? bits - age : 0;
}

/*
 * How long a connection of this client would wait at a backend, in no particular
 * unit.
 */
__noinline __u64 score(__u32 index, __u32 balance, __u32 even, __u64 client)
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
	crowd = (__u64)(load->inflight + load->datagrams) * (even ? 256 : b->cost) + 256;
	if (balance == BALANCE_LEAST_LATENCY) {
		latency = load->rtt + load->response;
		/* It fades so that somebody tries it. Whom it lets wait does. */
		if (!load->inflight)
			latency = aged(latency, load, bpf_jiffies64());
		if (latency > SLOWEST)
			latency = SLOWEST;
	}
	return crowd * (latency + NOISE) << penalty(load, reference(index, b), client);
}

/* How much faster, and by how much shorter answers, makes a backend hasty. */
#define HASTY 4

/*
 * Whether a backend answers in a fraction of another's time with a fraction of what
 * that one says: most likely it fails. Being fast then is no merit.
 */
static __always_inline bool is_hasty(const struct load *load, const struct load *other)
{
	return load->response && load->answer && (__u64)load->response * HASTY < other->response &&
	       (__u64)load->answer * HASTY < other->answer;
}

/*
 * Whether connections wait at a backend of which no answer is known, while the other
 * one answers. Its handshakes, which are the kernel's, say nothing of its answers.
 */
static __always_inline bool is_mute(const struct load *load, const struct load *other)
{
	return load->inflight && !load->response && other->response;
}

/* Power of two choices: the second only if it is clearly better. */
__noinline __u32 better(struct search *s, __u32 first, __u32 second)
{
	struct load *mine = load_of(first), *other = load_of(second);
	__u32 balance;
	__u64 a, b;

	if (!s || !mine || !other || is_hasty(other, mine))
		return first;
	balance = is_mute(mine, other) || is_mute(other, mine) ? BALANCE_LEAST_CONNECTIONS
							       : s->balance;
	a = score(first, balance, s->traits & TRAIT_EVEN, s->client);
	b = score(second, balance, s->traits & TRAIT_EVEN, s->client);
	return b * 5 / 4 < a ? second : first;
}

/* Whether nothing stands against a backend, whoever asks. */
static __always_inline bool is_free(__u32 index, __u32 limit)
{
	struct load *load = load_of(index);

	return load && load->inflight < limit && !is_blamed(load);
}

/*
 * The usual case: nobody blames either backend, neither is full, and none of the
 * service is new. Then nothing counts but weight, load and latency, and not who
 * asks. 0 when it is not so simple.
 */
static __always_inline __u32 choose_plain(struct search *s)
{
	__u32 limit = ~0U, first, second;
	struct service_info *policy;

	if (!(s->traits & TRAIT_PLAIN)) {
		policy = bpf_map_lookup_elem(&services, &s->service);
		if (!policy || in_slow_start_at_all(policy, bpf_jiffies64()))
			return 0;
		if (policy->max_connections && s->judged)
			limit = policy->max_connections;
	}
	first = draw(s->slots, s->count, bpf_get_prandom_u32());
	s->drawn = first;
	if (!is_free(first, limit))
		return 0;
	if (s->balance == BALANCE_RANDOM || s->count < 2)
		return first;
	second = draw_other(s->slots, s->count, first);
	if (!second)
		return first;
	s->fellow = second;
	return is_free(second, limit) ? better(s, first, second) : 0;
}

/* A backend of the table at hand, or 0. */
static __always_inline __u32 from_table(struct search *s)
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
	return second ? better(s, first, second) : first;
}

/* The groups after the first, one by one. */
static long try_next_group(__u32 i __attribute__((unused)), struct search **search)
{
	struct search *s = *search;
	__u32 head = s->slots + s->count;
	struct slot *next = bpf_map_lookup_elem(&slots, &head);

	s->slots = head + 1;
	s->count = next ? next->first : 0;
	s->drawn = s->fellow = 0;
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
	v = judge(s, index, b, load, policy);
	if (v == USABLE || v == WARMING)
		return index;
	return v == DUE && claim_trial(s, index, b, policy) ? index : 0;
}

/* A backend for a new connection, or 0 when there is none. The search is spent then. */
__noinline __u32 choose(struct search *s)
{
	__u32 found;

	if (!s)
		return 0;
	found = s->balance == BALANCE_SOURCE_HASH ? at_home(s) : from_table(s);
	if (!found) {
		s->usable = 0;
		bpf_loop(MAX_TABLES, try_next_group, &s, 0);
		found = s->usable;
	}
	if (!found && s->desperate) {
		count(COUNTER_PANICS);
		found = s->desperate;
	}
	/* What others found dead is not refused to who has not tried it himself. */
	return found ?: s->shunned;
}

#endif
