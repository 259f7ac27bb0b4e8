"""One measurement in a process of its own: `python -m tests.benchmarks.worker '["module:function", {...}]'`."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from typing import Any

from tests.benchmarks.common import MARK, call


def main() -> None:
    """Run the job that is named in the only argument and print its rows."""
    function, arguments = json.loads(sys.argv[1])
    _use_cores(int(os.environ.get("OMP_NUM_THREADS", "2")))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    def emit(row: dict[str, Any]) -> None:
        sys.stdout.write(f"\n{MARK}{json.dumps(row)}\n")
        sys.stdout.flush()

    call(function, arguments, emit)


def _use_cores(n_cores: int) -> None:
    """Keep this process to some cores, whatever thread pools its libraries make."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:n_cores])
    import torch

    torch.set_num_threads(n_cores)


if __name__ == "__main__":
    main()
