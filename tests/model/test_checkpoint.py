from __future__ import annotations

import json
import pickletools
import random
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from amici_eval.common.errors import DataError, ModelFormatError
from amici_eval.data.files import content_digest
from amici_eval.data.tissue import prepare
from amici_eval.evaluation.pipeline import evaluate
from amici_eval.model.checkpoint import TrainedAMICI, read_amici_directory
from amici_eval.model.engines.opening import open_access
from amici_eval.model.manifest import write_manifest
from amici_eval.model.training import data_loader_restored
from amici_eval.settings.evaluation import (
    AblationSpec,
    DataSpec,
    EvaluationSpec,
    PermutationSpec,
    SubsetSpec,
    TrainedOnSpec,
)

pytestmark = pytest.mark.amici

FILES = ("weights.safetensors", "model.json", "cells.json", "manifest.json")


@pytest.fixture
def saved(trained, tmp_path):
    trained.save(tmp_path / "saved")
    return tmp_path / "saved"


def random_state():
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global generator is what must stay untouched
    return random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()


def assert_same(one: TrainedAMICI, other: TrainedAMICI) -> None:
    assert one.card == other.card
    assert one.init_params == other.init_params
    assert one.registry == other.registry
    assert one.cells == other.cells
    assert one.history == other.history
    assert list(one.weights) == list(other.weights)
    for name, value in one.weights.items():
        assert value.dtype == other.weights[name].dtype
        assert torch.equal(value, other.weights[name]), name


# --- save and load ----------------------------------------------------------------------------------------------------


def test_saved_model_comes_back_the_same(trained, saved):
    back = TrainedAMICI.load(saved)
    # safetensors sorts by name
    assert_same(
        replace(trained, weights=dict(sorted(trained.weights.items()))),
        replace(back, weights=dict(sorted(back.weights.items()))),
    )
    assert back.history
    for name, value in back.build_module().state_dict().items():
        assert torch.equal(value, trained.weights[name]), name


def test_live_model_and_its_folder_give_the_same(native, trained):
    one = TrainedAMICI.from_amici(native)
    # scvi-tools writes the set-up of the folder anew when it loads, with an id of its own
    assert_same(replace(one, registry={}), replace(trained, registry={}))
    assert {key: value for key, value in one.registry.items() if key != "scvi_uuid"}.keys() == {
        key for key in trained.registry if key != "scvi_uuid"
    }


def test_nothing_that_is_saved_is_a_pickle(saved):
    paths = sorted(path for path in saved.rglob("*") if path.is_file())
    assert {path.name for path in paths} == set(FILES)
    for path in paths:
        content = path.read_bytes()
        assert not zipfile.is_zipfile(path)
        assert content[:1] not in (b"\x80", b"(", b"c", b"P")
        with pytest.raises(ValueError, match=r"opcode|pickle|not"):
            list(pickletools.genops(content))
        if path.suffix == ".json":
            json.loads(content)
        else:
            size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + size])
            assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} <= {"F32", "I64"}


def test_training_cells_are_known_by_name(trained, saved, adata):
    rest = frozenset(adata.obs_names[adata.obs["region"] == "rest"])
    assert trained.card.training_cells == rest
    assert TrainedAMICI.load(saved).card.training_cells == rest
    assert set(trained.cells["validation"]) == set(adata.obs_names) - rest
    assert trained.cells["test"] == ()


def test_card_says_what_the_model_is(trained, adata):
    card = trained.card
    assert (card.n_heads, card.n_neighbors, card.genes) == (2, 8, tuple(adata.var_names))
    assert card.cell_types == tuple(sorted(adata.obs["cell_type"].unique()))
    assert (card.labels_key, card.coord_obsm_key, card.layer, card.cell_radius_key) == (
        "cell_type",
        "spatial",
        None,
        None,
    )
    assert card.training_data.n_cells == 500
    assert card.training_data.digest == content_digest(adata)
    assert card.versions["amici-st"] == "0.1.0"
    assert card.versions["scvi-tools"] == "1.2.2"


def test_folder_without_data_leaves_training_cells_unknown(amici_dir, tmp_path):
    model = read_amici_directory(amici_dir, adata=None, trust=False)
    assert model.card.training_cells is None
    assert model.card.training_data is None
    assert model.cells == {}
    model.save(tmp_path / "saved")
    assert TrainedAMICI.load(tmp_path / "saved").card == model.card


