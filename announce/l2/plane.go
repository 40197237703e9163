// Package l2 tells the hosts of a segment which VIPs are here, by ARP and neighbour
// discovery: one host has each VIP.
//
// Announcers that share a key tell each other, on the segments themselves, that they are
// there and which VIPs they have; which of them takes what nobody has is decided by
// election.go, which is pure. Questions are answered by an eBPF program at the interface,
// while what this host has is its own: with others who could take over, for a moment
// after it has last said that it is there; alone, for ever, also without an agent.
package l2

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pentad/pentad/announce"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/host"
	"github.com/pentad/pentad/pins"
)

// Want is where which VIPs are to be announced.
type Want struct {
	Config config.L2
	VIPs   []announce.VIP
}

// Equal reports whether both are the same.
func (w Want) Equal(o Want) bool {
	return w.Config.Equal(o.Config) && slices.EqualFunc(w.VIPs, o.VIPs, func(a, b announce.VIP) bool {
		return a.Address == b.Address && (a.Missing == "") == (b.Missing == "")
	})
}

// Plane is this host among announcers.
type Plane struct {
	log *slog.Logger
	dir string

	mu       sync.Mutex
	want     *Want // nil: it is about to be applied
	kernel   *kernel
	election *election
	talk     talk
	wires    map[string]*wire
	missing  []string              // interfaces that are not there
	vips     map[key]netip.Addr    // all of the want
	bursts   map[netip.Addr]*burst // VIPs that are being claimed
	asked    map[netip.Addr]uint64 // when, in ns since boot
	owners   map[netip.Addr]string // what was logged last
	news     bool                  // something was heard
	watched  time.Time             // when it was looked last whether somebody else has a VIP
	watching []key                 // that are still to be looked at
	took     map[netip.Addr]uint64 // since when this host has each VIP, in ns since boot
	looked   time.Time             // when groups and the key were looked at last
	withdrew time.Time             // when everything was given up
}

// talk is what this host says to others.
type talk struct {
	secret   []byte // nil: there are no others
	name     string
	nonce    uint64
	group    uint64
	sequence uint64
	said     time.Time
	part     int                // of what is claimed, that is said next
	heard    map[id]heardMember // whoever signs with the key
}

type heardMember struct {
	nonce uint64
	at    time.Time
}

// burst is a VIP that is claimed again and again for a while: switches and hosts may miss
// the first.
type burst struct {
	next time.Time
	left int
}

const (
	burstCount = 5
	burstEvery = 1100 * time.Millisecond // some take one a second only
)

// New returns a plane that has not touched the kernel yet. pins is the directory of all
// pins.
func New(pinDir string, log *slog.Logger) *Plane {
	return &Plane{
		log: log, dir: filepath.Join(pinDir, planeDir), wires: make(map[string]*wire), vips: make(map[key]netip.Addr),
		bursts: make(map[netip.Addr]*burst), asked: make(map[netip.Addr]uint64), owners: make(map[netip.Addr]string), took: make(map[netip.Addr]uint64),
	}
}

// Apply announces what is wanted where it is wanted, as far as other announcers leave it
// to this one.
func (p *Plane) Apply(_ context.Context, want Want) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.withdrew) < announce.WithdrawnFor {
		return announce.ErrWithdrawn
	}
	p.withdrew = time.Time{}
	if err := p.prepare(want.Config); err != nil {
		return err
	}
	there, err := pins.Ethernet(want.Config.Interfaces)
	if err != nil {
		return err
	}
	if err := p.openWires(there); err != nil {
		return err
	}
	p.missing = nil
	for _, name := range want.Config.Interfaces {
		if _, ok := there[name]; !ok {
			p.missing = append(p.missing, name)
		}
	}
	p.vips = make(map[key]netip.Addr)
	able := make(map[key]bool)
	for _, v := range want.VIPs {
		k := vipKey(v.Address)
		p.vips[k] = v.Address
		if v.Missing == "" {
			able[k] = true
		}
	}
	p.election.setCapable(able)
	p.adopt()
	if err := p.decide(time.Now()); err != nil {
		return err
	}
	if !p.kernel.areAttached(there) || !p.kernel.areJoined() {
		if err := errors.Join(p.kernel.attach(there), p.kernel.join()); err != nil {
			return err
		}
		p.claimAll() // somebody may have missed it
	}
	p.want, p.looked = &want, time.Now()
	return nil
}

