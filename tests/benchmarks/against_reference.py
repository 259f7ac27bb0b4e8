"""Time our evaluation against amici-st's own, on the same model, data and number of permutations, and print the ratio.

Each side runs in a process of its own, so that peak memory is its own. Without arguments: the demo's tissue and model;
`python -m tests.benchmarks.against_reference MODEL_DIR DATA.h5ad` takes a trained model (a folder of `AMICI.save`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def measure(side: str, model_dir: str, data: str) -> None:
    """Run one side and print wall time, CPU time and peak memory as JSON."""
    import resource
    import time

    import amici
    import anndata
    from scipy import sparse

    adata = anndata.read_h5ad(data)
    if sparse.issparse(adata.X):
        adata.X = adata.X.toarray()
    model = amici.AMICI.load(model_dir, adata=adata)
    wall, cpu = time.perf_counter(), time.process_time()
    if side == "amici-st":
        n_permutations = model.get_expl_variance_scores()._n_permutations
    else:
        from amici_eval import evaluate

        n_permutations = evaluate(model, adata).n_permutations
    result = {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "n_permutations": n_permutations,
    }
    sys.stdout.write(f"\n@@{json.dumps(result)}\n")


def make_demo_model(folder: Path) -> tuple[str, str]:
    """Simulate and train the demo's first model."""
    from amici_eval.model.training import DEMO_TRAINING, train_amici
    from amici_eval.simulate import DEMO_TISSUE, simulate_tissue

    adata = simulate_tissue(DEMO_TISSUE).adata
    adata.write_h5ad(folder / "tissue.h5ad")
    train_amici(adata, seed=0, **DEMO_TRAINING.kwargs()).save(str(folder / "model"))
    return str(folder / "model"), str(folder / "tissue.h5ad")


def main() -> None:
    """Measure both sides and print them."""
    if len(sys.argv) == 4 and sys.argv[1] in ("amici-st", "hooked"):
        measure(*sys.argv[1:])
        return
    with tempfile.TemporaryDirectory() as scratch:
        model_dir, data = sys.argv[1:3] if len(sys.argv) == 3 else make_demo_model(Path(scratch))
        rows = {}
        for side in ("hooked", "amici-st"):
            command = [sys.executable, "-m", "tests.benchmarks.against_reference", side, model_dir, data]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows[side] = json.loads(output.rpartition("@@")[2])
    print(f"{'':10}{'wall s':>10}{'CPU s':>10}{'peak MB':>10}{'permutations':>14}")
    for side, row in rows.items():
        numbers = f"{row['wall_s']:10.2f}{row['cpu_s']:10.2f}{row['peak_mb']:10.0f}{row['n_permutations']:14d}"
        print(f"{side:10}{numbers}")
    print(f"amici-st takes {rows['amici-st']['wall_s'] / rows['hooked']['wall_s']:.1f} times as long")


if __name__ == "__main__":
    main()