def test_data_saved_with_the_model_is_used(native, trained, tmp_path):
    native.save(str(tmp_path / "model"), save_anndata=True)
    assert (tmp_path / "model" / "adata.h5ad").is_file()
    model = read_amici_directory(tmp_path / "model", adata=None, trust=False)
    assert model.card.training_cells == trained.card.training_cells
    assert model.card.training_data.digest == trained.card.training_data.digest


def test_model_on_a_layer_and_with_radii(make_amici, adata, tmp_path):
    adata.layers["scaled"] = adata.X.copy()
    adata.X = np.ones(adata.shape, dtype=np.float32)
    adata.obs["radius"] = np.linspace(0.5, 4.0, adata.n_obs)
    native = make_amici(adata.copy(), layer="scaled", cell_radius_key="radius")
    TrainedAMICI.from_amici(native).save(tmp_path / "saved")
    model = TrainedAMICI.load(tmp_path / "saved")
    assert (model.card.layer, model.card.cell_radius_key) == ("scaled", "radius")
    expected = native.get_predictions(prog_bar=False)
    np.testing.assert_array_equal(model.bind(adata).get_predictions(prog_bar=False), expected)
    np.testing.assert_allclose(model.predict(adata), expected, atol=1e-6, rtol=0)
    del adata.layers["scaled"]
    with pytest.raises(DataError, match=r"adata.layers has no 'scaled'"):
        model.bind(adata)


# --- predictions ------------------------------------------------------------------------------------------------------


def test_bound_model_predicts_bit_for_bit_as_amici(saved, native, adata):
    bound = TrainedAMICI.load(saved).bind(adata)
    np.testing.assert_array_equal(bound.get_predictions(prog_bar=False), native.get_predictions(prog_bar=False))
    np.testing.assert_array_equal(bound.train_indices_, native.train_indices_)
    for name, frame in native.history_.items():
        np.testing.assert_allclose(np.ravel(bound.history_[name]), np.ravel(np.asarray(frame, dtype=float)))


