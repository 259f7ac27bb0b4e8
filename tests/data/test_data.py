from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from amici_eval.common.errors import DataError
from amici_eval.common.model_card import TrainingData
from amici_eval.data import matrices as module
from amici_eval.data.checks import labels_of
from amici_eval.data.files import content_digest, open_anndata
from amici_eval.data.membership import describe_training_data, digest_of_places
from amici_eval.data.tissue import check_sections, keep_away_from_training, prepare
from amici_eval.evaluation.pipeline import evaluate
from amici_eval.model.checkpoint import read_amici_directory
from amici_eval.model.engines.opening import open_access
from amici_eval.settings.evaluation import AblationSpec, DataSpec, EvaluationSpec, PermutationSpec, SubsetSpec
from tests.fakes import make_card

LABELS = ("CD8+_T_Cells", "Microglia/PVM", "Stromal_&_T_Cell_Hybrid", "β cell")
CARD = make_card()


def make_adata(n_cells=40, *, genes=CARD.genes, spacing=10.0, seed=0):
    """A tissue that fits ``CARD``: log values, cells about ``spacing`` apart, ten cells of each type."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(3.0, size=(n_cells, len(genes))).astype(np.float32)
    grid = np.stack(np.divmod(np.arange(n_cells), 8), axis=1) + rng.uniform(-0.2, 0.2, size=(n_cells, 2))
    return ad.AnnData(
        X=np.log1p(counts),
        obs=pd.DataFrame(
            {
                "cell_type": pd.Categorical([LABELS[i % 4] for i in range(n_cells)]),
                "region": pd.Categorical(["left" if i < 15 else "rest" for i in range(n_cells)]),
                "slide": [i * 2 // n_cells for i in range(n_cells)],
                "radius": np.linspace(3, 5, n_cells),
                "kept": [i % 3 == 0 for i in range(n_cells)],
            },
            index=[f"cell{i:03d}" for i in rng.permutation(n_cells)],
        ),
        var=pd.DataFrame(index=list(genes)),
        layers={"counts": counts},
        obsm={"spatial": grid * spacing},
        uns={"note": "kept"},
    )


@pytest.fixture
def adata():
    return make_adata()


def refusal(call, *args, **kwargs):
    with pytest.raises(DataError) as caught:
        call(*args, **kwargs)
    return caught.value.value, caught.value.rule, caught.value.fix


def prepared(adata, *, card=CARD, **settings):
    return prepare(adata, card, DataSpec(**settings))


def refused(adata, *, card=CARD, **settings):
    return refusal(prepare, adata, card, DataSpec(**settings))


# --- reading files


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "none.h5ad"
    assert refusal(open_anndata, path) == (
        f"{path} does not exist",
        "data must be a readable AnnData",
        "correct the path",
    )


@pytest.mark.parametrize(("name", "ending"), [("a.csv", ".csv"), ("a.h5", ".h5"), ("a", "no suffix")])
def test_a_file_of_another_kind_is_refused(tmp_path, name, ending):
    path = tmp_path / name
    path.write_text("gene,cell\n1,2\n")
    assert refusal(open_anndata, path) == (
        f"{path} ends in {ending}",
        "data must be an AnnData written as .h5ad or .zarr",
        "write it with adata.write_h5ad(...)",
    )


def damage(path, adata, how):
    adata.write_h5ad(path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "random": np.random.default_rng(0).bytes(5000),
            "truncated": whole[: len(whole) // 2],
            "cut at the end": whole[:-100],
            "empty": b"",
            "csv": b"gene,cell\n1,2\n",
        }[how]
    )


CUT = ("it ends before its content does", "copy or download it again")
NO_HDF5 = ("it is not an HDF5 file", "write it with adata.write_h5ad(...)")


@pytest.mark.parametrize(
    ("how", "cause"),
    [("random", NO_HDF5), ("truncated", CUT), ("cut at the end", CUT), ("empty", NO_HDF5), ("csv", NO_HDF5)],
)
def test_a_damaged_file_is_refused(adata, tmp_path, how, cause):
    path = tmp_path / "a.h5ad"
    damage(path, adata, how)
    for backed in (None, True):
        value, rule, fix = refusal(open_anndata, path, backed=backed)
        assert value.startswith(f"{path} cannot be read (")
        assert (rule, fix) == cause


def test_a_folder_that_is_no_zarr_is_refused(tmp_path):
    (tmp_path / "a.zarr").mkdir()
    value, _, fix = refusal(open_anndata, tmp_path / "a.zarr")
    assert value.startswith(f"{tmp_path / 'a.zarr'} cannot be read (")
    assert fix.startswith("write it again")


@pytest.mark.parametrize(("cells", "genes"), [(0, 6), (40, 0)])
def test_an_empty_anndata_is_refused(adata, tmp_path, cells, genes):
    empty = adata[:cells, :genes].copy()
    expected = (
        f"the AnnData is empty ({cells} cells x {genes} genes)",
        "at least one cell and one gene are needed",
        "check how it was filtered",
    )
    assert refused(empty) == expected
    empty.write_h5ad(tmp_path / "a.h5ad")
    named = expected[0].replace("AnnData", f"AnnData in {tmp_path / 'a.h5ad'}")
    assert refusal(open_anndata, tmp_path / "a.h5ad") == (named, *expected[1:])


# --- what an AnnData may not be


def put(values, at, value):
    values[at] = value


def with_column(name, at, value, dtype=object):
    """Return a change of some values in a column of obs."""

    def change(adata):
        column = adata.obs[name].astype(object)
        column.iloc[at] = value
        adata.obs[name] = column.astype(dtype)

    return change


ANNDATA = "data must be an AnnData; read the file with anndata.read_h5ad(...) or give its path as data.uri"
EVERY_GENE = (
    "every gene of the model must be among var_names; "
    "take the AnnData before gene filtering, or train on the genes you have"
)
LABELS_RULE = "it must hold the cell types (data.labels_key names another column); there are"
LAYER_FIX = "name the right layer as data.layer, or data.layer=X for adata.X"
NAME_COORDINATES = "name the right entry as data.coord_obsm_key"
FILL = "fill the values or drop these cells before training"
RADII = {"card": make_card(cell_radius_key="radius")}
COLUMNS = "cell_type, region, slide, radius, kept"
NO_COORDINATES = {
    "<U4": lambda names: np.full((40, 2), "left"),
    "object": lambda names: np.full((40, 2), "left", dtype=object),
    "DataFrame": lambda names: pd.DataFrame({"x": ["a"] * 40, "y": [1.0] * 40}, index=names),
    "float64": lambda names: sparse.csr_matrix(np.ones((40, 2))),
}

# a change of the AnnData (or what is given in its place), settings, and what is said: value, rule and fix
REFUSED = [
    (lambda a: ["none"], {}, f"data is a list: {ANNDATA}"),
    (lambda a: a.X, {}, f"data is a ndarray: {ANNDATA}"),
    (
        lambda a: setattr(a, "obs_names", ["twice", "twice", *a.obs_names[2:]]),
        {},
        "cell name 'twice' occurs more than once: obs_names must be unique: the order of permutations and training "
        "membership go by name; call adata.obs_names_make_unique()",
    ),
    (
        lambda a: setattr(a, "var_names", ["g0", "g1", "g2", "g3", "g4", "g1"]),
        {},
        "gene 'g1' occurs more than once: genes are matched by name, so var_names must be unique; call "
        "adata.var_names_make_unique() or drop one of them",
    ),
    *(
        (
            lambda a, kept=kept: a[:, kept].copy(),
            {},
            f"the model has 6 genes and the data lacks {lacking}: {EVERY_GENE}",
        )
        for kept, lacking in (
            (["g0", "g2", "g3", "g4", "g5"], "1 of them (g1)"),
            (["g5", "g1"], "4 of them (g0, g2, g3, ...)"),
        )
    ),
    (
        None,
        {"labels_key": "celltype"},
        f"adata.obs has no column 'celltype': {LABELS_RULE} {COLUMNS}; name the right column",
    ),
    (
        lambda a: ad.AnnData(X=a.X, var=a.var, obs=pd.DataFrame(index=a.obs_names)),
        {},
        f"adata.obs has no column 'cell_type': {LABELS_RULE} no columns; name the right column",
    ),
    *(
        (
            with_column("cell_type", [3, 17], np.nan, dtype),
            {},
            "adata.obs['cell_type'] is missing in 2 of 40 cells: every cell needs a value for the cell types "
            f"(data.labels_key names another column); {FILL}",
        )
        for dtype in ("category", object)
    ),
    (
        with_column("cell_type", slice(0, 7), ["new", "new", "α", "new", "δ", "ε", "new"]),
        {},
        "adata.obs['cell_type'] has 4 labels the model has not seen: 'new' (4 cells), 'α' (1 cells), 'δ' (1 cells): "
        f"the model knows {', '.join(LABELS)}; rename the labels to the model's, or drop these cells",
    ),
    (
        lambda a: put(a.obsm, "X_pca", np.ones((40, 3))),
        {"coord_obsm_key": "xy"},
        f"adata.obsm has no 'xy': it must hold the coordinates; there are spatial, X_pca; {NAME_COORDINATES}",
    ),
    (
        lambda a: a.obsm.clear(),
        {},
        f"adata.obsm has no 'spatial': it must hold the coordinates; there are no entries; {NAME_COORDINATES}",
    ),
    *(
        (
            lambda a, bad=bad: put(a.obsm["spatial"], ([6, 22], [1, 0]), bad),
            {},
            "adata.obsm['spatial'] is not finite for 2 of 40 cells (first: {cell 6}): every cell needs finite "
            "coordinates; drop these cells before training and evaluation",
        )
        for bad in (np.nan, np.inf, -np.inf)
    ),
    (
        lambda a: put(a.obsm, "spatial", a.obsm["spatial"][:, :1]),
        {},
        "adata.obsm['spatial'] has shape (40, 1): coordinates must have at least two columns; store x and y",
    ),
    *(
        (
            lambda a, made=made: put(a.obsm, "spatial", made(a.obs_names)),
            {},
            f"adata.obsm['spatial'] holds {shown}: coordinates must be numbers; convert them to float",
        )
        for shown, made in NO_COORDINATES.items()
    ),
    *(
        (
            with_column("radius", 6, bad, dtype),
            RADII,
            f"adata.obs['radius'] is {bad!r} in cell {{cell 6}}: cell radii must be finite numbers; correct the column",
        )
        for bad in ("wide", np.inf)
        for dtype in ("category", object)
    ),
    (
        with_column("radius", slice(0, 3), np.nan, float),
        RADII,
        f"adata.obs['radius'] is missing in 3 of 40 cells: every cell needs a value for the cell radii; {FILL}",
    ),
    *(
        (
            change,
            settings,
            f"adata.layers has no 'lognorm': it must hold the expression; there are {there}; {LAYER_FIX}",
        )
        for change, settings, there in (
            (None, {"layer": "lognorm"}, "counts"),
            (None, {"card": make_card(layer="lognorm")}, "counts"),
            (lambda a: a.layers.clear(), {"layer": "lognorm"}, "no layers"),
        )
    ),
    (
        None,
        {"subset": SubsetSpec(key="region", value="right")},
        "no cell has region = 'right': its values are left, rest; choose one of these",
    ),
    (
        None,
        {"subset": SubsetSpec(key="area", value="left")},
        f"adata.obs has no column 'area': it must hold the subset (data.subset.key); there are {COLUMNS}; "
        "name the right column",
    ),
    (
        None,
        {"sample_key": "batch"},
        f"adata.obs has no column 'batch': it must hold the samples; there are {COLUMNS}; name the right column",
    ),
    (
        None,
        {"subset": SubsetSpec(indices=(3, 40))},
        "data.subset.indices names row 40: the data has rows 0 to 39; give row numbers of this AnnData",
    ),
]


@pytest.mark.filterwarnings("ignore")  # AnnData warns of names that occur twice, too
@pytest.mark.parametrize(("change", "settings", "said"), REFUSED)
def test_what_cannot_be_evaluated_is_refused(adata, change, settings, said):
    given = None if change is None else change(adata)
    expected = said.replace("{cell 6}", adata.obs_names[6])
    with pytest.raises(DataError) as caught:
        prepared(adata if given is None else given, **settings)
    assert str(caught.value) == expected


def test_of_many_values_of_a_column_some_are_named(adata):
    value, rule, _ = refused(adata, subset=SubsetSpec(key="radius", value="left"))
    assert value == "no cell has radius = 'left'"
    assert rule.count(", ") == 8
    assert rule.endswith(", ...")


# --- a tissue that fits


def test_a_tissue_that_fits_is_seen_as_it_is(adata):
    tissue = prepared(adata)
    assert tissue.notes == ()
    assert tissue.n_cells == 40
    assert tissue.gene_columns is None
    assert tissue.evaluated.all()
    assert tissue.radii is None
    assert tissue.samples is None
    assert tissue.matrix is adata.X
    np.testing.assert_array_equal(tissue.cell_names, adata.obs_names)
    np.testing.assert_array_equal(tissue.labels, adata.obs["cell_type"].astype(str))
    np.testing.assert_array_equal(np.array(CARD.cell_types)[tissue.label_codes], tissue.labels)
    np.testing.assert_array_equal(tissue.coordinates, adata.obsm["spatial"])
    rows = np.array([7, 3, 3])
    np.testing.assert_array_equal(tissue.expression(rows), adata.X[rows])
    assert tissue.expression(rows).dtype == np.float32


def test_awkward_labels_are_labels(adata):
    receivers = prepared(adata).receivers()
    assert tuple(receivers) == LABELS
    for label, rows in receivers.items():
        assert (adata.obs["cell_type"].iloc[rows] == label).all()
        assert len(rows) == 10


def test_label_codes_follow_the_model_and_not_the_data(adata):
    card = make_card(cell_types=("never seen here", *LABELS[::-1]))
    codes = prepared(adata, card=card).label_codes
    np.testing.assert_array_equal(np.array(card.cell_types)[codes], adata.obs["cell_type"].astype(str))
    assert codes.dtype == np.int64
    assert set(codes) == {1, 2, 3, 4}


def test_receivers_are_in_the_order_of_their_names(adata):
    tissue = prepared(adata)
    for rows in tissue.receivers().values():
        names = tissue.cell_names[rows].tolist()
        assert names == sorted(names)
    shuffled = adata[np.random.default_rng(1).permutation(40)].copy()
    other = prepared(shuffled)
    for label, rows in tissue.receivers().items():
        assert tissue.cell_names[rows].tolist() == other.cell_names[other.receivers()[label]].tolist()


def test_receivers_belong_to_who_asks_for_them(adata):
    tissue = prepared(adata)
    first = tissue.receivers()
    expected = {label: rows.copy() for label, rows in first.items()}
    first.pop(LABELS[0])[:] = 0
    first[LABELS[1]][:] = 0
    again = tissue.receivers()
    assert tuple(again) == LABELS
    for label, rows in expected.items():
        np.testing.assert_array_equal(again[label], rows)


def test_expression_is_walked_in_the_order_of_the_file(adata):
    tissue = prepared(adata)
    rows = tissue.receivers()[LABELS[2]][[4, 0, 4, 9, 2]]
    blocks = list(tissue.expression_blocks(rows, max_rows=2))
    assert [len(block.positions) for block in blocks] == [2, 2, 1]
    positions = np.concatenate([block.positions for block in blocks])
    assert rows[positions].tolist() == sorted(rows)
    for block in blocks:
        np.testing.assert_array_equal(block.values, adata.X[rows[block.positions]])
        block.values[:] = -1.0
    assert adata.X.min() == 0.0
    assert list(tissue.expression_blocks(np.array([], dtype=np.int64))) == []


@pytest.mark.parametrize("layer", [None, "counts"])
def test_values_are_whole_numbers_by_the_model_s_genes_alone(layer):
    wide = make_adata(genes=("extra", *CARD.genes))
    wide.layers["counts"][3, 0] = 0.5
    facts = describe_training_data(make_adata(), coord_obsm_key="spatial", layer=layer)
    assert facts.integer_valued == (layer == "counts")
    card = make_card(training_data=facts)
    for storage in (np.asarray, sparse.csr_matrix):
        wide.layers["counts"] = storage(wide.layers["counts"])
        notes = prepared(wide, card=card, layer="counts" if layer else "X").notes
        assert notes == ("1 of 7 genes of the data are not in the model and ignored",)
    counts = make_adata()
    counts.layers["counts"] = counts.layers["counts"].astype(np.int32)
    assert describe_training_data(counts, coord_obsm_key="spatial", layer="counts").integer_valued
    assert prepared(counts, card=card, layer="counts").notes == (
        () if layer else (prepared(make_adata(), card=card, layer="counts").notes)
    )


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array])
def test_sparse_expression_is_the_same_expression(adata, kind):
    dense = prepared(adata).expression(np.arange(40))
    adata.X = kind(adata.X)
    np.testing.assert_array_equal(prepared(adata).expression(np.arange(40)), dense)


def test_layers_are_chosen(adata):
    rows = np.arange(5)
    by_card = make_card(layer="counts")
    counts = adata.layers["counts"][rows]
    np.testing.assert_array_equal(prepared(adata, layer="counts").expression(rows), counts)
    np.testing.assert_array_equal(prepared(adata, card=by_card).expression(rows), counts)
    np.testing.assert_array_equal(prepared(adata, card=by_card, layer="X").expression(rows), adata.X[rows])


def test_the_user_names_other_columns_than_the_model(adata):
    adata.obs["other"] = adata.obs["cell_type"].to_numpy()[::-1]
    adata.obsm["elsewhere"] = adata.obsm["spatial"] + 5
    tissue = prepared(adata, labels_key="other", coord_obsm_key="elsewhere", sample_key="slide")
    np.testing.assert_array_equal(tissue.labels, adata.obs["other"].astype(str))
    np.testing.assert_array_equal(tissue.coordinates, adata.obsm["spatial"] + 5)
    np.testing.assert_array_equal(tissue.samples, adata.obs["slide"].astype(str))


def test_radii_are_taken_if_the_model_uses_them(adata):
    tissue = prepared(adata, card=make_card(cell_radius_key="radius"))
    np.testing.assert_array_equal(tissue.radii, adata.obs["radius"])


def test_coordinates_may_be_a_frame_or_have_three_columns(adata):
    expected = adata.obsm["spatial"].copy()
    adata.obsm["spatial"] = pd.DataFrame(expected, index=adata.obs_names, columns=["x", "y"])
    np.testing.assert_array_equal(prepared(adata).coordinates, expected)
    adata.obsm["spatial"] = np.column_stack([expected, np.arange(40)])
    assert prepared(adata).coordinates.shape == (40, 3)


# --- names


def test_genes_in_another_order_are_aligned_by_name(adata):
    rows = np.array([5, 0, 39])
    moved = prepared(adata[:, ["g3", "g0", "g5", "g1", "g2", "g4"]].copy())
    np.testing.assert_array_equal(moved.expression(rows), adata.X[rows])
    assert moved.notes == ("genes of the data are in another order than the model's; aligned by name",)


@pytest.mark.parametrize("storage", [np.asarray, sparse.csr_matrix])
def test_further_genes_are_ignored_with_a_note(storage):
    wide = make_adata(genes=("g0", "extra", "g1", "g2", "g3", "more", "g4", "g5"))
    rows = np.array([5, 0, 39])
    expected = wide.X[rows][:, [0, 2, 3, 4, 6, 7]]
    wide.X = storage(wide.X)
    tissue = prepared(wide)
    np.testing.assert_array_equal(tissue.expression(rows), expected)
    assert tissue.notes == ("2 of 8 genes of the data are not in the model and ignored",)
    both = prepared(wide[:, ["g5", "g4", "more", "g3", "g2", "g1", "extra", "g0"]].copy())
    np.testing.assert_array_equal(both.expression(rows), expected)
    assert [note.split()[0] for note in both.notes] == ["2", "genes"]


def test_notes_are_logged(adata, caplog):
    with caplog.at_level(logging.WARNING, logger="amici_eval"):
        notes = prepared(adata[:, list(adata.var_names[::-1])].copy()).notes
    assert [record.getMessage() for record in caplog.records] == list(notes)
    assert len(notes) == 1


# --- labels


def test_a_category_without_cells_is_no_unseen_label(adata):
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.add_categories(["never used"])
    assert tuple(prepared(adata).receivers()) == LABELS


def test_too_few_cells_of_other_types_are_refused(adata):
    few = adata[(adata.obs["cell_type"] == "β cell").to_numpy() | (np.arange(40) < 5)].copy()
    # rows 0 to 4 hold one cell of each other type and a second one of the first
    assert few.obs["cell_type"].value_counts()["β cell"] == 10
    card = make_card(n_neighbors=5)
    assert refused(few, card=card) == (
        "cells of type 'β cell' have 4 cells of other types around them",
        "the model attends to 5 neighbours, all of other types",
        "evaluate on the whole tissue and choose receivers with data.subset, which keeps all as neighbours",
    )
    assert prepared(few, card=make_card(n_neighbors=4)).n_cells == 14


# --- expression


@pytest.mark.parametrize("storage", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_expression_that_is_not_finite_names_gene_and_cell(adata, storage, bad, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ROWS", 7)
    adata.X[23, 4] = bad
    adata.X = storage(adata.X)
    expected = (
        f"expression of g4 in cell {adata.obs_names[23]} is {bad}",
        "expression must be finite",
        "drop or impute such values as it was done for training",
    )
    assert refused(adata) == expected
    assert refused(adata[:, ["g3", "g0", "g4", "g1", "g2", "g5"]].copy()) == expected


def test_genes_the_model_does_not_know_may_be_anything():
    wide = make_adata(genes=("extra", *CARD.genes))
    wide.X[3, 0] = np.nan
    assert prepared(wide).n_cells == 40


def test_an_anndata_without_x_is_refused(adata):
    adata.X = None
    assert refused(adata) == ("adata.X is empty", "it must hold the expression", "name the layer as data.layer")
    assert prepared(adata, layer="counts").n_cells == 40


# --- compared with the training tissue


def trained_on(adata, **changes):
    facts = describe_training_data(adata, coord_obsm_key="spatial", layer=None)
    return make_card(training_data=dataclasses.replace(facts, **changes))


def test_facts_of_the_training_tissue(adata):
    facts = describe_training_data(adata, coord_obsm_key="spatial", layer=None)
    xy = adata.obsm["spatial"]
    apart = np.sqrt(((xy[:, None] - xy) ** 2).sum(axis=2))
    np.fill_diagonal(apart, np.inf)
    assert facts == TrainingData(
        n_cells=40,
        digest=content_digest(adata),
        places=digest_of_places(xy),
        nn_distance=pytest.approx(np.median(apart.min(axis=1)), rel=1e-12),
        integer_valued=False,
    )
    assert describe_training_data(adata, coord_obsm_key="spatial", layer="counts").integer_valued


def test_the_training_tissue_itself_needs_no_note(adata):
    assert prepared(adata, card=trained_on(adata)).notes == ()


def test_counts_for_a_model_of_log_values_get_a_note(adata):
    (note,) = prepared(adata, card=trained_on(adata), layer="counts").notes
    assert note.startswith("expression looks like counts, but the model was trained on transformed values")
    assert note.endswith("name the right layer as data.layer")
    (note,) = prepared(adata, card=trained_on(adata, integer_valued=True)).notes
    assert note.startswith("expression looks like transformed values, but the model was trained on counts")


@pytest.mark.parametrize(("factor", "shown"), [(10.0, "10 times"), (0.1, "0.1 times")])
def test_coordinates_in_another_unit_get_a_note(adata, factor, shown):
    card = trained_on(adata)
    adata.obsm["spatial"] = adata.obsm["spatial"] * factor
    (note,) = prepared(adata, card=card).notes
    trained = card.training_data.nn_distance
    assert f"cells lie {factor * trained:.4g} apart" in note
    assert f"{shown} the {trained:.4g} of the training tissue: the unit of adata.obsm differs" in note


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_tissue_of_another_density_gets_no_note(adata, factor):
    card = trained_on(adata)
    adata.obsm["spatial"] = adata.obsm["spatial"] * factor
    assert prepared(adata, card=card).notes == ()


def test_cells_on_one_spot_do_not_break_the_comparison(adata):
    card = trained_on(adata)
    adata.obsm["spatial"] = np.zeros((40, 2))
    (note,) = prepared(adata, card=card).notes
    assert note.startswith("40 of 40 cells share a position")


@pytest.mark.parametrize("factor", [0.05, 7.0])
def test_coordinates_that_are_odd_on_their_own_get_a_note(adata, factor):
    card = trained_on(adata)
    distance = card.training_data.nn_distance * factor
    adata.obsm["spatial"] = adata.obsm["spatial"] * factor
    (note,) = prepared(adata).notes
    assert note == (
        f"cells lie {distance:.4g} apart (median distance to the nearest cell), which is unusual in micrometres: "
        "AMICI's distance kernel works on raw values; the same tissue in pixels instead of micrometres trains 7 to 14 "
        "times slower and learns nothing, so check the unit in which the model was trained"
    )
    # where the tissue of training is known, that comparison says all
    (note,) = prepared(adata, card=card).notes
    assert "of the training tissue: the unit of adata.obsm differs" in note
    assert prepared(adata, card=trained_on(adata)).notes == ()


@pytest.mark.parametrize("factor", [0.2, 1.0, 4.0])
def test_coordinates_that_may_be_micrometres_get_no_note(adata, factor):
    adata.obsm["spatial"] = adata.obsm["spatial"] * factor
    assert prepared(adata).notes == ()


# --- which cells are evaluated


def test_a_subset_by_column(adata):
    tissue = prepared(adata, subset=SubsetSpec(key="region", value="left"))
    np.testing.assert_array_equal(tissue.evaluated, np.arange(40) < 15)
    assert tissue.n_cells == 40
    assert sum(map(len, tissue.receivers().values())) == 15
    assert all((rows < 15).all() for rows in tissue.receivers().values())
    assert tissue.notes == ("15 of 40 cells evaluated; all cells serve as neighbours",)


@pytest.mark.parametrize(("key", "value", "size"), [("slide", "1", 20), ("kept", "True", 14)])
def test_a_subset_by_numbers_or_truth_values_is_written_as_text(adata, key, value, size):
    tissue = prepared(adata, subset=SubsetSpec(key=key, value=value))
    assert tissue.evaluated.sum() == size
    np.testing.assert_array_equal(tissue.evaluated, adata.obs[key].astype(str) == value)


@pytest.mark.parametrize("kind", ["int64", "float32", "Int64", "object", "category", "str"])
def test_whole_numbers_of_a_column_equal_their_integers(adata, kind):
    number = np.arange(adata.n_obs) % 3
    column = pd.Series(number.astype(float) if kind in ("float32", "category") else number, index=adata.obs_names)
    adata.obs["cluster"] = column.astype(kind)
    for value in ("1", "1.0", 1, 1.0):
        tissue = prepared(adata, subset=SubsetSpec(key="cluster", value=value))
        np.testing.assert_array_equal(tissue.evaluated, number == 1)
    assert refused(adata, subset=SubsetSpec(key="cluster", value="0_1"))[0] == "no cell has cluster = '0_1'"


def test_a_truth_value_is_found_in_any_case(adata):
    for column in (adata.obs["kept"], adata.obs["kept"].astype(str), adata.obs["kept"].astype(str).str.lower()):
        adata.obs["chosen"] = column
        for value in ("true", "True", True):
            tissue = prepared(adata, subset=SubsetSpec(key="chosen", value=value))
            np.testing.assert_array_equal(tissue.evaluated, adata.obs["kept"].to_numpy())


def test_a_value_that_two_others_equal_is_refused(adata):
    adata.obs["cluster"] = ["1", "1.0"] * (adata.n_obs // 2)
    assert prepared(adata, subset=SubsetSpec(key="cluster", value="1")).evaluated.sum() == adata.n_obs // 2
    value, rule, _ = refused(adata, subset=SubsetSpec(key="cluster", value="1.00"))
    assert (value, rule) == ("it is not clear which cell has cluster = '1.00'", "its values are 1, 1.0")


@pytest.mark.parametrize("kind", ["int64", "float64", "str", "category"])
@pytest.mark.parametrize("ending", ["", ".0"])
def test_numeric_labels_are_those_of_training_whatever_their_kind(adata, kind, ending):
    codes = adata.obs["cell_type"].cat.codes.astype("int64")
    known = tuple(f"{code}{ending}" for code in sorted(codes.unique()))
    adata.obs["cell_type"] = codes.astype(kind)
    found = labels_of(adata, SimpleNamespace(cell_types=known), "cell_type")
    assert found.tolist() == [f"{code}{ending}" for code in codes]


def test_a_subset_by_index(adata):
    tissue = prepared(adata, subset=SubsetSpec(indices=(39, 0, 4)))
    assert np.flatnonzero(tissue.evaluated).tolist() == [0, 4, 39]
    assert tuple(tissue.receivers()) == ("CD8+_T_Cells", "β cell")


# --- held-out cells and the buffer


def fitted_on(adata, rows, **facts):
    return make_card(training_cells=frozenset(adata.obs_names[rows]), **facts)


def test_held_out_cells_are_those_that_the_model_was_not_fitted_on(adata):
    # rows 30 on; every fourth of them is of one type
    card = fitted_on(adata, np.arange(30))
    fresh = prepared(adata, card=card, subset=SubsetSpec(held_out=True))
    seen = prepared(adata, card=card, subset=SubsetSpec(held_out=False))
    assert prepared(adata, card=card).evaluated.all()
    assert np.flatnonzero(fresh.evaluated).tolist() == list(range(30, 40))
    np.testing.assert_array_equal(seen.evaluated, ~fresh.evaluated)
    assert fresh.n_cells == seen.n_cells == 40
    assert fresh.notes == (
        "data.subset.held_out=true keeps 10 of 40 chosen cells, of 4 of 4 cell types: the model was not fitted on them",
        "10 of 40 cells evaluated; all cells serve as neighbours",
    )
    assert seen.notes == (
        "data.subset.held_out=false keeps 30 of 40 chosen cells, of 4 of 4 cell types: the model was fitted on them",
        "30 of 40 cells evaluated; all cells serve as neighbours",
    )


@pytest.mark.parametrize("chosen", [{"key": "region", "value": "left"}, {"indices": tuple(range(15))}])
def test_held_out_cells_are_taken_of_the_chosen_ones(adata, chosen):
    card = fitted_on(adata, np.arange(2, 40))
    tissue = prepared(adata, card=card, subset=SubsetSpec(**chosen, held_out=True))
    assert np.flatnonzero(tissue.evaluated).tolist() == [0, 1]
    # a type without held-out cells is not there
    assert {label: rows.tolist() for label, rows in tissue.receivers().items()} == {LABELS[0]: [0], LABELS[1]: [1]}
    assert tissue.notes[0].startswith("data.subset.held_out=true keeps 2 of 15 chosen cells, of 2 of 4 cell types")
    other = prepared(adata, card=card, subset=SubsetSpec(**chosen, held_out=False))
    assert np.flatnonzero(other.evaluated).tolist() == list(range(2, 15))


def test_held_out_cells_keep_their_canonical_order(adata):
    card = fitted_on(adata, np.arange(0, 40, 3))
    everyone = prepared(adata, card=card).receivers()
    held_out = prepared(adata, card=card, subset=SubsetSpec(held_out=True)).receivers()
    for label, rows in everyone.items():
        np.testing.assert_array_equal(held_out[label], rows[rows % 3 != 0])
    order = np.random.default_rng(2).permutation(40)
    shuffled = prepared(adata[order].copy(), card=card, subset=SubsetSpec(held_out=True)).receivers()
    for label, rows in held_out.items():
        np.testing.assert_array_equal(order[shuffled[label]], rows)


def test_all_cells_of_another_tissue_are_held_out(adata):
    card = make_card(training_cells=frozenset({"a cell of another tissue"}))
    tissue = prepared(adata, card=card, subset=SubsetSpec(held_out=True))
    assert tissue.evaluated.all()
    assert tissue.notes == (
        "data.subset.held_out=true keeps 40 of 40 chosen cells, of 4 of 4 cell types: the model was not fitted on "
        "them; none of the cells that it was fitted on is in the data",
    )
    value, rule, fix = refused(adata, card=card, subset=SubsetSpec(held_out=False))
    assert value == "data.subset.held_out=false leaves none of 40 chosen cells"
    assert rule.endswith("of the 40 cells of the data it was fitted on 0")
    assert fix == "leave data.subset.held_out out"


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"held_out": True}, "data.subset.held_out=true"),
        ({"held_out": False}, "data.subset.held_out=false"),
        ({"buffer": True}, "data.subset.buffer=true"),
        ({"held_out": True, "buffer": True}, "data.subset.held_out=true and data.subset.buffer=true"),
    ],
)
def test_training_cells_must_be_known_to_leave_them_out(adata, settings, value):
    rule = "it must be known which cells the model was fitted on, and the model does not tell"
    found, why, fix = refused(adata, subset=SubsetSpec(**settings))
    assert (found, why) == (value, rule)
    assert "data.trained_on.key=COLUMN" in fix


@pytest.mark.parametrize(
    ("held_out", "fitted", "how", "n_fitted", "fix"),
    [
        (True, slice(0, 40), "all", 40, "leave data.subset.held_out out"),
        (True, slice(0, 20), "all", 20, "choose other cells, or leave data.subset.held_out out"),
        (False, slice(20, 40), "none", 20, "choose other cells, or leave data.subset.held_out out"),
    ],
)
def test_a_split_that_leaves_no_cell_is_refused_with_the_counts(adata, held_out, fitted, how, n_fitted, fix):
    subset = SubsetSpec(key="region", value="left", held_out=held_out)
    assert refused(adata, card=fitted_on(adata, fitted), subset=subset) == (
        f"data.subset.held_out={str(held_out).lower()} leaves none of 15 chosen cells",
        f"the model was fitted on {how} of them; of the 40 cells of the data it was fitted on {n_fitted}",
        fix,
    )


def nearest_of_other_types(tissue, n_neighbours):
    """Rows of each cell's neighbours, by looking at all pairs."""
    found = []
    for cell in range(tissue.n_cells):
        others = np.flatnonzero(tissue.labels != tissue.labels[cell])
        distance = np.linalg.norm(tissue.coordinates[others] - tissue.coordinates[cell], axis=1)
        found.append(others[np.argsort(distance)[:n_neighbours]])
    return np.stack(found)


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [({}, range(160)), ({"held_out": True}, range(64)), ({"indices": tuple(range(20, 90))}, range(20, 90))],
)
def test_a_buffer_keeps_the_inner_cells_of_a_region(settings, chosen):
    adata = make_adata(160)
    card = fitted_on(adata, np.arange(64, 160))
    tissue = prepared(adata, card=card, subset=SubsetSpec(**settings, buffer=True))
    neighbours = nearest_of_other_types(tissue, 4)
    buffered = keep_away_from_training(tissue, neighbours)
    inner = [cell for cell in chosen if all(other < 64 for other in neighbours[cell])]
    assert np.flatnonzero(buffered.evaluated).tolist() == inner
    # rows of the grid hold eight cells; those of the last rows of the region touch the cells of training
    assert set(chosen) & set(range(40)) < set(inner) < set(range(64))
    # what was looked up before is not carried over, and nothing else changes
    assert sum(map(len, tissue.receivers().values())) == len(chosen)
    assert sorted(np.concatenate(list(keep_away_from_training(tissue, neighbours).receivers().values()))) == inner
    assert buffered.n_cells == 160
    assert buffered.notes[: len(tissue.notes)] == tissue.notes
    n_types = len({tissue.labels[cell] for cell in inner})
    assert buffered.notes[len(tissue.notes) :] == (
        f"data.subset.buffer=true drops {len(chosen) - len(inner)} of {len(chosen)} cells, for a cell that the model "
        f"was fitted on is among their 4 neighbours; {len(inner)} cells of {n_types} cell types are evaluated",
    )
    if settings:
        assert tissue.notes[-1] == f"{len(chosen)} of 160 cells chosen; all cells serve as neighbours"


