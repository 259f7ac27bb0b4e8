"""`python -m tests.calibration [PART ...]`: how far p-values and intervals hold, and docs/validity.md about it."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.common import parse_parts, read_table, say, write_table
from tests.calibration import exact, families, intervals, power, real_null, report, type_one
from tests.calibration.common import Options

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS: dict[str, Callable[[Options], None]] = {
    "type_one": type_one.run,
    "few": type_one.run_few,
    "power": power.run,
    "exact": exact.run,
    "families": families.run,
    "intervals": intervals.run,
    "real_null": real_null.run,
}


def parse(arguments: list[str] | None = None) -> tuple[list[str], Options]:
    """Return the parts to run and the options."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.calibration",
        description="Simulate tissue in which nothing is to be found, or something is, and write the page about what "
        "the tests found",
    )
    parser.add_argument("--data", type=Path, help="folder with real tissue (default ../shared/data where present)")
    parser.add_argument("--seed", type=int, default=0, help="of all simulations (default 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--quick", action="store_true", help="three simulations each, to see that everything runs")
    given = parse_parts(parser, arguments, parts=PARTS, results="calibration-results", page="validity.md")
    beside = Path("..", "shared", "data")
    return given.parts, Options(
        results=given.results,
        docs=given.docs,
        data=given.data or (beside if beside.is_dir() else None),
        seed=given.seed,
        workers=given.workers,
        quick=given.quick,
    )


def run(parts: list[str], options: Options) -> None:
    """Run parts in the order given."""
    for part in parts:
        if part == "report":
            say(f"written: {report.write(options.results, options.docs)}")
            continue
        begun = time.monotonic()
        PARTS[part](options)
        minutes = (time.monotonic() - begun) / 60.0
        runs = {row["part"]: row for row in read_table(options.results / "runs.csv")}
        runs[part] = {"part": part, "seed": options.seed, "workers": options.workers, "minutes": round(minutes, 1)}
        write_table(options.results / "runs.csv", [runs[name] for name in PARTS if name in runs])
        say(f"{part}: {minutes:.1f} min")


if __name__ == "__main__":
    # scvi-tools tells of each AnnData it sees
    logging.disable(logging.WARNING)
    run(*parse())
