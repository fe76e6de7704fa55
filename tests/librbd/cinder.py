#!/usr/bin/env python3
"""What OpenStack Cinder's driver for RBD, and its backup driver, do with librbd.

The calls, their arguments and the exceptions that are expected are those of
cinder/volume/drivers/rbd.py and cinder/backup/drivers/ceph.py; Cinder itself is
not needed, only python3-rados and python3-rbd. What this says has been found true
of Ceph's librbd, with clones of both formats:

    cinder.py --pool rbd --clone-format 1
    cinder.py --pool rbd --clone-format 2

--lsd is for lsd's library. Where that is meant to differ, `lsd` is asked here, and
it is said why.

Each scenario makes its own volumes, and leaves nothing.
"""

import argparse
import errno
import os
import sys
import time
import traceback

import rados
import rbd

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
ORDER = 22  # rbd_store_chunk_size is 4 (MiB)


class Check(Exception):
    """What is wrong."""


def same(got, want, what):
    if got != want:
        raise Check('%s: %r, not %r' % (what, got, want))


def true(is_so, what):
    if not is_so:
        raise Check(what)


class raises:
    """A block that must end in the exception."""

    def __init__(self, exception):
        self.exception = exception

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind is None:
            raise Check('no %s' % self.exception.__name__)
        return issubclass(kind, self.exception)  # another one goes on up


class Client:
    """A connection, as Cinder makes one for each thing that it does."""

    def __init__(self, pool, fmt):
        self.cluster = rados.Rados(rados_id='admin', clustername='ceph', conffile=os.environ.get('CEPH_CONF', ''))
        for option in ('rados_osd_op_timeout', 'rados_mon_op_timeout', 'client_mount_timeout'):
            self.cluster.conf_set(option, '30')
        self.cluster.conf_set('rbd_default_clone_format', str(fmt))
        self.cluster.connect()
        self.ioctx = self.cluster.open_ioctx(pool)

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.ioctx.close()
        self.cluster.shutdown()

    @property
    def features(self):
        features = self.cluster.conf_get('rbd_default_features')
        if features is None or int(features) == 0:
            features = rbd.RBD_FEATURE_LAYERING
        return int(features)


class Volume:
    """An open image with a connection of its own, or with that of a client."""

    def __init__(self, driver, name, snapshot=None, read_only=False, client=None):
        self.own = client is None
        self.client = driver.client() if self.own else client
        try:
            self.image = rbd.Image(self.client.ioctx, name, snapshot=snapshot, read_only=read_only)
        except rbd.Error:
            if self.own:
                self.client.__exit__()
            raise

    def __enter__(self):
        return self.image

    def __exit__(self, *unused):
        try:
            self.image.close()
        finally:
            if self.own:
                self.client.__exit__()


class Driver:
    """What Cinder's driver does."""

    def __init__(self, args):
        self.pool, self.lsd = args.pool, args.lsd
        # Clones need no protected snapshot, and do not keep one from being removed.
        self.v2 = args.lsd or args.clone_format == 2
        self.format = args.clone_format

    def client(self):
        return Client(self.pool, self.format)

    def open(self, name, **how):
        return Volume(self, name, **how)

    def create_volume(self, name, size):
        with self.client() as c:
            rbd.RBD().create(c.ioctx, name, size, ORDER, old_format=False, features=c.features)

    def clone_info(self, image, name, snap=None):
        try:
            if snap:
                image.set_snap(snap)
            pool, parent, parent_snap = tuple(image.parent_info())
            if snap:
                image.set_snap(None)
            if name.endswith('.deleted'):
                name = name[:-len('.deleted')]
            if parent_snap == name + '.clone_snap':
                return pool, parent, parent_snap
        except rbd.ImageNotFound:
            image.set_snap(None)
        return None, None, None

    def clone_depth(self, client, name, depth=0):
        with self.open(name, read_only=True, client=client) as image:
            _, parent, _ = self.clone_info(image, name)
        return self.clone_depth(client, parent, depth + 1) if parent else depth

    def create_cloned_volume(self, name, source, most=5):
        snap = name + '.clone_snap'
        with self.client() as c, self.open(source, client=c) as image:
            image.create_snap(snap)
            image.protect_snap(snap)
            rbd.RBD().clone(c.ioctx, source, snap, c.ioctx, name, features=c.features)
            if self.clone_depth(c, source) < most:
                return
            with self.open(name, client=c) as dest:
                dest.flatten()
            image.unprotect_snap(snap)
            image.remove_snap(snap)

    def copy_volume(self, name, source):
        with self.open(source, read_only=True) as image, self.client() as c:
            image.copy(c.ioctx, name)

    def create_volume_from_snapshot(self, name, source, snap, size=None):
        with self.client() as src:
            with self.open(source, read_only=True, client=src) as image:
                unit = max(image.stripe_unit(), 1 << ORDER)
            with self.client() as dest:
                rbd.RBD().clone(src.ioctx, source, snap, dest.ioctx, name, features=src.features, order=unit.bit_length() - 1)
        if size:
            self.extend_volume(name, size)

    def extend_volume(self, name, size):
        with self.open(name) as image:
            image.resize(size)

    def flatten(self, name):
        with self.open(name) as image:
            image.flatten()

    def flatten_children(self, client, name, snap=None):
        with self.open(name, client=client) as image:
            if snap is not None:
                image.set_snap(snap)
            children = image.list_children()
        for pool, child in children:
            same(pool, self.pool, 'pool of a child')
            self.flatten(child)

    def delete_clone_parent_refs(self, client, parent, snap):
        with self.open(parent, client=client) as image:
            _, grand, grand_snap = self.clone_info(image, parent, snap)
            image.unprotect_snap(snap)
            image.remove_snap(snap)
            has_snaps = bool(list(image.list_snaps()))
        if not has_snaps and parent.endswith('.deleted'):
            rbd.RBD().remove(client.ioctx, parent)
            if grand:
                self.delete_clone_parent_refs(client, grand, grand_snap)

    def delete_volume(self, name, delay=0):
        """Returns how it went: gone, renamed or trashed."""
        with self.client() as c:
            try:
                with self.open(name, client=c) as image:
                    clone_snap = next((s['name'] for s in image.list_snaps() if s['name'].endswith('.clone_snap')), None)
                    _, parent, parent_snap = self.clone_info(image, name, clone_snap)
            except rbd.ImageNotFound:
                return 'gone'
            if clone_snap is not None:
                rbd.RBD().rename(c.ioctx, name, name + '.deleted')
                return 'renamed'
            how = self._remove(c, name, delay)
            if parent:
                self.delete_clone_parent_refs(c, parent, parent_snap)
            return how

    def _remove(self, client, name, delay):
        try:
            rbd.RBD().remove(client.ioctx, name)
            return 'gone'
        except (rbd.ImageHasSnapshots, rbd.ImageBusy):
            self.flatten_children(client, name)
        try:
            rbd.RBD().remove(client.ioctx, name)
            return 'gone'
        except rbd.ImageHasSnapshots:
            rbd.RBD().trash_move(client.ioctx, name, delay)
            return 'trashed'

    def create_snapshot(self, name, snap):
        with self.open(name) as image:
            image.create_snap(snap)
            image.protect_snap(snap)

    def delete_snapshot(self, name, snap):
        try:
            try:
                with self.open(name) as image:
                    image.unprotect_snap(snap)
            except rbd.InvalidArgument:
                pass  # it is not protected
            except rbd.ImageBusy:
                with self.client() as c:
                    self.flatten_children(c, name, snap)
                with self.open(name) as image:
                    image.unprotect_snap(snap)
            with self.open(name) as image:
                image.remove_snap(snap)
        except rbd.ImageNotFound:
            pass

    def revert_to_snapshot(self, name, snap):
        with self.open(name) as image:
            image.rollback_to_snap(snap)

    def write(self, name, offset, data):
        with self.open(name) as image:
            same(image.write(data, offset), len(data), 'bytes written')

    def read(self, name, offset, length, snapshot=None):
        with self.open(name, snapshot=snapshot, read_only=True) as image:
            return image.read(offset, length)

    def names(self):
        with self.client() as c:
            return sorted(rbd.RBD().list(c.ioctx))

    def trash(self):
        with self.client() as c:
            return sorted(t['name'] for t in rbd.RBD().trash_list(c.ioctx))