@pytest.mark.parametrize("storage", ["dense", "csr", "csc", "float64"])
def test_predictions_do_not_depend_on_storage(saved, native, adata, storage):
    expected = native.get_predictions(prog_bar=False)
    x = np.asarray(adata.X.toarray() if sparse.issparse(adata.X) else adata.X)
    adata.X = {"dense": x, "csr": sparse.csr_matrix(x), "csc": sparse.csc_matrix(x), "float64": x.astype(np.float64)}[
        storage
    ]
    model = TrainedAMICI.load(saved)
    np.testing.assert_allclose(model.predict(adata), expected, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(model.bind(adata).get_predictions(prog_bar=False), expected)


def test_genes_are_aligned_by_name_and_cells_keep_their_order(saved, native, adata):
    expected = native.get_predictions(prog_bar=False)
    model = TrainedAMICI.load(saved)
    genes, cells = (np.random.default_rng(0).permutation(size) for size in (adata.n_vars, adata.n_obs))
    reordered = adata[cells, genes].copy()
    np.testing.assert_allclose(model.predict(reordered), expected[cells], atol=1e-6, rtol=0)
    bound = model.bind(reordered)
    assert list(bound.adata.var_names) == list(adata.var_names)
    assert list(bound.adata.obs_names) == list(reordered.obs_names)
    np.testing.assert_allclose(bound.get_predictions(prog_bar=False), expected[cells], atol=1e-6, rtol=0)
    trained_rows = set(reordered.obs_names[bound.train_indices_])
    assert trained_rows == set(adata.obs_names[adata.obs["region"] == "rest"])


def test_layer_of_the_data_can_be_named(trained, native, adata):
    adata.layers["scaled"] = adata.X.copy()
    adata.X = adata.X * 0.5
    tissue = prepare(adata, trained.card, DataSpec(layer="scaled"))
    with open_access(trained, tissue, AblationSpec(device="cpu")) as access:
        ours = access.predict(np.arange(adata.n_obs), keeps=[None])[0]
    np.testing.assert_allclose(ours, native.get_predictions(prog_bar=False), atol=1e-6, rtol=0)


def test_tissue_that_lacks_a_type_keeps_the_models_own_profiles(saved, adata):
    model = TrainedAMICI.load(saved)
    gone = model.card.cell_types[0]
    fewer = adata[adata.obs["cell_type"] != gone].copy()
    bound = model.bind(fewer)
    assert torch.equal(bound.module.ct_profiles, model.weights["ct_profiles"])
    np.testing.assert_allclose(bound.get_predictions(prog_bar=False), model.predict(fewer), atol=1e-6, rtol=0)


def test_binding_leaves_data_generators_and_scvi_alone(saved, adata):
    from scvi.dataloaders import AnnDataLoader, DataSplitter

    assert DataSplitter.data_loader_cls is AnnDataLoader
    copy, state = adata.copy(), random_state()
    model = TrainedAMICI.load(saved)
    bound = model.bind(adata)
    model.predict(adata)
    assert random_state() == state
    assert DataSplitter.data_loader_cls is AnnDataLoader
    assert bound.adata is not adata
    assert not np.shares_memory(np.asarray(bound.adata.X), np.asarray(adata.X))
    assert content_digest(adata) == content_digest(copy)
    for part in ("obs", "var", "obsm", "varm", "layers", "uns"):
        assert sorted(getattr(adata, part).keys()) == sorted(getattr(copy, part).keys())


def test_bound_model_can_train_on_without_changing_what_it_came_from(saved, adata, tmp_path, monkeypatch):
    from amici._anndataloader import SpatialAnnDataLoader
    from scvi.dataloaders import AnnDataLoader, DataSplitter

    model = TrainedAMICI.load(saved)
    bound = model.bind(adata)
    assert bound._data_splitter_cls.data_loader_cls is SpatialAnnDataLoader
    before = bound.get_predictions(prog_bar=False)
    monkeypatch.chdir(tmp_path)
    bound.module.train()
    bound.train(
        max_epochs=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    assert not np.allclose(bound.get_predictions(prog_bar=False), before)
    assert DataSplitter.data_loader_cls is AnnDataLoader
    np.testing.assert_allclose(model.predict(adata), before, atol=1e-6, rtol=0)


def test_bound_model_serves_amicis_own_interpretation(saved, native, adata):
    bound = TrainedAMICI.load(saved).bind(adata)
    label = adata.obs["cell_type"].iloc[0]
    ours = bound.get_neighbor_ablation_scores(label, 0)._ablation_scores_df
    theirs = native.get_neighbor_ablation_scores(label, 0)._ablation_scores_df
    columns = [name for name in theirs if theirs[name].dtype.kind == "f"]
    np.testing.assert_array_equal(ours[columns].to_numpy(), theirs[columns].to_numpy())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_only_a_trained_amici_itself_is_saved(make_amici, adata):
    from amici import AMICI

    class Mine(AMICI):
        pass

    namesake = type("AMICI", (AMICI,), {"__module__": "tests.model"})
    for settings, message in (
        ({"trained": False}, r"the model is not trained: only trained models are saved; call train"),
        ({"cls": Mine}, r"Mine: only amici.AMICI itself can be saved.*amici_eval.evaluate\(model"),
        ({"cls": namesake}, r"tests.model.AMICI: only amici.AMICI itself can be saved"),
    ):
        with pytest.raises(ModelFormatError, match=message):
            TrainedAMICI.from_amici(make_amici(adata.copy(), **settings))


def test_another_model_of_scvi_tools_is_refused(adata):
    from scvi.model import SCVI

    adata.X = adata.X.astype(np.float32).rint()
    SCVI.setup_anndata(adata)
    model = SCVI(adata, n_hidden=4, n_latent=2)
    model.is_trained_ = True
    with pytest.raises(ModelFormatError, match=r"SCVI: only amici.AMICI itself can be saved"):
        TrainedAMICI.from_amici(model)
    with pytest.raises(
        ModelFormatError, match=r"SCVI: it must be an amici.AMICI or what amici_eval.load_model returns"
    ):
        evaluate(model, adata)


def test_folder_of_another_model_is_refused(amici_dir, tmp_path):
    content = torch.load(amici_dir / "model.pt", weights_only=False)
    content["attr_dict"]["registry_"]["model_name"] = "SCVI"
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ModelFormatError, match=r"saved by class 'SCVI': it must have been saved by amici.AMICI"):
        read_amici_directory(tmp_path, adata=None, trust=False)


def test_data_with_other_cells_is_refused(amici_dir, native, adata):
    message = r"the data has 499 cells: the model was trained on 500; give the AnnData the model was trained on"
    with pytest.raises(DataError, match=message):
        read_amici_directory(amici_dir, adata=adata[1:].copy(), trust=False)
    with pytest.raises(DataError, match=message):
        TrainedAMICI.from_amici(native, adata=adata[1:].copy())


def test_data_with_other_expression_is_refused(amici_dir, adata):
    adata.X = adata.X[np.random.default_rng(0).permutation(adata.n_obs)]
    message = (
        r"mean expression of type '.*' differs by up to .* from the profile in the model: the model stores the mean"
    )
    with pytest.raises(DataError, match=message):
        read_amici_directory(amici_dir, adata=adata, trust=False)


def test_data_with_other_genes_or_labels_is_refused(amici_dir, adata):
    with pytest.raises(DataError, match=r"the model has 40 genes and the data lacks 1 of them"):
        read_amici_directory(amici_dir, adata=adata[:, 1:].copy(), trust=False)
    adata.obs["cell_type"] = "Unheard_Of"
    with pytest.raises(DataError, match=r"1 labels the model has not seen: 'Unheard_Of' \(500 cells\)"):
        read_amici_directory(amici_dir, adata=adata, trust=False)


@pytest.mark.parametrize("name", FILES)
def test_altered_file_is_named(saved, name):
    content = (saved / name).read_bytes()
    damages = [content[:0], content[: len(content) // 2], content[:-1]]
    if name != "manifest.json":
        damages.append(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    for damage in damages:
        (saved / name).write_bytes(damage)
        with pytest.raises(ModelFormatError, match=rf"is damaged: {name} (is not the file that was|cannot be read)"):
            TrainedAMICI.load(saved)
    (saved / name).unlink()
    with pytest.raises(ModelFormatError, match=rf"is damaged: {name} (is missing|cannot be read)"):
        TrainedAMICI.load(saved)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ('{"sha256": {}}', "the manifest lacks cells.json"),
        ('{"sums": {}}', "manifest.json cannot be read"),
        ("[]", "manifest.json cannot be read"),
        ('{"sha256": 3}', "manifest.json cannot be read"),
        ("\xff\xfe", "manifest.json cannot be read"),
    ],
)
def test_odd_manifest_is_refused(saved, manifest, message):
    (saved / "manifest.json").write_text(manifest, encoding="latin1")
    with pytest.raises(ModelFormatError, match=f"is damaged: {message}"):
        TrainedAMICI.load(saved)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file"])
def test_manifest_reads_no_file_elsewhere(saved, name):
    sums = json.loads((saved / "manifest.json").read_text())["sha256"]
    (saved / "manifest.json").write_text(json.dumps({"sha256": {name: "0" * 64, **sums}}))
    with pytest.raises(ModelFormatError, match=r"is damaged: the manifest names .*, which is no plain file name"):
        TrainedAMICI.load(saved)


def rewrite(saved, change) -> None:
    """Change model.json and sign the folder again, as another program might."""
    setup = json.loads((saved / "model.json").read_text(encoding="utf-8"))
    change(setup)
    (saved / "model.json").write_text(json.dumps(setup), encoding="utf-8")
    write_manifest(saved)


def test_later_schema_is_refused(saved):
    rewrite(saved, lambda setup: setup.update(schema_version=99))
    with pytest.raises(ModelFormatError, match=r"schema version 99: .* reads schema version 1; install the version"):
        TrainedAMICI.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda setup: setup.pop("card"),
        lambda setup: setup["card"].update(colour="red"),
        lambda setup: setup["card"].pop("n_heads"),
        lambda setup: setup["card"].update(genes=3),
        lambda setup: setup.update(history=[1]),
    ],
)
def test_set_up_with_missing_or_unknown_parts_is_refused(saved, change):
    rewrite(saved, change)
    with pytest.raises(ModelFormatError, match="is damaged: "):
        TrainedAMICI.load(saved)


