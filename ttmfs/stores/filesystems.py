"""Which filesystems are distributed, so that a store there needs page maps; and which cannot have a store."""

from ..errors import NotSupported
from ..linux.mountinfo import CEPH, NFS, filesystem_of

__all__ = ["is_distributed"]

REFUSED = {
    "fuse.glusterfs": "after a heal of a replica, GlusterFS shows pages that were dropped, and zeros for pages",
    "fuse.mfs": "MooseFS cannot punch holes",
    "nfs": "only NFS 4.2 can punch holes: mount it with vers=4.2",
}


def is_distributed(directory: int) -> bool:
    """Whether a directory is to be such a store. Raises NotSupported where no store can be."""
    found = filesystem_of(directory)
    if found is None or found.type in CEPH:
        return found is not None
    if found.type in NFS and "vers=4.2" in found.options:
        return True
    kind = "nfs" if found.type in NFS else found.type
    if reason := REFUSED.get(kind):
        raise NotSupported(f"{reason}; use a directory on CephFS, tmpfs, ext4, xfs or btrfs")
    return False
