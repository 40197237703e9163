package host

// RouteProtocol is the origin (RTPROT_, FRA_PROTOCOL) of routes and rules that pentad
// makes: by it they are found again, whoever made them. Nobody else is known to use the
// number (linux/rtnetlink.h; rt_protos of iproute2).
const RouteProtocol = 112

// LocalTable is the number of the routing table in which every address is one of this
// host: packets with LocalMark look there.
const LocalTable = 0x7074
