/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The life of a connection through a VIP: counted when it begins, judged when
 * its handshake ends, counted back when it is over; and what its backend learns
 * from that. All of it is told to those who follow flows.
 */
#ifndef PENTAD_SOCKET_CONNECTION_H
#define PENTAD_SOCKET_CONNECTION_H

#include <stdbool.h>

#include <linux/errno.h>

#include "kernel.h"
#include "maps.h"

/* Ticks of bpf_jiffies64() in a second. */
const volatile __u32 hz;

/* How long a trial may go without an outcome before another may begin. */
#define TRIAL_SECONDS 10

/* An ejection is at most this many times the configured one. */
#define EJECTION_GROWTH 10

/* How often a compare-and-exchange that another CPU spoiled is repeated. */
#define SPOILED 8

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		(*value)++;
}

static __always_inline __u32 ticks(__u32 ms)
{
	return (__u64)ms * hz / 1000;
}

static __always_inline __u32 milliseconds(__u32 ticks)
{
	return (__u64)ticks * 1000 / hz;
}

static __always_inline struct load *load_of(__u32 backend)
{
	__u32 chunk = backend >> LOAD_CHUNK_BITS, place = backend & (LOAD_CHUNK - 1);
	void *loads_of_chunk = bpf_map_lookup_elem(&loads, &chunk);

	return loads_of_chunk ? bpf_map_lookup_elem(loads_of_chunk, &place) : NULL;
}

static __always_inline void copy(__be32 *to, const __be32 *from)
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

/* The finalizer of MurmurHash3 (Appleby, public domain): every bit moves half of the others. */
static __always_inline __u64 mix(__u64 x)
{
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdULL;
	x ^= x >> 33;
	x *= 0xc4ceb9fe1a85ec53ULL;
	x ^= x >> 33;
	return x;
}

static __always_inline bool is_followed(void)
{
	__u32 zero = 0;
	__u64 *until = bpf_map_lookup_elem(&followed, &zero);

	return until && *until && *until > bpf_jiffies64();
}

/* Hand an event to every follower. Whoever has no room for it is told how many it missed. */
static __noinline void publish(struct event *e)
{
	__u64 now = bpf_jiffies64();
	int i;

	e->time = bpf_ktime_get_ns();
	for (i = 0; i < FOLLOWERS; i++) {
		__u32 place = i;
		__u64 *until = bpf_map_lookup_elem(&followers, &place);
		__u64 *missed;
		void *ring;

		if (!until || *until <= now)
			continue;
		ring = bpf_map_lookup_elem(&flows, &place);
		/* The follower looks by itself, often: waking it would cost more than the event. */
		if (!ring || !bpf_ringbuf_output(ring, e, sizeof(*e), BPF_RB_NO_WAKEUP))
			continue;
		missed = bpf_map_lookup_elem(&lost, &place);
		if (missed)
			__sync_fetch_and_add(missed, 1);
	}
}

/* What the kernel knows of a TCP connection. */
struct traffic {
	__u64 sent; /* bytes */
	__u64 received;
	__u32 rtt;      /* us, smoothed; 0: unknown */
	__u32 rtt_min;  /* us */
	__u32 response; /* us, from a request to the first byte of its answer; 0: unknown */
};

/*
 * How long the first answer took: from what was sent last until the first byte
 * came, if that is the order in which it was; else there was more than one
 * request, and of the last one it is known to a jiffy.
 */
static __always_inline __u32 response_of(struct tcp_sock *t)
{
	/* Who sends nothing waits from the handshake on. */
	__u64 asked = t->first_tx_mstamp ?: t->delivered_mstamp;
	__u64 answered = t->rcv_rtt_est.time;
	__u32 ticks;

	if (!answered || !asked)
		return 0;
	if (answered >= asked)
		return answered - asked ?: 1;
	ticks = t->inet_conn.icsk_ack.lrcvtime - t->lsndtime;
	return (__s32)ticks > 0 ? (__u64)milliseconds(ticks) * 1000 : 1;
}

static __always_inline void read_traffic(struct traffic *to, struct tcp_sock *t)
{
	to->sent = t->bytes_sent;
	to->received = t->bytes_received;
	to->rtt = t->srtt_us >> 3;
	to->rtt_min = t->rtt_min.s[0].v;
	to->response = response_of(t);
}

/*
 * Tell followers what became of a connection, unless its service is silent. t may
 * be NULL. This and some others are global functions because the verifier looks
 * at those once, and not in every place from which they are called.
 */