def test_weights_that_are_no_safetensors_are_refused(saved):
    (saved / "weights.safetensors").write_bytes(b"no tensors here")
    write_manifest(saved)
    with pytest.raises(ModelFormatError, match=r"is damaged: .*weights.safetensors has 15 bytes and says that its"):
        TrainedAMICI.load(saved)


@pytest.mark.parametrize("change", [{"n_heads": 4}, {"n_head_size": 8}, {"depth": 3}])
def test_weights_that_do_not_fit_the_set_up_are_refused(trained, adata, change):
    odd = replace(trained, init_params={**trained.init_params, **change})
    message = r"weights and set-up disagree \(.*\): they must come from one model; register the model again"
    with pytest.raises(ModelFormatError, match=message):
        odd.build_module()
    with pytest.raises(ModelFormatError, match=message):
        odd.bind(adata)


def test_missing_weight_is_refused(trained):
    weights = {name: value for name, value in trained.weights.items() if name != "linear_head.weight"}
    with pytest.raises(ModelFormatError, match=r"weights and set-up disagree .*linear_head.weight"):
        replace(trained, weights=weights).build_module()


def test_set_up_that_json_cannot_hold_is_refused(native):
    native.init_params_ = {"kwargs": {"model_kwargs": {"activation": torch.nn.ReLU()}}}
    with pytest.raises(
        ModelFormatError, match=r"init_params_.activation holds a ReLU: set-up must consist of plain values"
    ):
        TrainedAMICI.from_amici(native)


