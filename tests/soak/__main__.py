"""Inject faults of every kind at random stages, and report what was lost: nothing may be.

``python -m tests.soak [--faults 200] [--seed 0] [--only PATTERN] [--keep DIR] [--jobs 3]``: forks commands from a
process that has everything imported and compiled, against SQLite and a real tracking server behind a proxy.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.faults import KINDS
from tests.soak.surroundings import warmed

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the trials and return the exit code: 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--faults", type=int, default=200, help="how many, over all kinds in turn")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"), help="of stages and amounts")
    parser.add_argument("--only", default="", help="kinds whose name matches this pattern")
    parser.add_argument("--keep", type=Path, help="folder for what the trials leave; by default nothing stays")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=3, help="how many processes share them; they mostly wait")
    asked = parser.parse_args(arguments)
    if asked.jobs > 1 and asked.faults > 1:
        return _share(asked)
    kinds = [kind for kind in KINDS if re.search(asked.only, kind.name)]
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="amici-eval-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    began, done, bad, finished, taken = time.monotonic(), 0, 0, 0, 0
    try:
        with warmed(folder) as soak:
            print(f"warm after {time.monotonic() - began:.0f} s; seed {asked.seed}", flush=True)
            if not kinds:
                print(f"no kind matches {asked.only!r}")
                return 2
            for number in range(asked.faults):
                if not _is_ours(asked.claims, number):
                    continue
                done += 1
                kind = kinds[number % len(kinds)]
                outcome = soak.trial(kind, number, random.Random(f"{asked.seed} {number}"))
                bad += bool(outcome.wrong)
                finished, taken = finished + outcome.finished, taken + outcome.taken
                state = "; ".join(outcome.wrong) or "ok"
                print(
                    f"{number + 1:3d} {kind.name:28s} exit {outcome.first:8s} finished {outcome.finished:2d} "
                    f"taken {outcome.taken:2d}  {state}",
                    flush=True,
                )
    finally:
        if asked.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{done} faults of {len(kinds)} kinds in {time.monotonic() - began:.0f} s: {bad} bad; "
        f"{finished} parts were finished before a fault, {taken} were taken up after it"
    )
    return 1 if bad else 0


def _share(asked: argparse.Namespace) -> int:
    """Let several processes, with stores and servers of their own, take the next fault each until all are injected."""
    began, jobs = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="amici-eval-claims-") as claims:
        for job in range(asked.jobs):
            command = [sys.executable, "-m", "tests.soak", "--jobs", "1", "--faults", str(asked.faults)]
            command += ["--seed", str(asked.seed), "--only", asked.only, "--claims", claims]
            command += [] if asked.keep is None else ["--keep", str(asked.keep / str(job))]
            jobs.append(subprocess.Popen(command))
        codes = [job.wait() for job in jobs]
    took = time.monotonic() - began
    print(f"{asked.faults} faults asked for; {asked.jobs} processes in {took:.0f} s: exit codes {codes}")
    return max(map(abs, codes))


def _is_ours(claims: Path | None, number: int) -> bool:
    """Return whether no other process has taken a fault; then it is taken."""
    if claims is None:
        return True
    try:
        (claims / str(number)).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