__noinline int tell(struct socket *s, __u32 kind, __u32 error, struct traffic *t)
{
	struct service_info *policy;
	struct event e = {};
	struct backend *b;
	__u32 index;

	if (!s)
		return 0;
	index = (__u32)s->backend;
	b = bpf_map_lookup_elem(&backends, &index);
	e.service = b ? b->service : 0;
	policy = bpf_map_lookup_elem(&services, &e.service);
	if (policy && policy->silent)
		return 0;
	e.cookie = s->cookie;
	e.vip_port = s->vip_port;
	e.port = s->port;
	e.kind = kind;
	e.protocol = s->protocol;
	e.error = error;
	e.duration = milliseconds((__u32)bpf_jiffies64() - (__u32)(s->life >> 32));
	copy(e.vip, s->vip);
	copy(e.addr, s->addr);
	if (t) {
		e.rtt = t->rtt;
		e.sent = t->sent;
		e.received = t->received;
	}
	/* A handshake ends in a softirq, where whatever process runs has no part in it. */
	if (kind == EVENT_CONNECT || kind == EVENT_CLOSED) {
		e.pid = bpf_get_current_pid_tgid() >> 32;
		bpf_get_current_comm(e.command, sizeof(e.command));
	}
	publish(&e);
	return 0;
}

/* Moving average: a quarter of the new. */
static __always_inline __u32 smooth(__u32 old, __u32 sample)
{
	if (!old)
		return sample;
	return old - old / 4 + sample / 4;
}

/*
 * A latency counts half as much for every HALF_LIFE seconds without a new
 * measurement: a backend that nobody uses because it was slow is tried again.
 */
#define HALF_LIFE 1

static __always_inline __u32 aged(__u32 latency, const struct load *load, __u32 now)
{
	__u32 age = now - load->measured;
	__u32 halvings;

	/* Usual, and spares a division. */
	if (age < HALF_LIFE * hz)
		return latency;
	halvings = age / (HALF_LIFE * hz);
	return halvings > 31 ? 0 : latency >> halvings;
}

static __always_inline void measured_rtt(struct load *load, __u32 sample)
{
	__u32 now = bpf_jiffies64();

	load->response = aged(load->response, load, now);
	load->rtt = smooth(aged(load->rtt, load, now), sample ?: 1);
	load->measured = now;
}

/*
 * One late answer among others is the scheduler's doing, two in a row are the
 * backend's: what counts is the better of the last two.
 */
static __always_inline void measured_response(struct load *load, __u32 sample)
{
	__u32 now = bpf_jiffies64(), last = load->last_response;

	load->last_response = sample ?: 1;
	if (last && last < sample)
		sample = last;
	load->rtt = aged(load->rtt, load, now);
	load->response = smooth(aged(load->response, load, now), sample ?: 1);
	load->measured = now;
}

static __always_inline struct socket *place_of(__u64 cookie)
{
	__u32 place = cookie & (SOCKETS - 1);

	return bpf_map_lookup_elem(&sockets, &place);
}

/* What was translated for this socket, or NULL. */
static __always_inline struct socket *recall(__u64 cookie)
{
	struct socket *s = place_of(cookie);

	if (!s)
		return NULL;
	if (s->cookie == cookie)
		return s;
	if (!s->crowded)
		return NULL;
	return bpf_map_lookup_elem(&sockets_more, &cookie);
}

static __always_inline __u32 tag_of(__u64 cookie)
{
	return (__u32)(mix(cookie) >> 40) << 8;
}

/*
 * Set and clear bits of life. Returns life as it was, or 0 when the place has
 * another owner by now.
 */
static __always_inline __u64 change_life(struct socket *s, __u64 cookie, __u8 set, __u8 clear)
{
	__u32 tag = tag_of(cookie);
	int i;

	for (i = 0; i < SPOILED; i++) {
		__u64 old = *(volatile __u64 *)&s->life;
		__u64 new = (old & ~(__u64)clear) | set;

		if (((__u32)old & ~0xffU) != tag)
			return 0;
		if (new == old || __sync_val_compare_and_swap(&s->life, old, new) == old)
			return old;
	}
	return 0;
}

static __always_inline struct service_info *service_of(__u32 backend)
{
	struct backend *b = bpf_map_lookup_elem(&backends, &backend);
	__u32 service = b ? b->service : 0;

	return service ? bpf_map_lookup_elem(&services, &service) : NULL;
}

/* The backend takes connections again, little by little. */
static __always_inline void readmit(struct load *load)
{
	load->failures = 0;
	load->readmitted = (__u32)bpf_jiffies64() ?: 1;
	*(volatile __u64 *)&load->ejected = 0;
}

/*
 * Eject for twice as long as the last time, unless the backend has done well for
 * long. old is the value of ejected that the caller saw: only one of those who
 * see the same reason ejects.
 */
