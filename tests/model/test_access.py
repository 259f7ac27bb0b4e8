from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from amici_eval.common.errors import DataError, DeviceError, ModelFormatError
from amici_eval.data.files import content_digest
from amici_eval.data.tissue import prepare
from amici_eval.evaluation.pipeline import evaluate
from amici_eval.model.cards import card_of
from amici_eval.model.checkpoint import TrainedAMICI, read_amici_directory
from amici_eval.model.engines.hooked import neighbours
from amici_eval.model.engines.opening import open_access, resolve_device
from amici_eval.settings.evaluation import AblationSpec, DataSpec, SubsetSpec
from tests.model.conftest import on_cpu, opened

pytestmark = pytest.mark.amici

QUICK = on_cpu(19)


def everything(adata):
    """Content and layout of an AnnData."""
    return (
        content_digest(adata),
        *(sorted(getattr(adata, part).keys()) for part in ("obs", "var", "obsm", "varm", "obsp", "layers", "uns")),
        adata.X.dtype,
        type(adata.X),
    )


def random_state():
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global generator is what must stay untouched
    return random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()


def test_a_compiler_that_is_switched_off_is_refused_before_any_work(trained, adata, monkeypatch):
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    with pytest.raises(DeviceError, match=r"NUMBA_DISABLE_JIT=1.*unset it"):
        evaluate(trained, adata)


def test_neighbours_are_those_of_amici(trained, native, adata):
    index, distance = neighbours(prepare(adata, trained.card, DataSpec()), trained.card)
    assert np.array_equal(index, native.adata.obsm["_nn_idx"])
    assert np.array_equal(distance, native.adata.obsm["_nn_dist"])


def test_neighbours_with_cell_radii_are_those_of_amici(make_amici, adata):
    adata.obs["radius"] = np.random.default_rng(0).uniform(0.5, 4.0, adata.n_obs)
    model = make_amici(adata.copy(), cell_radius_key="radius")
    tissue = prepare(adata, card_of(model, adata=adata), DataSpec())
    index, distance = neighbours(tissue, card_of(model, adata=adata))
    assert np.array_equal(index, model.adata.obsm["_nn_idx"])
    assert np.array_equal(distance, model.adata.obsm["_nn_dist"])
    assert (distance == 0.0).any()


def test_unablated_predictions_are_those_of_amici(trained, native, adata):
    with opened(trained, adata) as access:
        ours = access.predict(np.arange(adata.n_obs), keeps=[None])[0]
    np.testing.assert_allclose(ours, native.get_predictions(prog_bar=False), atol=1e-6, rtol=0)


def test_batch_size_changes_nothing(trained, adata):
    rows = np.random.default_rng(0).permutation(adata.n_obs)[:60]
    keeps = [(0,), (1,), (0, 1), None, ()]
    results = {}
    for size in (1, 7, 512):
        done = []
        with opened(trained, adata, batch_size=size) as access:
            results[size] = access.predict(rows, keeps=keeps, progress=done.append)
        assert sum(done) == len(rows) * len(keeps)
    np.testing.assert_allclose(results[1], results[512], atol=1e-6, rtol=0)
    np.testing.assert_allclose(results[7], results[512], atol=1e-6, rtol=0)
    np.testing.assert_allclose(results[512][2], results[512][3], atol=1e-6, rtol=0)


def test_rows_are_what_was_asked_for(trained, adata):
    tissue = prepare(adata, trained.card, DataSpec(subset=SubsetSpec(key="region", value="rest")))
    with open_access(trained, tissue, AblationSpec(device="cpu")) as access:
        receivers = access.receivers()
        rows = np.concatenate(list(receivers.values()))
        assert set(rows.tolist()) == set(np.flatnonzero(adata.obs["region"] == "rest").tolist())
        for label, own in receivers.items():
            assert set(adata.obs["cell_type"].iloc[own]) == {label}
            assert access.cell_names(own) == sorted(adata.obs_names[own])
        x = adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X
        assert np.array_equal(access.expression(rows), np.asarray(x, dtype=np.float32)[rows])
        assert access.predict(rows[:0], keeps=[None]).shape == (1, 0, adata.n_vars)