// prepare opens the kernel, and begins an election if there is none for this key.
func (p *Plane) prepare(c config.L2) error {
	secret, err := readKey(c)
	if err != nil {
		return err
	}
	if p.kernel == nil {
		k, err := openKernel(p.dir)
		if err != nil {
			return err
		}
		p.kernel = k
	}
	if p.election != nil && p.election.priority == uint8(c.Priority) && slices.Equal(p.talk.secret, secret) && p.talk.group == groupOf(c.Group) {
		return nil
	}
	if p.election != nil {
		p.leave() // those of before take over, and do not hear of what follows
	}
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	var self id
	var nonce [8]byte
	for _, b := range [][]byte{self[:], nonce[:]} {
		if _, err := rand.Read(b); err != nil {
			return err
		}
	}
	p.talk = talk{secret: secret, name: name[:min(len(name), maxName)], nonce: binary.BigEndian.Uint64(nonce[:]), group: groupOf(c.Group), heard: make(map[id]heardMember)}
	p.election = newElection(self, uint8(c.Priority), time.Now())
	if secret == nil {
		p.election.began = time.Time{} // there is nobody to be listened to
	}
	return nil
}

// adopt goes on with what an earlier agent had, if nobody could take it meanwhile.
func (p *Plane) adopt() {
	if !p.kernel.lasts() || !p.election.alone() || len(p.election.owned) > 0 {
		return
	}
	for vip, owned := range p.kernel.vips {
		if k := vipKey(vip); owned && p.election.capable[k] {
			p.election.owned[k] = true
		}
	}
}

func groupOf(name string) uint64 {
	sum := sha256.Sum256([]byte(name))
	return binary.BigEndian.Uint64(sum[:])
}

func vipKey(a netip.Addr) key {
	b := a.As16()
	sum := sha256.Sum256(b[:])
	return key(binary.BigEndian.Uint64(sum[:]))
}

// openWires has a wire at just these interfaces.
func (p *Plane) openWires(there map[string]pins.Interface) error {
	for name, w := range p.wires {
		if i, ok := there[name]; !ok || i.Index != w.index || string(i.MAC[:]) != string(w.device) {
			// Its reader may be about to take the lock.
			go w.close()
			delete(p.wires, name)
		}
	}
	for name, i := range there {
		if p.wires[name] != nil {
			continue
		}
		w, err := openWire(i, p.receive)
		if err != nil {
			return fmt.Errorf("interface %s: %w", name, err)
		}
		p.wires[name] = w
	}
	return nil
}

// receive takes a message from a segment.
func (p *Plane) receive(b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.talk.secret == nil || p.election == nil {
		return
	}
	m, err := parse(b, p.talk.secret)
	if err != nil || m.group != p.talk.group || m.sender == p.election.id {
		return
	}
	now := time.Now()
	p.talk.hear(m, now)
	if p.election.receive(m, slices.Contains(m.heard, p.talk.nonce), now) && m.leaving {
		p.news = true
	}
}

// hear notes the sender of a message: he is told that he was heard.
func (t *talk) hear(m message, now time.Time) {
	for i, h := range t.heard {
		if now.Sub(h.at) > deadAfter {
			delete(t.heard, i)
		}
	}
	if _, ok := t.heard[m.sender]; !ok && len(t.heard) >= maxHeard {
		oldest := m.sender
		for i, h := range t.heard {
			if oldest == m.sender || h.at.Before(t.heard[oldest].at) {
				oldest = i
			}
		}
		delete(t.heard, oldest)
	}
	t.heard[m.sender] = heardMember{m.nonce, now}
}

// maxHeard bounds those of whom it is not known whether they are there, or somebody says
// again what they said once.
const maxHeard = 256

// nonces returns those whom this host hears, as many as fit: members first, of the others
// whoever the lot falls on.
func (t *talk) nonces(members map[id]*member, now time.Time) (all []uint64) {
	for i := range members {
		if h, ok := t.heard[i]; ok {
			all = append(all, h.nonce)
		}
	}
	for i, h := range t.heard { // in no order
		if len(all) >= maxMembers {
			break
		}
		if members[i] == nil && now.Sub(h.at) <= deadAfter {
			all = append(all, h.nonce)
		}
	}
	return all
}

