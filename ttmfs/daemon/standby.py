"""What a standby does: it waits, with everything imported, until its keeper passes it what a daemon needs.

Nearly all of a takeover is the start of Python and its imports. A standby has them behind it, and with them the first
run of trio, its first thread, and the first touch of its heap. :mod:`ttmfs.recovery.keeper_standby` starts it.
"""

import gc
import os
import signal
import socket
from pathlib import Path

import trio

from ..linux import system_calls
from ..recovery.keeper_protocol import ENDING, MOST_DESCRIPTORS, STANDBY, listen_fds, move_descriptors
from .inherited import lock_memory

__all__ = ["wait_for_turn"]

COMM = "ttmfs-standby"
LONGEST_NAMES = 4096


def wait_for_turn() -> None:
    """Wait, if this process is a standby, until it is to be the daemon. Else return at once.

    What the keeper passed is then where a daemon that a keeper started finds it. If the keeper ends, this process ends.
    """
    if not (told := os.environ.pop(STANDBY, "")):
        return
    number, nice = map(int, told.split())
    _warm_up()
    comm = Path("/proc/self/comm")
    name = comm.read_text()
    with socket.socket(fileno=number) as channel:
        channel.set_inheritable(False)
        before = [signal.signal(ending, signal.SIG_DFL) for ending in ENDING]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        system_calls.outlive_parent()  # from now on the end of the channel tells that the keeper has ended
        try:
            channel.send(b"ready")
            comm.write_text(COMM)
            names, descriptors, _, _ = socket.recv_fds(channel, LONGEST_NAMES, MOST_DESCRIPTORS)
        except OSError:  # the keeper died just now
            names, descriptors = b"", []
        if not names:
            os._exit(0)
        for ending, handler in zip(ENDING, before, strict=True):
            signal.signal(ending, handler)
    if os.getpriority(os.PRIO_PROCESS, 0) != nice:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    comm.write_text(name)
    move_descriptors(descriptors)
    os.environ.update(listen_fds(names.decode().split(":")))


def _warm_up() -> None:
    """Do once what takes long only at the first time."""

    async def use_trio() -> None:
        await trio.to_thread.run_sync(int)
        await trio.lowlevel.checkpoint()

    trio.run(use_trio)
    system_calls.touch_heap()
    gc.collect()
    gc.freeze()  # a later collection looks at none of it
    lock_memory()
