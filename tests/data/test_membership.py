"""Which cells a model was fitted on, where names of cells may belong to others."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from amici_eval.common.errors import DataError, InvalidSpecError
from amici_eval.common.model_card import Fingerprints
from amici_eval.data.matrices import open_rows
from amici_eval.data.membership import expression_prints, place_prints, prints_from, text_of
from amici_eval.data.tissue import prepare
from amici_eval.settings.evaluation import DataSpec, SubsetSpec, TrainedOnSpec
from tests.fakes import make_card

GENES = tuple(f"g{i}" for i in range(12))
N_CELLS, N_FITTED = 200, 120


def make_tissue(seed=0, n_cells=N_CELLS):
    rng = np.random.default_rng(seed)
    return ad.AnnData(
        X=sparse.csr_matrix(np.log1p(rng.poisson(2.0, (n_cells, len(GENES)))).astype(np.float32)),
        obs=pd.DataFrame(
            {"cell_type": pd.Categorical(list("AB") * (n_cells // 2)), "in_test": np.arange(n_cells) >= N_FITTED},
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(index=list(GENES)),
        obsm={"spatial": rng.uniform(0, 500, (n_cells, 2))},
    )


def prints_of(adata, genes=GENES):
    columns = adata.var_names.get_indexer(list(genes))
    return expression_prints(open_rows(adata.X), columns, tuple(genes))


def card_of(adata, rows=slice(0, N_FITTED)):
    """The card of a model that was fitted on some rows."""
    prints = Fingerprints(
        names=tuple(adata.obs_names[rows]),
        places=place_prints(adata.obsm["spatial"])[rows],
        expression=prints_of(adata)[rows],
    )
    return make_card(genes=GENES, cell_types=("A", "B"), training_cells=frozenset(prints.names), fingerprints=prints)


def fitted(adata, card, **spec):
    tissue = prepare(adata, card, DataSpec(**spec))
    return tissue.fitted, " ".join(tissue.notes)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.toarray(),
        lambda x: x.tocsc(),
        lambda x: x.astype(np.float64),
        lambda x: np.asfortranarray(x.toarray().astype(np.float64)),
        # entries that are stored in parts, in any order, and zeros that are stored
        lambda x: sparse.csr_matrix(
            (
                np.concatenate([np.r_[row.data / 2, row.data[::-1] / 2, 0] for row in x]),
                np.concatenate([np.r_[row.indices, row.indices[::-1], 0] for row in x]),
                np.r_[0, np.cumsum([2 * row.nnz + 1 for row in x])],
            ),
            shape=x.shape,
        ),
    ],
    ids=["dense", "csc", "float64", "fortran", "duplicates"],
)
def test_fingerprints_do_not_depend_on_the_form_of_the_matrix(form):
    adata = make_tissue()
    expected = prints_of(adata)
    assert len(np.unique(expected)) == N_CELLS
    other = ad.AnnData(X=form(adata.X), obs=adata.obs, var=adata.var)
    before = other.X.copy()
    np.testing.assert_array_equal(prints_of(other), expected)
    assert (abs(other.X - before)).sum() == 0


def test_whole_numbers_have_the_fingerprints_of_the_same_floats():
    counts = np.random.default_rng(1).poisson(2.0, (50, len(GENES)))
    as_floats = expression_prints(open_rows(counts.astype(np.float32)), None, GENES)
    for matrix in (counts, sparse.csr_matrix(counts.astype(np.uint16))):
        np.testing.assert_array_equal(expression_prints(open_rows(matrix), None, GENES), as_floats)


def test_order_of_genes_and_further_genes_do_not_change_fingerprints():
    adata = make_tissue()
    more = ad.AnnData(X=sparse.csr_matrix(np.ones((N_CELLS, 3), np.float32)), obs=adata.obs)
    more.var_names = ["x", "y", "z"]
    wider = ad.concat([more, adata[:, np.random.default_rng(3).permutation(len(GENES))]], axis=1)
    np.testing.assert_array_equal(prints_of(wider), prints_of(adata))


def test_names_that_agree_need_no_look_at_expression(monkeypatch):
    adata = make_tissue()
    card = card_of(adata)
    monkeypatch.setattr("amici_eval.data.tissue.expression_prints", None)
    found, notes = fitted(adata[np.random.default_rng(0).permutation(N_CELLS)].copy(), card)
    assert found.sum() == N_FITTED
    assert not notes


def changed(adata, *, names=False, place=False, expression=False):
    adata = adata.copy()
    if names:
        adata.obs_names = [f"other{i}" for i in range(adata.n_obs)]
    if place:
        adata.obsm["spatial"] = adata.obsm["spatial"] * 0.37 + 12
    if expression:
        adata.X = adata.X * np.float32(1.7)
    return adata


@pytest.mark.parametrize(
    "what",
    [
        {},
        {"names": True},
        {"place": True},
        {"expression": True},
        {"names": True, "place": True},
        {"names": True, "expression": True},
    ],
    ids=lambda what: "+".join(what) or "nothing",
)
def test_cells_are_found_as_long_as_two_things_agree_or_one_that_tells_them_apart(what):
    adata = make_tissue()
    order = np.random.default_rng(5).permutation(N_CELLS)
    found, notes = fitted(changed(adata, **what)[order].copy(), card_of(adata))
    np.testing.assert_array_equal(found, order < N_FITTED)
    assert ("have other names here" in notes) == ("names" in what)


def test_names_that_went_to_other_cells_do_not_mislead():
    adata = make_tissue()
    card = card_of(adata)
    adata.obs_names = np.roll(adata.obs_names, 31)
    found, notes = fitted(adata, card)
    np.testing.assert_array_equal(found, np.arange(N_CELLS) < N_FITTED)
    assert "have other names here" in notes


def test_names_of_another_tissue_are_refused_with_the_ways_out():
    card = card_of(make_tissue())
    with pytest.raises(
        DataError, match="120 cells have the name of a cell the model was fitted on, but neither"
    ) as caught:
        fitted(make_tissue(seed=9), card)
    assert "adata.obs_names = 'new_' + adata.obs_names" in caught.value.fix
    assert "data.trained_on.key" in caught.value.fix
    other = make_tissue(seed=9)
    other.obs_names = "new_" + other.obs_names
    found, _ = fitted(other, card)
    assert not found.any()


def test_a_few_wrong_names_are_counted_and_said():
    adata = make_tissue()
    card = card_of(adata)
    other = make_tissue(seed=9)
    adata.obsm["spatial"][:3] = other.obsm["spatial"][:3]
    x = adata.X.toarray()
    x[:3] = other.X[:3].toarray()
    adata.X = sparse.csr_matrix(x)
    found, notes = fitted(adata, card)
    assert found.sum() == N_FITTED - 3
    assert not found[:3].any()
    assert "3 cells have the name of a cell the model was fitted on, but neither its place nor its expression" in notes


def test_few_cells_that_happen_to_look_alike_are_no_training_cells():
    adata, other = make_tissue(), make_tissue(seed=9)
    other.obs_names = "new_" + other.obs_names
    x = other.X.toarray()
    x[:5] = adata.X[:5].toarray()
    other.X = sparse.csr_matrix(x)
    found, _ = fitted(other, card_of(adata))
    assert not found.any()


def test_models_without_fingerprints_go_by_name():
    adata = make_tissue()
    card = make_card(genes=GENES, cell_types=("A", "B"), training_cells=frozenset(adata.obs_names[:7]))
    found, _ = fitted(adata, card)
    assert np.flatnonzero(found).tolist() == list(range(7))


@pytest.mark.parametrize("value", ["false", "False", "FALSE"])
def test_the_user_can_say_which_cells_were_trained_on(value, tmp_path):
    adata = make_tissue()
    card = make_card(genes=GENES, cell_types=("A", "B"))
    assert fitted(adata, card)[0] is None
    expected = np.arange(N_CELLS) < N_FITTED
    found, _ = fitted(adata, card, trained_on=TrainedOnSpec(key="in_test", value=value))
    np.testing.assert_array_equal(found, expected)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(adata.obs_names[:N_FITTED]) + "\n")
    spec = {"trained_on": TrainedOnSpec(names=str(names)), "subset": SubsetSpec(held_out=True)}
    found, _ = fitted(adata, card, **spec)
    np.testing.assert_array_equal(found, expected)
    assert prepare(adata, card, DataSpec(**spec)).evaluated.sum() == N_CELLS - N_FITTED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "0 of the 0 names"),
        (b"cell1\nnobody\n", "1 of the 2 names"),
        (b"\xff", "cannot"),
    ],
)
def test_a_file_of_names_that_does_not_fit_is_refused(tmp_path, content, message):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        fitted(make_tissue(), make_card(genes=GENES, cell_types=("A", "B")), trained_on=TrainedOnSpec(names=str(path)))


@pytest.mark.parametrize("spec", [{"key": "in_test"}, {"value": "x"}, {"key": "a", "value": "b", "names": "c"}])
def test_half_of_a_setting_is_refused(spec):
    with pytest.raises(InvalidSpecError, match="training cells are named by a column and its value, or by a file"):
        TrainedOnSpec(**spec)


@settings(max_examples=50)
@given(cells=st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)), max_size=20))
def test_fingerprints_come_back_from_json(cells):
    names = tuple(f"c{i}" for i in range(len(cells)))
    prints = Fingerprints(
        names=names,
        places=np.array([place for place, _ in cells], dtype=np.uint32),
        expression=np.array([value for _, value in cells], dtype=np.uint64),
    )
    back = prints_from(json.loads(json.dumps(text_of(prints))), names)
    np.testing.assert_array_equal(back.places, prints.places)
    np.testing.assert_array_equal(back.expression, prints.expression)
    for wrong in (names[:-1] if names else ("one",), (*names, "more")):
        with pytest.raises(ValueError, match="fingerprints of"):
            prints_from(text_of(prints), wrong)
