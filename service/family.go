package service

import "net/netip"

// Family is a family of addresses. Its number is that of the protocol: 4 or 6.
type Family uint8

// The families.
const (
	V4 Family = 4
	V6 Family = 6
)

// EachFamily is both of them, in the order in which they are treated.
var EachFamily = [2]Family{V4, V6}

// FamilyOf returns the family of an address, which is not an IPv4-mapped one.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() {
		return V4
	}
	return V6
}

// String returns "IPv4" or "IPv6".
func (f Family) String() string {
	if f == V4 {
		return "IPv4"
	}
	return "IPv6"
}

// Other is the other one.
func (f Family) Other() Family { return V4 + V6 - f }

// Index is the place of the family in an array with one for each.
func (f Family) Index() int {
	if f == V4 {
		return 0
	}
	return 1
}

// Length is how many bytes an address has.
func (f Family) Length() int {
	if f == V4 {
		return 4
	}
	return 16
}

// Families says something of each family of addresses.
type Families struct{ V4, V6 bool }

// Has is what it says of the family of an address.
func (f Families) Has(a netip.Addr) bool {
	if FamilyOf(a) == V4 {
		return f.V4
	}
	return f.V6
}
