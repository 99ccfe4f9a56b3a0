"""The soak, for half a minute. ``make soak`` runs it for longer."""

import os
import time
from pathlib import Path

import pytest

from soak import soak

pytestmark = pytest.mark.serial

SECONDS = float(os.environ.get("SOAK_SECONDS", "30"))


def test_c22_a_mixed_load_with_kills_runs_for_half_a_minute(tmp_path: Path) -> None:
    print(soak(tmp_path, SECONDS, seed=time.time_ns() % 10**6))
