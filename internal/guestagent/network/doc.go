// Package network makes the guest's one network device: a TUN device whose
// packets the guest agent carries to the host and back. What may be reached
// through it is decided on the host; nothing here is a boundary.
package network
