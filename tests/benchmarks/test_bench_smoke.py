"""The benchmark runs at tiny sizes and writes its tables and page. How fast anything is, is never asserted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import anndata
import numpy as np
import pytest
import torch

from tests.benchmarks import gpu, report
from tests.benchmarks.__main__ import parse, run
from tests.benchmarks.common import read_table
from tests.benchmarks.floor import needed_work
from tests.benchmarks.tissues import TissueSize, random_model, read_tissue, write_tissue

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.amici, pytest.mark.slow]

SMALL = TissueSize(n_cells=300, n_genes=12, n_types=3)


@pytest.fixture(autouse=True)
def _one_thread():
    # at these sizes threads only wait for each other
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_model():
    return random_model(read_tissue(SMALL), n_heads=2, head_size=4, n_neighbors=5, n_nn_embed=16, n_nn_embed_hidden=24)


def test_all_parts_write_their_tables_and_the_page(tmp_path: Path) -> None:
    parts, options = parse(["--quick", "--repeats", "1", "--workdir", str(tmp_path / "work")])
    assert parts == ["reference", "scaling", "floor", "million", "report"]
    options = replace(options, in_process=True, results=tmp_path / "results", docs=tmp_path / "docs")
    run(parts, options)

    by_side = {row["side"]: row for row in read_table(options.results / "reference.csv")}
    assert set(by_side) == {"everything", "inference", "catalogue", "factored", "hooked", "amici-st"}
    assert len({row["n_permutations"] for row in by_side.values()}) == 1
    for row in read_table(options.results / "agreement.csv"):
        assert row["max_abs_gene"] < 1e-5
        assert row["values_compared"] == 2 * 3 * 12
        assert row["tests_compared"] == 2 * 3
    scaling = read_table(options.results / "scaling.csv")
    assert {row["sampling"] for row in scaling} == {"independent", "cyclic"}
    assert read_table(options.results / "floor.csv")[0]["floor_s"] > 0
    assert {row["n_cells"] for row in read_table(options.results / "million.csv")} == {100, 1000}
    page = (options.docs / "performance.md").read_text()
    for title in ("Beside amici-st", "Against size", "Distance to the floor", "A million cells"):
        assert "Not measured" not in page.split(f"## {title}")[1].split("## ")[0]
    assert (options.docs / "images" / report.FIGURE).stat().st_size > 5_000
    # simulated data are gone
    assert list((tmp_path / "work").iterdir()) == []


def test_amici_st_is_extrapolated_where_it_would_take_too_long(tmp_path: Path) -> None:
    _, options = parse(["--quick", "--limit", "0", "--engine", "hooked", "--workdir", str(tmp_path)])
    options = replace(options, in_process=True, results=tmp_path / "results", docs=tmp_path / "docs")
    run(["reference"], options)
    row = next(row for row in read_table(options.results / "reference.csv") if row["side"] == "amici-st")
    assert row["basis"] == "extrapolated from 3 of 6 pairs"
    assert row["wall_s"] > 0
    assert read_table(options.results / "agreement.csv")[0]["tests_compared"] == 3


def test_tissue_is_what_its_size_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = TissueSize(n_cells=2_000, n_genes=50, n_types=4)
    write_tissue(tmp_path / "a.h5ad", size)
    adata = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert adata.shape == (2_000, 50)
    assert 0.15 < adata.X.nnz / 100_000 < 0.25
    assert adata.X.has_canonical_format
    assert adata.obs["cell_type"].value_counts().shape == (4,)
    assert np.unique(adata.obsm["spatial"], axis=0).shape == (2_000, 2)
    again = read_tissue(size)
    assert (adata.X != again.X).nnz == 0
    assert adata.obs.equals(again.obs)
    assert (adata.X != read_tissue(replace(size, seed=1)).X).nnz > 0
    # several blocks join to one matrix
    monkeypatch.setattr("tests.benchmarks.tissues._BLOCK", 300)
    in_blocks = read_tissue(size).X
    assert in_blocks.has_canonical_format
    assert in_blocks.indptr[-1] == in_blocks.nnz
    assert (in_blocks[:300] != adata.X[:300]).nnz < adata.X[:300].nnz
    assert np.allclose(np.expm1(in_blocks.toarray()).sum(axis=1), 2 * 0.2 * 50, rtol=1e-4)


def test_floor_counts_what_the_layers_of_the_model_need(tiny_model) -> None:
    from amici_eval.data.tissue import prepare
    from amici_eval.model.engines.hooked import neighbours
    from amici_eval.settings.evaluation import DataSpec

    tissue = prepare(read_tissue(SMALL), tiny_model.card, DataSpec())
    work = needed_work(tiny_model, tissue)
    index, _ = neighbours(tissue, tiny_model.card)
    pairs = {(int(j), int(tissue.label_codes[i])) for i in range(SMALL.n_cells) for j in index[i]}
    by_stage = {}
    for product in work.products:
        by_stage[product.stage] = by_stage.get(product.stage, 0) + product.operations
    senders = len({j for j, _ in pairs})
    assert by_stage["expression embedding"] == 2 * senders * (12 * 24 + 24 * 12 + 12 * 16)
    assert by_stage["distance network, pairs"] == 2 * len(pairs) * (512 * (16 + 32) + (16 + 32) * 2)
    assert work.attention == 4 * 300 * 5 * 2 * 4


def test_gpu_kernels_agree_and_are_timed_on_any_device(tmp_path: Path, tiny_model) -> None:
    assert gpu.main(["--results", str(tmp_path), "--cells", "500"]) == 0
    assert all(row["holds"] for row in read_table(tmp_path / "gpu_checks.csv"))
    limits = {"float32": 1e9, "float64": 1e9, "bandwidth": 1e9}
    rows = list(gpu.time_stages(gpu.SMALL, 500, "cpu", limits))
    assert all(row["seconds"] > 0 for row in rows)
    # random weights have the names and shapes of the real ones
    sizes = replace(gpu.SMALL, genes=12, types=3, heads=2, head_size=4, embed=16, embed_hidden=24)
    sizes = replace(sizes, kv=256, pos_hidden=512, query_hidden=512)
    state = {name: tuple(tensor.shape) for name, tensor in gpu.random_state(sizes).items()}
    real = {name: tuple(tensor.shape) for name, tensor in tiny_model.weights.items() if "IGNORE" not in name}
    assert state == real


def test_exponent_of_a_power_law() -> None:
    x = [10, 100, 1_000, 10_000]
    assert report.exponent(x, [value**1.5 for value in x]) == pytest.approx(1.5)
    # the lower half does not count
    assert report.exponent(x, [7.0, 7.0, 1_000.0, 10_000.0]) == pytest.approx(1.0)
