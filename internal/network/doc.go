// Package network is the outside of one guest's network: a TCP/IP stack in this
// process that takes the guest's packets and makes connections of the host of
// them, if the policy allows where they lead.
//
// A [Gateway] is fed over one connection to the guest agent, which holds a TUN
// device (guestproto.AttachNetwork). There is no device, no route and no filter
// on the host, and nothing here needs root. Whatever the guest sends ends in
// [Gateway.check], which looks at the address of one connection just before
// exactly that address is dialled: there is no name and no second look-up in
// between. Names are resolved by the gateway's own name server, with the host's
// resolver; what they resolve to decides nothing.
//
// The guest is hostile. Packets that are not TCP, UDP or an echo request to the
// gateway never reach the stack; flows, their buffers and the queue to the guest
// are bounded.
package network
