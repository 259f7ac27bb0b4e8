"""Run the tests of numbers as other processors would: ``python -m tests.processors [NAME ...]``.

Each setting imitates a processor by what the libraries of linear algebra are told, with one thread and with two; the
last one sums products in another order (``tests/reordered.py``). One line per setting is printed; the exit status is 1
if a test failed. Variables that this processor or the installed libraries do not know do nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    "tests/stats",
    "tests/model",
    "tests/evaluation/test_baselines.py",
    "tests/evaluation/test_evaluation.py",
    "tests/data/test_files.py",
    "tests/evaluation/test_memory_ends.py",
    "tests/results/test_moments.py",
    "tests/evaluation/test_head_tests.py",
)
_AVX512 = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL"
_WITHOUT_AVX = {
    "OPENBLAS_CORETYPE": "Prescott",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "NPY_DISABLE_CPU_FEATURES": f"AVX F16C FMA3 AVX2 {_AVX512}",
    "NUMBA_CPU_NAME": "generic",
}
_AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NPY_DISABLE_CPU_FEATURES": _AVX512,
}
SETTINGS: dict[str, dict[str, str]] = {
    "own": {},
    "haswell": {**_AVX2, "OPENBLAS_CORETYPE": "Haswell", "NUMBA_CPU_NAME": "haswell"},
    "zen": {**_AVX2, "OPENBLAS_CORETYPE": "Zen", "NUMBA_CPU_NAME": "znver1"},
    "nehalem": {**_WITHOUT_AVX, "OPENBLAS_CORETYPE": "Nehalem", "NUMBA_CPU_NAME": "nehalem"},
    "prescott": _WITHOUT_AVX,
    "reordered": {"PYTEST_PLUGINS": "tests.reordered"},
}


def main(names: list[str]) -> int:
    """Run the settings with these names, or all; each with one thread and with two."""
    known = [f"{name}-{threads}" for name in SETTINGS for threads in (1, 2)]
    asked = [one for one in known if not names or one in names or one.rpartition("-")[0] in names]
    if unknown := [name for name in names if not any(name in (one, one.rpartition("-")[0]) for one in known)]:
        sys.stderr.write(f"{unknown[0]!r} is no setting: {', '.join(known)}\n")
        return 2
    failed = False
    for one in asked:
        name, _, threads = one.rpartition("-")
        limits = {f"{library}_NUM_THREADS": threads for library in ("OMP", "MKL", "OPENBLAS")}
        environment = {**os.environ, **limits, **SETTINGS[name]}
        command = [sys.executable, "-m", "pytest", "-q", *(os.environ.get("PROCESSOR_TESTS", "").split() or FILES)]
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        told = [line for line in lines if re.match(r"(FAILED|ERROR) ", line)]
        last = lines[-1] if lines else done.stderr.strip()[-300:]
        sys.stdout.write("\n".join([f"{one}: {last} ({time.monotonic() - start:.0f} s)", *told]) + "\n")
        sys.stdout.flush()
        failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