def test_cell_order_changes_nothing(trained, adata):
    order = np.random.default_rng(1).permutation(adata.n_obs)
    one = trained.predict(adata)
    other = trained.predict(adata[order].copy())
    np.testing.assert_allclose(other, one[order], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("device", "there", "message"),
    [
        ("cuda", False, "ablation.device=cuda: PyTorch .* finds 0 CUDA devices here; set ablation.device"),
        ("cuda:7", True, "ablation.device=cuda:7: PyTorch .* finds 2 CUDA devices"),
        ("mps", False, "ablation.device=mps: PyTorch finds no Apple GPU here; set ablation.device=auto"),
    ],
)
def test_absent_devices_are_refused(monkeypatch, device, there, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=message):
        resolve_device(device)


def test_devices_that_are_there_are_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [resolve_device(name) for name in ("auto", "cuda", "cuda:1", "mps")] == ["cuda", "cuda", "cuda:1", "mps"]


def test_absent_device_stops_an_evaluation_before_the_data_is_looked_at(monkeypatch, trained):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="0 CUDA devices"):
        evaluate(trained, "no AnnData", replace(QUICK, ablation=AblationSpec(device="cuda")))


def test_touching_sections_are_refused(trained, adata):
    left = adata.obsm["spatial"][:, 0] < np.median(adata.obsm["spatial"][:, 0])
    adata.obs["slide"] = np.where(left, "slide 1", "slide 2")
    spec = replace(QUICK, data=DataSpec(sample_key="slide"))
    with pytest.raises(DataError, match=r"of 500 cells have neighbours in another section .* sections must lie apart"):
        evaluate(trained, adata, spec)
    # the model is free to look across where no section is named
    assert evaluate(trained, adata, QUICK).n_cells.sum() == 500
    adata.obsm["spatial"] = adata.obsm["spatial"] + np.where(left, 0.0, 1e4)[:, None]
    assert evaluate(trained, adata, spec).n_cells.sum() == 500


def test_live_model_stays_where_it_is(native, adata):
    storages = {name: value.data_ptr() for name, value in native.module.state_dict().items()}
    with opened(native, adata) as access:
        access.predict(np.arange(5), keeps=[(0,)])
    assert {parameter.device.type for parameter in native.module.parameters()} == {"cpu"}
    assert {name: value.data_ptr() for name, value in native.module.state_dict().items()} == storages


def test_evaluation_leaves_a_live_model_and_all_else_as_it_was(native, adata):
    import amici
    from scvi.dataloaders import DataSplitter

    calls = []
    native.module.train()
    native.module.nn_embed.eval()
    point = native.module.attention_layer.hook_pattern
    point.add_hook(lambda pattern, hook: calls.append(pattern.shape))
    hooks = list(point.fwd_hooks)
    flags = [part.training for part in native.module.modules()]
    weights = {name: value.clone() for name, value in native.module.state_dict().items()}
    own_before, before = everything(native.adata), everything(adata)
    classes = {cls: dict(vars(cls)) for cls in (amici.AMICI, amici.AMICIModule, DataSplitter)}
    attributes = {name: id(value) for name, value in vars(native).items()}
    state = random_state()

    own = evaluate(native, spec=QUICK)
    other = evaluate(native, adata, QUICK)

    assert random_state() == state
    assert {cls: dict(vars(cls)) for cls in classes} == classes
    assert {name: id(value) for name, value in vars(native).items()} == attributes
    assert everything(native.adata) == own_before
    assert everything(adata) == before
    assert [part.training for part in native.module.modules()] == flags
    assert point.fwd_hooks == hooks
    assert calls
    assert all(torch.equal(value, weights[name]) for name, value in native.module.state_dict().items())
    assert all(parameter.grad is None for parameter in native.module.parameters())
    # neither neighbour dropout nor the hook changed a number
    np.testing.assert_array_equal(own.expl_var, other.expl_var)
    np.testing.assert_array_equal(own.exceedances, other.exceedances)


def test_live_and_saved_model_give_the_same_evaluation(native, trained, adata):
    live, saved = evaluate(native, adata, QUICK), evaluate(trained, adata, QUICK)
    np.testing.assert_array_equal(live.expl_var_gene, saved.expl_var_gene)
    np.testing.assert_array_equal(live.exceedances, saved.exceedances)
    assert live.held_out == saved.held_out


