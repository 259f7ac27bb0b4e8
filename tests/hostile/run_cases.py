"""Read every malformed model and file in one process of bounded memory; write down what came of each.

``python -m tests.hostile.run_cases BASE SCRATCH OUTCOMES``; BASE holds sound files, OUTCOMES gets a line of JSON each.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

from tests.hostile import data_files, pickles, stored_models
from tests.hostile.cases import Base, Case, read, spoilt

CASES: list[Case] = [*stored_models.CASES, *data_files.CASES, *pickles.CASES]
LIMIT_BYTES = 2 * 2**30
LIMIT_S = 10


def _too_long(*_: object) -> None:
    raise TimeoutError


def outcome(case: Case, base: Base, folder: Path) -> dict[str, object]:
    """Make a case, read it, and say what happened."""
    from amici_eval.common.errors import AmiciEvalError

    target = case.build(base, folder)
    found: dict[str, object] = {"name": case.name, "target": str(target), "error": None}
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    signal.alarm(LIMIT_S)
    try:
        read(case.kind, target)
    except AmiciEvalError as error:
        found |= {"error": "refused", "value": error.value, "rule": error.rule, "fix": error.fix, "text": str(error)}
    except BaseException as error:  # noqa: BLE001, RUF100 - whatever it was is told
        found |= {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        signal.alarm(0)
    found["seconds"] = time.perf_counter() - start
    found["grown_kb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    found["amici"] = any(name.partition(".")[0] in ("amici", "scvi") for name in sys.modules)
    return found


def main() -> None:
    """Run all cases, sound files first."""
    base, scratch, outcomes = (Path(argument) for argument in sys.argv[1:])
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _too_long)
    kinds = {"model": "model", "saved": "saved", "tissue.h5ad": "data", "tissue.zarr": "data", "moments.npz": "moments"}
    sound = [Case(f"sound {name}", kind, spoilt(name, lambda path: None)) for name, kind in kinds.items()]
    with outcomes.open("w", encoding="utf-8") as file:
        for number, case in enumerate([*sound, *CASES]):
            if number == len(sound):
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limit = pages * resource.getpagesize() + LIMIT_BYTES
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            folder = scratch / str(number)
            folder.mkdir()
            file.write(json.dumps(outcome(case, Base(base), folder)) + "\n")
            file.flush()
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
