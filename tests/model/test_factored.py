"""The factored engine against the model's own forward pass."""

from __future__ import annotations

import itertools
import logging
from zlib import crc32

import numpy as np
import pytest
import torch

from amici_eval.common.errors import DeviceMemoryError
from amici_eval.data.tissue import prepare
from amici_eval.evaluation.baselines import evaluate_baselines
from amici_eval.evaluation.pipeline import Parity, check_parity, evaluate_access
from amici_eval.model.engines import factored
from amici_eval.model.engines.attention import Receivers, attend, attend_by_torch
from amici_eval.model.engines.encoder import SenderTables, embed_senders
from amici_eval.model.engines.factored import FactoredAccess
from amici_eval.model.engines.folding import fold_encoder
from amici_eval.model.engines.hooked import added_hook, faint_attention_is_zero, keep_heads, why_not_factored
from amici_eval.model.engines.opening import open_access
from amici_eval.model.training import data_loader_restored
from amici_eval.settings.evaluation import AblationSpec, DataSpec, EvaluationSpec, PermutationSpec, SubsetSpec
from amici_eval.stats.explained_variance import explained_variance
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.type_sums import gather_sums
from tests.model.conftest import on_cpu, opened
from tests.same_numbers import FLOAT32, assert_counts, assert_rounded

pytestmark = pytest.mark.amici

KEEPS = [(0,), (1,), (0, 1), None, ()]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"n_heads": 1},
        {"n_heads": 3, "n_head_size": 5},
        {"n_nn_embed": 11},  # as many as genes: no projection of the gene embedding
        {"n_nn_embed": 12, "n_heads": 3, "n_kv_dim": 4},  # no projection, hence no norm, of keys and values
        {"n_label_embed": 6, "n_heads": 3, "n_query_dim": 2},  # no projection of the queries
        {"distance_kernel_unit_scale": 30.0, "attention_dummy_score": -1.0, "pos_coef_offset": 0.5},
        {"attention_penalty_coef": 0.1, "value_l1_penalty_coef": 0.1},
    ],
)
def test_tables_and_readout_give_the_forward_pass(sizes):
    from amici import AMICIModule

    base = {"n_heads": 2, "n_head_size": 4, "n_nn_embed": 8, "n_nn_embed_hidden": 9, "n_kv_dim": 8, "n_query_dim": 8}
    n_genes, n_types, n_cells, n_neighbors = 11, 3, 40, 7
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        module = AMICIModule(
            n_genes=n_genes, n_labels=n_types, empirical_ct_means=torch.rand(n_types, n_genes), **(base | sizes)
        ).eval()
        for parameter in module.parameters():  # norms start with weight 1 and bias 0, which would hide mistakes
            parameter += 0.3 * torch.randn_like(parameter)
        x, index = torch.rand(n_cells, n_genes), torch.randint(0, n_cells, (n_cells, n_neighbors))
        distance, labels = 20 * torch.rand(n_cells, n_neighbors), torch.randint(0, n_types, (n_cells, 1))
        weights = fold_encoder(module, device="cpu")
        tables = SenderTables.empty(weights, n_cells, device="cpu")
        needed = torch.rand(n_cells, n_types) < 0.5
        needed[index, labels] = True
        order = torch.randperm(n_cells)
        for part in order.split(13):
            embed_senders(weights, x[part], needed[part], part, tables)
        outputs = attend(tables, Receivers(index.numpy().astype(np.int32), distance.numpy(), labels[:, 0].numpy()))
        for keep in [None, (), *((head,) for head in range(module.n_heads))]:
            with keep_heads(module, keep):
                _, found = module({"X": x, "labels": labels, "nn_x": x[index], "nn_dist": distance}, compute_loss=False)
            for code in range(n_types):
                of_type = labels[:, 0].numpy() == code
                ours = weights.readout(code).predict(outputs[of_type], keep)
                np.testing.assert_allclose(ours, found["prediction"].numpy()[of_type], atol=FLOAT32, rtol=FLOAT32)


