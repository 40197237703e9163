package host

// The register of marks. Whoever wants another one enters it here: a test sees to it
// that none is taken for part of another.
const (
	// ProbeMark is the mark (SO_MARK) of sockets that are not translated: a probe
	// reaches the backend that it names, also when that is the VIP of another service.
	// The bytes spell "pn7d"; no other use of marks is known to match it.
	ProbeMark = 0x706e3764

	// ProxyMark is the mark (SO_MARK) of what proxies of this host send: it is never led
	// to a proxy. Who may set a mark may do everything else, too. The bytes spell "pn7x".
	ProxyMark = 0x706e3778

	// LocalMark is the mark of a packet that a rule delivers to a socket of this host,
	// wherever it wants to go. The bytes spell "pn7t".
	LocalMark = 0x706e3774

	// CapturedBit is the bit of the mark of a connection (ct mark) whose packets are handed
	// to a proxy.
	CapturedBit = 1 << 17

	// TranslatedMark is the bit of a packet's mark that it has between its translation
	// and the choice of its source address, on its way through this host. It is
	// kube-proxy's (--iptables-masquerade-bit), which other tools know to leave alone.
	TranslatedMark = 1 << 14
)