def test_a_buffer_in_a_random_split_is_refused():
    adata = make_adata(160)
    fitted = np.random.default_rng(0).permutation(160)[:144]
    subset = SubsetSpec(held_out=True, buffer=True)
    tissue = prepared(adata, card=fitted_on(adata, fitted), subset=subset)
    assert refusal(keep_away_from_training, tissue, nearest_of_other_types(tissue, 4)) == (
        "data.subset.buffer=true leaves none of 16 cells",
        "each has a cell that the model was fitted on among its 4 neighbours: a buffer needs a model for which a whole "
        "region or section was held out; a random split leaves training cells everywhere",
        "leave data.subset.buffer out, or fit the model without a region and evaluate that region",
    )


def test_without_a_buffer_cells_beside_training_cells_stay(adata):
    tissue = prepared(adata, card=fitted_on(adata, np.arange(20)), subset=SubsetSpec(held_out=True))
    assert keep_away_from_training(tissue, nearest_of_other_types(tissue, 4)) is tissue


@pytest.fixture
def whole_tissue(_tissue):
    return _tissue.copy()


@pytest.fixture
def model(amici_dir, whole_tissue):
    return read_amici_directory(amici_dir, adata=whole_tissue, trust=False)


@pytest.mark.amici
@pytest.mark.parametrize("engine", ["factored", "hooked"])
def test_held_out_cells_keep_all_their_neighbours_whatever_the_engine(whole_tissue, model, engine):
    everything = AblationSpec(device="cpu", engine=engine)
    with open_access(model, prepare(whole_tissue, model.card, DataSpec()), everything) as access:
        predicted = access.predict(np.arange(500), keeps=[None, (0,)])
        neighbours = access.hooked.neighbour_rows if engine == "factored" else access.neighbour_rows
    fresh = (whole_tissue.obs["region"] != "rest").to_numpy()
    inner = fresh & fresh[neighbours].all(axis=1)
    assert 0 < inner.sum() < fresh.sum()
    for buffer, expected in ((False, fresh), (True, inner)):
        tissue = prepare(whole_tissue, model.card, DataSpec(subset=SubsetSpec(held_out=True, buffer=buffer)))
        with open_access(model, tissue, everything) as access:
            rows = np.concatenate(list(access.receivers().values()))
            assert sorted(rows) == np.flatnonzero(expected).tolist()
            ours = access.predict(rows, keeps=[None, (0,)])
            notes = access.notes
        np.testing.assert_allclose(ours, predicted[:, rows], atol=1e-6, rtol=0)
        assert any("data.subset.buffer=true drops" in note for note in notes) == buffer


