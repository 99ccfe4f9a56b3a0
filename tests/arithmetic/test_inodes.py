"""The layout of inode numbers and file handles."""

from hypothesis import given
from hypothesis import strategies as st

from ttmfs.fuse import inodes

backups = st.integers(2, inodes.MAX_BACKUP_ID)
handles = st.integers(0, inodes.SHMEM)
serials = st.integers(0, 2**70)


@given(backups, handles)
def test_an_inode_number_gives_back_its_backup_and_handle(backup: int, handle: int) -> None:
    ino = inodes.inode(backup, handle)
    assert (inodes.backup_of(ino), inodes.handle_of(ino)) == (backup, handle)
    assert inodes.CONFIG < ino < inodes.READER, "neither one of the mount's own nor in the way of the reader's bit"


@given(backups, handles)
def test_the_bit_of_readers_in_a_file_handle_leaves_backup_and_handle_readable(backup: int, handle: int) -> None:
    fh = inodes.inode(backup, handle) | inodes.READER
    assert fh < 2**64
    assert (inodes.backup_of(fh), inodes.handle_of(fh)) == (backup, handle)


@given(backups, serials)
def test_a_directory_file_handle_gives_back_its_backup(backup: int, serial: int) -> None:
    fh = inodes.with_serial(inodes.inode(backup, 0), serial)
    assert inodes.backup_of(fh) == backup
    assert fh != inodes.with_serial(inodes.inode(backup, 0), serial + 1)


@given(st.sampled_from([inodes.ROOT, inodes.STATS, inodes.CONFIG]), serials)
def test_a_file_handle_of_a_mount_file_gives_back_the_file(ino: int, serial: int) -> None:
    fh = inodes.with_serial(ino, serial)
    assert inodes.backup_of(fh) == 0
    assert inodes.own_of(fh) == ino


def test_hidden_entries_have_numbers_after_every_page() -> None:
    assert inodes.MAX_HANDLE < inodes.IMAGE < inodes.SHMEM < 2**inodes.HANDLE_BITS
