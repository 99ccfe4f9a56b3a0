"""System calls that Python lacks, where no other layer's tests reach them."""

import subprocess
import sys

from harness import REPOSITORY


def effective(status: str) -> int:
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff")), 16)


def test_only_the_named_capability_is_dropped() -> None:
    """It runs in a user namespace of its own, where it has all capabilities."""
    script = """
        from pathlib import Path
        from ttmfs.linux import system_calls as linux
        print(Path("/proc/self/status").read_text())
        linux.renounce(linux.CAP_SYS_RESOURCE)
        print("====", Path("/proc/self/status").read_text())
    """
    command = ["unshare", "-r", sys.executable, "-c", "\n".join(map(str.strip, script.splitlines()))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=True)
    before, after = map(effective, done.stdout.split("===="))
    assert before & ~after == 1 << 24
    assert not after & ~before
