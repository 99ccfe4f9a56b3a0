#!/usr/bin/env python3
"""Benchmarks: compare ttmfs with tmpfs, bindfs, and examples of libfuse and pyfuse3, on real mounts in one run.

Prints tables, and writes results.json and SVG plots. Leaves nothing mounted. Needs root.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import bulk
import idle
import latency
import listing
import machine
import memory
import operations
import parallel
import recovery
import swap
from plan import FULL, QUICK, TINY, Plan
from report import targets_table
from systems import OTHER, Unavailable, compare_with

GROUPS = {
    "operations": operations,
    "parallel": parallel,
    "bulk": bulk,
    "latency": latency,
    "listing": listing,
    "swap": swap,
    "recovery": recovery,
    "memory": memory,
    "idle": idle,
}
RESULTS = Path(__file__).resolve().parent / "results"


def log(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="plan", action="store_const", const=QUICK, default=FULL, help="under a minute")
    size.add_argument("--tiny", dest="plan", action="store_const", const=TINY, help="only a check that it works")
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, metavar="NAME", help=f"run only these groups: {', '.join(GROUPS)}"
    )
    parser.add_argument(
        "--program", type=Path, metavar="DIR", help=f"measure the ttmfs of another checkout in turns, too, as '{OTHER}'"
    )
    parser.add_argument("--rounds", type=int, help="counted rounds, after one to warm up")
    parser.add_argument("--json", type=Path, default=RESULTS / "results.json", metavar="FILE", help="(%(default)s)")
    parser.add_argument(
        "--plots", type=Path, default=RESULTS, metavar="DIR", help="directory for the SVG plots (%(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed or was not measured")
    arguments = parser.parse_args()
    if os.geteuid():
        parser.error("needs root, to mount a tmpfs and to drop the kernel's caches")
    if arguments.program:
        try:
            compare_with(arguments.program.resolve())
        except Unavailable as error:
            parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: ended by SIGTERM"))
    try:
        import charts  # these need an extra: fail before measuring, not after
        import plots
    except ImportError as error:
        parser.error(f"{error}: pip install '.[bench]'")
    plan = replace(arguments.plan, rounds=arguments.rounds or arguments.plan.rounds)
    found: dict[str, Any] = {"machine": machine.record(), "plan": asdict(plan), "groups": {}, "failed": {}}
    said = machine.describe(found["machine"])
    print(f"{said}\n\nA {plan.name} run; {plan.rounds} rounds.", flush=True)
    targets, seconds = [], {}
    for name in arguments.only or GROUPS:
        start = time.monotonic()
        try:
            result = measure(name, plan)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            found["failed"][name] = repr(error)  # keep the figures of the other groups
            print(f"\n## {name}\n\nFAILED: {error}", flush=True)
            log(f"{name} failed: {error}")
            continue
        seconds[name] = round(time.monotonic() - start, 1)
        log(f"{name}: {seconds[name]} s")
        found["groups"][name] = result
        targets += GROUPS[name].targets(result)
        print(f"\n## {name}\n\n{GROUPS[name].report(result)}", flush=True)
    print(f"\n## targets\n\n{targets_table(targets)}")
    found |= {"said": said, "targets": [target.as_dict() for target in targets], "seconds": seconds}
    found["machine"]["load_average_after"] = os.getloadavg()[0]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    drawn = [path for kind in (charts, plots) for path in kind.draw(found["groups"], said, arguments.plots)]
    written = [arguments.json, *drawn]
    log(f"{sum(seconds.values()):.0f} s; wrote {', '.join(map(str, written))}")
    missed = arguments.check and not all(target.met for target in targets)
    return int(bool(found["failed"]) or missed)


def measure(name: str, plan: Plan) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ttmfs-bench.") as temporary:
        directory = Path(temporary)
        result: dict[str, Any] = GROUPS[name].run(plan, directory)
        for left in directory.iterdir():
            left.rmdir()  # fails if something is still mounted; does not empty it
        return result


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("bench: interrupted")
