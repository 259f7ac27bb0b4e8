"""Who talks to whom: masked senders against the model's own forward pass, and what follows for explained variance."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from amici_eval.data.simulate import PlantedEffect, TissueSpec, simulate_tissue
from amici_eval.data.tissue import prepare
from amici_eval.evaluation.pipeline import evaluate, evaluate_access
from amici_eval.model.checkpoint import read_amici_directory
from amici_eval.model.engines import factored
from amici_eval.model.engines.attention import Receivers, attend, attend_by_torch
from amici_eval.model.engines.encoder import SenderTables
from amici_eval.model.engines.factored import FactoredAccess
from amici_eval.model.engines.opening import open_access
from amici_eval.model.training import DEMO_TRAINING, train_amici
from amici_eval.report.evaluation_sentences import sure_links
from amici_eval.results.evaluation import HeadEvaluation
from amici_eval.settings.evaluation import AblationSpec, DataSpec, EvaluationSpec, PermutationSpec, SubsetSpec
from amici_eval.stats.explained_variance import explained_variance
from tests.model.conftest import opened
from tests.model.test_factored import attention_patterns
from tests.oracles.masked import predictions_without
from tests.same_numbers import FLOAT32, assert_rounded

pytestmark = pytest.mark.amici

KEEPS = [(0,), (1,), None]


def asked(**settings):
    test = {"n_permutations": 19, "n_bootstrap": 50} | settings
    ablation = AblationSpec(device="cpu", modes=("keep_one",), baselines=False, senders=True)
    return EvaluationSpec(permutation=PermutationSpec(**test), ablation=ablation)


@pytest.fixture(scope="module")
def evaluation(_tissue, amici_dir):
    adata = _tissue.copy()
    with opened(read_amici_directory(amici_dir, adata=adata, trust=False), adata) as access:
        return evaluate_access(access, asked())


# --- the engine


@pytest.mark.parametrize("use_numba", [True, False])
def test_without_a_sender_type_outputs_are_those_of_masked_scores(trained, adata, monkeypatch, use_numba):
    if not use_numba:
        monkeypatch.setattr("amici_eval.model.engines.attention.compiled_attention", lambda: None)
    rows = np.random.default_rng(0).permutation(adata.n_obs)[:90]
    with opened(trained, adata, batch_size=200) as access:
        senders = tuple(range(len(access.card.cell_types)))
        found = access.attend(rows, without_senders=senders)
        codes, changed = access.label_codes[rows], []
        for sender in senders:
            literal = predictions_without(access, rows, sender, keeps=KEEPS)
            for code, cell_type in enumerate(access.card.cell_types):
                of_type = codes == code
                for position, heads in enumerate(KEEPS):
                    ours = access.readout(cell_type).predict(found.without_senders[sender][of_type], heads)
                    np.testing.assert_allclose(ours, literal[position, of_type], atol=FLOAT32, rtol=0)
            changed.append(np.abs(found.without_senders[sender] - found.whole).max())
        np.testing.assert_array_equal(found.whole, access.head_outputs(rows))
    assert min(changed) > 1e-3


@pytest.mark.parametrize("compute", [attend, attend_by_torch])
def test_a_masked_row_has_no_weight_however_low_all_other_scores_are(compute):
    tables = SenderTables(torch.full((2, 6), 5.0), torch.full((2, 3, 2, 2), 7.0), dummy_score=3.0)
    tables.mask(1)
    slots = np.array([[0, 1], [1, 1]], dtype=np.int32)
    # the first neighbour lies so far away that the dummy has all the attention
    receivers = Receivers(slots, np.full((2, 2), 3e4, dtype=np.float32), np.array([2, 0]))
    np.testing.assert_array_equal(compute(tables, receivers), 0.0)


def test_all_sender_types_come_from_one_embedding_and_tiles_change_nothing(trained, adata, monkeypatch):
    rows = np.random.default_rng(1).permutation(adata.n_obs)
    embedded, literal = [], factored.embed_senders

    def watched(weights, expression, *others):
        embedded.append(len(expression))
        return literal(weights, expression, *others)

    monkeypatch.setattr(factored, "embed_senders", watched)
    with opened(trained, adata) as access:
        whole = access.attend(rows, without_senders=(0, 3, 4))
        assert sum(embedded) <= adata.n_obs
        access._tile = 37
        cut = access.attend(rows, without_senders=(0, 3, 4))
    assert_rounded(cut.without_senders, whole.without_senders)
    np.testing.assert_allclose(cut.by_sender.attention, whole.by_sender.attention, rtol=1e-5)
    np.testing.assert_array_equal(cut.by_sender.n_receivers, whole.by_sender.n_receivers)


def test_attention_by_type_is_the_sum_over_the_models_own_pattern(trained, adata):
    rows = np.random.default_rng(2).permutation(adata.n_obs)[:120]
    with opened(trained, adata, batch_size=200) as access:
        found = access.attend(rows, without_senders=(0,)).by_sender
        pattern = attention_patterns(access.hooked, rows)[:, :, :-1]
        types, of_neighbours = access.label_codes[rows], access.label_codes[access.neighbour_rows[rows]]
    for receiver in range(5):
        for sender in range(5):
            chosen = (types == receiver)[:, None] & (of_neighbours == sender)
            expected = np.where(chosen[:, None], pattern, 0.0).sum(axis=(0, 2))
            np.testing.assert_allclose(found.attention[receiver, sender], expected, atol=1e-4)
            assert found.n_receivers[receiver, sender] == chosen.any(axis=1).sum()


def test_the_distance_to_a_tenth_is_where_attention_to_a_lone_sender_falls_to_a_tenth(make_amici, adata):
    with opened(make_amici(adata, n_neighbors=1), adata) as access:
        row = np.array([7])
        code, sender = access.label_codes[row[0]], access.label_codes[access.neighbour_rows[7, 0]]
        sums = access.attend(row, without_senders=(0,)).by_sender
        tenth = np.log(10.0) * sums.attention[code, sender] / sums.coefficient[code, sender]
        odds = []
        for farther in (0.0, float(tenth[0])):
            access.hooked.distances = access.hooked.distances + np.float32(farther)
            shares = access.attend(row, attention_of=np.array([0])).attention[0, 0]
            odds.append(shares[0] / shares[1])
    # beside the dummy, whose score does not change
    assert odds[1] / odds[0] == pytest.approx(0.1, rel=1e-3)


def test_sender_types_are_taken_in_turn_where_memory_is_scarce(trained, adata, evaluation, monkeypatch):
    asked_for = []
    literal = FactoredAccess.attend

    def watched(self, rows, **options):
        asked_for.append(tuple(options.get("without_senders", ())))
        return literal(self, rows, **options)

    with opened(trained, adata) as access:
        assert access.sender_batches(10) == [(0, 1, 2, 3, 4)]
        access._memory = 2 * 4 * adata.n_obs * 8
        assert access.sender_batches(adata.n_obs) == [(0, 1), (2, 3), (4,)]
        monkeypatch.setattr(FactoredAccess, "attend", watched)
        found = evaluate_access(access, asked()).senders
    assert [one for one in asked_for if one] == [(0, 1), (2, 3), (4,)]
    for name in ("attention", "effect", "low", "p_value", "distance", "effect_gene"):
        expected = getattr(evaluation.senders, name)
        np.testing.assert_allclose(getattr(found, name), expected, atol=1e-6, rtol=1e-4, err_msg=name)


# --- a planted effect


def test_a_planted_effect_is_found_for_its_sender_its_receiver_and_its_genes():
    planted = PlantedEffect("B", "A", ("X1", "X2", "X3"), range_um=20.0, strength=2.2)
    tissue = TissueSpec(
        n_cells=1000,
        n_genes=16,
        cell_types=("A", "B", "C"),
        proportions=(0.4, 0.3, 0.3),
        effects=(planted,),
        window_um=(330.0, 330.0),
        mean_counts=800.0,
        n_markers=2,
        dispersion=0.02,
    )
    small = dict.fromkeys(DEMO_TRAINING.model_params, 16) | {"n_heads": 2, "n_head_size": 4}
    adata = simulate_tissue(tissue).adata
    model = train_amici(
        adata, n_neighbors=10, seed=0, max_epochs=40, batch_size=128, learning_rate=3e-3, model_params=small
    )
    found = evaluate(model, adata, asked(n_bootstrap=500))
    frame = found.senders_frame().set_index(["head", "ct_name", "sender"])
    best = int(np.argmax(found.expl_var[:, 0]))
    assert found.expl_var[best, 0] > 0.2
    row, other = frame.loc[(best, "A", "B")], frame.loc[(best, "A", "C")]
    assert row["ci_low"] > 0.1
    assert row["p_value_adj"] < 0.05
    assert row["best_gene"] in planted.genes
    assert abs(other["expl_var_lost"]) < 0.2 * row["expl_var_lost"]
    genes = found.sender_genes_frame().set_index(["head", "ct_name", "sender", "gene"])
    assert (genes.loc[(best, "A", "B")].loc[list(planted.genes), "ci_low"] > 0.2).all()
    # nothing but what was planted is shown as a link
    links = {(found.cell_types[at], found.senders.senders[sender]) for _, at, sender in sure_links(found, range(3))}
    assert links == {("A", "B")}


# --- the evaluation


def test_what_is_lost_is_explained_variance_minus_that_of_masked_predictions(trained, adata, evaluation):
    found = evaluation.senders
    with opened(trained, adata, batch_size=10**6) as access:
        for at, (label, rows) in enumerate(access.receivers().items()):
            targets = access.expression(rows)
            whole = access.hooked.predict(rows, keeps=KEEPS[:2])
            for sender in range(5):
                if evaluation.cell_types[at] == found.senders[sender]:
                    assert np.isnan(found.effect[:, at, sender]).all()
                    assert found.reason(label, label) == "no evaluated cell of the type has such a neighbour"
                    continue
                masked = predictions_without(access, rows, sender, keeps=KEEPS[:2])
                for head in range(2):
                    before, after = (explained_variance(one[head], targets) for one in (whole, masked))
                    lost = before.aggregated - after.aggregated
                    assert found.effect[head, at, sender] == pytest.approx(lost, abs=1e-6)
                    np.testing.assert_allclose(
                        found.effect_gene[head, at, sender], before.per_gene - after.per_gene, atol=1e-5
                    )
    lost = found.effect[np.isfinite(found.effect)]
    assert np.abs(lost).max() > 1e-4
    assert (found.low[np.isfinite(found.low)] <= lost).all()
    assert (found.high[np.isfinite(found.high)] >= lost).all()


def test_attention_to_senders_and_dummy_adds_up(evaluation):
    found = evaluation.senders
    total = found.attention.sum(axis=2)
    assert ((total > 0) & (total <= 1.0 + 1e-6)).all()
    assert ((found.p_value_adj >= found.p_value) | np.isnan(found.p_value)).all()
    assert np.isfinite(found.distance[found.attention > 0]).all()
    assert found.n_receivers.max() <= evaluation.n_cells.max()


def test_with_senders_all_other_numbers_stay(trained, adata, evaluation):
    without = dataclasses.replace(asked(), ablation=AblationSpec(device="cpu", modes=("keep_one",), baselines=False))
    done = []
    with opened(trained, adata) as access:
        plain = evaluate_access(access, without, progress=lambda *told: done.append(told))
    assert plain.senders is None
    assert plain.senders_frame().empty
    for name in ("expl_var_gene", "exceedances", "p_value", "expl_var_full"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(evaluation, name))


def test_progress_counts_every_mask_and_ends_at_its_total(trained, adata):
    told = []
    with opened(trained, adata) as access:
        evaluate_access(access, asked(), progress=lambda *one: told.append(one))
    assert told[-1][1] - 1 <= told[-1][0] <= told[-1][1]
    assert any(what == "senders masked out" for _, _, what in told)


def test_the_hooked_engine_says_why_it_does_not_tell_who_talks_to_whom(trained, adata):
    ablation = AblationSpec(engine="hooked", device="cpu", senders=True, baselines=False)
    spec = EvaluationSpec(permutation=PermutationSpec(n_permutations=3), ablation=ablation)
    with opened(trained, adata, engine="hooked") as access:
        found = evaluate_access(access, spec)
    assert found.senders is None
    assert [note for note in found.notes if "ablation.senders" in note] == [
        "ablation.senders: who talks to whom needs the factored engine on cells with coordinates; not computed"
    ]


def test_a_type_of_one_cell_and_one_of_few_tiles_say_why(trained, adata):
    labels = adata.obs["cell_type"].to_numpy()
    single, corner = "Endothelial", "Tumor"
    nearest = np.argsort(np.linalg.norm(adata.obsm["spatial"], axis=1))
    rows = [*np.flatnonzero(labels == single)[:1], *[row for row in nearest if labels[row] == corner][:8]]
    rows += np.flatnonzero(labels == "Fibroblasts").tolist()
    data = DataSpec(subset=SubsetSpec(indices=tuple(int(row) for row in rows)))
    spec = dataclasses.replace(asked(), data=data)
    with open_access(trained, prepare(adata, trained.card, data), spec.ablation) as access:
        found = evaluate_access(access, spec)
    frame = found.senders_frame()
    one = frame[frame["ct_name"] == single]
    assert one["expl_var_lost"].isna().all()
    assert set(one["undefined_reason"]) == {"1 cell; explained variance needs at least 2"}
    few = frame[(frame["ct_name"] == corner) & (frame["n_receivers"] > 0)]
    assert few["expl_var_lost"].notna().all()
    assert few["ci_low"].isna().all()
    assert few["undefined_reason"].str.match(r"cells in \d tiles; at least 5 are needed").all()


def test_outputs_that_are_no_numbers_in_one_head_leave_the_other(trained, adata, monkeypatch, evaluation):
    literal = FactoredAccess.attend

    def broken(self, rows, **options):
        outputs = literal(self, rows, **options)
        if outputs.without_senders is not None:
            outputs.without_senders[:, :3, 4] = np.inf
        return outputs

    monkeypatch.setattr(FactoredAccess, "attend", broken)
    with opened(trained, adata) as access:
        found = evaluate_access(access, asked()).senders
    assert np.isnan(found.effect[1, 0]).all()
    np.testing.assert_allclose(found.effect[0], evaluation.senders.effect[0], atol=1e-9)
    assert "the predictions of some heads are not finite" in found.reason(evaluation.cell_types[0], found.senders[1])


def test_senders_survive_json_but_for_single_genes(evaluation, tmp_path):
    evaluation.save(tmp_path)
    again = HeadEvaluation.load(tmp_path).senders
    for entry in dataclasses.fields(again):
        one, other = getattr(evaluation.senders, entry.name), getattr(again, entry.name)
        if entry.name in again.apart:
            assert one is not None
            assert other is None
        else:
            np.testing.assert_array_equal(one, other, err_msg=entry.name)
