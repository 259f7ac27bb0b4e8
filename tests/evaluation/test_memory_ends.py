"""Memory ends at any operation of an evaluation: it goes on with smaller pieces, or says what to do; same numbers."""

from __future__ import annotations

import importlib
import logging

import numpy as np
import pytest
import torch

from amici_eval.common.errors import DeviceMemoryError
from amici_eval.common.memory import Shrinking, is_out_of_memory, memory_errors_explained
from amici_eval.evaluation.pipeline import evaluate
from amici_eval.settings.evaluation import AblationSpec, EvaluationSpec, PermutationSpec
from tests.same_numbers import FLOAT32, assert_counts
from tests.scarce import ERRORS, scarce

STAGES = {
    # module, function, how much it is asked to do at a time, and what is too much
    "attention": (
        "amici_eval.model.engines.factored",
        "embed_senders",
        lambda weights, expression, *_: len(expression),
        70,
    ),
    "ablations": ("amici_eval.stats.ablation.values", "_coalition_sums", lambda *a, **_: a[2], 20),
    "substitutions": (
        "amici_eval.stats.ablation.values",
        "_substituted_values",
        lambda *_, chunk_cells, **__: chunk_cells,
        20,
    ),
    "exact moments": ("amici_eval.stats.permutation.exact_moments", "_stratum_sums", lambda *a: a[4], 2**14),
    "test in tissue": ("amici_eval.stats.spatial.lag_test", "_lag_test", lambda *_, **k: k["n_heads"], 1),
    "gram": ("amici_eval.stats.permutation.nulls", "_gram_statistics", lambda *a: a[3], 2**16),
}


def settings(engine: str, **test) -> EvaluationSpec:
    return EvaluationSpec(
        ablation=AblationSpec(device="cpu", engine=engine, senders=engine == "factored", batch_size=128),
        permutation=PermutationSpec(n_permutations=99, n_bootstrap=20, **test),
    )


@pytest.fixture
def as_on_a_device(trained, monkeypatch):
    """Torch does all the work, as it does on a GPU; on one thread, for what fails is of this one."""
    for module in ("nulls", "statistics"):
        monkeypatch.setattr(f"amici_eval.stats.permutation.{module}.cpu_kernels", lambda _: None)
    monkeypatch.setattr("amici_eval.model.engines.attention.compiled_attention", lambda: None)
    monkeypatch.setattr("amici_eval.model.engines.encoder.encoder_kernels", lambda: None)
    monkeypatch.setattr("amici_eval.stats.ablation.values.cpu_substitution", lambda _: None)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def same(found, whole) -> None:
    """Counts and sums of two evaluations are the same up to rounding in float32."""
    assert_counts(found.exceedances, whole.exceedances)
    counted = found.exceedances == whole.exceedances
    np.testing.assert_array_equal(found.p_value[counted], whole.p_value[counted])
    for name in ("expl_var", "expl_var_gene", "expl_var_full"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), atol=FLOAT32, rtol=0, err_msg=name)
    np.testing.assert_allclose(found.spatial.p_value, whole.spatial.p_value, rtol=1e-4)
    if whole.ablations is not None:
        np.testing.assert_allclose(found.ablations.expl_var, whole.ablations.expl_var, atol=FLOAT32, rtol=0)
    if whole.senders is not None:
        np.testing.assert_allclose(found.senders.effect, whole.senders.effect, atol=FLOAT32, rtol=0)


@pytest.mark.amici
@pytest.mark.parametrize("engine", ["factored", "hooked"])
def test_one_failure_anywhere_changes_nothing_or_is_explained(trained, adata, as_on_a_device, engine, caplog):
    spec = settings(engine)
    with scarce(lambda *_: False) as mode:
        whole = evaluate(trained, adata, spec)
    with scarce(lambda *_: False) as building:
        trained.build_module()
    explained: list[str] = []
    recovered, places = 0, np.linspace(building.count + 1, mode.count, 8).astype(int)
    for number, place in enumerate(places):
        error = list(ERRORS.values())[number % len(ERRORS)]
        caplog.clear()
        with caplog.at_level(logging.WARNING), scarce(lambda count, _, place=place: count == place, error) as failing:
            try:
                found = evaluate(trained, adata, spec)
            except DeviceMemoryError as error_told:
                explained.append(str(error_told))
                continue
        assert failing.failures == 1
        assert "out of memory" in caplog.text
        same(found, whole)
        recovered += 1
    assert all("out of memory on cpu at " in text and "memory_budget" in text for text in explained)
    # weights that are folded, or put on the device, are no chunks
    assert recovered >= len(places) - 3


