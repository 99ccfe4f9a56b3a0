"""A service manager that stores descriptors, as systemd does: a keeper's second layer, against the keeper's own death.

The keeper is then the unit's main process. It passes on what its daemons say, and has the manager store the same
descriptors as it holds itself. A keeper that dies takes its daemon with it, and the manager starts another keeper with
what is stored. The protocol is sd_notify(3)'s.

The keeper imports this module by its path, so it imports only the standard library.
"""

import contextlib
import os
import socket
from collections.abc import Mapping

ADDRESS, STORES = "NOTIFY_SOCKET", "FDSTORE"
"""Environment variables. systemd sets STORES, how many descriptors it stores, from version 254 on; the units do too."""

WATCHDOG, WATCHED, STARTED = "WATCHDOG_USEC", "WATCHDOG_PID", "SYSTEMD_EXEC_PID"
SEND_SECONDS = 1.0

NOT_AGAIN, HELD_BY_NEXT = 69, 70
"""Exit statuses of a keeper: nothing is kept, and another start would not help (EX_UNAVAILABLE; the units name it in
RestartPreventExitStatus=); and another keeper is to be started, which holds what is stored (EX_SOFTWARE)."""


class ServiceManager:
    """The manager of this process's unit. Without one (`address` is empty) nothing here does anything.

    `watchdog` is how many seconds the manager waits for a sign of life; 0: it does not.
    """

    def __init__(self, address: str = "", watchdog: float = 0.0) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog = watchdog
        self.is_ready = False  # whether the manager was told that the unit is ready

    def __bool__(self) -> bool:
        return bool(self._address)

    @classmethod
    def found(cls, environment: "Mapping[str, str]") -> "ServiceManager":
        """The manager that started this process, if it stores descriptors."""
        me, stores = str(os.getpid()), environment.get(STORES, "")
        # Else the manager started another process, whose environment this one has.
        if environment.get(STARTED, me) != me or not stores.isdigit() or stores == "0":
            return cls()
        patience, watched = environment.get(WATCHDOG, ""), environment.get(WATCHED, "")
        watches = patience.isdigit() and watched in ("", me)
        return cls(environment.get(ADDRESS, ""), int(patience) / 1e6 if watches else 0.0)

    def hold(self, name: str, fd: int) -> None:
        """Store a descriptor in place of one that is stored by the same name."""
        self.drop(name)
        self.tell("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptors=(fd,))

    def drop(self, name: str) -> None:
        """Close what is stored by a name."""
        self.tell("FDSTOREREMOVE=1", f"FDNAME={name}")

    def tell(self, *lines: str, descriptors: "tuple[int, ...]" = ()) -> None:
        """Send a message. It is lost if the manager does not take it within SEND_SECONDS: the mount goes on."""
        self.is_ready |= "READY=1" in lines
        if self._address and lines:
            with (
                contextlib.suppress(OSError),
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
            ):
                channel.settimeout(SEND_SECONDS)
                channel.connect(self._address)
                socket.send_fds(channel, ["\n".join(lines).encode()], list(descriptors))
