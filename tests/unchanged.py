"""Show that a change of the code changed no result: the same jobs by another commit and by this working tree.

``python -m tests.unchanged COMMIT`` registers, evaluates (with both engines), compares and gates models of a simulated
tissue and, where they lie beside the repository, of real tissue. It compares every artifact, metric, parameter and tag
of the runs, the text of pages, and what the commands print: numbers to the last bit; identifiers, times and paths are
masked, figures are not compared. A folder that an earlier run kept may stand for the commit.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from difflib import unified_diff
from html import unescape
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MASKS = {
    r"tag amici_eval\.heartbeat.*": "<heartbeat>",
    r"(?m)^ *\d+ % \(.* left\n": "",
    r"(?m)^(INFO|WARNING|ERROR) [\w.]+:": "<logger>:",
    r"\b[0-9a-f]{32,64}\b|\bm-[0-9a-f]{32}\b": "<id>",
    r"(?<![\w.])(?=[0-9a-f]*[a-f])(?=[a-f]*[0-9])[0-9a-f]{8,12}\b": "<short id>",
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?( UTC|Z|\+00:00)?": "<time>",
    r"\d+(\.\d+)? (s|min|seconds|MB|GB|MiB|GiB)\b": "<measured>",
    r"/[^\s\"'<>,)]*/(after|before)[^/\s\"'<>,)]*": "<folder>",
}


def prepare(inputs: Path) -> None:
    """Write a simulated tissue and a small AMICI trained on a part of it: input of both sides."""
    import numpy as np

    from tests.conftest import small_tissue, train_plainly

    tissue = small_tissue()
    tissue.write_h5ad(inputs / "simulated.h5ad")
    train_plainly(tissue, np.flatnonzero((tissue.obs["region"] == "rest").to_numpy())).save(str(inputs / "simulated"))


def jobs(inputs: Path) -> list[tuple[str, list[str]]]:
    """The commands in order, each with the name of its output."""
    sources = {"simulated": (inputs / "simulated", inputs / "simulated.h5ad")}
    if SHARED.is_dir():
        osmfish = SHARED / "data" / "osmfish_sscortex.h5ad"
        sources |= {f"osmfish{seed}": (SHARED / "models" / f"osmfish_seed{seed}", osmfish) for seed in (0, 1)}
    found = []
    for source, (folder, data) in sources.items():
        name = source.rstrip("01")
        found.append((f"register {source}", ["register", f"model_dir={folder}", f"name={name}", f"data.uri={data}"]))
    for name in sorted({source.rstrip("01") for source in sources}):
        model = f"model_uri=models:/{name}/1"
        found.append((f"evaluate {name}", ["evaluate", model]))
        hooked = ["ablation.engine=hooked", "ablation.modes=[keep_one,leave_one_out]"]
        found.append((f"evaluate {name}, hooked", ["evaluate", model, *hooked, "permutation.n_permutations=100"]))
    model = "model_uri=models:/simulated/1"
    for null in ("tile", "torus"):
        options = [f"permutation.spatial_null={null}", "permutation.method=sequential", "report.figures=false"]
        found.append((f"evaluate simulated, {null}", ["evaluate", model, *options]))
    options = ["permutation.tail=gpd", "permutation.sampling=cyclic", "permutation.adjustment=by"]
    found.append(("evaluate simulated, gpd", ["evaluate", model, *options, "data.subset.held_out=true"]))
    if SHARED.is_dir():
        found.append(("compare", ["compare", "model=osmfish", "versions=[1,2]"]))
        for version in (1, 2):
            gate = ["gate", f"model_uri=models:/osmfish/{version}", "gate.promote=champion"]
            found.append((f"gate {version}", gate))
    return found


COLLECT = """
import sys, mlflow
from pathlib import Path
out = Path(sys.argv[1]); client = mlflow.MlflowClient()
def order(run): return run.info.start_time
for experiment in client.search_experiments():
    for number, run in enumerate(sorted(client.search_runs([experiment.experiment_id], max_results=1000), key=order)):
        to = out / f"{experiment.name}-{number}"; to.mkdir(parents=True)
        rows = [f"status {run.info.status} {run.info.run_name}"]
        rows += [f"param {key} {value}" for key, value in run.data.params.items()]
        rows += [f"tag {key} {value}" for key, value in run.data.tags.items()]
        for key in run.data.metrics:
            rows += [f"metric {key} {m.step} {m.value!r}" for m in client.get_metric_history(run.info.run_id, key)]
        rows += [f"input {i.dataset.name} {i.dataset.schema} {i.dataset.profile}" for i in run.inputs.dataset_inputs]
        (to / "run.txt").write_text("\\n".join(sorted(rows)))
        client.download_artifacts(run.info.run_id, "", str(to))
