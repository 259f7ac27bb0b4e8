"""Heads across versions, on small AMICI models: who is whom, what changed, what is said of what differs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from amici_eval.common.errors import DataError
from amici_eval.comparison.pipeline import compare
from amici_eval.evaluation.pipeline import evaluate
from amici_eval.evaluation.tiles import kept_sums
from amici_eval.model.checkpoint import read_amici_directory, untrained_like
from amici_eval.results.comparison import HeadComparison
from amici_eval.settings.comparison import ComparisonSpec
from amici_eval.settings.evaluation import AblationSpec, DataSpec, EvaluationSpec, PermutationSpec, SubsetSpec

pytestmark = pytest.mark.amici
SPEC = EvaluationSpec(
    ablation=AblationSpec(device="cpu", modes=("keep_one",), baselines=False),
    permutation=PermutationSpec(n_permutations=19, n_bootstrap=99),
)
TALKING = replace(SPEC, ablation=replace(SPEC.ablation, senders=True))
QUICK = ComparisonSpec(n_permutations=99, n_flips=99, n_bootstrap=99)


def relabelled(trained, order):
    """Return the same function with its heads in another order and what they bring rotated, V with O."""
    weights = {name: tensor.clone() for name, tensor in trained.weights.items()}
    n_heads, size = len(order), weights["attention_layer.W_V"].shape[0]

    def blocks(tensor, dim=0):
        width = tensor.shape[dim] // n_heads
        rows = torch.cat([torch.arange(head * width, (head + 1) * width) for head in order])
        return tensor.index_select(dim, rows).contiguous()

    for name in ("W_Q", "W_K", "W_V"):
        weights[f"attention_layer.{name}"] = weights[f"attention_layer.{name}"][:, order]
    for name in ("b_Q", "b_K", "b_V"):
        weights[f"attention_layer.{name}"] = weights[f"attention_layer.{name}"][order]
    weights["attention_layer.W_O"] = blocks(weights["attention_layer.W_O"])[:, order]
    for name in ("attention_layer.norm_o.weight", "attention_layer.norm_o.bias"):
        weights[name] = blocks(weights[name])
    weights["linear_head.weight"] = blocks(weights["linear_head.weight"], dim=1)
    for name in weights:
        if name.startswith(("query_embed.project_nn.", "kv_embed.project_nn.", "pos_coef_mlp.project_nn.")):
            weights[name] = blocks(weights[name])
    if "query_embed.project_nn.0.weight" not in weights:
        # the query is the label embedding itself, which is used for distances, too
        n_labels = weights["ct_embed.weight"].shape[1]
        own = blocks(torch.arange(n_labels))
        both = torch.cat([torch.arange(weights["pos_coef_mlp.nn.0.weight"].shape[1] - n_labels), own])
        both[-n_labels:] += len(both) - n_labels
        for network, order_of in (("query_embed", own), ("pos_coef_mlp", both)):
            weights[f"{network}.nn.0.weight"] = weights[f"{network}.nn.0.weight"][:, order_of]
            for name in ("nn.3.weight", "nn.3.bias", "nn.4.weight", "nn.4.bias"):
                weights[f"{network}.{name}"] = weights[f"{network}.{name}"][order_of]
        weights["ct_embed.weight"] = weights["ct_embed.weight"][:, own]
        weights["pos_coef_mlp.project_nn.0.weight"] = weights["pos_coef_mlp.project_nn.0.weight"][:, both]
    for head in range(n_heads):
        turn = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(head))).Q
        weights["attention_layer.W_V"][:, head] = turn @ weights["attention_layer.W_V"][:, head]
        weights["attention_layer.b_V"][head] = turn @ weights["attention_layer.b_V"][head]
        weights["attention_layer.W_O"][:, head] = weights["attention_layer.W_O"][:, head] @ turn.T
    return replace(trained, weights={name: tensor.contiguous() for name, tensor in weights.items()})


def named(evaluation, version):
    return replace(
        evaluation, model={"name": "m", "version": version, "model_id": f"m-{version}"}, data={"digest": "d"}
    )


@pytest.fixture(scope="module")
def evaluated(amici_dir, _tissue):
    adata = _tissue.copy()
    return named(evaluate(read_amici_directory(amici_dir, adata=adata, trust=False), adata, SPEC), "1")


@pytest.fixture(scope="module")
def talking(amici_dir, _tissue):
    """The same with senders."""
    adata = _tissue.copy()
    return named(evaluate(read_amici_directory(amici_dir, adata=adata, trust=False), adata, TALKING), "1")


def test_a_version_with_its_heads_in_another_order_is_the_same(trained, adata, evaluated):
    other = named(evaluate(relabelled(trained, [1, 0]), adata, SPEC), "2")
    assert np.abs(other.expl_var - evaluated.expl_var[::-1]).max() < 1e-6
    found = compare([evaluated, other], QUICK)
    assert found.labels == ("m 1", "m 2")
    (match,) = found.matches
    assert match.partner.tolist() == [1, 0]
    np.testing.assert_allclose(match.matched, 1.0, atol=1e-6)
    np.testing.assert_allclose(np.diag(match.cka[:, ::-1]), 1.0, atol=1e-6)
    np.testing.assert_allclose(np.diag(match.divergence[:, ::-1]), 0.0, atol=1e-6)
    np.testing.assert_allclose(np.diag(match.profile_cosine[:, ::-1]), 1.0, atol=1e-6)
    assert (match.p_value == 0.01).all()
    assert [lineage.heads for lineage in found.lineages] == [(0, 1), (1, 0)]
    (differences,) = found.differences
    assert np.abs(differences.difference).max() < 1e-5
    assert set(differences.verdict) == {"same"}
    assert found.overall[0].verdict == "same"


def test_a_head_that_was_replaced_is_gone_and_its_successor_new(trained, adata, evaluated):
    fresh = untrained_like(trained, seed=1).weights
    weights = {name: tensor.clone() for name, tensor in trained.weights.items()}
    for name in ("W_Q", "W_K", "W_V"):
        weights[f"attention_layer.{name}"][:, 1] = fresh[f"attention_layer.{name}"][:, 1]
    weights["attention_layer.W_O"][:, 1] = fresh["attention_layer.W_O"][:, 1]
    other = named(evaluate(replace(trained, weights=weights), adata, SPEC), "2")
    found = compare([evaluated, other], QUICK)
    assert found.matches[0].partner.tolist() == [0, -1]
    assert found.matches[0].new == (1,)
    assert [lineage.heads for lineage in found.lineages] == [(0, 0), (1, None), (None, 1)]
    frame = found.matches_frame()
    assert frame["status"].tolist() == ["matched", "gone", "new"]
    assert frame["lineage"].tolist() == [0, 1, 2]
    assert found.lineages[1].stability == 0.0
    full = found.differences_frame().query("head_before == 'full'")
    expected = other.expl_var_full - evaluated.expl_var_full
    np.testing.assert_allclose(full["difference"], expected, atol=1e-6)
    np.testing.assert_allclose(full["expl_var_after"] - full["expl_var_before"], expected)


def test_several_versions_are_followed_through_their_order(trained, adata, evaluated, tmp_path):
    folders = []
    for version, order in (("1", [0, 1]), ("2", [1, 0]), ("3", [1, 0])):
        folders.append(tmp_path / version)
        named(evaluate(relabelled(trained, order), adata, SPEC), version).save(folders[-1])
    told = []
    found = compare(folders, QUICK, progress=lambda done, total, what: told.append((done, total, what)))
    assert [lineage.heads for lineage in found.lineages] == [(0, 1, 1), (1, 0, 0)]
    np.testing.assert_allclose([lineage.stability for lineage in found.lineages], 1.0, atol=1e-6)
    assert set(found.similarity) == {(0, 1), (0, 2), (1, 2)}
    assert told == [(0, 3, "m 1"), (1, 3, "m 2"), (2, 3, "m 3"), (3, 3, "done")]
    assert len(found.versions_frame()) == 3 * 3 * len(evaluated.cell_types)


def test_what_is_written_is_read_back(trained, adata, evaluated, tmp_path):
    other = named(evaluate(relabelled(trained, [1, 0]), adata, SPEC), "2")
    found = compare([evaluated, other], QUICK, floor=np.array([0.1, np.nan]), notes=["beware"])
    found.save(tmp_path)
    back = HeadComparison.load(tmp_path)
    for name in ("matches_frame", "differences_frame", "versions_frame"):
        assert getattr(back, name)().equals(getattr(found, name)()), name
    assert back.to_json() == found.to_json()
    assert back.notes == ("beware",)
    assert len(back.gene_differences_frame()) == 0
    genes = found.gene_differences_frame()
    assert len(genes) == 3 * len(evaluated.cell_types) * len(evaluated.genes)
    row = genes.iloc[len(evaluated.genes) + 2]
    assert (row["head_before"], row["ct_name"], row["gene"]) == ("0", evaluated.cell_types[1], evaluated.genes[2])
    expected = other.expl_var_gene[1, 1, 2] - evaluated.expl_var_gene[0, 1, 2]
    assert row["difference_gene"] == pytest.approx(expected, abs=1e-5)
    for damage in ("{}", "[", '{"schema_version": 99}', found.to_json().replace('"versions"', '"x"', 1)):
        with pytest.raises(DataError):
            HeadComparison.from_json(damage)


def test_versions_with_other_genes_and_types_are_compared_on_what_they_share(trained, adata, evaluated):
    names = {gene: f"new {gene}" for gene in evaluated.genes[:3]}
    genes = tuple(names.get(gene, gene) for gene in evaluated.genes)
    renamed = adata.copy()
    renamed.var_names = [names.get(name, name) for name in renamed.var_names]
    other = evaluate(replace(trained, card=replace(trained.card, genes=genes)), renamed, SPEC)
    found = compare([evaluated, named(other, "2")], QUICK)
    assert found.matches[0].n_genes == len(genes) - 3
    assert found.matches[0].partner.tolist() == [0, 1]
    assert any("3 genes of m 1 are not in m 2" in note for note in found.notes)
    assert any("3 genes of m 2 are not in m 1" in note for note in found.notes)


def test_one_model_on_two_data_sets_is_compared_without_matching(trained, adata):
    halves = []
    for name, rows in (("left", np.arange(250)), ("right", np.arange(250, 500))):
        spec = replace(SPEC, data=DataSpec(subset=SubsetSpec(indices=tuple(rows.tolist()))))
        halves.append(
            replace(
                evaluate(trained, adata, spec),
                model={"name": "m", "version": "1"},
                data={"name": name, "digest": name},
            )
        )
    found = compare(halves, QUICK)
    assert (found.kind, found.labels, found.matches) == ("datasets", ("left", "right"), ())
    assert [lineage.heads for lineage in found.lineages] == [(0, 0), (1, 1)]
    (differences,) = found.differences
    np.testing.assert_allclose(differences.difference[:-1], halves[1].expl_var - halves[0].expl_var)
    defined = ~np.isnan(differences.low)
    assert defined.any()
    assert (differences.low <= differences.difference)[defined].all()
    assert (differences.difference <= differences.high)[defined].all()


def test_untrained_models_are_drawn_anew_and_leave_the_random_state_alone(trained):
    before = torch.random.get_rng_state()
    one, again, other = (untrained_like(trained, seed=seed).weights for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name])
    assert not torch.equal(one["attention_layer.W_O"], other["attention_layer.W_O"])
    assert not torch.equal(one["linear_head.weight"], trained.weights["linear_head.weight"])
    assert torch.equal(one["ct_profiles"], trained.weights["ct_profiles"])


def test_what_cannot_be_compared_is_refused(trained, adata, evaluated):
    other = named(evaluated, "2")
    with pytest.raises(DataError, match=r"^1 evaluation: a comparison needs at least two; give two versions or more$"):
        compare([evaluated], QUICK)
    with pytest.raises(DataError, match=r"^m 2: no moments were kept \(factored engine\): heads are matched by what"):
        compare([evaluated, replace(other, moments=None)], QUICK)
    with pytest.raises(DataError, match=r"^m 1 was evaluated on data d, m 2 on e: versions are compared on the same"):
        compare([evaluated, replace(other, data={"digest": "e"})], QUICK)
    spec = replace(SPEC, data=DataSpec(subset=SubsetSpec(indices=tuple(range(400)))))
    with pytest.raises(DataError, match=r"versions are compared on the same cells|told tile by tile"):
        compare([evaluated, named(evaluate(trained, adata, spec), "2")], QUICK)


def test_who_talks_to_whom_is_compared_head_by_head(trained, adata, talking, tmp_path):
    one = talking
    same = named(evaluate(relabelled(trained, [1, 0]), adata, TALKING), "2")
    # what tiles lose adds up to what the type loses
    for evaluation in (one, same):
        moments = evaluation.moments
        for at, cell_type in enumerate(evaluation.cell_types):
            rows = kept_sums(moments, cell_type, moments.genes)
            target = rows.target_squares[:, rows.varies].sum()
            lost = moments.lost_squares[:, at].sum(axis=2) / target
            np.testing.assert_allclose(lost, evaluation.senders.effect[:, at], atol=1e-5)
    found = compare([one, same], QUICK)
    (talk,) = found.senders
    assert (talk.head_before.tolist(), talk.head_after.tolist()) == ([0, 1], [1, 0])
    known = ~np.isnan(talk.lost_before)
    assert known.any()
    assert np.abs(talk.difference[known]).max() < 1e-5
    assert np.abs(talk.attention_after - talk.attention_before).max() < 1e-5
    assert set(np.array(talk.verdict)[known.ravel() & ~np.isnan(talk.low.ravel())]) == {"same"}
    # with the other model's heads in its place, the frame holds the losses of both evaluations
    fresh = named(evaluate(untrained_like(trained, seed=1), adata, TALKING), "3")
    other = compare([one, fresh], replace(QUICK, unmatched=0.0, margin=1e-6))
    if not len(other.senders[0].head_before):
        pytest.fail("no head was matched, so that nothing is compared")
    frame = other.senders_frame()
    for entry in frame.to_dict("records"):
        receiver = one.cell_types.index(entry["ct_name"])
        sender = one.senders.senders.index(entry["sender"])
        was = one.senders.effect[entry["head_before"], receiver, sender]
        became = fresh.senders.effect[entry["head_after"], receiver, sender]
        np.testing.assert_allclose(
            [entry["expl_var_lost_before"], entry["expl_var_lost_after"], entry["difference"]],
            [was, became, became - was],
        )
        assert (entry["undefined_reason"] != "") == bool(np.isnan(became - was) or np.isnan(entry["p_value"]))
        if entry["p_value"] <= 0.05 and entry["verdict"] in ("more", "less"):
            assert (entry["verdict"] == "more") == (entry["ci_low"] > 0)
        if not np.isnan(entry["ci_low"]):
            # from tiles alone: the same receivers, senders and tiles
            middle = (entry["ci_low"] + entry["ci_high"]) / 2
            np.testing.assert_allclose(middle, entry["difference"], atol=1e-5)
    assert frame["ci_low"].notna().any()
    assert (frame["p_value"] > 0).any()
    other.save(tmp_path)
    back = HeadComparison.load(tmp_path)
    assert back.senders_frame().equals(frame)
    assert back.to_json() == other.to_json()


def reordered(evaluation):
    """Return the same evaluation with types of receivers and of senders the other way round."""
    found, moments = evaluation.senders, evaluation.moments
    back = slice(None, None, -1)
    types, last = evaluation.cell_types[back], len(evaluation.cell_types) - 1
    of_types = {
        name: getattr(evaluation, name)[..., back]
        if getattr(evaluation, name).ndim < 3
        else evaluation.expl_var_gene[:, back]
        for name in ("n_cells", "expl_var_gene", "expl_var", "expl_var_full", "expl_var_none", "exceedances", "p_value")
    }
    of_types |= {name: getattr(evaluation, name)[:, back] for name in ("p_value_adj", "p_ci_low", "p_ci_high")}
    both = {
        name: getattr(found, name)[:, back, back]
        for name in (
            "attention",
            "effect",
            "low",
            "high",
            "p_value",
            "p_value_adj",
            "distance",
            "best_gene",
            "effect_best_gene",
        )
    }
    return replace(
        evaluation,
        cell_types=types,
        held_out=evaluation.held_out[back],
        sampling=evaluation.sampling[back],
        n_permutations_by_type=evaluation.n_permutations_by_type[back],
        spatial=None,
        intervals=None,
        parts=None,
        trivial=None,
        ablations=None,
        **of_types,
        senders=replace(
            found,
            senders=found.senders[back],
            n_receivers=found.n_receivers[back, back],
            lost_squares=None,
            **dict.fromkeys(found.of_genes),
            **both,
        ),
        moments=replace(
            moments,
            cell_types=types,
            row_type=last - moments.row_type,
            sketch_type=last - moments.sketch_type,
            query_weights=moments.query_weights[back],
            query_gram=moments.query_gram[back],
            readout_offset=moments.readout_offset[back],
            senders=moments.senders[back],
            lost_squares=moments.lost_squares[:, back, back],
        ),
    )


def test_the_order_of_types_and_senders_does_not_matter(trained, adata, talking):
    one = talking
    fresh = named(evaluate(untrained_like(trained, seed=1), adata, TALKING), "3")
    spec = replace(QUICK, unmatched=0.0)
    key = ["head_before", "head_after", "ct_name", "sender"]
    expected = compare([one, fresh], spec).senders_frame().set_index(key).sort_index()
    for pair in ([one, reordered(fresh)], [reordered(one), fresh]):
        frame = compare(pair, spec).senders_frame().set_index(key).sort_index()
        numbers = expected.select_dtypes("number").columns
        np.testing.assert_allclose(frame[numbers], expected[numbers], atol=1e-6)


def test_cells_of_other_types_are_not_compared_tile_by_tile(evaluated):
    one, moments = evaluated, evaluated.moments
    own = np.flatnonzero(moments.row_type == moments.row_type[0])
    rows = [own[0], own[moments.row_tile[own] != moments.row_tile[own[0]]][0]]
    n_cells = moments.n_cells.copy()
    n_cells[rows] += [1, -1]
    other = named(replace(one, moments=replace(moments, n_cells=n_cells)), "2")
    with pytest.raises(DataError, match=r"lie in other tiles of tissue: versions are compared on the same cells"):
        compare([one, other], QUICK)


def test_losses_are_compared_on_the_same_genes_only_and_where_both_were_computed(evaluated, talking):
    one, plain = talking, named(evaluated, "2")
    assert compare([one, plain], QUICK).senders == ()
    assert compare([one, plain], QUICK).senders_frame().empty
    # from an evaluation whose moments hold no losses
    old = replace(one, moments=replace(one.moments, senders=(), lost_squares=one.moments.lost_squares[:, :, :0]))
    (talk,) = compare([one, named(old, "2")], QUICK).senders
    assert np.isnan(talk.p_value).all()
    assert not np.isnan(talk.difference).all()
    assert "no losses by tile were kept" in talk.reason(one.cell_types[0], talk.senders[0])
    # as of a model with other genes: differences stand without p
    others = (*one.genes[:-1], "other")
    unlike = named(replace(one, genes=others, moments=replace(one.moments, genes=others)), "2")
    (talk,) = compare([one, unlike], QUICK).senders
    assert np.isnan(talk.p_value).all()
    assert not np.isnan(talk.difference).all()
    assert "the versions have other genes" in talk.reason(one.cell_types[0], talk.senders[0])


def test_on_other_data_losses_have_independent_intervals(trained, adata, talking):
    one = replace(talking, data={"name": "a", "digest": "a"})
    half = replace(TALKING, data=DataSpec(subset=SubsetSpec(indices=tuple(range(0, adata.n_obs, 2)))))
    other = replace(named(evaluate(trained, adata, half), "1"), data={"name": "b", "digest": "b"})
    (talk,) = compare([one, other], QUICK).senders
    known = np.isfinite(talk.low)
    assert known.any()
    assert (talk.low[known] <= talk.difference[known]).all()
    assert (talk.difference[known] <= talk.high[known]).all()
    widths = [(found.senders.high - found.senders.low)[known] for found in (one, other)]
    np.testing.assert_allclose((talk.high - talk.low)[known], np.hypot(*widths), atol=1e-9)
    assert np.isnan(talk.p_value).all()
    assert "there is no p" in talk.reason(one.cell_types[0], talk.senders[0])