@pytest.mark.amici
def test_the_cells_that_a_buffer_drops_are_evaluated_by_nobody(whole_tissue, model):
    subset = SubsetSpec(held_out=True, buffer=True)
    spec = EvaluationSpec(
        data=DataSpec(subset=subset),
        ablation=AblationSpec(device="cpu", modes=("keep_one",)),
        permutation=PermutationSpec(n_permutations=19),
    )
    evaluation = evaluate(model, whole_tissue, spec)
    (note,) = [note for note in evaluation.notes if "data.subset.buffer=true drops" in note]
    n_cells = int(evaluation.n_cells.sum())
    assert f"; {n_cells} cells of {len(evaluation.cell_types)} cell types are evaluated" in note
    assert n_cells < (whole_tissue.obs["region"] != "rest").sum()
    assert set(evaluation.held_out) == {True}


# --- sections


def test_sections_that_touch_are_refused():
    samples = np.array(["s1", "s1", "s2", "s2"], dtype=object)
    coordinates = np.array([[0.0, 0.0], [1.0, 3.0], [2.0, 0.0], [40.0, 0.0]])
    value, rule, fix = refusal(check_sections, samples, np.array([[1], [2], [1], [2]]), coordinates)
    assert value == "2 of 4 cells have neighbours in another section (first: a cell of s1 beside one of s2)"
    assert rule == "sections must lie apart in one coordinate frame, or the model attends across slides"
    assert "add 80 times its number to the x coordinate" in fix


