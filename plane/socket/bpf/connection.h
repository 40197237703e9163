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

#include "blame.h"
#include "kernel.h"
#include "maps.h"

/* How often a compare-and-exchange that another CPU spoiled is repeated. */
#define SPOILED 8

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		(*value)++;
}

static __always_inline __u32 milliseconds(__u32 ticks)
{
	return (__u64)ticks * 1000 / hz;
}

static __always_inline void copy(__be32 *to, const __be32 *from)
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
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

	/* Where others wait still, their silence is no reason to think better of it. */
	if (load->inflight <= 1)
		load->response = aged(load->response, load, now);
	load->rtt = smooth(aged(load->rtt, load, now), sample ?: 1);
	load->measured = now;
}

/*
 * One late answer among others is the scheduler's doing, two in a row are the
 * backend's: what counts is the better of the last two.
 */
static __always_inline void measured_response(struct load *load, __u32 sample, __u64 received)
{
	__u32 now = bpf_jiffies64(), last = load->last_response;

	load->answer = smooth(load->answer, received > ~0U ? ~0U : received ?: 1);
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

/* What a SYN met with that its backend, or the network up to it, may have done. */
static __always_inline bool is_evidence(__u32 error)
{
	switch (error) {
	case ECONNREFUSED:
	case ECONNRESET:
	case ENETUNREACH:
	case EHOSTUNREACH:
	case ETIMEDOUT:
		return true;
	}
	return false;
}

/*
 * The connect failed: refused, unreachable, or its SYN was not answered in time.
 * What never sent a SYN is no failure of a backend.
 */
__noinline int failed(struct socket *s, __u64 cookie, __u32 error, struct identity *who)
{
	struct service_info *policy;
	struct incident what = {};
	bool ejected = false;
	struct load *load;
	__u32 index;
	__u64 life;

	if (!s || !who)
		return 0;
	life = change_life(s, cookie, LIFE_FAILED, LIFE_TRIAL);
	index = (__u32)s->backend;
	if (!(life & LIFE_SENT) || life & (LIFE_FAILED | LIFE_ESTABLISHED))
		return 0;
	load = load_of(index);
	policy = service_of(index);
	if (!load || !policy)
		return 0;
	if (life & LIFE_COUNTED)
		__sync_fetch_and_add(&load->failed, 1);
	what.backend = s->backend;
	what.age = (__u32)bpf_jiffies64() - (__u32)(life >> 32);
	what.kind = life & LIFE_TRIAL ? BLAME_TRIAL : 0;
	if (is_evidence(error))
		ejected = blame(load, policy, who, &what);
	if (!is_followed())
		return 0;
	tell(s, EVENT_FAILED, error, NULL);
	if (ejected)
		tell(s, EVENT_EJECTED, 0, NULL);
	return 0;
}

/* Whose connection it is, if that matters to anybody. */
static __always_inline void identify_if_blamed(struct sock *sk, const struct socket *s,
					       struct identity *to)
{
	struct load *load = load_of((__u32)s->backend);

	if (load && is_blamed(load))
		identify(sk, to);
}

/* The handshake is complete. rtt in microseconds. */
__noinline int established(struct socket *s, __u64 cookie, __u32 rtt, struct identity *who)
{
	struct load *load;
	bool readmitted;
	__u64 life;

	if (!s || !who)
		return 0;
	life = change_life(s, cookie, LIFE_ESTABLISHED, 0);
	load = load_of((__u32)s->backend);
	if (!life || !load)
		return 0;
	if (life & LIFE_COUNTED)
		measured_rtt(load, rtt);
	if (is_followed()) {
		struct traffic t = {.rtt = rtt};

		tell(s, EVENT_ESTABLISHED, 0, &t);
	}
	if (!is_blamed(load))
		return 0;
	readmitted = acquit(load, s->backend, who, false, bpf_jiffies64());
	if (readmitted)
		change_life(s, cookie, 0, LIFE_TRIAL);
	if (readmitted && is_followed())
		tell(s, EVENT_READMITTED, 0, NULL);
	return 0;
}

/*
 * The server of an established connection hung up at once, without a word: for its
 * client that is no better than a refusal.
 */
__noinline int hung_up(struct socket *s, __u64 cookie, struct identity *who)
{
	struct incident what = {};
	struct service_info *policy;
	struct load *load;
	__u64 life;

	if (!s || !who)
		return 0;
	what.backend = s->backend;
	what.age = (__u32)bpf_jiffies64() - (__u32)(s->life >> 32);
	policy = service_of((__u32)s->backend);
	load = load_of((__u32)s->backend);
	if (what.age >= hz || !load || !policy)
		return 0;
	life = change_life(s, cookie, LIFE_FRUITLESS, LIFE_TRIAL);
	if (!(life & LIFE_ESTABLISHED) || life & LIFE_FRUITLESS)
		return 0;
	what.kind = BLAME_FRUITLESS | (life & LIFE_TRIAL ? BLAME_TRIAL : 0);
	if (blame(load, policy, who, &what) && is_followed())
		tell(s, EVENT_EJECTED, 0, NULL);
	return 0;
}

/*
 * No SYN ever left: there is no way to the backend, or this connect had a fault of its
 * own. It makes the backend less attractive to who met that, and no more.
 */
__noinline int unsent(struct socket *s, __u64 cookie, struct identity *who)
{
	struct incident what = {.kind = BLAME_UNSENT};
	struct service_info *policy;
	struct load *load;
	__u64 life;

	if (!s || !who)
		return 0;
	/* Of UDP, and of what was sent, there is nothing to note. */
	life = s->life;
	if (!(life & LIFE_JUDGED) || life & (LIFE_SENT | LIFE_FAILED))
		return 0;
	life = change_life(s, cookie, LIFE_FAILED, 0);
	load = load_of((__u32)s->backend);
	policy = service_of((__u32)s->backend);
	if (!load || !policy || !life || life & (LIFE_SENT | LIFE_FAILED))
		return 0;
	what.backend = s->backend;
	blame(load, policy, who, &what);
	if (is_followed())
		tell(s, EVENT_FAILED, 0, NULL);
	return 0;
}

/* Who gives up sooner than this part of a second has other reasons than silence. */
#define PATIENT 5

/* Whether a process gives a connect up that was answered by nobody for a while. */
static __always_inline bool is_unanswered(const struct socket *s)
{
	__u64 life = s->life;

	return life & LIFE_SENT && !(life & (LIFE_ESTABLISHED | LIFE_FAILED)) &&
	       (__u32)bpf_jiffies64() - (__u32)(life >> 32) >= hz / PATIENT;
}

/* Nobody waits for the outcome of a trial any more: the next connection is the trial. */
static __always_inline void give_up_trial(__u64 backend, const struct identity *who)
{
	struct blame *b = blame_of(who->client, backend);
	__u64 old = b ? b->ejected : 0;

	if (old & 1)
		__sync_val_compare_and_swap(&b->ejected, old, bpf_jiffies64() << 1);
}

/*
 * The connection is over, however it ended; t may be NULL, and who, when nobody can
 * tell whose it was. It is counted back once, whoever comes first.
 */
__noinline int ended(struct socket *s, __u64 cookie, struct traffic *t, struct identity *who)
{
	struct load *load;
	__u64 life;
	bool udp;

	if (!s)
		return 0;
	life = change_life(s, cookie, 0, LIFE_COUNTED | LIFE_TRIAL | LIFE_SENT);
	udp = s->udp & UDP_COUNTED;
	load = load_of((__u32)s->backend);
	if (!(life & (LIFE_COUNTED | LIFE_TRIAL | LIFE_SENT)) || !load)
		return 0;
	if (life & LIFE_ESTABLISHED && t) {
		/* Of a short connection the handshake has told it. */
		if (life & LIFE_COUNTED && t->rtt_min &&
		    (__u32)bpf_jiffies64() - (__u32)(life >> 32) > hz)
			measured_rtt(load, t->rtt_min);
		if (life & LIFE_COUNTED && t->response)
			measured_response(load, t->response, t->received);
		/* Who talks and is not hung up on has found a server, also one that says nothing. */
		if (who && !(life & LIFE_FRUITLESS) && (t->received > 1 || t->sent) &&
		    is_blamed(load) && acquit(load, s->backend, who, true, life >> 32) &&
		    is_followed())
			tell(s, EVENT_READMITTED, 0, NULL);
	}
	if (life & LIFE_TRIAL && who)
		give_up_trial(s->backend, who);
	if (life & (LIFE_COUNTED | LIFE_SENT) && !(life & LIFE_FAILED) && is_followed())
		tell(s, EVENT_CLOSED, 0, t);
	if (life & LIFE_COUNTED)
		__sync_fetch_and_sub(udp ? &load->datagrams : &load->inflight, 1);
	return 0;
}

/* Give the place back, unless somebody else has done so. */
static __always_inline void vacate(struct socket *s, __u64 cookie)
{
	__sync_val_compare_and_swap(&s->cookie, cookie, 0);
}

/* The socket is gone, or connects elsewhere. */
static __always_inline void forget(__u64 cookie, struct traffic *t, struct identity *who)
{
	struct socket *s = place_of(cookie);
	struct socket *more;
	__u64 earlier = cookie | EARLIER;

	if (!s)
		return;
	if (s->crowded) {
		more = bpf_map_lookup_elem(&sockets_more, &cookie);
		if (more) {
			ended(more, cookie, t, who);
			bpf_map_delete_elem(&sockets_more, &cookie);
		}
		more = bpf_map_lookup_elem(&sockets_more, &earlier);
		if (more) {
			ended(more, cookie, NULL, NULL);
			bpf_map_delete_elem(&sockets_more, &earlier);
		}
	}
	if (s->cookie == cookie) {
		ended(s, cookie, t, who);
		vacate(s, cookie);
	}
}

#endif