@pytest.mark.amici
@pytest.mark.parametrize(
    ("stage", "engine", "test"),
    [
        ("attention", "factored", {}),
        ("ablations", "factored", {}),
        ("substitutions", "factored", {}),
        ("exact moments", "factored", {"spatial_null": "tile", "tile_width": 100.0}),
        ("test in tissue", "hooked", {}),
        ("gram", "hooked", {}),
    ],
)
def test_a_stage_whose_large_pieces_fail_again_and_again_goes_on_in_small_ones(
    trained, adata, as_on_a_device, monkeypatch, caplog, stage, engine, test
):
    spec = settings(engine, **test)
    whole = evaluate(trained, adata, spec)
    module, name, size_of, too_large = STAGES[stage]
    literal, seen = getattr(importlib.import_module(module), name), []

    def scarce_stage(*arguments, **named):
        size = size_of(*arguments, **named)
        seen.append(size)
        if size > too_large:
            raise torch.OutOfMemoryError
        return literal(*arguments, **named)

    monkeypatch.setattr(importlib.import_module(module), name, scarce_stage)
    with caplog.at_level(logging.WARNING):
        found = evaluate(trained, adata, spec)
    assert max(seen) > too_large >= min(seen)
    assert "going on with" in caplog.text
    same(found, whole)


@pytest.mark.amici
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("engine", ["factored", "hooked"])
def test_what_does_not_fit_at_all_is_told(trained, adata, as_on_a_device, engine, error):
    # the weights fit, nothing of the cells does
    def fails(count: int, size: int) -> bool:
        return count > 3000 and size > 8

    with scarce(fails, error), pytest.raises(DeviceMemoryError) as told:
        evaluate(trained, adata, settings(engine))
    assert "out of memory on cpu at " in told.value.value
    assert " are free" in told.value.value
    assert "memory_budget" in told.value.fix


# --- the mechanism


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_sizes_are_halved_and_stay_so(error):
    tried = []

    def work(size: int) -> int:
        tried.append(size)
        if size > 3:
            raise error()
        return size

    room = Shrinking(100, floor=2, what="a test", device="cpu")
    assert room.run(work) == 3
    assert room.run(work) == 3
    assert tried == [100, 50, 25, 12, 6, 3, 3]


def test_at_the_floor_the_error_names_work_free_memory_and_fix(monkeypatch):
    def work(size: int) -> None:
        msg = "CUDA out of memory. Tried to allocate 2.00 GiB."
        raise torch.OutOfMemoryError(msg)

    monkeypatch.setattr("amici_eval.common.memory.free_bytes", lambda device: 1_500_000_000)
    with pytest.raises(DeviceMemoryError) as told:
        Shrinking(8, floor=3, what="a test", device="cuda:1").run(work)
    for part in ("cuda:1", "a test of 3 cells at a time", "Tried to allocate 2.00 GiB", "1.5 GB are free"):
        assert part in told.value.value
    assert "ablation.device=cpu" in told.value.fix
    assert "batch_size" in told.value.fix


def test_other_errors_are_left_alone():
    for error in (RuntimeError("shapes differ"), OSError(2, "no such file"), ValueError("out of memory")):

        def work(size: int, error: Exception = error) -> None:
            raise error

        assert not is_out_of_memory(error)
        with pytest.raises(type(error)) as told:
            Shrinking(8, what="a test", device="cpu").run(work)
        assert told.value is error
        with pytest.raises(type(error)) as told, memory_errors_explained("a test", "cpu"):
            raise error
        assert told.value is error


def test_a_failure_inside_a_failure_shrinks_the_outer_work_too():
    def inner(size: int) -> int:
        def fails(_: int) -> int:
            if size > 2:
                raise MemoryError
            return size

        return Shrinking(1, what="inside", device="cpu").run(fails)

    assert Shrinking(8, what="outside", device="cpu").run(inner) == 2


def test_a_file_or_a_tissue_that_does_not_fit_is_told(trained, adata, tmp_path, monkeypatch):
    from amici_eval.common.errors import DataError
    from amici_eval.data.files import open_anndata
    from amici_eval.data.tissue import prepare
    from amici_eval.settings.evaluation import DataSpec

    adata.write_h5ad(tmp_path / "tissue.h5ad")

    def too_large(*_: object, **__: object):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("anndata.io.read_elem", too_large)
        with pytest.raises(
            DataError, match=r"tissue\.h5ad .*: it does not fit into the free memory; .*data\.backed=true"
        ):
            open_anndata(tmp_path / "tissue.h5ad")
    monkeypatch.setattr("amici_eval.data.tissue.np.asarray", too_large)
    with pytest.raises(DeviceMemoryError, match="preparing the tissue"):
        prepare(adata, trained.card, DataSpec())
    monkeypatch.undo()
    monkeypatch.setattr("amici.AMICIModule", too_large)
    with pytest.raises(DeviceMemoryError, match="building the model"):
        trained.build_module()
