"""What all parts share: options, tables and page on disk, the machine, measurements in processes of their own."""

from __future__ import annotations

import csv
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Collection, Iterable, Iterator

    Row = dict[str, Any]
    Emit = Callable[[Row], None]

MARK = "@@row "
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for.

    Parameters
    ----------
    results, docs, workdir
        Folders of the tables, of the page that is generated from them, and of simulated data.
    threads
        Cores that each measurement may use.
    repeats
        Runs of one measurement, of which the median counts; slow ones run once.
    limit_s
        How long amici-st may run on one case; above it the time is extrapolated from some pairs of head and type.
    real
        Pairs of a folder that ``AMICI.save`` wrote and its AnnData.
    quick
        Tiny sizes: to see that everything runs, not to learn how fast.
    million, million_cells
        Whether the scaling goes up to a million cells, and the size of the part that bears that name.
    in_process
        Measure in this process, for tests.
    """

    results: Path = Path("benchmark-results")
    docs: Path = Path("docs")
    workdir: Path | None = None
    keep: bool = False
    threads: int = 2
    repeats: int = 3
    limit_s: float = 300.0
    engine: str | None = None
    real: tuple[tuple[str, str], ...] = ()
    quick: bool = False
    million: bool = False
    million_cells: int = 1_000_000
    in_process: bool = False

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """Give a folder for simulated data, gone afterwards unless it is to be kept."""
        if self.workdir is not None:
            self.workdir.mkdir(parents=True, exist_ok=True)
        if self.keep:
            place = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.workdir))
            say(f"data in {place} (kept)")
            yield place
        else:
            with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=self.workdir) as scratch:
                yield Path(scratch)


def parse_parts(
    parser: argparse.ArgumentParser, arguments: list[str] | None, *, parts: Iterable[str], results: str, page: str
) -> argparse.Namespace:
    """Parse a command that has ``--quick``, its parts and its folders besides, with their defaults filled in."""
    known = [*parts, "report"]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(known)}; default: all")
    parser.add_argument("--results", type=Path, help=f"folder of the tables (default {results})")
    parser.add_argument("--docs", type=Path, help=f"folder of {page} (default docs)")
    given = parser.parse_args(arguments)
    for part in given.parts:
        if part not in known:
            parser.error(f"{part!r} is no part; choose from {', '.join(known)}")
    given.parts = given.parts or known
    # numbers of a quick run must not land on the page
    given.results = given.results or Path(results, *(["quick"] if given.quick else []))
    given.docs = given.docs or (given.results if given.quick else Path("docs"))
    return given


@dataclass(frozen=True, kw_only=True)
class Job:
    """A measurement: a function ``module:name(emit, **arguments)``, by name, so that another process can run it."""

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def measure(job: Job, options: Options) -> Iterator[Row]:
    """Run a job and yield its rows as they come; in a process of its own, so that peak memory is the job's own."""
    if options.in_process:
        rows: list[Row] = []
        call(job.function, job.arguments, rows.append)
        yield from rows
        return
    environment = {
        **os.environ,
        **{name: str(options.threads) for name in _THREADS},
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_MODE": "disabled",
        **job.environment,
    }
    command = [sys.executable, "-m", "tests.benchmarks.worker", json.dumps([job.function, job.arguments])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(MARK):
                yield json.loads(line[len(MARK) :])
    finally:
        if process.poll() is None and sys.exc_info()[0] is not None:
            process.terminate()
        process.stdout.close()
        if process.wait() != 0:
            # the other measurements are still worth having
            say(f"{job.function} ended with exit status {process.returncode}; its remaining rows are missing")


def call(function: str, arguments: Row, emit: Emit) -> None:
    """Run ``module:name(emit, **arguments)``."""
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(emit, **arguments)


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def write_table(path: Path, rows: list[Row]) -> None:
    """Write rows as CSV; columns are those of all rows, in order of first appearance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> list[Row]:
    """Read what :func:`write_table` wrote, numbers as numbers; no rows if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [{name: _parsed(text) for name, text in row.items()} for row in csv.DictReader(stream)]


def _parsed(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"": None, "True": True, "False": False}.get(text, text)


def read_tables(results: Path) -> dict[str, list[Row]]:
    """Read all tables of a folder, by name."""
    return {path.stem: read_table(path) for path in sorted(results.glob("*.csv"))}


def write_page(path: Path, sections: Iterable[str]) -> Path:
    """Write sections in Markdown, and return the page's path."""
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def table(columns: str, rows: Iterable[Iterable[str]], *, text: Collection[int] = (0,)) -> str:
    """Return a table in Markdown, columns named as in ``"a | b"``; those of text to the left, numbers to the right."""
    rule = "|".join("---" if column in text else "---:" for column in range(columns.count(" | ") + 1))
    return "\n".join([f"| {columns.strip()} |", f"|{rule}|", *(f"| {' | '.join(cells)} |" for cells in rows)])


def machine(options: Options) -> Row:
    """Describe the machine, without a date."""
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    packages = ("torch", "numba", "numpy", "scipy", "anndata", "amici-st", "scvi-tools")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads_used": options.threads,
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: of(package) for package in packages},
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        values = dict(
            (part.strip() for part in line.split(":", 1)) for line in info.read_text().splitlines() if ":" in line
        )
        # some virtual machines say no more than the maker's name: family and model tell the generation
        name = values.get("model name", platform.machine())
        return f"{name}, family {values.get('cpu family', '?')} model {values.get('model', '?')}"
    return platform.processor() or platform.machine()


def _memory_gb() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return float("nan")