def test_sections_apart_are_fine():
    samples = np.array(["s1", "s1", "s2", "s2"], dtype=object)
    neighbours = np.array([[1], [0], [3], [2]])
    assert check_sections(samples, neighbours, np.zeros((4, 2))) is None


# --- nothing changes


@pytest.mark.parametrize("storage", [np.asarray, sparse.csc_matrix])
def test_the_anndata_is_only_read(storage):
    adata = make_adata(genes=("extra", *CARD.genes[::-1]))
    adata.X = storage(adata.X)
    before = adata.copy()
    digest, matrix, spatial = content_digest(adata), adata.X, adata.obsm["spatial"]
    tissue = prepared(adata, sample_key="slide", subset=SubsetSpec(key="kept", value="True"))
    expression = tissue.expression(np.arange(40))
    tissue.receivers()
    expression[:] = -1.0
    assert content_digest(adata) == digest == content_digest(before)
    assert adata.X is matrix
    assert adata.obsm["spatial"] is spatial
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    for name in ("obsm", "layers", "uns", "varm", "obsp", "varp"):
        assert list(getattr(adata, name)) == list(getattr(before, name)), name


def test_expression_of_all_cells_is_no_view_of_the_data(adata):
    prepared(adata).expression(np.arange(40))[:] = -1.0
    assert adata.X.min() == 0.0


