"""The memory budget on real free memory: what an evaluation takes, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from amici_eval.model.engines import factored

pytestmark = [pytest.mark.amici, pytest.mark.slow]

SCRIPT = """
import json, os, resource, sys
from dataclasses import replace
from pathlib import Path

from amici_eval.evaluation.pipeline import evaluate
from amici_eval.model.training import train_amici
from amici_eval.data.simulate import DEMO_TISSUE, simulate_tissue
from amici_eval.settings.evaluation import AblationSpec, EvaluationSpec, PermutationSpec

budget, limit = sys.argv[1], int(sys.argv[2])
size = replace(DEMO_TISSUE, n_genes=40, n_cells=300)
spec = EvaluationSpec(
    ablation=AblationSpec(device="cpu", memory_budget=budget if budget != "none" else None),
    permutation=PermutationSpec(n_permutations=99, n_bootstrap=50),
)
small = simulate_tissue(size).adata
sizes = ("n_query_dim", "n_kv_dim", "n_nn_embed", "n_nn_embed_hidden", "n_query_embed_hidden", "n_pos_coef_mlp_hidden")
model = train_amici(
    small, labels_key="cell_type", coord_obsm_key="spatial", n_neighbors=8, seed=0, max_epochs=1, batch_size=128,
    model_params={"n_heads": 8, "n_head_size": 32, "distance_kernel_unit_scale": 10.0, **dict.fromkeys(sizes, 16)},
)
# compiles, and loads what is loaded at first use
evaluate(model, small, spec)
tissue = simulate_tissue(replace(size, n_cells=10_000, window_um=(1200.0, 1200.0))).adata
tissue.obs_names = "large_" + tissue.obs_names
if limit:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, resource.RLIM_INFINITY))

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


# the peak of what came before does not count
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
found = evaluate(model, tissue, spec)
print(json.dumps({"grown": (kilobytes("VmHWM") - before) * 1024, "engine": found.engine}))
"""
MB = 2**20


def measured(*, budget: str, limit: int = 0) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, budget, str(limit)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_an_evaluation_gets_through_with_little_memory_left():
    # 10,000 cells x 8 heads of 32 with what the null needs of them: 10 MB an array
    limited = measured(budget="none", limit=300 * MB)
    assert limited["engine"] == "factored"
    assert 30 * MB < limited["grown"] < 300 * MB


def test_more_than_is_free_is_not_taken_and_is_told(monkeypatch, caplog):
    monkeypatch.setattr(factored, "available_memory", lambda: 10**9)
    assert factored.memory_budget(None, "cpu") == 10**9 // 4
    assert factored.memory_budget(4 * 10**8, "cpu") == 4 * 10**8
    assert factored.memory_budget(10**10, "cpu") == 10**9
    factored.warn_of_budget(10**10, "cpu")
    assert "asks for 10 GB, but 1 GB are free on cpu" in caplog.text
    caplog.clear()
    factored.warn_of_budget(10**8, "cpu")
    assert not caplog.text
    # a second evaluation beside sees what the first has taken by then
    monkeypatch.setattr(factored, "available_memory", lambda: 6 * 10**8)
    assert factored.memory_budget(None, "cpu") == 6 * 10**8 // 4
