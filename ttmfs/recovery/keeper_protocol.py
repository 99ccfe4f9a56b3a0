"""What a keeper and its daemons agree on: names, numbers, and how descriptors are passed.

The protocol is sd_notify(3)'s with a few words more. A daemon sends datagrams of lines:

- ``FDSTORE=1`` and ``FDNAME=`` with a descriptor: hold this. ``FDSTOREREMOVE=1`` and ``FDNAME=``: close it.
- ``READY=1``: it serves. ``WATCHDOG=1``: it still serves. ``STOPPING=1``: it ends on purpose.
- ``EXTEND=1``: it starts, and waits for its store: give up later.
- ``STANDBY=1``, with ``READY=1``: keep a standby for it. ``STATUS=``: what a service manager is to show.
- ``BARRIER=1`` with a pipe: write a byte to it and close it once all messages before were handled, by the keeper and by
  its service manager if it has one. A keeper that dies closes it without the byte.

A process that is started with descriptors finds them from 3 on (``LISTEN_PID``, ``LISTEN_FDS``, ``LISTEN_FDNAMES``).

The keeper imports this module by its path, so it imports only the standard library.
"""

import os
import signal

CONNECTION, STATE, STORE = "fuse", "state", "store"
"""Names of the descriptors that the next daemon needs. ttmfs.stores.store names STORE and those beside it."""

KEEPER = "keeper"
"""The daemon's end of the socket pair to its keeper, among the descriptors that a daemon is started with."""

GAVE_UP = "gave-up"
"""An eventfd in a service manager's store: the keeper before gave up while the manager waited for it to be ready."""

RESTART = signal.SIGUSR1
"""The signal that makes a keeper replace its daemon, or try again after giving up."""

LEFT = 75
"""The exit status of a daemon whose connection was cut off: it leaves the pages to another (EX_TEMPFAIL)."""

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

MOST_FAILED_STARTS, MOST_SECONDS_DOWN = 5, 30.0
"""When to give up: after this many failed starts in a row, or this long without a daemon that serves."""

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
MOST_DESCRIPTORS = 16

KEEPER_PID, HELD, STANDBY = "TTMFS_KEEPER_PID", "TTMFS_HELD", "TTMFS_STANDBY"
"""Environment variables: for a daemon, its keeper's process id; for a keeper, its descriptors as NAME=FD words; for a
standby, the descriptor of its channel and the nice value that it has as a daemon."""

PATIENCE = "TTMFS_PATIENCE"
"""An environment variable of daemons whose keeper has a service manager, and that are to die with the keeper: after how
many seconds without a sign of life the keeper kills them."""


def listen_fds(names: "list[str]") -> "dict[str, str]":
    """The environment that tells this process, or a program that it executes, which descriptors it was passed."""
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}


def move_descriptors(descriptors: "list[int]") -> None:
    """Move descriptors to the numbers from FIRST_DESCRIPTOR on, inheritable, and close all others above."""
    unused = FIRST_DESCRIPTOR + MOST_DESCRIPTORS + 1 + max([0, *descriptors])
    for number, fd in enumerate(descriptors):  # a number below may be in use by another of them
        os.dup2(fd, unused + number)
    for number in range(len(descriptors)):
        os.dup2(unused + number, FIRST_DESCRIPTOR + number)
    os.closerange(FIRST_DESCRIPTOR + len(descriptors), unused + len(descriptors))