# --- fingerprints


def test_the_fingerprint_is_frozen():
    # another value here means that runs of one data set no longer find each other
    adata = ad.AnnData(
        X=np.array([[0.0, 1.5], [2.0, 0.0]], dtype=np.float32),
        obs=pd.DataFrame({"cell_type": ["A", "β cell"], "score": [0.5, np.nan]}, index=["c1", "c2"]),
        var=pd.DataFrame(index=["g1", "g2"]),
        obsm={"spatial": np.array([[0.0, 1.0], [2.0, 3.0]])},
    )
    assert content_digest(adata) == "a6e363d562c5382208d655ada1249d9a"


def test_the_fingerprint_does_not_depend_on_storage(adata, tmp_path, monkeypatch):
    # a negative zero is a zero that sparse storage drops
    adata.X[3, 2] = -0.0
    adata.obs["some"] = pd.array([1, None] * 20, dtype="Int64")
    adata.obs["text"] = [f"t{i}" for i in range(40)]
    adata.obs["gap"] = pd.Categorical(["a", None] * 20)
    digest = content_digest(adata)
    assert len(digest) == 32
    assert set(digest) <= set("0123456789abcdef")
    variants = {"copy": adata.copy(), "view": adata[:, :]}
    for kind in (sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array):
        variants[kind.__name__] = other = adata.copy()
        other.X, other.layers["counts"] = kind(adata.X), kind(adata.layers["counts"])
    variants["float64"] = wide = adata.copy()
    wide.X, wide.layers["counts"] = adata.X.astype(np.float64), adata.layers["counts"].astype(np.int64)
    for name in ("copy", "csr_matrix"):
        variants[name].copy().write_h5ad(tmp_path / f"{name}.h5ad")
        variants[f"{name} in h5ad"] = open_anndata(tmp_path / f"{name}.h5ad")
        variants[name].copy().write_zarr(tmp_path / f"{name}.zarr")
        variants[f"{name} in zarr"] = open_anndata(tmp_path / f"{name}.zarr")
    variants["backed"] = ad.read_h5ad(tmp_path / "csr_matrix.h5ad", backed="r")
    assert {name: content_digest(other) for name, other in variants.items()} == dict.fromkeys(variants, digest)
    variants["backed"].file.close()
    monkeypatch.setattr(module, "_BLOCK_ROWS", 7)
    assert content_digest(adata) == digest
    assert content_digest(variants["csc_matrix"]) == digest