def test_predictions_are_those_of_the_hooked_engine(trained, adata):
    rows = np.random.default_rng(0).permutation(adata.n_obs)[:90]
    with opened(trained, adata) as access:
        assert isinstance(access, FactoredAccess)
        done = []
        ours = access.predict(rows, keeps=KEEPS, progress=done.append)
        np.testing.assert_allclose(ours, access.hooked.predict(rows, keeps=KEEPS), atol=FLOAT32, rtol=0)
        np.testing.assert_allclose(access.predict_literally(rows, keeps=KEEPS), ours, atol=FLOAT32, rtol=0)
        assert sum(done) == len(rows) * len(KEEPS)
        assert access.predict(rows[:0], keeps=[None]).shape == (1, 0, adata.n_vars)


def test_one_pass_for_all_ablations_is_the_literal_one(trained, adata):
    rows = np.arange(30)
    with opened(trained, adata, engine="hooked", batch_size=7) as access:
        np.testing.assert_allclose(
            access.predict_side_by_side(rows, keeps=KEEPS), access.predict(rows, keeps=KEEPS), atol=1e-6, rtol=0
        )
        layer = access.module.attention_layer
        assert not layer.hook_pattern.fwd_hooks
        assert not layer.hook_output.fwd_hooks


def outputs_of(model, adata, rows, *, tile=None, chunk=None, memory=None):
    with opened(model, adata, memory_budget=memory) as access:
        access._tile = tile or access._tile
        access._chunk = chunk or access._chunk
        done = []
        outputs = access.head_outputs(rows, progress=done.append)
        assert sum(done) == len(rows)
        return outputs


def test_tiles_chunks_memory_and_the_order_of_rows_change_nothing(trained, adata):
    rows = np.random.default_rng(2).permutation(adata.n_obs)
    whole = outputs_of(trained, adata, rows)
    assert np.abs(whole).max() > 1e-3
    for settings in ({"tile": 37}, {"chunk": 3}, {"tile": 101, "chunk": 64}, {"memory": "1MB"}):
        assert_rounded(outputs_of(trained, adata, rows, **settings), whole)
    backwards = outputs_of(trained, adata, rows[::-1])
    assert_rounded(backwards[::-1], whole)
    some = outputs_of(trained, adata, rows[:11], tile=4)
    assert_rounded(some, whole[:11])


@pytest.mark.parametrize("scattered", [False, True])
def test_the_memory_budget_bounds_the_tables(trained, adata, monkeypatch, scattered):
    sizes, chunks = [], []
    empty, embed = SenderTables.empty, factored.embed_senders

    def counted(weights, n_senders, *, device):
        sizes.append(n_senders * weights.bytes_per_sender)
        return empty(weights, n_senders, device=device)

    def watched(weights, expression, *others):
        chunks.append(len(expression) * weights.bytes_per_embedding)
        return embed(weights, expression, *others)

    rows = np.arange(adata.n_obs)[:: 9 if scattered else 1]
    whole = outputs_of(trained, adata, rows)
    budget = 20_000
    monkeypatch.setattr(factored, "_LEAST_TILE", 8)
    monkeypatch.setattr(factored, "_LEAST_CHUNK", 2)
    monkeypatch.setattr(factored, "memory_budget", lambda asked, device: budget)
    monkeypatch.setattr(SenderTables, "empty", counted)
    monkeypatch.setattr(factored, "embed_senders", watched)
    assert_rounded(outputs_of(trained, adata, rows), whole)
    assert len(sizes) > 1
    assert max(sizes) <= budget
    assert max(chunks) <= budget


def test_compiled_and_plain_attention_agree():
    rng = np.random.default_rng(0)
    tables = SenderTables(
        values=torch.from_numpy(rng.normal(size=(50, 15)).astype(np.float32)),
        pairs=torch.from_numpy(rng.exponential(size=(50, 4, 2, 3)).astype(np.float32)),
        dummy_score=0.5,
    )
    slots = rng.integers(0, 50, (9000, 6)).astype(np.int32)
    distances = rng.exponential(40.0, (9000, 6)).astype(np.float32)
    types = rng.integers(0, 4, 9000)
    receivers = Receivers(slots, distances, types)
    ours = attend(tables, receivers)
    np.testing.assert_allclose(ours, attend_by_torch(tables, receivers), atol=1e-6, rtol=0)
    by_hand = []
    for h in range(3):
        pairs = tables.pairs[slots[7], types[7], :, h].numpy()
        weight = np.exp(np.array([*(pairs[:, 0] - pairs[:, 1] * distances[7]), 0.5]))
        values = tables.values[slots[7], 5 * h : 5 * h + 5].numpy()
        by_hand.append((weight[:-1, None] * values).sum(axis=0) / weight.sum())
    np.testing.assert_allclose(ours[7], np.concatenate(by_hand), atol=1e-6)


