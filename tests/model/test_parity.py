"""The evaluation against the installed amici-st, on the same permutations."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix, issparse
from scipy.stats import false_discovery_control

from amici_eval.data.tissue import prepare
from amici_eval.evaluation.pipeline import evaluate
from amici_eval.model.cards import card_of
from amici_eval.model.checkpoint import TrainedAMICI, read_amici_directory
from amici_eval.model.engines.opening import open_access
from amici_eval.model.training import data_loader_restored
from amici_eval.settings.evaluation import (
    AblationSpec,
    DataSpec,
    EvaluationSpec,
    PermutationSpec,
    SubsetSpec,
    default_n_permutations,
)
from amici_eval.stats.permutation.permutations import PermutationStream
from tests.same_numbers import assert_counts, assert_rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from amici_eval.results.evaluation import HeadEvaluation

pytestmark = pytest.mark.amici

SEED = 7
SHRINK = 1e-2
FLOAT32 = float(np.finfo(np.float32).eps)
ENGINES = ("factored", "hooked")
# of the largest prediction; the hooked engine makes the reference's own products, cut into other batches
GAP_OF_PREDICTIONS = {"hooked": 16 * FLOAT32, "factored": 64 * FLOAT32}
NEAR_TIE = {"hooked": 1e-8, "factored": 1e-6}


@dataclass(frozen=True)
class Order:
    """Where the cells of a type stand in the AnnData, and where in canonical order (by name)."""

    rows: np.ndarray
    place: np.ndarray
    """Place among ``rows`` of each cell in canonical order."""

    @classmethod
    def of(cls, adata: Any, cell_type: str) -> Order:
        rows = np.flatnonzero((adata.obs["cell_type"] == cell_type).to_numpy())
        return cls(rows=rows, place=np.argsort(adata.obs_names[rows].to_numpy().astype(str), kind="stable"))

    def permutations(self, cell_type: str, n_permutations: int) -> np.ndarray:
        """Return our permutations for cells in the order of the AnnData."""
        stream = PermutationStream(seed=SEED, cell_type=cell_type, n_cells=len(self.rows))
        canonical = stream.batch(0, n_permutations)
        permutations = np.empty_like(canonical)
        permutations[:, self.place] = self.place[canonical]
        return permutations


@dataclass(frozen=True)
class Comparison:
    """Both results on one model, and what is needed to recompute either."""

    native: Any
    reference: pd.DataFrame
    ours: HeadEvaluation
    n_permutations: int

    @property
    def adata(self) -> Any:
        return self.native.adata

    def reference_counts(self) -> np.ndarray:
        """Permutations that the reference counted, heads x types, types in our order."""
        table = self.reference.drop_duplicates(["head", "ct_name"]).pivot(
            index="head", columns="ct_name", values="p_value_head"
        )
        counts = table[list(self.ours.cell_types)].to_numpy() * self.n_permutations
        assert np.allclose(counts, np.round(counts), atol=1e-6)
        return np.round(counts).astype(np.int64)

    def reference_predictions(self, head: int, cell_type: str) -> tuple[np.ndarray, np.ndarray]:
        """Predictions and expression as the reference computes them, cells in the order of the AnnData."""
        from amici.interpretation import AMICIExplainedVarianceModule

        predictions, expression = AMICIExplainedVarianceModule._get_ct_predictions_for_ablated_head(
            self.native, adata=self.adata, head_idx=head, cell_type=cell_type
        )
        return predictions.to_numpy(), expression.to_numpy()

    def float64_errors(self, head: int, cell_type: str) -> tuple[float, np.ndarray]:
        """Mean squared error of the identity and of each permutation, of the reference's predictions in float64."""
        predictions, expression = (values.astype(np.float64) for values in self.reference_predictions(head, cell_type))
        permutations = Order.of(self.adata, cell_type).permutations(cell_type, self.n_permutations)
        errors = np.array([np.mean((predictions[permutation] - expression) ** 2) for permutation in permutations])
        return float(np.mean((predictions - expression) ** 2)), errors


def our_permutations(adata: Any, n_heads: int, n_permutations: int) -> Iterator[np.ndarray]:
    """Yield permutations in the order in which the reference asks for them."""
    for _ in range(n_heads):
        for cell_type in adata.obs["cell_type"].unique():
            yield from Order.of(adata, str(cell_type)).permutations(str(cell_type), n_permutations)