def test_held_out_cells_are_told_from_training_cells(trained, adata):
    region = sorted(set(adata.obs["region"]) - {"rest"})[0]
    fresh = evaluate(trained, adata, replace(QUICK, data=DataSpec(subset=SubsetSpec(key="region", value=region))))
    seen = evaluate(trained, adata, replace(QUICK, data=DataSpec(subset=SubsetSpec(key="region", value="rest"))))
    assert set(fresh.held_out) == {True}
    assert set(seen.held_out) == {False}


def test_evaluation_without_any_data_is_refused(trained):
    with pytest.raises(DataError, match=r"no data was given: .* call evaluate\(model, adata\)"):
        evaluate(trained)


def test_subclass_of_amici_can_be_evaluated(make_amici, adata):
    from amici import AMICI

    class Mine(AMICI):
        pass

    result = evaluate(make_amici(adata.copy(), cls=Mine), spec=QUICK)
    assert np.isfinite(result.expl_var).all()


# --- variants of AMICI


def variant(*, asks_for: str = "X"):
    """A class as forks of AMICI have them: another module, a mask of attention, perhaps further inputs."""
    import amici

    class AMICIUnimodalAttentionModule(amici.AMICIModule):
        def _get_generative_input(self, tensors, inference_outputs):
            return {**super()._get_generative_input(tensors, inference_outputs), "attention_mask": tensors[asks_for]}

        def generative(self, labels, label_embed, nn_embed, nn_dist, attention_mask=None, **options):
            # another meaning of distance
            return super().generative(labels, label_embed, nn_embed, nn_dist * 0.5, **options)

    class Variant(amici.AMICI):
        _module_cls = AMICIUnimodalAttentionModule

    return Variant


def test_a_variant_runs_through_its_own_forward_pass(make_amici, adata):
    model = make_amici(adata, cls=variant())
    found = evaluate(model, adata, replace(QUICK, ablation=AblationSpec(device="cpu", engine="factored")))
    assert found.engine == "hooked"
    assert any("AMICIUnimodalAttentionModule" in note for note in found.notes)
    theirs = model.get_expl_variance_scores(n_permutations=1)._explained_variance_df
    for (head, cell_type), rows in theirs.groupby(["head", "ct_name"]):
        ours = found.expl_var[head, found.cell_types.index(cell_type)]
        assert ours == pytest.approx(rows["expl_var_head"].iloc[0], abs=1e-5)


def test_a_variant_gets_what_its_own_loader_gives(make_amici, adata):
    model = make_amici(adata, cls=variant(asks_for="coordinates"))
    assert np.isfinite(evaluate(model, adata, QUICK).expl_var).all()
    with pytest.raises(ModelFormatError, match=r"AMICIUnimodalAttentionModule asks for 'coordinates'.*model\.adata"):
        evaluate(model, adata.copy(), QUICK)


def test_a_variant_is_not_registered_and_the_reason_names_it(make_amici, adata, tmp_path):
    model = make_amici(adata, cls=variant())
    with pytest.raises(ModelFormatError, match=r"only amici.AMICI itself can be saved.*amici_eval.evaluate"):
        TrainedAMICI.from_amici(model)
    model.save(str(tmp_path / "saved"))
    with pytest.raises(ModelFormatError, match="the model was saved by class 'Variant'"):
        read_amici_directory(tmp_path / "saved", adata=adata, trust=False)


@pytest.mark.parametrize("change", ["tensor", "argument"])
def test_a_fork_that_keeps_the_names_is_not_registered(make_amici, adata, tmp_path, change):
    make_amici(adata).save(str(tmp_path / "saved"))
    path = tmp_path / "saved" / "model.pt"
    content = torch.load(path, weights_only=False)
    if change == "tensor":
        content["model_state_dict"]["batch_embed.weight"] = torch.zeros(2, 3)
    else:
        content["attr_dict"]["init_params_"]["kwargs"]["model_kwargs"]["n_batch"] = 2
    torch.save(content, path)
    with pytest.raises(ModelFormatError, match=r"the model is of another class or version of AMICI: it (has|was)"):
        read_amici_directory(path, adata=adata, trust=False)


def test_other_sources_of_amici_are_said(trained, adata):
    assert not any("sources of amici-st" in note for note in evaluate(trained, adata, QUICK).notes)
    versions = {**trained.card.versions, "amici-st sources": "0123456789abcdef"}
    other = replace(trained, card=replace(trained.card, versions=versions))
    assert any("sources of amici-st here" in note for note in evaluate(other, adata, QUICK).notes)
