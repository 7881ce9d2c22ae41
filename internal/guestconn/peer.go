package guestconn

import (
	"context"
	"net"
	"time"
)

// peerPoll is how often WaitPeerGone looks. Only half-closed connections are
// watched, which our own client never makes, so a look now and then is cheaper
// than a thread for each.
const peerPoll = 200 * time.Millisecond

// PeerGone reports whether c's peer has ended both directions. Ask it after a
// read returned io.EOF: true means the peer closed or died, false that it only
// said it will send no more, or that c cannot tell (a multiplexed stream
// cannot, but there an abort is a read error instead of io.EOF).
func PeerGone(c net.Conn) bool { return peerGone(c) }

// WaitPeerGone waits until [PeerGone] turns true or ctx ends, and reports which.
func WaitPeerGone(ctx context.Context, c net.Conn) bool {
	t := time.NewTicker(peerPoll)
	defer t.Stop()
	for {
		if PeerGone(c) {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
		}
	}
}