SCENARIOS = []


def scenario(function):
    SCENARIOS.append(function)
    return function


@scenario
def volumes(d):
    """They are created, listed, looked at, extended and deleted."""
    d.create_volume('volume-1', GiB)
    with raises(rbd.ImageExists):
        d.create_volume('volume-1', GiB)
    same(d.names(), ['volume-1'], 'list')
    with d.client() as c:
        same([v['name'] for v in rbd.RBD().list2(c.ioctx)], ['volume-1'], 'list2')
    with d.open('volume-1') as image:
        stat = image.stat()
        same((stat['size'], stat['num_objs']), (GiB, GiB // stat['obj_size']), 'stat')
        # Objects of lsd have 8 MiB at least, whatever smaller size is asked for.
        order = 23 if d.lsd else ORDER
        same((stat['order'], stat['obj_size']), (order, 1 << order), 'size of objects')
        same((image.stripe_unit(), image.stripe_count()), (1 << order, 1), 'striping')
        same(image.get_name(), 'volume-1', 'name')
        true(image.features() & rbd.RBD_FEATURE_LAYERING, 'no layering')
        true(not image.old_format(), 'old format')
        same((image.overlap(), image.flags(), image.data_pool_id() >= -1), (0, 0, True), 'overlap, flags, data pool')
        same(stat['block_name_prefix'], image.block_name_prefix(), 'prefix')
        image.op_features()
        ident = image.id()
        for asked in (image.parent_info, image.parent_id, image.get_parent_image_spec):
            with raises(rbd.ImageNotFound):
                asked()
    with d.client() as c:
        same([v['id'] for v in rbd.RBD().list2(c.ioctx)], [ident], 'id')
        with rbd.Image(c.ioctx, image_id=ident, read_only=True) as image:
            same(image.get_name(), 'volume-1', 'name by id')
    d.write('volume-1', GiB - 4, b'last')
    d.extend_volume('volume-1', 2 * GiB)
    same(d.read('volume-1', GiB - 4, 8), b'last\0\0\0\0', 'at the old end')
    with d.open('volume-1') as image:
        image.resize(GiB // 2)
        same(image.size(), GiB // 2, 'shrunk')
        with raises(rbd.InvalidArgument):
            image.resize(GiB // 4, allow_shrink=False)
        same(image.size(), GiB // 2, 'not shrunk')
        image.resize(GiB)
        same(image.read(GiB - 4, 4), b'\0' * 4, 'what had been cut off')
    same(d.delete_volume('volume-1'), 'gone', 'deleted')
    same(d.delete_volume('volume-1'), 'gone', 'deleted again')
    with d.client() as c:
        with raises(rbd.ImageNotFound):
            rbd.RBD().remove(c.ioctx, 'volume-1')
        with raises(rbd.ImageNotFound):
            rbd.Image(c.ioctx, 'volume-1')
        with raises(rbd.ImageNotFound):
            rbd.Image(c.ioctx, image_id='0123456789ab')
        for order in (5, 40):
            with raises(rbd.ArgumentOutOfRange):
                rbd.RBD().create(c.ioctx, 'volume-1', GiB, order)


@scenario
def names(d):
    """They can be changed: Cinder takes volumes of others over, and gives them back."""
    # lsd's names are of letters, digits and a few signs.
    strange = 'volume-ok' if d.lsd else 'volume with a blank, and ünïcode'
    for name in ('a', 'b', strange):
        d.create_volume(name, MiB)
    same(d.names(), ['a', 'b', strange], 'list')
    d.write('a', 0, b'a')
    with d.client() as c:
        with raises(rbd.ImageExists):
            rbd.RBD().rename(c.ioctx, 'a', 'b')
        with raises(rbd.ImageNotFound):
            rbd.RBD().rename(c.ioctx, 'none', 'c')
        rbd.RBD().rename(c.ioctx, 'a', 'volume-a')
        with raises(rbd.ImageNotFound):
            rbd.Image(c.ioctx, 'a')
    same(d.read('volume-a', 0, 2), b'a\0', 'under its new name')
    for name in d.names():
        d.delete_volume(name)


@scenario
def data(d):
    """It is read as it was written, at any byte; a backup writes and discards in chunks."""
    d.create_volume('volume-1', 64 * MiB)
    with d.open('volume-1') as image:
        blob = os.urandom(3 * MiB + 777)
        same(image.write(blob, 4 * MiB - 333), len(blob), 'written')
        same(image.read(4 * MiB - 333, len(blob)), blob, 'read')
        same(image.read(4 * MiB - 335, 4), b'\0\0' + blob[:2], 'read at its beginning')
        image.flush()
        same(image.write(b'end', 64 * MiB - 3), 3, 'written at the end')
        same(image.read(64 * MiB - 3, 100), b'end', 'a read is cut at the end')
        with raises(rbd.InvalidArgument):
            image.read(64 * MiB, 1)
        with raises(rbd.InvalidArgument):
            image.write(b'far', 64 * MiB)
        with raises(rbd.InvalidArgument):
            image.discard(64 * MiB + 1, MiB)
        image.discard(4 * MiB, MiB)
        same(image.read(4 * MiB - 4, MiB + 8), blob[329:333] + b'\0' * MiB + blob[MiB + 333:MiB + 337], 'a hole')
        image.write_zeroes(6 * MiB, 12345)
        same(image.read(6 * MiB, 12346), b'\0' * 12345 + blob[2 * MiB + 333 + 12345:][:1], 'zeroes')
        image.invalidate_cache()
        done = []
        comps = [image.aio_write(bytes([i]) * 5000, 8 * MiB + i * 5000, lambda c: done.append(c.get_return_value())) for i in range(32)]
        comps.append(image.aio_flush(lambda c: done.append(c.get_return_value())))
        for c in comps:
            c.wait_for_complete_and_cb()
        same(done, [0] * 33, 'results of asynchronous writes')
        got = []
        image.aio_read(8 * MiB, 32 * 5000, lambda c, data: got.append(data)).wait_for_complete_and_cb()
        same(got, [b''.join(bytes([i]) * 5000 for i in range(32))], 'asynchronous read')
        discarded = image.aio_discard(8 * MiB, MiB, lambda c: None)
        discarded.wait_for_complete_and_cb()
        same(discarded.get_return_value(), 0, 'asynchronous discard')
        same(image.read(8 * MiB, MiB), b'\0' * MiB, 'discarded')
    same(d.read('volume-1', 7 * MiB, 7), blob[3 * MiB + 333:][:7], 'by another handle')
    d.delete_volume('volume-1')


@scenario
def open_images(d):
    """Volumes are listed, looked at and refused to be deleted while they are open."""
    d.create_volume('volume-1', 64 * MiB)
    with d.open('volume-1') as image:
        image.write(b'one', 0)
        with d.open('volume-1') as other:
            same(other.read(0, 3), b'one', 'by a second handle')
            other.write(b'two', 0)
        same(image.read(0, 3), b'two', 'what a second handle wrote')
        with d.open('volume-1', read_only=True) as other:  # the provisioned size of all volumes
            same((other.size(), other.read(0, 3)), (64 * MiB, b'two'), 'by one that only reads')
        with d.client() as c, raises(rbd.ImageBusy):
            rbd.RBD().remove(c.ioctx, 'volume-1')
        with d.open('volume-1') as other:
            other.resize(96 * MiB)
        for _ in range(100):  # another process may learn of it a little later
            if image.size() == 96 * MiB:
                break
            time.sleep(0.1)
        same(image.size(), 96 * MiB, 'extended by a second handle')
        image.write(b'three', 90 * MiB)
    same(d.delete_volume('volume-1'), 'gone', 'deleted')


@scenario
def read_only(d):
    """Neither a volume that is opened to be read nor a snapshot can be changed."""
    d.create_volume('volume-1', 64 * MiB)
    d.create_snapshot('volume-1', 'snap')
    for how in ({'read_only': True}, {'snapshot': 'snap'}):
        with d.open('volume-1', **how) as image:
            changes = [lambda: image.write(b'x', 0), lambda: image.discard(0, 4096), lambda: image.write_zeroes(0, 4096),
                       lambda: image.resize(MiB), lambda: image.rollback_to_snap('snap'), lambda: image.metadata_set('a', 'b')]
            if 'read_only' in how:  # a handle on a snapshot can do these, if it was not opened to read
                changes += [lambda: image.create_snap('other'), lambda: image.remove_snap('snap'), lambda: image.rename_snap('snap', 'other'), image.flatten]
                if not d.lsd:  # where protecting changes nothing
                    changes += [lambda: image.protect_snap('snap'), lambda: image.unprotect_snap('snap')]
            for change in changes:
                with raises(rbd.ReadOnlyImage):
                    change()
            image.flush()
            same(image.read(0, 4), b'\0' * 4, 'read')
    with raises(rbd.ImageNotFound):
        d.read('volume-1', 0, 1, snapshot='none')
    with d.open('volume-1') as image:
        with raises(rbd.ImageNotFound):
            image.set_snap('none')
        image.set_snap('snap')
        with raises(rbd.ReadOnlyImage):
            image.write(b'x', 0)
        image.set_snap(None)
        image.write(b'x', 0)
    d.delete_snapshot('volume-1', 'snap')
    d.delete_volume('volume-1')


@scenario
def snapshots(d):
    """They are made, protected, looked at, reverted to and deleted."""
    d.create_volume('volume-1', 64 * MiB)
    d.write('volume-1', 0, b'first')
    d.create_snapshot('volume-1', 'snapshot-1')
    d.extend_volume('volume-1', 96 * MiB)
    d.write('volume-1', 0, b'second')
    d.write('volume-1', 80 * MiB, b'far')
    d.create_snapshot('volume-1', 'snapshot-2')
    d.write('volume-1', 0, b'third')
    with d.open('volume-1') as image:
        snaps = list(image.list_snaps())
        same([(s['name'], s['size']) for s in snaps], [('snapshot-1', 64 * MiB), ('snapshot-2', 96 * MiB)], 'snapshots')
        same([image.snap_get_name(s['id']) for s in snaps], ['snapshot-1', 'snapshot-2'], 'names by id')
        same([image.snap_get_id(s['name']) for s in snaps], [s['id'] for s in snaps], 'ids by name')
        true(abs(image.get_snap_timestamp(snaps[0]['id']).timestamp() - time.time()) < 60, 'when it was made')
        same([image.snap_exists(n) for n in ('snapshot-1', 'none')], [True, False], 'exists')
        with raises(rbd.ImageExists):
            image.create_snap('snapshot-1')
        # No snapshot of lsd needs protection: it says yes to all, and protects none.
        same(image.is_protected_snap('snapshot-1'), not d.lsd, 'protected')
        if d.lsd:
            image.protect_snap('snapshot-1')
        else:
            with raises(rbd.ImageBusy):
                image.protect_snap('snapshot-1')
            with raises(rbd.ImageBusy):
                image.remove_snap('snapshot-1')
        for missing in (image.protect_snap, image.unprotect_snap, image.is_protected_snap, image.remove_snap, image.rollback_to_snap, image.snap_get_id):
            with raises(rbd.ImageNotFound):
                missing('none')
        same(image.read(0, 6), b'thirdd', 'the volume')
        image.set_snap('snapshot-1')
        same((image.size(), image.read(0, 6)), (64 * MiB, b'first\0'), 'the first snapshot')
        image.set_snap_by_id(snaps[1]['id'])
        same((image.size(), image.read(0, 6), image.read(80 * MiB, 3)), (96 * MiB, b'second', b'far'), 'the second snapshot')
        image.set_snap(None)
        same((image.size(), image.read(0, 6)), (96 * MiB, b'thirdd'), 'the volume again')
        with raises(rbd.ImageExists):
            image.rename_snap('snapshot-1', 'snapshot-2')
        with raises(rbd.ImageNotFound):
            image.rename_snap('none', 'other')
        image.rename_snap('snapshot-1', 'managed')
        same(image.is_protected_snap('managed'), not d.lsd, 'protected under its new name')
        image.rename_snap('managed', 'snapshot-1')
    same(d.read('volume-1', 0, 6, snapshot='snapshot-1'), b'first\0', 'the first snapshot, opened')
    with d.client() as c, raises(rbd.ImageHasSnapshots):
        rbd.RBD().remove(c.ioctx, 'volume-1')
    d.revert_to_snapshot('volume-1', 'snapshot-2')
    same(d.read('volume-1', 0, 6), b'second', 'reverted')
    d.revert_to_snapshot('volume-1', 'snapshot-1')
    with d.open('volume-1') as image:
        same((image.size(), image.read(0, 6)), (64 * MiB, b'first\0'), 'reverted to the first')
        same([s['name'] for s in image.list_snaps()], ['snapshot-1', 'snapshot-2'], 'snapshots of a reverted volume')
        image.unprotect_snap('snapshot-1')
        true(not image.is_protected_snap('snapshot-1'), 'still protected')
        if not d.lsd:
            with raises(rbd.InvalidArgument):
                image.unprotect_snap('snapshot-1')
        image.remove_snap_by_id(image.snap_get_id('snapshot-1'))
    d.delete_snapshot('volume-1', 'snapshot-1')  # it is gone
    d.delete_snapshot('volume-1', 'snapshot-2')
    same(d.delete_volume('volume-1'), 'gone', 'deleted')


@scenario
def clones(d):
    """Volumes are made of snapshots, which stay busy until they are flattened."""
    base, child = os.urandom(9 * MiB), 'volume-2'
    d.create_volume('volume-1', 64 * MiB)
    d.write('volume-1', 5 * MiB, base)
    with d.open('volume-1') as image:
        image.create_snap('snap')
    if not d.v2:
        with raises(rbd.InvalidArgument):
            d.create_volume_from_snapshot(child, 'volume-1', 'snap')
    with d.open('volume-1') as image:
        image.protect_snap('snap')
        same(list(image.list_children()), [], 'children of none')
    d.write('volume-1', 5 * MiB, b'later')
    d.create_volume_from_snapshot(child, 'volume-1', 'snap', size=96 * MiB)
    with raises(rbd.ImageExists):
        d.create_volume_from_snapshot(child, 'volume-1', 'snap')
    for source, snap in (('volume-1', 'none'), ('none', 'snap')):
        with d.client() as c, raises(rbd.ImageNotFound):
            rbd.RBD().clone(c.ioctx, source, snap, c.ioctx, 'volume-3', features=c.features)
    with d.open('volume-1') as image:
        ident = image.id()
        image.op_features()
    with d.open(child) as image:
        same(tuple(image.parent_info()), (d.pool, 'volume-1', 'snap'), 'parent')
        same(image.parent_id(), ident, "parent's id")
        spec = image.get_parent_image_spec()
        same((spec['pool_name'], spec['image_name'], spec['snap_name']), (d.pool, 'volume-1', 'snap'), "parent's names")
        same((image.size(), image.overlap()), (96 * MiB, 64 * MiB), 'size and overlap')
        same(image.read(5 * MiB, len(base)), base, 'what the snapshot had')
        same(image.read(70 * MiB, 8), b'\0' * 8, 'behind the parent')
        image.write(b'mine', 5 * MiB + 100)
        image.discard(8 * MiB, MiB)
        base = base[:100] + b'mine' + base[104:3 * MiB] + b'\0' * MiB + base[4 * MiB:]
        same(image.read(5 * MiB, len(base)), base, 'what the clone has')
    same(d.read('volume-1', 5 * MiB, 8, snapshot='snap')[4:], base[4:8], 'what the snapshot has')
    with d.open('volume-1', read_only=True) as image:
        image.set_snap('snap')
        same(list(image.list_children()), [(d.pool, child)], 'children')
        same([(c['pool'], c['image'], c['trash']) for c in image.list_children2()], [(d.pool, child, False)], 'children with their ids')
        image.set_snap(None)
    if not d.v2:
        with d.open('volume-1') as image:
            with raises(rbd.ImageBusy):
                image.unprotect_snap('snap')
            with raises(rbd.ImageBusy):
                image.remove_snap('snap')
    with d.client() as c, raises(rbd.ImageHasSnapshots):
        rbd.RBD().remove(c.ioctx, 'volume-1')
    # With the first format the clone is flattened by this; it is none any more.
    d.delete_snapshot('volume-1', 'snap')
    same(d.read(child, 5 * MiB, len(base)), base, 'what the clone has without its snapshot')
    with d.open(child) as image:
        if d.v2:
            same(image.overlap(), 64 * MiB, 'overlap with a snapshot that is gone')
            image.flatten()
        with raises(rbd.ImageNotFound):
            image.parent_info()
        same(image.overlap(), 0, 'overlap of what is flat')
        with raises(rbd.InvalidArgument):
            image.flatten()
        same(image.read(5 * MiB, len(base)), base, 'what is flat')
    same(d.delete_volume('volume-1'), 'gone', 'deleted')
    same(d.read(child, 5 * MiB, len(base)), base, 'without a parent')
    same(d.delete_volume(child), 'gone', 'deleted')


@scenario
def shrunk_clones(d):
    """What a clone had of its parent is gone when it was smaller in between."""
    d.create_volume('volume-1', 16 * MiB)
    d.write('volume-1', 12 * MiB, b'parent')
    d.create_snapshot('volume-1', 'snap')
    d.create_volume_from_snapshot('volume-2', 'volume-1', 'snap')
    with d.open('volume-2') as image:
        image.resize(8 * MiB)
        image.resize(16 * MiB)
        same(image.read(12 * MiB, 6), b'\0' * 6, 'shrunk, and extended')
        if not d.lsd:  # which says how much it was made of; what is gone is gone in its map
            same(image.overlap(), 8 * MiB, 'overlap')
        image.flatten()
        same(image.read(12 * MiB, 6), b'\0' * 6, 'what is flat')
    d.delete_volume('volume-2')
    d.delete_snapshot('volume-1', 'snap')
    d.delete_volume('volume-1')


@scenario
def cloned_volumes(d):
    """Volumes are made of volumes, through snapshots that nobody sees; parents are deleted first."""
    d.create_volume('volume-1', 16 * MiB)
    d.write('volume-1', MiB, b'one')
    d.create_cloned_volume('volume-2', 'volume-1')
    d.write('volume-2', 2 * MiB, b'two')
    d.create_cloned_volume('volume-3', 'volume-2')
    d.write('volume-3', 3 * MiB, b'three')
    d.create_cloned_volume('volume-4', 'volume-3', most=2)  # it is too deep, and is flattened
    with d.client() as c:
        same([d.clone_depth(c, 'volume-%d' % n) for n in (1, 2, 3, 4)], [0, 1, 2, 0], 'depth')
    for name in ('volume-3', 'volume-4'):
        same([d.read(name, n * MiB, 3) for n in (1, 2, 3)], [b'one', b'two', b'thr'], name)
    with d.open('volume-3') as image:
        same(list(image.list_snaps()), [], 'snapshots')
    same(d.delete_volume('volume-1'), 'renamed', 'the parent of all')
    same(d.delete_volume('volume-2'), 'renamed', 'its child')
    same(d.names(), ['volume-1.deleted', 'volume-2.deleted', 'volume-3', 'volume-4'], 'names')
    same(d.read('volume-3', MiB, 3), b'one', 'what comes from a deleted parent')
    same(d.delete_volume('volume-3'), 'gone', 'the last child')
    same(d.names(), ['volume-4'], 'names after that')
    d.delete_volume('volume-4')


@scenario
def copies(d):
    """Where volumes are not to be clones they are copied."""
    blob = os.urandom(5 * MiB)
    d.create_volume('volume-1', 32 * MiB)
    d.write('volume-1', 3 * MiB, blob)
    d.create_snapshot('volume-1', 'snap')
    d.write('volume-1', 3 * MiB, b'later')
    d.copy_volume('volume-2', 'volume-1')
    same(d.read('volume-2', 3 * MiB, len(blob)), b'later' + blob[5:], 'the copy')
    with raises(rbd.ImageExists):
        d.copy_volume('volume-2', 'volume-1')
    with d.client() as c, d.open('volume-1', snapshot='snap', client=c) as image:
        image.copy(c.ioctx, 'volume-3')
        image.deep_copy(c.ioctx, 'volume-4')  # the snapshot, too
    for name in ('volume-3', 'volume-4'):
        same(d.read(name, 3 * MiB, len(blob)), blob, 'the copy of the snapshot')
    with d.client() as c, d.open('volume-1', client=c) as image:
        image.deep_copy(c.ioctx, 'volume-5')
    with d.open('volume-5') as image:
        same([s['name'] for s in image.list_snaps()], ['snap'], 'snapshots of a deep copy')
        same((image.size(), image.read(3 * MiB, len(blob))), (32 * MiB, b'later' + blob[5:]), 'a deep copy')
        image.set_snap('snap')
        same(image.read(3 * MiB, len(blob)), blob, 'the snapshot of a deep copy')
    for name in ('volume-1', 'volume-4', 'volume-5'):
        d.delete_snapshot(name, 'snap')
    for name in d.names():
        same(d.delete_volume(name), 'gone', 'deleted')


def diff(image, length, since, **how):
    """The changes, which must be in order and not overlap."""
    changes = []
    image.diff_iterate(0, length, since, lambda offset, n, exists: changes.append((offset, n, exists)), **how)
    for (a, n, _), (b, _, _) in zip(changes, changes[1:]):
        true(a + n <= b, 'changes overlap, or are not in order: %r' % changes)
    return changes


def covers(changes, offset, n, exists):
    """Says whether the changes have all the n bytes."""
    for a, m, e in changes:
        if a <= offset < a + m and bool(e) == exists:
            got = min(offset + n, a + m) - offset
            offset, n = offset + got, n - got
    return n == 0


@scenario
def backups(d):
    """A backup asks for what has changed since the last one; the first time, for what there is."""
    d.create_volume('volume-1', 64 * MiB)
    with d.open('volume-1') as image:
        same(diff(image, image.size(), None), [], 'what is in an empty volume')
        image.write(os.urandom(64 * KiB), 9 * MiB)
        image.write(os.urandom(8 * MiB), 20 * MiB)
        image.create_snap('backup.1.snap.1')
        first = diff(image, image.size(), None)
        true(covers(first, 9 * MiB, 64 * KiB, True) and covers(first, 20 * MiB, 8 * MiB, True), 'what there is: %r' % first)
        true(sum(n for _, n, _ in first) <= 20 * MiB, 'more than there is: %r' % first)
        same(diff(image, image.size(), 'backup.1.snap.1'), [], 'no change')
        image.write(b'change', 40 * MiB)
        image.discard(20 * MiB, 4 * MiB)
        second = diff(image, image.size(), 'backup.1.snap.1')
        true(covers(second, 40 * MiB, 6, True) and covers(second, 20 * MiB, 4 * MiB, False), 'changes: %r' % second)
        true(not covers(second, 9 * MiB, 64 * KiB, True), 'no change, but said to be: %r' % second)
        whole = diff(image, image.size(), 'backup.1.snap.1', whole_object=True)
        true(covers(whole, 40 * MiB, 4 * MiB, True), 'changed objects: %r' % whole)
        same(diff(image, 16 * MiB, 'backup.1.snap.1'), [], 'changes in a part')
        image.create_snap('backup.1.snap.2')
        image.write(b'after', 50 * MiB)
    with d.open('volume-1', snapshot='backup.1.snap.2', read_only=True) as image:
        same(diff(image, image.size(), 'backup.1.snap.1'), second, 'changes from one snapshot to another')
        with raises(rbd.ImageNotFound):
            diff(image, image.size(), 'none')
        with raises(rbd.NoSpace):
            image.diff_iterate(0, image.size(), None, lambda offset, n, exists: -errno.ENOSPC)
    with d.open('volume-1', snapshot='backup.1.snap.1', read_only=True) as image, raises(rbd.InvalidArgument):
        diff(image, image.size(), 'backup.1.snap.2')  # from a later one
    with d.open('volume-1') as image:
        for s in list(image.list_snaps()):
            if s['name'].startswith('backup.'):
                image.remove_snap(s['name'])
    d.delete_volume('volume-1')


@scenario
def backups_of_clones(d):
    """Of a clone, what it has of its parent is part of what there is, or is left out."""
    d.create_volume('volume-1', 32 * MiB)
    d.write('volume-1', 4 * MiB, os.urandom(4 * MiB))
    d.create_snapshot('volume-1', 'snap')
    d.create_volume_from_snapshot('volume-2', 'volume-1', 'snap')
    with d.open('volume-2') as image:
        image.write(os.urandom(4 * MiB), 16 * MiB)
        there = diff(image, image.size(), None)
        true(covers(there, 4 * MiB, 4 * MiB, True) and covers(there, 16 * MiB, 4 * MiB, True), 'what there is: %r' % there)
        own = diff(image, image.size(), None, include_parent=False)
        true(covers(own, 16 * MiB, 4 * MiB, True) and not covers(own, 4 * MiB, 4 * MiB, True), 'what is its own: %r' % own)
        image.create_snap('backup.1.snap.1')
        image.write(b'change', 5 * MiB)
        change = diff(image, image.size(), 'backup.1.snap.1')
        true(covers(change, 5 * MiB, 6, True) and not covers(change, 16 * MiB, 4 * MiB, True), 'changes: %r' % change)
        image.remove_snap('backup.1.snap.1')
    d.delete_volume('volume-2')
    d.delete_snapshot('volume-1', 'snap')
    d.delete_volume('volume-1')


@scenario
def metadata(d):
    """Volumes carry what others want to know, and limits of their speed."""
    d.create_volume('volume-1', MiB)
    with d.open('volume-1') as image:
        same(list(image.metadata_list()), [], 'at first')
        for n in range(70):  # more than are listed at once
            image.metadata_set('key %02d' % n, 'value %d' % n)
        image.metadata_set('key 00', 'changed')
        same(image.metadata_get('key 00'), 'changed', 'value')
        same(list(image.metadata_list()), [('key %02d' % n, 'value %d' % n if n else 'changed') for n in range(70)], 'list')
        image.metadata_set('long', 'x' * 4000)
        same(image.metadata_get('long'), 'x' * 4000, 'a long value')
        image.metadata_set('empty', '')
        same(image.metadata_get('empty'), '', 'an empty value')
        image.metadata_remove('empty')  # python3-rbd 16.2 lists nothing behind it
        image.metadata_remove('key 01')
        with raises(KeyError):
            image.metadata_get('key 01')
        with raises(KeyError):
            image.metadata_remove('key 01')
    with d.open('volume-1', read_only=True) as image:
        same(image.metadata_get('key 69'), 'value 69', 'value by another handle')
        same(len(list(image.metadata_list())), 70, 'how many')
    d.delete_volume('volume-1')


@scenario
def qos(d):
    """Cinder stores limits of speed as configuration of the image."""
    d.create_volume('volume-1', MiB)
    with d.open('volume-1') as image:
        image.config_set('rbd_qos_iops_limit', '1000')
        same(image.config_get('rbd_qos_iops_limit'), '1000', 'limit')
        # lsd keeps what is set, but has no options of images that it would list.
        limit = {k['name']: k['value'] for k in image.config_list()}.get('rbd_qos_iops_limit')
        same(limit, None if d.lsd else '1000', 'limit in the list')
        image.config_remove('rbd_qos_iops_limit')
        limit = {k['name']: k['value'] for k in image.config_list()}.get('rbd_qos_iops_limit')
        same(limit, None if d.lsd else '0', 'limit by default')
    d.delete_volume('volume-1')


@scenario
def multiattach(d):
    """Features that exclude several writers are taken away for volumes that have them."""
    d.create_volume('volume-1', MiB)
    exclusions = rbd.RBD_FEATURE_JOURNALING | rbd.RBD_FEATURE_FAST_DIFF | rbd.RBD_FEATURE_OBJECT_MAP | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
    with d.open('volume-1') as image:
        saved = image.features()
        change = exclusions & saved
        with raises(rbd.InvalidArgument):
            image.update_features(rbd.RBD_FEATURE_EXCLUSIVE_LOCK, False)
        image.update_features(change, False)
        same(image.features() & exclusions, 0, 'what is left')
        with raises(rbd.InvalidArgument):
            image.update_features(change, False)
    with d.open('volume-1') as image, d.open('volume-1') as other:
        image.write(b'one', 0)
        other.write(b'two', 3)
        same(image.read(0, 6), b'onetwo', 'what both have written')
        image.update_features(change, True)
        same(image.features(), saved, 'what is back')
        with raises(rbd.InvalidArgument):
            image.update_features(rbd.RBD_FEATURE_LAYERING, False)
    d.delete_volume('volume-1')


@scenario
def locks(d):
    """Advisory locks, which whoever attaches a volume may take."""
    d.create_volume('volume-1', MiB)
    with d.client() as c, d.open('volume-1', client=c) as image, d.open('volume-1') as other:
        c.cluster.conf_set('rbd_blocklist_on_break_lock', 'false')
        same(image.list_lockers(), [], 'lockers of none')
        image.lock_exclusive('cookie')
        with raises(rbd.ImageExists):
            image.lock_exclusive('cookie')
        with raises(rbd.ImageBusy):
            image.lock_exclusive('another')
        with raises(rbd.ImageBusy):
            other.lock_exclusive('other')
        with raises(rbd.ImageBusy):
            other.lock_shared('other', 'tag')
        held = other.list_lockers()
        same((held['exclusive'], held['tag'], [cookie for _, cookie, _ in held['lockers']]), (True, '', ['cookie']), 'lockers')
        with raises(rbd.ImageNotFound):
            image.unlock('another')
        image.unlock('cookie')
        image.lock_shared('a', 'tag')
        other.lock_shared('b', 'tag')
        with raises(rbd.ImageBusy):
            other.lock_shared('c', 'gat')
        held = image.list_lockers()
        same((held['exclusive'], held['tag'], sorted(cookie for _, cookie, _ in held['lockers'])), (False, 'tag', ['a', 'b']), 'shared')
        for client, cookie, _ in held['lockers']:
            image.break_lock(client, cookie)
        same(image.list_lockers(), [], 'lockers at last')
        with raises(rbd.ImageNotFound):
            image.break_lock(held['lockers'][0][0], held['lockers'][0][1])
    d.delete_volume('volume-1')


@scenario
def exclusive_lock(d):
    """The lock that librbd has with its feature exclusive-lock."""
    d.create_volume('volume-1', MiB)
    with d.open('volume-1') as image:
        image.write(b'x', 0)
        image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
        true(image.is_exclusive_lock_owner(), 'not the owner')
        owners = list(image.lock_get_owners())
        same([o['mode'] for o in owners], [rbd.RBD_LOCK_MODE_EXCLUSIVE], 'owners')
        image.write(b'y', 0)
        image.lock_release()
        # lsd's lock is the host's, until it has no handle any more.
        same(image.is_exclusive_lock_owner(), d.lsd, 'the owner after that')
    d.delete_volume('volume-1')


@scenario
def trash(d):
    """Volumes whose deletion is deferred can be restored, and are purged when their time has come."""
    for n in (1, 2, 3):
        d.create_volume('volume-%d' % n, MiB)
        d.write('volume-%d' % n, 0, b'data')
    with d.client() as c:
        with raises(rbd.ImageNotFound):
            rbd.RBD().trash_move(c.ioctx, 'none', 0)
        rbd.RBD().trash_move(c.ioctx, 'volume-1', 0)
        rbd.RBD().trash_move(c.ioctx, 'volume-2', 3600)
        same(d.names(), ['volume-3'], 'names')
        with raises(rbd.ImageNotFound):
            rbd.Image(c.ioctx, 'volume-1')
        listed = {t['name']: t for t in rbd.RBD().trash_list(c.ioctx)}
        same(sorted(listed), ['volume-1', 'volume-2'], 'trash')
        same([t['source'] for t in listed.values()], ['USER', 'USER'], 'source')
        later = listed['volume-2']
        true(3590 < (later['deferment_end_time'] - later['deletion_time']).total_seconds() < 3610, 'deferred: %r' % later)
        got = rbd.RBD().trash_get(c.ioctx, later['id'])
        same((got['name'], got['id']), ('volume-2', later['id']), 'one of the trash')
        purged = []
        for t in rbd.RBD().trash_list(c.ioctx):
            try:
                rbd.RBD().trash_remove(c.ioctx, t['id'])
                purged.append(t['name'])
            except rbd.PermissionError as e:
                same((t['name'], e.errno), ('volume-2', errno.EPERM), 'what is not yet to be purged')
        same(purged, ['volume-1'], 'purged')
        with raises(rbd.ImageNotFound):
            rbd.RBD().trash_remove(c.ioctx, listed['volume-1']['id'])
        with raises(rbd.ImageNotFound):
            rbd.RBD().trash_restore(c.ioctx, listed['volume-1']['id'], 'volume-1')
        with raises(rbd.ImageExists):
            rbd.RBD().trash_restore(c.ioctx, later['id'], 'volume-3')
        rbd.RBD().trash_restore(c.ioctx, later['id'], 'volume-2.back')
        same(d.read('volume-2.back', 0, 4), b'data', 'restored')
        with d.open('volume-2.back') as image:
            same(image.id(), later['id'], 'id of what was restored')
        rbd.RBD().trash_move(c.ioctx, 'volume-2.back', 3600)
        d.create_volume('volume-2.back', MiB)  # the name is free
        with rbd.Image(c.ioctx, image_id=later['id'], read_only=True) as image:
            same(image.read(0, 4), b'data', 'in the trash')
        rbd.RBD().trash_remove(c.ioctx, later['id'], force=True)
        same(list(rbd.RBD().trash_list(c.ioctx)), [], 'trash at last')
        rbd.RBD().trash_move(c.ioctx, 'volume-3', 0)
        rbd.RBD().trash_restore(c.ioctx, list(rbd.RBD().trash_list(c.ioctx))[0]['id'], '')
        same(d.names(), ['volume-2.back', 'volume-3'], 'restored by its own name')
    d.delete_volume('volume-2.back')
    d.delete_volume('volume-3')


@scenario
def trash_and_clones(d):
    """A volume that has snapshots with clones goes into the trash, and out when they are gone."""
    d.create_volume('volume-1', 16 * MiB)
    d.write('volume-1', MiB, b'data')
    d.create_snapshot('volume-1', 'snap')
    d.create_volume_from_snapshot('volume-2', 'volume-1', 'snap')
    with d.client() as c:
        rbd.RBD().trash_move(c.ioctx, 'volume-1', 0)
        same(d.names(), ['volume-2'], 'names')
        same(d.read('volume-2', MiB, 4), b'data', 'the clone')
        ident = list(rbd.RBD().trash_list(c.ioctx))[0]['id']
        with raises(rbd.ImageHasSnapshots):
            rbd.RBD().trash_remove(c.ioctx, ident)
        with d.open('volume-2') as image:
            image.flatten()
        rbd.RBD().trash_restore(c.ioctx, ident, 'volume-1')
    same(d.read('volume-2', MiB, 4), b'data', 'what is flat')
    d.delete_snapshot('volume-1', 'snap')
    for name in d.names():
        same(d.delete_volume(name), 'gone', 'deleted')


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--pool', default='rbd')
    p.add_argument('--lsd', action='store_true', help="this is lsd's library")
    p.add_argument('--clone-format', type=int, choices=(1, 2), default=2)
    p.add_argument('scenarios', nargs='*')
    args = p.parse_args()
    d = Driver(args)
    if d.names() or d.trash():
        sys.exit('pool %s is not empty: what a scenario that fails leaves is removed' % args.pool)
    failed = 0
    for s in SCENARIOS:
        if args.scenarios and s.__name__ not in args.scenarios:
            continue
        began = time.monotonic()
        try:
            s(d)
            same((d.names(), d.trash()), ([], []), 'what is left')
            print('ok   %-18s %5.2f s' % (s.__name__, time.monotonic() - began))
        except Exception:
            failed += 1
            print('FAIL %-18s %5.2f s\n%s' % (s.__name__, time.monotonic() - began, traceback.format_exc()))
            clean(d)
        sys.stdout.flush()
    sys.exit(1 if failed else 0)


def clean(d):
    """Removes what a scenario that failed has left, so that the next one says the truth."""
    with d.client() as c:
        try:
            for t in rbd.RBD().trash_list(c.ioctx):
                rbd.RBD().trash_restore(c.ioctx, t['id'], t['id'])
        except rbd.Error:
            pass
        for _ in range(4):  # clones go before their parents
            for name in rbd.RBD().list(c.ioctx):
                try:
                    with rbd.Image(c.ioctx, name) as image:
                        for s in list(image.list_snaps()):
                            if image.is_protected_snap(s['name']):
                                image.unprotect_snap(s['name'])
                            image.remove_snap(s['name'])
                    rbd.RBD().remove(c.ioctx, name)
                except rbd.Error:
                    pass


if __name__ == '__main__':
    main()