def test_without_numba_attention_is_plain_torch(monkeypatch, trained, adata):
    rows = np.arange(40)
    whole = outputs_of(trained, adata, rows)
    monkeypatch.setattr("amici_eval.model.engines.attention.compiled_attention", lambda: None)
    np.testing.assert_allclose(outputs_of(trained, adata, rows), whole, atol=1e-6, rtol=0)


def test_out_of_memory_halves_the_work_and_goes_on(trained, adata, monkeypatch, caplog):
    rows = np.arange(adata.n_obs)
    whole = outputs_of(trained, adata, rows)
    failures = itertools.count()
    literal = factored.embed_senders

    def scarce(weights, expression, *others):
        if len(expression) > 100:
            next(failures)
            raise torch.OutOfMemoryError
        return literal(weights, expression, *others)

    monkeypatch.setattr(factored, "embed_senders", scarce)
    with caplog.at_level(logging.WARNING), opened(trained, adata) as access:
        outputs = access.head_outputs(rows)
    assert_rounded(outputs, whole)
    assert next(failures) >= 2
    assert "out of memory on cpu" in caplog.text
    monkeypatch.setattr(factored, "embed_senders", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with (
        opened(trained, adata) as access,
        pytest.raises(DeviceMemoryError, match="out of memory on cpu at attention of 256 receivers"),
    ):
        access.head_outputs(rows)


# --- when the model's own forward pass is needed


def test_hooks_replaced_methods_and_other_parts_need_the_forward_pass(native):
    module = native.module
    assert why_not_factored(module) is None
    with added_hook(module.attention_layer.hook_z, lambda z, hook: z):
        assert "hooks of its own on attention_layer.hook_z" in why_not_factored(module)
    handle = module.linear_head.register_forward_hook(lambda *_: None)
    assert "linear_head" in why_not_factored(module)
    handle.remove()
    module.nn_embed.forward = module.nn_embed.forward
    assert "forward pass of its part nn_embed was replaced" in why_not_factored(module)
    del module.nn_embed.forward
    before = module.linear_head
    module.linear_head = torch.nn.Sequential(before)
    assert "linear_head" in why_not_factored(module)
    module.linear_head = before
    assert "float32" in why_not_factored(module.double())
    assert "OtherModule" in why_not_factored(other_module(module))


def other_module(module):
    class OtherModule(type(module)):
        pass

    other = OtherModule.__new__(OtherModule)
    other.__dict__ = module.__dict__
    return other


def test_a_model_with_hooks_of_its_own_is_evaluated_through_them(native, adata, caplog):
    def louder(z, hook):
        return 3.0 * z

    quick = on_cpu(5)
    with opened(native, adata) as access:
        plain = evaluate_access(access, quick)
    with added_hook(native.module.attention_layer.hook_z, louder):
        with caplog.at_level(logging.WARNING), opened(native, adata) as access:
            assert access.engine == "hooked"
            with_hook = evaluate_access(access, quick)
        assert len(native.module.attention_layer.hook_z.fwd_hooks) == 1
    assert plain.engine == "factored"
    assert with_hook.engine == "hooked"
    assert not np.allclose(plain.expl_var, with_hook.expl_var, atol=1e-4)
    assert "hooks of its own" in caplog.text
    assert any("hooked engine" in note for note in with_hook.notes)


def test_an_engine_that_disagrees_gives_way(trained, adata, caplog):
    quick = on_cpu(19)
    with opened(trained, adata, engine="hooked") as access:
        literal = evaluate_access(access, quick)
    with caplog.at_level(logging.WARNING), opened(trained, adata) as access:
        access._weights.key_values.values.bias.add_(0.05)
        fallen_back = evaluate_access(access, quick)
    assert fallen_back.engine == "hooked"
    assert fallen_back.parity > 1e-3
    assert fallen_back.parity_cells > 0
    assert "predictions differ" in caplog.text
    assert any("predictions differ" in note for note in fallen_back.notes)
    np.testing.assert_array_equal(fallen_back.expl_var_gene, literal.expl_var_gene)
    np.testing.assert_array_equal(fallen_back.exceedances, literal.exceedances)


def test_predictions_that_are_numbers_in_one_engine_only_are_no_parity(trained, adata):
    with opened(trained, adata) as access:
        access._weights.key_values.values.bias.fill_(torch.nan)
        parity = check_parity(access, access.receivers())
        assert parity.largest_difference == np.inf
        assert not parity.holds


def test_outputs_that_are_no_numbers_in_one_head_leave_the_others(trained, adata, monkeypatch):
    literal = FactoredAccess.attend

    def broken(self, rows, **options):
        outputs = literal(self, rows, **options)
        if options.get("progress") is not None:  # not in the check of parity, which looks at other cells
            for one in (outputs.whole, outputs.without_nearest):
                one[:3, 4] = np.inf
        return outputs

    monkeypatch.setattr(FactoredAccess, "attend", broken)
    quick = on_cpu(19)
    with opened(trained, adata) as access:
        found = evaluate_access(access, quick)
    first = found.cell_types[0]
    assert found.engine == "factored"
    assert np.isfinite(found.expl_var[0]).all()
    assert np.isnan(found.expl_var[1, 0])
    assert np.isfinite(found.expl_var[1, 1:]).all()
    assert [(item.head, item.reason) for item in found.undefined] == [(1, "the head's predictions are not finite")]
    assert found.exceedances[1, 0] == -1
    assert found.expl_var_none[0] == 0.0
    assert np.isnan(found.expl_var_full[0])
    assert f"{first}: ablations are undefined, for outputs of heads 1 are not finite" in found.notes


def test_parity_is_asked_relative_to_what_heads_bring():
    assert Parity(largest_difference=3e-6, scale=4.0, signal=0.5, n_cells=8).holds
    assert not Parity(largest_difference=9e-5, scale=1e-5, signal=1e-6, n_cells=8).holds
    assert not Parity(largest_difference=2e-3, scale=4.0, signal=0.5, n_cells=8).holds
    assert Parity().holds


def test_a_fallback_says_which_ablations_are_missing(native, adata):
    with added_hook(native.module.attention_layer.hook_z, lambda z, hook: z), opened(native, adata) as access:
        quick = on_cpu(5)
        found = evaluate_access(access, quick)
    assert found.ablations is None
    assert any("needs the factored engine: leave_one_out, mean_z" in note for note in found.notes)


def test_cells_with_the_same_expression_count_as_ties_whatever_the_blocks(trained, adata):
    x = adata.X.toarray()
    few = np.flatnonzero((adata.obs["cell_type"] == "Endothelial").to_numpy())[:12]
    x[few[1::2]] = x[few[::2]]
    adata.X = x
    rows = SubsetSpec(indices=tuple(few.tolist()))
    spec = EvaluationSpec(data=DataSpec(subset=rows), permutation=PermutationSpec(n_permutations=2000))
    counts = []
    for read_rows in (1, 2, 5, 7, 12):
        with open_access(trained, prepare(adata, trained.card, spec.data), AblationSpec(device="cpu")) as access:
            access._read_rows = read_rows
            counts.append(evaluate_access(access, spec).exceedances)
    for other in counts[1:]:
        np.testing.assert_array_equal(other, counts[0])


# --- both engines


@pytest.mark.parametrize("sampling", ["independent", "cyclic"])
def test_both_engines_give_the_same_evaluation(trained, adata, sampling):
    test = PermutationSpec(n_permutations=59, sampling=sampling)
    found = {}
    for engine in ("factored", "hooked"):
        with opened(trained, adata, engine=engine, modes=("leave_one_out",)) as access:
            found[engine] = evaluate_access(
                access, EvaluationSpec(permutation=test, ablation=AblationSpec(engine=engine, modes=("leave_one_out",)))
            )
    ours, literal = found["factored"], found["hooked"]
    assert (ours.engine, literal.engine) == ("factored", "hooked")
    assert ours.parity < FLOAT32
    assert literal.parity is None
    for name in ("expl_var_gene", "expl_var", "expl_var_full", "expl_var_none"):
        np.testing.assert_allclose(getattr(ours, name), getattr(literal, name), atol=FLOAT32, rtol=0)
    assert_counts(ours.exceedances, literal.exceedances)
    assert 0 < ours.exceedances.max()
    np.testing.assert_array_equal(ours.n_permutations_by_type, literal.n_permutations_by_type)
    assert set(ours.sampling) == set(literal.sampling)
    assert sampling in ours.sampling
    expected = ours.n_cells - 1 if sampling == "cyclic" else np.full(len(ours.n_cells), 59)
    np.testing.assert_array_equal(ours.n_permutations_by_type, expected)
    np.testing.assert_allclose(ours.p_value, (ours.exceedances + 1) / (expected + 1))
    np.testing.assert_allclose(
        ours.ablations.of("leave_one_out"), literal.ablations.of("leave_one_out"), atol=FLOAT32, rtol=0
    )


def test_tiles_of_the_moments_lie_where_their_cells_lie(trained, adata):
    spec = on_cpu(3)
    with opened(trained, adata) as access:
        moments = evaluate_access(access, spec).moments
    assert len(moments.tile_center) == moments.row_tile.max() + 1 >= 9
    weights = np.bincount(moments.row_tile, weights=moments.n_cells)
    middle = (weights[:, None] * moments.tile_center).sum(axis=0) / weights.sum()
    np.testing.assert_allclose(middle, adata.obsm["spatial"].mean(axis=0))
    assert np.ptp(moments.tile_center, axis=0).min() > 0.5 * np.ptp(adata.obsm["spatial"], axis=0).min()
    sketched = adata.obsm["spatial"][adata.obs_names.get_indexer(list(moments.sketch_names))]
    to_each = np.linalg.norm(sketched[:, None] - moments.tile_center[None], axis=2)
    assert (to_each[np.arange(len(sketched)), moments.sketch_tile] <= 1.5 * to_each.min(axis=1) + 1e-9).mean() > 0.8


def test_the_sketch_holds_outputs_and_attention_of_the_cells_that_it_names(trained, adata):
    spec = on_cpu(3)
    with opened(trained, adata) as access:
        moments = evaluate_access(access, spec).moments
        rows = adata.obs_names.get_indexer(list(moments.sketch_names))
        outputs = access.attend(rows, attention_of=moments.attended)
        neighbours = access.cell_names(access.neighbour_rows[rows[moments.attended]].ravel().astype(np.int64))
    labels = np.array(moments.cell_types)[moments.sketch_type]
    np.testing.assert_array_equal(labels, adata.obs["cell_type"].to_numpy()[rows])
    np.testing.assert_allclose(moments.sketch_outputs, outputs.whole, atol=FLOAT32)
    np.testing.assert_allclose(moments.attention, outputs.attention, atol=FLOAT32)
    assert moments.attention.shape[2] == moments.attended_neighbours.shape[1] + 1
    np.testing.assert_array_equal(moments.attended_neighbours.ravel(), [crc32(name.encode()) for name in neighbours])


@pytest.mark.parametrize("sampling", ["independent", "cyclic"])
def test_counts_do_not_depend_on_tiles_chunks_or_threads(trained, adata, monkeypatch, sampling):
    spec = on_cpu(59, sampling=sampling)
    found = []
    threads = torch.get_num_threads()
    # types one after another, side by side on one thread each, and side by side with their tests in turn
    for tile, chunk, n_threads, small in (
        (None, None, 1, 4096),
        (37, 3, 1, 4096),
        (101, 17, 2, 4096),
        (None, 64, 2, 10),
    ):
        monkeypatch.setattr("amici_eval.evaluation.launching._SIDE_BY_SIDE_CELLS", small)
        torch.set_num_threads(n_threads)
        try:
            with opened(trained, adata) as access:
                access._tile, access._chunk = tile or access._tile, chunk or access._chunk
                found.append(evaluate_access(access, spec))
            assert torch.get_num_threads() == n_threads
        finally:
            torch.set_num_threads(threads)
    for other in found[1:]:
        assert_counts(other.exceedances, found[0].exceedances)
        np.testing.assert_allclose(other.expl_var_gene, found[0].expl_var_gene, atol=FLOAT32)
        np.testing.assert_allclose(other.ablations.expl_var, found[0].ablations.expl_var, atol=FLOAT32)
        assert other.undefined == found[0].undefined


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_counts(trained, adata):
    found = []
    for device in ("cpu", "cuda"):
        spec = EvaluationSpec(permutation=PermutationSpec(n_permutations=199), ablation=AblationSpec(device=device))
        tissue = prepare(adata, trained.card, DataSpec())
        with open_access(trained, tissue, spec.ablation) as access:
            found.append(evaluate_access(access, spec))
    assert_counts(found[1].exceedances, found[0].exceedances)
    np.testing.assert_allclose(found[1].expl_var_gene, found[0].expl_var_gene, atol=FLOAT32)


# --- the catalogue against hooked runs


def test_the_catalogue_is_what_hooks_on_the_model_give(trained, adata):
    """Mean z, resampled z and frozen norm, done to the model itself by hooks."""
    spec = on_cpu(3)
    with opened(trained, adata) as access:
        found = evaluate_access(access, spec)
        module, literal = access.hooked.module, access.hooked
        literal._batch_size = 10**6
        cell_type, rows = next(iter(access.receivers().items()))
        targets = access.expression(rows)
        index = found.cell_types.index(cell_type)

        def ev(point, hook, keep=None):
            with added_hook(point, hook):
                return explained_variance(literal.predict(rows, keeps=[keep])[0], targets).aggregated

        stream = PermutationStream(seed=0, cell_type=cell_type, n_cells=len(rows), stratum="resampled_z")
        permutations = torch.from_numpy(stream.batch(0, 8).astype(np.int64))
        for head in range(2):

            def mean_z(z, hook, head=head):
                z = z.clone()
                z[:, :, head] = z[:, :, head].mean(dim=0)
                return z

            assert found.ablations.of("mean_z")[head, index] == pytest.approx(
                ev(module.attention_layer.hook_z, mean_z), abs=FLOAT32
            )
            values = []
            for permutation in permutations:

                def resampled(z, hook, head=head, permutation=permutation):
                    z = z.clone()
                    z[:, :, head] = z[permutation, :, head]
                    return z

                values.append(ev(module.attention_layer.hook_z, resampled))
            assert found.ablations.of("resampled_z")[head, index] == pytest.approx(np.mean(values), abs=FLOAT32)

        # the divisor of the whole model's layer norm, by a look at what goes in
        norm, taken = module.attention_layer.norm_o, []
        handle = norm.register_forward_pre_hook(lambda part, inputs: taken.append(inputs[0]))
        literal.predict(rows, keeps=[None])
        handle.remove()
        sigma = (taken[0].var(dim=-1, unbiased=False, keepdim=True) + norm.eps).sqrt()

        def frozen(part, inputs, output):
            centred = inputs[0] - inputs[0].mean(dim=-1, keepdim=True)
            return centred / sigma * part.weight + part.bias

        for head in range(2):
            handle = norm.register_forward_hook(frozen)
            value = explained_variance(literal.predict(rows, keeps=[(head,)])[0], targets).aggregated
            handle.remove()
            assert found.ablations.of("frozen_norm")[head, index] == pytest.approx(value, abs=FLOAT32)
        # two heads: every coalition is one of those that hooks give directly
        whole = {keep: explained_variance(literal.predict(rows, keeps=[keep])[0], targets).aggregated for keep in KEEPS}
        first = ((whole[(0,)] - whole[()]) + (whole[None] - whole[(1,)])) / 2
        assert found.ablations.of("shapley")[0, index] == pytest.approx(first, abs=FLOAT32)
        together = whole[None] - whole[(0,)] - whole[(1,)] + whole[()]
        assert found.ablations.interaction[index, 0, 1] == pytest.approx(together, abs=FLOAT32)


# --- faint attention


def test_far_neighbours_get_no_denormal_attention(native, adata):
    adata.obsm["spatial"] = adata.obsm["spatial"] * 60.0  # pixels
    taken = []
    with opened(native, adata, engine="hooked") as access:
        rows, literal = np.arange(50), access.module.attention_layer
        with added_hook(literal.hook_pattern, lambda pattern, hook: taken.append(pattern.clone())):
            ours = access.predict(rows, keeps=[None])[0]
            _, plain = access.module(access._tensors(rows), compute_loss=False)
        assert not literal.hook_attn_scores.fwd_hooks
    flushed, unflushed = taken
    tiny = torch.finfo(torch.float32).tiny
    assert ((unflushed > 0) & (unflushed < tiny)).any()
    assert not ((flushed > 0) & (flushed < tiny)).any()
    np.testing.assert_allclose(ours, plain["prediction"].numpy(), atol=1e-6, rtol=0)
    # the process still computes with denormal floats
    assert float(torch.tensor(tiny) / 2) > 0.0
    assert np.float32(tiny) / np.float32(2) > 0.0


def test_hooks_on_scores_leave_when_the_body_raises(native):
    layer = native.module.attention_layer
    seen = []

    def body():
        with faint_attention_is_zero(native.module):
            seen.append(len(layer.hook_attn_scores.fwd_hooks))
            raise RuntimeError("body")

    with pytest.raises(RuntimeError, match="body"):
        body()
    assert seen == [1]
    assert not layer.hook_attn_scores.fwd_hooks


def test_nothing_handed_in_changes(native, adata):
    before = {name: tensor.clone() for name, tensor in native.module.state_dict().items()}
    state = torch.get_rng_state()
    quick = on_cpu(5)
    native.module.train()
    with data_loader_restored(), opened(native, adata) as access:
        evaluate_access(access, quick)
    assert native.module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in native.module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


# --- without the nearest neighbour


def masking_the_nearest(distances):
    """Return a hook on attention scores that takes the score of each receiver's nearest neighbour away."""
    nearest = torch.from_numpy(distances.argmin(axis=1))

    def masked(scores, hook):
        scores = scores.clone()
        scores[torch.arange(len(scores)), :, :, nearest] = -torch.inf
        return scores

    return masked


@pytest.mark.parametrize("nearest_first", [True, False])
def test_without_the_nearest_outputs_are_those_of_a_masked_score(trained, adata, nearest_first):
    rows = np.random.default_rng(0).permutation(adata.n_obs)[:90]
    with opened(trained, adata, batch_size=200) as access:
        hooked = access.hooked
        if not nearest_first:  # as between outlines of cells with radii
            hooked.distances = np.ascontiguousarray(np.roll(hooked.distances, 3, axis=1))
            hooked.neighbour_rows = np.ascontiguousarray(np.roll(hooked.neighbour_rows, 3, axis=1))
        outputs = access.attend(rows, without_nearest=True).without_nearest
        with added_hook(hooked.module.attention_layer.hook_attn_scores, masking_the_nearest(hooked.distances[rows])):
            literal = hooked.predict(rows, keeps=KEEPS)
        whole = hooked.predict(rows, keeps=KEEPS)
        codes = access.label_codes[rows]
        for code, cell_type in enumerate(access.card.cell_types):
            of_type = codes == code
            for position, heads in enumerate(KEEPS):
                ours = access.readout(cell_type).predict(outputs[of_type], heads)
                np.testing.assert_allclose(ours, literal[position, of_type], atol=FLOAT32, rtol=0)
    assert np.abs(whole[3] - literal[3]).max() > 1e-3


def test_both_outputs_come_from_one_embedding_of_the_senders(trained, adata, monkeypatch):
    rows = np.random.default_rng(1).permutation(adata.n_obs)
    embedded, literal = [], factored.embed_senders

    def watched(weights, expression, *others):
        embedded.append(len(expression))
        return literal(weights, expression, *others)

    with opened(trained, adata) as access:
        whole = access.head_outputs(rows)
        monkeypatch.setattr(factored, "embed_senders", watched)
        done = []
        both = access.attend(rows, without_nearest=True, progress=done.append)
        assert sum(done) == len(rows)
        assert sum(embedded) <= adata.n_obs
        access._tile = 37
        cut = access.attend(rows, without_nearest=True)
    np.testing.assert_array_equal(both.whole, whole)
    assert_rounded(cut.without_nearest, both.without_nearest)


def attention_patterns(hooked, rows):
    """Return attention as the model's own forward pass computes it, shape (cells, heads, neighbours + 1)."""
    patterns = []

    def collect(pattern, hook):
        patterns.append(pattern[:, :, 0].numpy().copy())
        return pattern

    with added_hook(hooked.module.attention_layer.hook_pattern, collect):
        hooked.predict(rows, keeps=[None])
    return patterns[-1]


def test_attention_is_the_softmax_of_the_models_own_scores(trained, adata):
    rows = np.random.default_rng(2).permutation(adata.n_obs)[:120]
    attended = np.array([5, 3, 117, 60])
    with opened(trained, adata) as access:
        found = access.attend(rows, attention_of=attended)
        access._tile = 37
        cut = access.attend(rows, attention_of=attended)
        literal = attention_patterns(access.hooked, rows[attended])
    assert_rounded(cut.whole, found.whole)
    np.testing.assert_allclose(found.attention, literal, atol=FLOAT32, rtol=0)
    np.testing.assert_allclose(cut.attention, literal, atol=FLOAT32, rtol=0)
    np.testing.assert_allclose(found.attention.sum(axis=2), 1.0, atol=FLOAT32)


@pytest.mark.parametrize("use_numba", [True, False])
def test_with_one_neighbour_nothing_is_left_without_it(make_amici, adata, monkeypatch, use_numba):
    if not use_numba:
        monkeypatch.setattr("amici_eval.model.engines.attention.compiled_attention", lambda: None)
    with opened(make_amici(adata, n_neighbors=1), adata) as access:
        both = access.attend(np.arange(adata.n_obs), without_nearest=True)
    assert np.abs(both.whole).max() > 1e-3
    assert not both.without_nearest.any()


def test_explained_variance_without_the_nearest_is_that_of_masked_predictions(trained, adata):
    with opened(trained, adata, batch_size=10**6) as access:
        receivers, hooked = access.receivers(), access.hooked
        changed = []
        for label, rows in receivers.items():
            both = access.attend(rows, without_nearest=True)
            moments = gather_sums(
                both.whole,
                access.readout(label),
                access.expression_blocks(rows),
                tiles=np.arange(len(rows)) % 3,
                without_nearest=both.without_nearest,
            )
            point = hooked.module.attention_layer.hook_attn_scores
            with added_hook(point, masking_the_nearest(hooked.distances[rows])):
                predictions = hooked.predict(rows, keeps=[(0,), (1,), None])
            literal = [explained_variance(p, access.expression(rows)).aggregated for p in predictions]
            np.testing.assert_allclose(moments.explained_without_nearest, literal, atol=1e-6)
            changed.append(moments.explained_without_nearest[:2] - moments.by_tile.explained_variance[:2])
    assert np.abs(changed).max() > 1e-5


@pytest.mark.parametrize("engine", ["factored", "hooked"])
def test_baselines_need_no_head_of_either_engine(trained, adata, engine):
    with opened(trained, adata, engine=engine) as access:
        receivers = access.receivers()
        zeros = np.zeros((2, len(receivers)))
        names = access.cell_names(np.arange(adata.n_obs))
        fitted = np.isin(names, list(access.card.training_cells))
        found = evaluate_baselines(access, receivers, expl_var=zeros, expl_var_full=zeros[0], fitted=fitted)
    assert found.fitted_on == "training cells"
    assert np.isfinite(found.expl_var).any(axis=1).all()
    assert (found.expl_var[np.isfinite(found.expl_var)] < 1.0).all()
