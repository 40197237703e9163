package nat

// Review is what Run does from time to time.
var Review = (*Plane).review

// AffinityPlaces is how many clients are remembered.
const AffinityPlaces = affinityPlaces