def test_folder_without_model_is_refused(tmp_path):
    message = r"holds no model.pt: model_dir must be a folder that AMICI.save\(...\) wrote, or the path of its model.pt"
    for where in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelFormatError, match=message):
            read_amici_directory(where, adata=None, trust=False)


def test_a_model_is_found_under_any_prefix_with_its_data(native, trained, tmp_path):
    native.save(str(tmp_path), prefix="breast_", save_anndata=True, overwrite=True)
    for where in (tmp_path, tmp_path / "breast_model.pt"):
        found = read_amici_directory(where, adata=None, trust=False)
        assert found.card.training_cells == trained.card.training_cells
    native.save(str(tmp_path), prefix="other_", overwrite=True)
    with pytest.raises(ModelFormatError, match=r"several models: breast_model.pt, other_model.pt.*model_dir=.*breast_"):
        read_amici_directory(tmp_path, adata=None, trust=False)
    assert read_amici_directory(tmp_path / "other_model.pt", adata=None, trust=False).card.training_cells is None


# --- the form of the training data does not reach the model


@pytest.mark.filterwarnings("ignore:Training will be faster when sparse matrix is formatted as CSR")
@pytest.mark.parametrize(
    "form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray, np.float64, lambda x: sparse.csr_matrix(np.int64(x))]
)
def test_the_form_of_the_training_data_does_not_reach_the_model(make_amici, adata, tmp_path, form):
    x = np.expm1(adata.X.toarray()).round().astype(np.float32)
    adata.X = form(x)
    native = make_amici(adata.copy())
    native.save(str(tmp_path / "saved"))
    saved = read_amici_directory(tmp_path / "saved", adata=adata, trust=False)
    TrainedAMICI.from_amici(native).save(tmp_path / "logged")
    logged = TrainedAMICI.load(tmp_path / "logged")
    spec = EvaluationSpec(permutation=PermutationSpec(n_permutations=20, spatial_null="none", n_bootstrap=0))
    shape = native.module.ct_profiles.shape
    live = evaluate(native, adata, spec)
    assert native.module.ct_profiles.shape == shape
    for model in (saved, logged):
        assert model.weights["ct_profiles"].shape == (5, 40)
        assert model.weights["ct_profiles"].dtype == torch.float32
        np.testing.assert_allclose(evaluate(model, adata, spec).expl_var, live.expl_var, atol=1e-6)
    np.testing.assert_allclose(saved.predict(adata), native.get_predictions(prog_bar=False), atol=1e-5)


def test_a_model_of_doubled_genes_is_refused_in_the_same_words_everywhere(make_amici, adata, tmp_path):
    distinct = adata.copy()
    adata.var_names = ["A", "A", *adata.var_names[2:]]
    native = make_amici(adata)
    native.save(str(tmp_path / "saved"))
    message = r"trained with gene 'A' more than once: .*var_names_make_unique\(\) before setup_anndata, and train again"
    for doubled in (adata, distinct, None):
        with pytest.raises(ModelFormatError, match=message):
            read_amici_directory(tmp_path / "saved", adata=doubled, trust=False)
    with pytest.raises(ModelFormatError, match=message):
        TrainedAMICI.from_amici(native)
    with pytest.raises(ModelFormatError, match=message):
        evaluate(native, adata)