for model in client.search_registered_models():
    rows = [f"{model.name} {model.aliases} {model.tags}"]
    for version in client.search_model_versions(f"name='{model.name}'"):
        rows.append(f"{version.version} {version.tags} {version.description}")
    (out / f"registry-{model.name}.txt").write_text("\\n".join(rows))
"""


def run_all(checkout: Path, inputs: Path, work: Path) -> None:
    """Run the jobs with the code of a checkout; keep what they print and all that the store holds."""
    work.mkdir(parents=True)
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "MLFLOW_TRACKING_URI": f"sqlite:///{work / 'mlflow.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    (work / "store").mkdir()
    for name, command in jobs(inputs):
        print(f"{checkout.name}: {name}", flush=True)
        python = [sys.executable, "-m", "amici_eval", *command]
        ended = subprocess.run(python, cwd=work, env=environment, capture_output=True, text=True, check=False)
        said = f"exit {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        (work / "store" / f"said {name}.txt").write_text(said)
    collect = [sys.executable, "-c", COLLECT, str(work / "store")]
    subprocess.run(collect, cwd=work, env=environment, check=True, capture_output=True)


def masked(path: Path) -> list[str]:
    """Return a file as lines: numbers as they are, masked where every run has its own; of pages the text alone."""
    if path.suffix in (".png", ".svg"):
        return []
    if path.suffix in (".safetensors", ".npz"):
        arrays = load_file(path) if path.suffix == ".safetensors" else np.load(path)
        return [f"{key} {arrays[key].dtype} {arrays[key].shape} {arrays[key].tobytes().hex()}" for key in arrays]
    if path.suffix == ".parquet":
        return [path.read_bytes().hex()]
    text = path.read_text()
    if path.suffix == ".html":
        text = re.sub(r"(?s)<(svg|style|script)\b.*?</\1>|<[^>]*>", " ", text)
        text = re.sub(r"\s+", " ", unescape(text)).replace(". ", ".\n")
    for pattern, mask in MASKS.items():
        text = re.sub(pattern, mask, text)
    return text.splitlines()


def main(reference: str) -> int:
    if Path(reference).is_dir():
        work = Path(reference)
    else:
        work = Path(tempfile.mkdtemp(prefix="unchanged-"))
        prepare(work)
        checkout = work / "checkout"
        subprocess.run(["git", "worktree", "add", "--detach", str(checkout), reference], cwd=ROOT, check=True)
        try:
            run_all(checkout, work, work / "before")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(checkout)], cwd=ROOT, check=True)
    after = work / f"after-{os.getpid()}"
    run_all(ROOT, work, after)
    stores = [work / "before" / "store", after / "store"]
    names = [{str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()} for store in stores]
    different = 0
    for name in sorted(names[0] | names[1]):
        texts = [masked(store / name) if (store / name).is_file() else ["no such file"] for store in stores]
        lines = list(unified_diff(*texts, f"before/{name}", f"after/{name}", lineterm="", n=0))
        different += bool(lines)
        print("\n".join(line[:300] for line in lines[:12]), end="\n" if lines else "")
    print(f"{len(names[0] | names[1])} files, {different} differ; kept in {work} and {after}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