def test_the_fingerprint_leaves_out_what_model_set_up_writes(adata):
    digest = content_digest(adata)
    adata.obs["_scvi_labels"] = 1
    adata.obsm["_nn_idx"] = np.ones((40, 4), dtype=int)
    adata.uns["_scvi_uuid"] = "x"
    adata.uns["note"] = "changed"
    assert content_digest(adata) == digest


CHANGES = {
    "a value": lambda a: put(a.X, (39, 5), a.X[39, 5] + 1e-3),
    "a zero": lambda a: put(a.X, tuple(np.argwhere(a.X == 0)[0]), 1e-3),
    "a value of a layer": lambda a: put(a.layers["counts"], (0, 0), a.layers["counts"][0, 0] + 1),
    "a further layer": lambda a: put(a.layers, "more", a.X),
    "the name of a layer": lambda a: put(a.layers, "raw_counts", a.layers.pop("counts")),
    "a label": lambda a: put(a.obs.loc, (a.obs_names[0], "cell_type"), LABELS[1]),
    "a number": lambda a: put(a.obs.loc, (a.obs_names[0], "radius"), a.obs["radius"].iloc[0] + 1e-9),
    "a truth value": lambda a: put(a.obs.loc, (a.obs_names[0], "kept"), False),
    "a missing column": lambda a: a.obs.drop(columns="slide", inplace=True),  # noqa: PD002, RUF100 - of the same object
    "the name of a column": lambda a: a.obs.rename(columns={"slide": "slice"}, inplace=True),  # noqa: PD002, RUF100
    "a coordinate": lambda a: put(a.obsm["spatial"], (20, 1), a.obsm["spatial"][20, 1] + 1e-9),
    "the name of a cell": lambda a: setattr(a, "obs_names", ["renamed", *a.obs_names[1:]]),
    "the name of a gene": lambda a: setattr(a, "var_names", [*a.var_names[:-1], "renamed"]),
    "a letter between names": lambda a: setattr(
        a, "obs_names", [a.obs_names[0] + "c", a.obs_names[1][1:], *a.obs_names[2:]]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_notices(adata, change):
    digest = content_digest(adata)
    CHANGES[change](adata)
    assert content_digest(adata) != digest


def test_the_fingerprint_notices_the_order_of_cells_and_genes(adata):
    digests = {content_digest(adata), content_digest(adata[::-1].copy()), content_digest(adata[:, ::-1].copy())}
    assert len(digests) == 3


def test_a_missing_label_is_not_the_text_of_it(adata):
    labels = adata.obs["cell_type"].astype(object)
    digests = set()
    for filler in (None, "nan", "None", "NA", ""):
        adata.obs["cell_type"] = labels.where(np.arange(40) > 0, filler)
        digests.add(content_digest(adata))
    assert len(digests) == 5


def test_places_know_neither_order_nor_names(adata):
    xy = np.asarray(adata.obsm["spatial"], dtype=float)
    shuffled = np.random.default_rng(0).permutation(len(xy))
    assert digest_of_places(xy[shuffled]) == digest_of_places(xy)
    assert digest_of_places(xy.astype(np.float32).astype(float)) == digest_of_places(xy)
    moved = xy.copy()
    moved[3, 1] += 0.01
    assert digest_of_places(moved) != digest_of_places(xy)
