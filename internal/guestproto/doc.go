// Package guestproto is the guest protocol's only definition: the messages, the
// frames of the streaming form, the version, and the limits both sides keep.
//
// It knows nothing of transports and imports nothing but api. Both binaries
// import it; no other package declares a message of its own. The prose form of
// this package is docs/guest-protocol.md.
//
// One connection carries one request. The request is one JSON object on one
// line. In the plain form the guest answers with one JSON object and closes. In
// the streaming form ("stream": true) both sides speak frames after that line.
//
// The guest is hostile to the host: the decoders here bound every length before
// they use it and reject what a strict reader would not accept.
package guestproto