def test_what_cannot_be_loaded_is_not_logged(make_amici, adata):
    native = make_amici(adata)
    with torch.no_grad():
        native.module.linear_head.weight[0, 0] = float("nan")
    with pytest.raises(ModelFormatError, match=r"the live model holds no AMICI .*linear_head.weight holds values"):
        TrainedAMICI.from_amici(native)


# --- a part of the tissue


def part_of(adata):
    adata.obs["in_test"] = np.arange(adata.n_obs) % 5 == 0
    return adata[~adata.obs["in_test"]].copy()


def test_a_model_of_a_part_is_registered_with_the_whole_tissue(make_amici, adata, tmp_path):
    part = part_of(adata)
    native = make_amici(part)
    native.save(str(tmp_path), overwrite=True)
    with pytest.raises(DataError) as caught:
        read_amici_directory(tmp_path, adata=adata, trust=False)
    assert caught.value.value == "the data has 500 cells"
    assert "register.trained_on.key=in_test register.trained_on.value=False" in caught.value.fix
    training = TrainedOnSpec(key="in_test", value="false")
    with pytest.raises(DataError, match="of which trained_on chooses 100: the model was trained on 400"):
        read_amici_directory(tmp_path, adata=adata, trust=False, trained_on=replace(training, value="true"))
    found = read_amici_directory(tmp_path, adata=adata, trust=False, trained_on=training)
    assert found.card.training_cells == frozenset(part.obs_names[native.train_indices_])
    assert found.cells == read_amici_directory(tmp_path, adata=part, trust=False).cells


def test_rows_of_another_anndata_name_no_cells(make_amici, adata, tmp_path, caplog):
    import amici

    part = part_of(adata)
    native = make_amici(part)
    native.save(str(tmp_path), overwrite=True)
    with data_loader_restored():
        model = amici.AMICI.load(str(tmp_path), adata=adata)
    test = PermutationSpec(n_permutations=20, spatial_null="none", n_bootstrap=0)
    unknown = evaluate(model, adata, EvaluationSpec(permutation=test))
    assert set(unknown.held_out) == {None}
    assert any("bound to other cells" in note and "trained_on" in note for note in unknown.notes)
    with pytest.raises(DataError, match=r"data\.trained_on\.key"):
        evaluate(model, adata, EvaluationSpec(permutation=test, data=DataSpec(subset=SubsetSpec(held_out=True))))
    assert TrainedAMICI.from_amici(model).card.training_cells is None
    assert "training_adata" in caplog.text
    # said, it is known from the split of the part
    training = TrainedOnSpec(key="in_test", value="false")
    fitted = part.obs_names[native.train_indices_]
    spec = DataSpec(trained_on=training, subset=SubsetSpec(held_out=True))
    assert evaluate(model, adata, EvaluationSpec(permutation=test, data=spec)).n_cells.sum() == 500 - len(fitted)
    for logged in (TrainedAMICI.from_amici(model, trained_on=training), TrainedAMICI.from_amici(model, adata=part)):
        assert logged.card.training_cells == frozenset(fitted)


def test_prediction_needs_no_names(trained, adata):
    expected = trained.predict(adata)
    other = adata.copy()
    # names and places of training, none of its cells
    other.X = other.X[::-1]
    other.obsm["spatial"] = other.obsm["spatial"][::-1] + 1.0
    other.obs["cell_type"] = other.obs["cell_type"].to_numpy()[::-1]
    np.testing.assert_allclose(trained.predict(other)[::-1], expected, atol=1e-4)
    bound = trained.bind(other)
    renamed = adata[::-1].copy()
    np.testing.assert_array_equal(
        np.sort(bound.train_indices_), np.flatnonzero(renamed.obs_names.isin(trained.card.training_cells))
    )


def test_a_model_bound_to_all_and_saved_again_does_not_take_other_rows(make_amici, adata, tmp_path):
    import amici

    part = part_of(adata)
    make_amici(part).save(str(tmp_path / "part"))
    with data_loader_restored():
        amici.AMICI.load(str(tmp_path / "part"), adata=adata.copy()).save(str(tmp_path / "all"))
    with pytest.raises(DataError, match=r"differs by up to .*register\.trained_on\.key=in_test"):
        read_amici_directory(tmp_path / "all", adata=adata, trust=False)
    training = TrainedOnSpec(key="in_test", value="false")
    found = read_amici_directory(tmp_path / "all", adata=adata, trust=False, trained_on=training)
    assert found.card.training_cells == frozenset(part.obs_names[::2])