def reference_of(native: Any, n_permutations: int | None, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """Evaluate a live model with amici-st on our permutations."""
    adata, n_heads = native.adata, native.module.n_heads
    number = n_permutations or default_n_permutations(n_heads, adata.obs["cell_type"].nunique(), 0.05)
    permutations = our_permutations(adata, n_heads, number)

    def permutation(n_cells: int) -> np.ndarray:
        drawn = next(permutations)
        assert len(drawn) == n_cells
        return drawn

    with monkeypatch.context() as patch:
        patch.setattr(np.random, "permutation", permutation)
        computed = native.get_expl_variance_scores(n_permutations=n_permutations)
    assert next(permutations, None) is None
    assert computed._n_permutations == number
    return computed._explained_variance_df


def compare(
    native: Any,
    n_permutations: int | None,
    monkeypatch: pytest.MonkeyPatch,
    engine: str = "factored",
    reference: pd.DataFrame | None = None,
) -> Comparison:
    """Evaluate a live model with amici_eval and, if that is not done yet, with amici-st on the same permutations."""
    reference = reference_of(native, n_permutations, monkeypatch) if reference is None else reference
    test = PermutationSpec(n_permutations=n_permutations, seed=SEED, convention="reference")
    spec = EvaluationSpec(permutation=test, ablation=AblationSpec(device="cpu", engine=engine))
    ours = evaluate(native, native.adata, spec)
    assert ours.engine == engine
    n_types = native.adata.obs["cell_type"].nunique()
    assert ours.n_permutations == (n_permutations or default_n_permutations(native.module.n_heads, n_types, 0.05))
    return Comparison(native=native, reference=reference, ours=ours, n_permutations=ours.n_permutations)


def load(folder, adata):
    import amici

    with data_loader_restored():
        return amici.AMICI.load(str(folder), adata=adata)


@pytest.fixture(
    scope="module", params=[(engine, form) for engine in ENGINES for form in ("sparse", "dense")], ids="-".join
)
def small(amici_dir, dense_amici_dir, _tissue, request) -> Comparison:
    """The small models, trained and evaluated on sparse and on dense expression."""
    engine, form = request.param
    adata = _tissue.copy()
    if form == "dense":
        adata.X = adata.X.toarray()
    with pytest.MonkeyPatch.context() as monkeypatch:
        return compare(load(amici_dir if form == "sparse" else dense_amici_dir, adata), 300, monkeypatch, engine)


@pytest.fixture(scope="module")
def on_tissue(shared) -> Callable[[str, str], Comparison]:
    """Comparisons on real tissue, 4 heads x 11 types: as it is, or scrambled, so that no head explains anything."""
    import anndata

    @functools.cache
    def evaluated(tissue: str) -> tuple[Any, pd.DataFrame]:
        adata = anndata.read_h5ad(shared / "data" / "osmfish_sscortex.h5ad")
        if tissue == "scrambled":
            # cells of each type have swapped their expression
            rng, taken = np.random.default_rng(11), np.arange(adata.n_obs)
            for cell_type in adata.obs["cell_type"].unique():
                rows = Order.of(adata, cell_type).rows
                taken[rows] = rng.permutation(rows)
            adata.X = adata.X[taken]
        native = load(shared / "models" / "osmfish_seed0", adata)
        with pytest.MonkeyPatch.context() as monkeypatch:
            return native, reference_of(native, 220, monkeypatch)

    @functools.cache
    def compared(tissue: str, engine: str) -> Comparison:
        native, reference = evaluated(tissue)
        with pytest.MonkeyPatch.context() as monkeypatch:
            return compare(native, 220, monkeypatch, engine, reference)

    return compared


def assert_same_explained_variance(comparison: Comparison) -> None:
    ours, reference = comparison.ours, comparison.reference
    assert set(reference["ct_name"]) == set(ours.cell_types)
    assert len(reference) == ours.expl_var_gene.size
    gene = ours.expl_var_gene[
        reference["head"].to_numpy(),
        pd.Index(ours.cell_types).get_indexer(reference["ct_name"]),
        pd.Index(ours.genes).get_indexer(reference["gene"]),
    ]
    constant = np.isnan(gene)
    theirs = reference["expl_var_head_gene"].to_numpy()
    np.testing.assert_allclose(gene[~constant], theirs[~constant], atol=1e-5, rtol=0)
    assert np.all(theirs[constant] == 0.0)
    for head, cell_type, value in (
        reference[["head", "ct_name", "expl_var_head"]].drop_duplicates().itertuples(index=False)
    ):
        assert ours.expl_var[head, ours.cell_types.index(cell_type)] == pytest.approx(value, abs=1e-5)


def assert_same_counts(comparison: Comparison, *, all_pairs: bool) -> int:
    """Check counts, trace each difference to float32, and return how many pairs differ."""
    ours, theirs = comparison.ours.exceedances, comparison.reference_counts()
    assert np.all(ours >= 0)
    for head, index in np.ndindex(ours.shape):
        if not all_pairs and ours[head, index] == theirs[head, index]:
            continue
        identity, errors = comparison.float64_errors(head, comparison.ours.cell_types[index])
        # in float64, only rounding of the sum itself is left, and that of the predictions
        tolerance = NEAR_TIE[comparison.ours.engine]
        low = np.count_nonzero(errors < identity * (1 - tolerance))
        high = np.count_nonzero(errors <= identity * (1 + tolerance))
        assert low <= ours[head, index] <= high
        near = np.count_nonzero(np.abs(errors - identity) <= 16 * FLOAT32 * identity)
        assert abs(int(ours[head, index]) - int(theirs[head, index])) <= near
    return int(np.count_nonzero(ours != theirs))


def assert_same_p_values(comparison: Comparison) -> None:
    ours, counts = comparison.ours, comparison.reference_counts()
    same = ours.exceedances == counts
    np.testing.assert_allclose(ours.p_value[same], counts[same] / comparison.n_permutations, rtol=1e-12)
    # the same family, adjusted once
    np.testing.assert_allclose(
        ours.p_value_adj.ravel(), false_discovery_control(ours.p_value.ravel(), method="bh"), rtol=1e-12
    )
    if same.all():
        reference = comparison.reference.drop_duplicates(["head", "ct_name"])
        index = pd.Index(ours.cell_types).get_indexer(reference["ct_name"])
        np.testing.assert_allclose(
            ours.p_value_adj[reference["head"].to_numpy(), index], reference["p_value_adj_head"], rtol=1e-12
        )


def largest_gap_of_predictions(comparison: Comparison) -> float:
    model, adata = comparison.native, comparison.adata
    n_heads = model.module.n_heads
    gap = largest = 0.0
    with open_access(
        model, prepare(adata, card_of(model, adata=adata), DataSpec()), comparison.ours.spec.ablation
    ) as access:
        for cell_type in comparison.ours.cell_types:
            rows = Order.of(adata, cell_type).rows
            ours = access.predict(rows, keeps=[(head,) for head in range(n_heads)])
            for head in range(n_heads):
                theirs, expression = comparison.reference_predictions(head, cell_type)
                gap = max(gap, float(np.abs(ours[head] - theirs).max()))
                largest = max(largest, float(np.abs(theirs).max()))
                np.testing.assert_array_equal(access.expression(rows), expression)
    return gap / largest


# --- the small model --------------------------------------------------------------------------------------------------


def test_predictions_of_a_head_alone(small):
    assert largest_gap_of_predictions(small) <= GAP_OF_PREDICTIONS[small.ours.engine]


def test_explained_variance(small):
    assert_same_explained_variance(small)
    assert np.isfinite(small.ours.expl_var_gene).all()


def test_permutation_test(small):
    assert_same_counts(small, all_pairs=True)
    assert_same_p_values(small)
    # the comparison says something only where counts are neither all nor nothing
    assert np.any((small.ours.exceedances > 0) & (small.ours.exceedances < small.n_permutations))


def test_other_permutations_give_other_counts(small):
    test = PermutationSpec(n_permutations=300, seed=SEED + 1, convention="reference")
    other = evaluate(small.native, spec=EvaluationSpec(permutation=test, ablation=small.ours.spec.ablation))
    assert not np.array_equal(other.exceedances, small.ours.exceedances)
    np.testing.assert_array_equal(other.expl_var, small.ours.expl_var)


@pytest.mark.parametrize("engine", ENGINES)
def test_default_number_of_permutations(native, monkeypatch, engine):
    comparison = compare(native, None, monkeypatch, engine)
    assert comparison.n_permutations == np.ceil(comparison.ours.expl_var.size / 0.05)
    assert_same_counts(comparison, all_pairs=False)


def test_saved_model_agrees_too(small):
    saved = evaluate(TrainedAMICI.from_amici(small.native), small.adata, small.ours.spec)
    np.testing.assert_array_equal(saved.exceedances, small.ours.exceedances)
    assert_rounded(saved.expl_var_gene, small.ours.expl_var_gene)


@pytest.mark.parametrize("engine", ENGINES)
def test_gene_of_one_value_is_undefined_here_and_zero_in_the_reference(amici_dir, adata, monkeypatch, engine):
    cell_type = sorted(adata.obs["cell_type"].unique())[0]
    rows = np.flatnonzero(adata.obs["cell_type"] == cell_type)
    x = adata.X.toarray()
    x[rows, 3] = 0.0
    adata.X = csr_matrix(x)
    comparison = compare(load(amici_dir, adata), 40, monkeypatch, engine)
    assert_same_explained_variance(comparison)
    index = comparison.ours.cell_types.index(cell_type)
    missing = np.isnan(comparison.ours.expl_var_gene)
    assert missing[:, index, 3].all()
    assert missing.sum() == comparison.ours.n_heads
    reasons = [item.reason for item in comparison.ours.undefined]
    assert reasons == [f"the gene has one value in all {len(rows)} cells of the type"]
    assert_same_counts(comparison, all_pairs=True)


def test_cells_in_another_order(amici_dir, dense_amici_dir, small, monkeypatch):
    adata = small.adata
    shuffled = adata[np.random.default_rng(5).permutation(adata.n_obs)].copy()
    assert list(shuffled.obs_names) != list(adata.obs_names)
    folder = amici_dir if issparse(adata.X) else dense_amici_dir
    comparison = compare(load(folder, shuffled), 300, monkeypatch, small.ours.engine)
    assert_same_explained_variance(comparison)
    assert_same_counts(comparison, all_pairs=True)
    assert_counts(comparison.ours.exceedances, small.ours.exceedances)


def test_head_that_hardly_speaks_is_counted_by_float64(native, monkeypatch):
    import torch

    # predictions then vary so little that many of the mean squared errors are ties in float32
    with torch.no_grad():
        native.module.linear_head.weight.mul_(SHRINK)
    comparison = compare(native, 300, monkeypatch, "hooked")
    assert np.all(comparison.ours.exceedances >= 0)
    assert assert_same_counts(comparison, all_pairs=True) > 0


# --- real tissue ------------------------------------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.parametrize("engine", ENGINES)
def test_predictions_of_a_head_alone_on_real_tissue(on_tissue, engine):
    assert largest_gap_of_predictions(on_tissue("real", engine)) <= GAP_OF_PREDICTIONS[engine]


@pytest.mark.shared
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tissue", ["real", "scrambled"])
def test_explained_variance_on_real_tissue(on_tissue, tissue, engine):
    comparison = on_tissue(tissue, engine)
    assert comparison.ours.expl_var.shape == (4, 11)
    assert_same_explained_variance(comparison)


@pytest.mark.shared
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tissue", ["real", "scrambled"])
def test_permutation_test_on_real_tissue(on_tissue, tissue, engine):
    comparison = on_tissue(tissue, engine)
    assert_same_counts(comparison, all_pairs=False)
    assert_same_p_values(comparison)


@pytest.mark.shared
@pytest.mark.parametrize("engine", ENGINES)
def test_counts_on_scrambled_tissue_are_neither_all_nor_nothing(on_tissue, engine):
    comparison = on_tissue("scrambled", engine)
    counts = comparison.ours.exceedances
    between = (counts > 0) & (counts < comparison.n_permutations)
    assert between.mean() > 0.5


@pytest.mark.shared
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell_type", ["C. Plexus", "Microglia/PVM"])
def test_saved_model_agrees_on_real_tissue(on_tissue, shared, cell_type, engine):
    scrambled = on_tissue("scrambled", engine)
    saved = read_amici_directory(shared / "models" / "osmfish_seed0", adata=None, trust=False)
    spec = replace(scrambled.ours.spec, data=DataSpec(subset=SubsetSpec(key="cell_type", value=cell_type)))
    result = evaluate(saved, scrambled.adata, spec)
    index = scrambled.ours.cell_types.index(cell_type)
    assert_counts(result.exceedances[:, 0], scrambled.ours.exceedances[:, index])
    np.testing.assert_allclose(result.expl_var_gene[:, 0], scrambled.ours.expl_var_gene[:, index], atol=1e-5, rtol=0)
