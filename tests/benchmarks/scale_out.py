"""One evaluation over workers of Ray beside one process: time, and whether all numbers are the same.

``python -m tests.benchmarks.scale_out --model FOLDER --data FILE.h5ad [--engine hooked] [--n-workers 2]``
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.benchmarks.engines import Source
from tests.same_numbers import differences

if TYPE_CHECKING:
    from amici_eval.evaluation.launching import Launcher
    from amici_eval.results.evaluation import HeadEvaluation


def main() -> None:
    import torch

    from amici_eval.evaluation.launching import open_launcher
    from amici_eval.evaluation.pipeline import evaluate
    from amici_eval.settings.evaluation import AblationSpec, EvaluationSpec, LaunchSpec, PermutationSpec

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--engine", default="factored")
    parser.add_argument("--n-workers", type=int, default=2)
    parser.add_argument("--n-permutations", type=int)
    asked = parser.parse_args()
    spec = EvaluationSpec(
        ablation=AblationSpec(engine=asked.engine, device="cpu"),
        permutation=PermutationSpec(n_permutations=asked.n_permutations),
    )
    model, adata = Source(asked.model, asked.data).load()

    def timed(what: str, launcher: Launcher | None = None) -> HeadEvaluation:
        start = time.perf_counter()
        found = evaluate(model, adata, spec, launcher=launcher)
        sys.stdout.write(f"{what}: {time.perf_counter() - start:.2f} s\n")
        sys.stdout.flush()
        return found

    quick = replace(spec, permutation=replace(spec.permutation, n_permutations=9))
    evaluate(model, adata, quick)  # what is compiled at first use
    found = {}
    for n_threads in sorted({1, torch.get_num_threads(), asked.n_workers}):
        torch.set_num_threads(n_threads)
        found[n_threads] = timed(f"one process, torch on {n_threads} threads")
    start = time.perf_counter()
    with open_launcher(LaunchSpec(kind="ray", n_workers=asked.n_workers)) as launcher:
        sys.stdout.write(f"cluster started: {time.perf_counter() - start:.2f} s\n")
        # attention, which spans types, is this process's part
        over_ray = timed(f"{asked.n_workers} new workers", launcher)
        again = timed("the same workers again", launcher)
    sys.stdout.write(f"all with start and stop of the cluster: {time.perf_counter() - start:.2f} s\n")
    for n_threads, other in found.items():
        different = differences(other, over_ray) or ["nothing"]
        sys.stdout.write(f"workers differ from one process on {n_threads} threads in: {'; '.join(different)}\n")
    sys.stdout.write(f"the second evaluation differs from the first in: {differences(over_ray, again) or 'nothing'}\n")


if __name__ == "__main__":
    main()