static __always_inline bool eject(struct load *load, const struct service_info *policy, __u64 old)
{
	__u32 base = ticks(policy->ejection);
	__u64 now = bpf_jiffies64();
	__u32 times = load->ejections;
	__u32 growth;

	if (!old && times && (__u32)now - load->readmitted > EJECTION_GROWTH * base)
		times = 0;
	growth = times < 4 ? 1 << times : EJECTION_GROWTH;
	if (growth > EJECTION_GROWTH)
		growth = EJECTION_GROWTH;
	if (__sync_val_compare_and_swap(&load->ejected, old, (now + (__u64)base * growth) << 1) !=
	    old)
		return false;
	load->ejections = times + 1;
	load->failures = 0;
	__sync_fetch_and_add(&load->ejected_ever, 1);
	return true;
}

/* The connect failed: refused, unreachable, or its SYN was not answered in time. */
__noinline int failed(struct socket *s, __u64 cookie, __u32 error)
{
	struct service_info *policy;
	bool ejected = false;
	struct load *load;
	__u32 index;
	__u64 life;

	if (!s)
		return 0;
	life = change_life(s, cookie, LIFE_FAILED, LIFE_TRIAL);
	index = (__u32)s->backend;
	if (!(life & LIFE_JUDGED) || life & (LIFE_FAILED | LIFE_ESTABLISHED))
		return 0;
	load = load_of(index);
	policy = service_of(index);
	if (!load || !policy)
		return 0;
	__sync_fetch_and_add(&load->failed, 1);
	if (life & LIFE_TRIAL) {
		ejected = eject(load, policy, load->ejected);
	} else if (policy->failures && !load->ejected &&
		   (!load->readmitted || (__s32)((__u32)(life >> 32) - load->readmitted) >= 0)) {
		/* What began before the backend came back says nothing about it now. */
		if (__sync_fetch_and_add(&load->failures, 1) + 1 >= policy->failures)
			ejected = eject(load, policy, 0);
	}
	if (!is_followed())
		return 0;
	tell(s, EVENT_FAILED, error, NULL);
	if (ejected)
		tell(s, EVENT_EJECTED, 0, NULL);
	return 0;
}

/* The handshake is complete. rtt in microseconds. */
static __always_inline void established(struct socket *s, __u64 cookie, __u32 rtt)
{
	__u64 life = change_life(s, cookie, LIFE_ESTABLISHED, LIFE_TRIAL);
	__u32 index = (__u32)s->backend;
	struct load *load = load_of(index);

	if (!life || !load)
		return;
	measured_rtt(load, rtt);
	if (load->failures)
		load->failures = 0;
	if (is_followed()) {
		struct traffic t = {.rtt = rtt};

		tell(s, EVENT_ESTABLISHED, 0, &t);
	}
	if (life & LIFE_TRIAL || load->ejected) {
		/* A trial, or a connection that was made because too many are ejected. */
		readmit(load);
		if (is_followed())
			tell(s, EVENT_READMITTED, 0, NULL);
	}
}

/*
 * The connection is over, however it ended; t may be NULL. It is counted back
 * once, whoever comes first. What never sent a SYN found no way to its backend.
 */
__noinline int ended(struct socket *s, __u64 cookie, struct traffic *t)
{
	struct load *load;
	__u64 life;

	if (!s)
		return 0;
	life = change_life(s, cookie, 0, LIFE_COUNTED);
	load = load_of((__u32)s->backend);
	if (!(life & LIFE_COUNTED) || !load)
		return 0;
	if (t && life & LIFE_ESTABLISHED) {
		/* Of a short connection the handshake has told it. */
		if (t->rtt_min && (__u32)bpf_jiffies64() - (__u32)(life >> 32) > hz)
			measured_rtt(load, t->rtt_min);
		if (t->response)
			measured_response(load, t->response);
	}
	if (life & LIFE_JUDGED && !(life & LIFE_SENT)) {
		failed(s, cookie, ENETUNREACH);
	} else {
		if (life & LIFE_TRIAL && load->ejected & 1)
			/* Nobody waited for the outcome: the next one is the trial. */
			__sync_val_compare_and_swap(&load->ejected, load->ejected,
						    bpf_jiffies64() << 1);
		if (is_followed() && !(life & LIFE_FAILED))
			tell(s, EVENT_CLOSED, 0, t);
	}
	__sync_fetch_and_sub(&load->inflight, 1);
	return 0;
}

/* The socket is gone, or connects elsewhere. */
static __always_inline void forget(__u64 cookie, struct traffic *t)
{
	struct socket *s = place_of(cookie);
	struct socket *more;

	if (!s)
		return;
	if (s->crowded) {
		more = bpf_map_lookup_elem(&sockets_more, &cookie);
		if (more) {
			ended(more, cookie, t);
			bpf_map_delete_elem(&sockets_more, &cookie);
		}
	}
	if (s->cookie == cookie) {
		ended(s, cookie, t);
		*(volatile __u64 *)&s->cookie = 0;
	}
}

#endif
