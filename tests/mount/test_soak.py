"""The soak, for a minute. ``make soak`` runs it for longer."""

import os
import time
from pathlib import Path

from soak import soak

SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))


def test_c22_a_minute_of_everything_at_once(tmp_path: Path) -> None:
    print(soak(tmp_path, SECONDS, seed=time.time_ns() % 10**6))
