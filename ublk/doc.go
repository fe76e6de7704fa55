// Package ublk makes block devices whose requests are served by this process,
// through the kernel's ublk driver (drivers/block/ublk_drv.c,
// Documentation/block/ublk.rst). It knows nothing about what is behind a device:
// that is a [Handler].
//
// [Control] is the driver's control device: what it can do, which devices there
// are, making and removing them. A [Device] is one that this process serves.
//
//	c, err := ublk.OpenControl()
//	d, err := c.Add(ctx, ublk.Params{ID: -1, SizeBytes: 1 << 30})
//	err = d.Start(ctx, r, handler)   // /dev/ublkbN is there
//	...
//	err = d.Delete(ctx, false)
//
// # Requests
//
// The kernel keeps a fixed number of request slots (tags) for each of a device's
// queues. The server offers a tag with a FETCH command on its ring; the command
// completes when the tag has a request; COMMIT_AND_FETCH sends the request's
// result and offers the tag again. All commands of a queue must come from one
// thread. Here all queues of a device are served by one reactor, so handlers
// need no locks, and all that a turn of the reactor completed goes to the kernel
// in one system call.
//
// Data is copied by the kernel between a request's pages and the tag's buffer,
// which is mapped once and lives as long as the device.
//
// # Recovery
//
// Devices are made with user recovery and reissue: when the server dies, the
// block device stays, its users wait, and [Control.Recover] lets a new server
// take over. What was in flight is delivered again, so that a write may be
// applied twice. The character device can be opened by one process at a time:
// the new server opens it after START_USER_RECOVERY, which the kernel refuses
// (EBUSY) until everything of the old server is gone.
package ublk
