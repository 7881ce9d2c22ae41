// Package guestconn gets a byte stream to the guest agent, whatever lies
// between: AF_VSOCK, a Unix socket that speaks the hybrid vsock handshake, or
// streams multiplexed over the one pipe that a virtio-serial port or a dialled
// socket gives. Every one of them ends up as a net.Conn, so the guest protocol
// knows none of them.
//
// All these connections can end their two directions separately (CloseWrite).
// Close without a CloseWrite is an abort that the peer can tell from a
// half-close, which is how a caller that goes away ends its command in the
// guest; see [PeerGone].
package guestconn