// tickEvery is how often it is looked what has to be done.
const tickEvery = 50 * time.Millisecond

// Run speaks to other announcers, and claims VIPs.
func (p *Plane) Run(ctx context.Context) {
	t := time.NewTicker(tickEvery)
	defer t.Stop()
	said := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			err := p.tick(time.Now()) // it may have waited
			if err != nil && err.Error() != said {
				p.log.Error("VIPs could not be announced as they should", "error", err)
			}
			said = ""
			if err != nil {
				said = err.Error()
			}
		}
	}
}

func (p *Plane) tick(now time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.want == nil {
		return nil
	}
	p.hearAnswers(now)
	var errs []error
	if p.news || now.Sub(p.talk.said) >= beatEvery {
		p.news = false
		errs = append(errs, p.decide(now))
	}
	errs = append(errs, p.burst(now))
	p.lookForRivals(now)
	return errors.Join(errs...)
}

// It is asked for VIPs that this host has, all of them within some seconds: nobody
// should answer.
const (
	watchEvery = time.Second
	watchAll   = 8   // seconds
	watchMost  = 100 // a second
)

func (p *Plane) watchAtOnce() int {
	return min(watchMost, 1+len(p.election.owned)/watchAll)
}

// recently is how old the claim of somebody else may be to count: he was asked since.
func (p *Plane) recently() time.Duration {
	return time.Duration(2+len(p.election.owned)/p.watchAtOnce())*watchEvery + time.Second
}

func (p *Plane) lookForRivals(now time.Time) {
	if now.Sub(p.watched) < watchEvery {
		return
	}
	p.watched = now
	if len(p.watching) == 0 {
		p.watching = slices.Collect(maps.Keys(p.election.owned))
	}
	some := p.watching[:min(len(p.watching), p.watchAtOnce())]
	p.watching = p.watching[len(some):]
	for _, k := range some {
		for _, w := range p.wires {
			if p.election.owned[k] {
				_ = w.ask(p.vips[k])
			}
		}
	}
}

// decide has the election decide, and the kernel follow.
func (p *Plane) decide(now time.Time) error {
	if !p.election.alone() && now.Sub(p.talk.said) > leaseTime {
		p.log.Warn("this agent stood still, and others may have taken its VIPs", "for", now.Sub(p.talk.said).Round(time.Millisecond))
		for _, k := range p.election.lapse(now) {
			delete(p.bursts, p.vips[k])
		}
	}
	gained, lost, kept, ask := p.election.tick(now)
	for _, k := range ask {
		p.askFor(p.vips[k])
	}
	for _, k := range gained {
		p.took[p.vips[k]] = bootTime()
	}
	for _, k := range append(gained, kept...) {
		if p.bursts[p.vips[k]] == nil {
			p.bursts[p.vips[k]] = &burst{next: now, left: burstCount}
		}
	}
	for _, k := range lost {
		delete(p.bursts, p.vips[k])
		delete(p.took, p.vips[k])
	}
	// What is given up is so before others hear of it, and what is taken is answered
	// before it is claimed.
	vips := make(map[netip.Addr]bool, len(p.vips))
	for k, a := range p.vips {
		vips[a] = p.election.owned[k]
	}
	errs := []error{p.kernel.set(vips)}
	if len(gained)+len(lost) > 0 || now.Sub(p.talk.said) >= beatEvery {
		p.say(now, len(gained)+len(lost) > 0, false)
		errs = append(errs, p.kernel.setLease(leaseTime, p.election.alone() && p.election.hasListened(now)))
	}
	p.logOwners()
	return errors.Join(errs...)
}

