"""The daemon's log: it never blocks the daemon."""

import logging
import socket
import time
from pathlib import Path

import pytest

from ttmfs.daemon import log as daemon_log
from ttmfs.recovery import log_sink


def test_an_unread_syslog_does_not_block_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_sink, "SYSLOG_SOCKET", str(tmp_path / "log"))
    handler = daemon_log._Handler(log_sink.Syslog("ttmfs"))
    record = logging.LogRecord("ttmfs", logging.ERROR, __file__, 1, "the daemon before died", (), None)
    handler.emit(record)  # there is none yet
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(tmp_path / "log"))
        began = time.monotonic()
        for _ in range(2000):  # far more than its queue takes (net.unix.max_dgram_qlen)
            handler.emit(record)
        assert time.monotonic() < began + 2
        assert log.recv(1000).startswith(b"<27>ttmfs[")
    handler.emit(logging.LogRecord("ttmfs", logging.INFO, __file__, 1, "serving %s", ("/mnt/\udcff",), None))
    (tmp_path / "log").unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as anew:
        anew.bind(str(tmp_path / "log"))
        handler.emit(record)
        assert anew.recv(1000).endswith(b"]: the daemon before died\0")
    handler.close()
