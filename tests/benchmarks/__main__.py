"""`python -m tests.benchmarks [PART ...]`: measure, and write docs/performance.md from what was measured."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from tests.benchmarks import floor, million, reference, report, scaling
from tests.benchmarks.common import Options, machine, parse_parts, say, write_table

PARTS = {
    "reference": reference.run,
    "scaling": scaling.run,
    "floor": floor.run,
    "million": million.run,
}


def parse(arguments: list[str] | None = None) -> tuple[list[str], Options]:
    """Return the parts to run and the options."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measure speed and memory and write the page about them. The GPU has a command of its own: "
        "python -m tests.benchmarks.gpu",
    )
    parser.add_argument("--real", nargs=2, action="append", default=[], metavar=("MODEL_DIR", "DATA.h5ad"))
    parser.add_argument("--workdir", type=Path, help="where simulated data are written (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="keep simulated data")
    parser.add_argument("--threads", type=int, default=2, help="cores each measurement may use (default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median counts (default 3)")
    parser.add_argument(
        "--limit", type=float, default=300.0, help="seconds amici-st may take before it is extrapolated"
    )
    parser.add_argument("--engine", choices=["factored", "hooked"], help="measure this engine only")
    parser.add_argument("--million", action="store_true", help="scaling up to a million cells")
    parser.add_argument("--million-cells", type=int, default=1_000_000, help="size of the part `million`")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    given = parse_parts(parser, arguments, parts=PARTS, results="benchmark-results", page="performance.md")
    return given.parts, Options(
        results=given.results,
        docs=given.docs,
        workdir=given.workdir,
        keep=given.keep,
        threads=given.threads,
        repeats=given.repeats,
        limit_s=given.limit,
        engine=given.engine,
        real=tuple((model, data) for model, data in given.real),
        quick=given.quick,
        million=given.million,
        million_cells=given.million_cells,
    )


def run(parts: list[str], options: Options) -> None:
    """Run parts in the order given."""
    for part in parts:
        if part == "report":
            say(f"written: {report.write(options.results, options.docs)}")
        else:
            write_table(options.results / "machine.csv", [machine(options)])
            PARTS[part](options)


if __name__ == "__main__":
    # scvi-tools tells of each AnnData it sees
    logging.disable(logging.WARNING)
    run(*parse())