// say says that this host is there, and what it claims: all of it if that has changed,
// else a part.
func (p *Plane) say(now time.Time, whole, leaving bool) {
	p.talk.said = now
	if p.talk.secret == nil {
		return
	}
	e, t := p.election, &p.talk
	all := e.claims()
	parts := max(1, (len(all)+maxClaims-1)/maxClaims)
	// Whoever missed some hears all again within ten beats.
	count := max(1, parts/10)
	if whole || t.part >= parts {
		t.part = 0
	}
	if whole {
		count = parts
	}
	heard := t.nonces(e.members, now)
	for range count {
		t.sequence++
		m := message{
			group: t.group, sender: e.id, nonce: t.nonce, sequence: t.sequence, priority: e.priority, leaving: leaving, name: t.name, heard: heard,
			version: e.version, part: uint16(t.part), parts: uint16(parts), claims: all[t.part*maxClaims : min(len(all), (t.part+1)*maxClaims)],
		}
		b := m.append(nil, t.secret)
		for _, w := range p.wires {
			_ = w.send(announcers, etherType, b) // an interface that is down hears nothing
		}
		t.part = (t.part + 1) % parts
	}
}

// askFor asks on all segments who has a VIP.
func (p *Plane) askFor(vip netip.Addr) {
	p.asked[vip] = bootTime()
	for _, w := range p.wires {
		_ = w.ask(vip)
	}
}

// hearAnswers finds those who answered.
func (p *Plane) hearAnswers(at time.Time) {
	for vip, when := range p.asked {
		c, ok := p.foreignClaim(vip)
		if ok && c.at >= when {
			p.election.answered(vipKey(vip), at)
		}
		if ok && c.at >= when || bootTime()-when > uint64(time.Second) {
			delete(p.asked, vip)
		}
	}
}

// maxClaimsAtOnce is how many VIPs are claimed in one tick.
const maxClaimsAtOnce = 200

// foreignClaim is claimOf, but for what this host says itself at another interface of the
// same segment.
func (p *Plane) foreignClaim(vip netip.Addr) (foreignClaim, bool) {
	c, ok := p.kernel.claimOf(vip)
	for _, w := range p.wires {
		if ok && w.device.String() == c.mac.String() {
			return foreignClaim{}, false
		}
	}
	return c, ok
}

// burst claims what has to be claimed now.
func (p *Plane) burst(now time.Time) error {
	var errs []error
	sent := 0
	for vip, b := range p.bursts {
		if now.Before(b.next) {
			continue
		}
		if sent++; sent > maxClaimsAtOnce {
			break // nothing may take so long that others think this host is dead
		}
		for name, w := range p.wires {
			if err := w.claim(vip); err != nil {
				errs = append(errs, fmt.Errorf("%s at %s: %w", vip, name, err))
			}
		}
		b.next, b.left = now.Add(burstEvery), b.left-1
		if b.left == 0 {
			delete(p.bursts, vip)
		}
	}
	return errors.Join(errs...)
}

// claimAll claims everything that this host has once more.
func (p *Plane) claimAll() {
	for k := range p.election.owned {
		p.bursts[p.vips[k]] = &burst{left: burstCount}
	}
}

// logMost is how many VIPs are named when their owners change; of more the number is.
const logMost = 10

// logOwners says who has which VIP, when that changes.
func (p *Plane) logOwners() {
	changed := 0
	for k, vip := range p.vips {
		name, here := p.election.ownerOf(k), p.election.owned[k]
		if here {
			name = p.talk.name + " (here)"
		}
		was, ok := p.owners[vip]
		if name == was && (ok || name == "") {
			continue
		}
		p.owners[vip] = name
		if changed++; changed <= logMost {
			p.log.Info("a VIP has another owner on its segment", "vip", vip, "owner", name, "here", here)
		}
	}
	if changed > logMost {
		p.log.Info("more VIPs have other owners on their segment", "vips", changed-logMost)
	}
	if len(p.owners) > len(p.vips) {
		maps.DeleteFunc(p.owners, func(a netip.Addr, _ string) bool { _, ok := p.vips[vipKey(a)]; return !ok })
	}
}

// Intact reports whether interfaces have the program, and the address that it answers
// with, and now and then whether they are in all groups and the key is the same.
func (p *Plane) Intact() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.want == nil || p.kernel == nil {
		return p.withdrew.IsZero() || time.Since(p.withdrew) < announce.WithdrawnFor
	}
	there, err := pins.Ethernet(p.want.Config.Interfaces)
	if err == nil && !p.kernel.areAttached(there) {
		return false
	}
	if time.Since(p.looked) < lookEvery {
		return true
	}
	p.looked = time.Now()
	secret, err := readKey(p.want.Config)
	return p.kernel.areJoined() && (err != nil || slices.Equal(secret, p.talk.secret))
}

