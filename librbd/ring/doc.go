// Package ring is the daemon's side of the rings in shared memory over which programs
// with the C library send their requests (docs/format-librbd.md, "The ring"). It knows
// neither images nor sockets.
//
// A [Memory] is a ring's memory with its two eventfds; a [Conn] is what the daemon knows
// of the one client that has them; a [Group] serves any number of Conns on one reactor,
// and gives their requests to Handlers, as package ublk does with those of a block
// device.
//
// # Trust
//
// The client may write to the memory at any time whatever it likes. So what is in it is
// loaded once, and only what was loaded is checked and used; what the daemon has to
// remember it keeps in memory of its own, and of the words that both write it believes
// nothing that could harm anybody but the client. A client that breaks the rules is
// broken: see [Conn.Err]. The contents of an IO's Buf can change under its handler.
//
// # The reactor's death
//
// A Conn survives its reactor: once that has ended, another one's Group takes it up, and
// what was under way is handled again. What the dead one's handlers still say of their
// IOs is ignored.
package ring
