"""``export``: serves the metrics of all mounts of the machine over HTTP, for Prometheus."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import re
import signal
import socket
import sys

from ...quoting import plain, quoted
from .child_process import ask
from .command import Command, CommandError
from .http_server import Page, listening, serve
from .terminal import is_terminal

__all__ = ["COMMANDS"]

PATH = "/metrics"
ADDRESS = "127.0.0.1:10900"
"""The ports from 9100 to 9999 all belong to other exporters. Nothing is registered for this one."""


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "mounts", nargs="*", metavar="MNT", help="only these mount points, mounted or not (default: all mounts)"
    )
    parser.add_argument(
        "--listen", metavar="ADDRESS:PORT", type=_address, default=ADDRESS,
        help=f"where to serve; :PORT is every address of the machine (default: {ADDRESS})",
    )  # fmt: skip
    parser.add_argument("--once", action="store_true", help="print the metrics once, and serve nothing")


def _address(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^:\[\]]*)):(\d{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT, such as {ADDRESS} or [::1]:10900")
    return match[1] or match[2] or "::", int(match[3])


def _run(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("prometheus_client") is None:
        raise CommandError(
            f"this needs prometheus_client: {quoted(sys.executable)} -m pip install 'prometheus_client>=0.20,<1' "
            "(or install ttmfs[export])"
        )
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    from .mount_metrics import MountMetrics

    registry = CollectorRegistry(auto_describe=False)
    registry.register(MountMetrics([*dict.fromkeys(map(_real, arguments.mounts))]))

    def page(accept: str) -> tuple[bytes, str]:
        encode, kind = choose_encoder(accept)
        return encode(registry), kind

    if arguments.once:
        lines = page("")[0].decode().split("\n")
        # Any user can choose the path of a mount, and with it a label.
        sys.stdout.write("\n".join(map(plain, lines) if is_terminal(sys.stdout) else lines))
        return 0
    host, port = arguments.listen
    return _serve(host, port, page)


def _serve(host: str, port: int, page: Page) -> int:
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        listener = listening(host, port)
    except OSError as error:
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise CommandError(f"cannot listen at {where}: {why}; choose another with --listen") from None
    with listener:
        where = where.removesuffix(f":{port}") + f":{listener.getsockname()[1]}"

        def ready() -> None:
            sys.stderr.write(f"ttmfs export: serving http://{where}{PATH}\n")
            sys.stderr.flush()

        if asyncio.run(serve(listener, PATH, page, ready)) == signal.SIGINT:
            raise KeyboardInterrupt
    return 0


def _real(path: str) -> str:
    """The absolute path of a mount point, with links above it resolved. The mount itself is not touched."""
    above, name = os.path.split(os.path.abspath(path))
    found = ask(path, lambda: os.path.join(os.path.realpath(above), name)).items
    return str(found[0]) if found else os.path.join(above, name)


COMMANDS = (
    Command(
        "export",
        "Serve the metrics of all mounts of this machine for Prometheus, each with the label mount. Mounts that come\n"
        "and go are followed. A mount that does not answer is ttmfs_up 0, and holds up the others for 2 seconds at\n"
        "most. Mounts of other users show only ttmfs_up, unless you name them. It needs prometheus_client: the extra\n"
        "ttmfs[export].\n\n"
        "exit status: 0 after SIGTERM; 2 if it cannot listen.",
        """\
examples:
  ttmfs export
  ttmfs export --listen :10900 /mnt/ttm
  ttmfs export --once | sponge /var/lib/prometheus/node-exporter/ttmfs.prom""",
        _add,
        _run,
    ),
)