// lookEvery is how often that is.
const lookEvery = 2 * time.Second

// readKey returns the key of announcers; nil: this host is the only one.
func readKey(c config.L2) ([]byte, error) {
	if c.KeyFile == "" {
		return nil, nil
	}
	text, err := host.ReadPassword(c.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("announce.l2: %w", err)
	}
	return []byte(text), nil
}

// Distrust has the next Apply read the kernel.
func (p *Plane) Distrust() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forgetKernel()
}

func (p *Plane) forgetKernel() {
	p.want = nil
	if p.kernel != nil {
		p.kernel.close()
		p.kernel = nil
	}
}

// Withdraw gives up everything: the end of the agent is near.
func (p *Plane) Withdraw() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.leave()
	if p.election != nil {
		p.election.lapse(time.Now())
	}
	p.want, p.withdrew = nil, time.Now()
}

// leave tells others that they may take over, which they do at once, once nothing is
// answered here.
func (p *Plane) leave() {
	if p.kernel == nil || p.election == nil {
		return
	}
	if err := p.kernel.setLease(0, false); err != nil {
		p.log.Error("VIPs could not be given up", "error", err)
	}
	p.say(time.Now(), true, true)
}

// Close lets go. What this host has is left to others, if there are any; else it stays.
func (p *Plane) Close() {
	p.mu.Lock()
	if p.want != nil && !p.election.alone() {
		p.leave()
	}
	wires := p.wires
	p.wires = nil
	p.forgetKernel()
	p.mu.Unlock()
	for _, w := range wires {
		w.close()
	}
}

// Report is how a VIP is.
type Report struct {
	Owner   string // the host that has it; empty: none
	Here    bool
	Problem string // empty: none
}

// Reports says who has each VIP.
func (p *Plane) Reports() map[netip.Addr]Report {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make(map[netip.Addr]Report)
	if p.election == nil || p.kernel == nil {
		return all
	}
	at := time.Now()
	for k, vip := range p.vips {
		r := Report{Owner: p.election.ownerOf(k), Here: p.election.owned[k]}
		if r.Here {
			r.Owner = p.talk.name
		}
		c, ok := p.foreignClaim(vip)
		// Who had it before may have said so a moment ago.
		foreign := ok && bootTime()-c.at < uint64(p.recently()) && c.at > p.took[vip]+uint64(time.Second)
		switch {
		case len(p.wires) == 0:
			r.Owner, r.Here, r.Problem = "", false, "none of the interfaces of announce.l2 is there"
		case foreign && r.Here:
			r.Problem = fmt.Sprintf("%s says that it has it, too", c.mac)
		case p.election.isTaken(k, at) && ok:
			r.Problem = fmt.Sprintf("%s has it, which is no announcer of this group: another host has the address, or the agent of an announcer is dead", c.mac)
		}
		all[vip] = r
	}
	return all
}

// Members returns the names of other announcers, sorted.
func (p *Plane) Members() (names []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.election == nil {
		return nil
	}
	for _, m := range p.election.members {
		names = append(names, m.name)
	}
	slices.Sort(names)
	return names
}

// Answers returns how many questions were answered, by ARP and NDP.
func (p *Plane) Answers() (counts [2]uint64, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.kernel == nil {
		return counts, nil
	}
	return p.kernel.answers()
}

// Warnings says what keeps VIPs from being announced.
func (p *Plane) Warnings() (all []string) {
	p.mu.Lock()
	missing := p.missing
	p.mu.Unlock()
	for _, name := range missing {
		all = append(all, fmt.Sprintf("announce.l2: there is no interface %s of Ethernet; nobody there is told of VIPs", name))
	}
	problems := make(map[string][]string)
	for vip, r := range p.Reports() {
		if r.Problem != "" {
			problems[r.Problem] = append(problems[r.Problem], vip.String())
		}
	}
	for problem, vips := range problems {
		slices.Sort(vips)
		all = append(all, fmt.Sprintf("two owners of %s: %s", strings.Join(vips, ", "), problem))
	}
	slices.Sort(all)
	return all
}
