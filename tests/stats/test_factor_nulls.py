from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, kstest

from amici_eval.common.errors import DeviceMemoryError
from amici_eval.common.threads import in_threads
from amici_eval.stats.permutation import nulls, statistics
from amici_eval.stats.permutation.nulls import factor_exceedances, permutation_exceedances
from amici_eval.stats.permutation.permutations import PermutationStream, compiled_kernels
from amici_eval.stats.pvalues import p_values
from tests.builders import heads_of
from tests.oracles import permutations as oracle

PATHS = [(engine, form) for engine in ("compiled", "torch") for form in ("factor", "gram")]
CELLS_PER_PERMUTATION = {"factor": 0, "gram": np.inf}
"""Up to how many cells per permutation form ``"gram"`` is taken."""


def stream(n_cells, seed=0):
    return PermutationStream(seed=seed, cell_type="T", n_cells=n_cells)


def order_of_shifts(n_cells):
    return PermutationStream(seed=0, cell_type="T", n_cells=n_cells, stratum="\0cyclic").batch(0, 1)[0]


def draw(seed, *, n_cells=12, n_columns=3, n_heads=3, signal=0.3):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(n_cells, n_columns, n_heads)).astype(np.float32)
    factors = (signal * images + rng.normal(size=images.shape)).astype(np.float32)
    return factors, images


def use_torch(monkeypatch):
    """Let torch do on the CPU what it does on a device."""
    for module in (nulls, statistics):
        monkeypatch.setattr(module, "cpu_kernels", lambda _: None)


def use_form(form, monkeypatch):
    for name in ("_GRAM_CELLS_PER_PERMUTATION", "_TORCH_GRAM_CELLS_PER_PERMUTATION"):
        monkeypatch.setattr(statistics, name, CELLS_PER_PERMUTATION[form])


@pytest.fixture(params=PATHS, ids="-".join)
def path(request, monkeypatch):
    """By the kernels or by torch, in one form."""
    engine, form = request.param
    use_form(form, monkeypatch)
    if engine == "torch":
        use_torch(monkeypatch)
    return form


def exceedances(factors, images, *, n_permutations=60, dead=None, **arguments):
    heads = heads_of(factors, images, dead)
    return factor_exceedances(heads, stream=stream(len(factors)), n_permutations=n_permutations, **arguments)


def count(factors, images, **arguments):
    return exceedances(factors, images, **arguments).exceedances


@pytest.mark.parametrize(
    ("n_cells", "n_columns", "n_heads"),
    [(3, 1, 1), (4, 3, 2), (5, 2, 3), (8, 5, 17), (12, 1, 35), (17, 4, 8), (33, 3, 5)],
)
@pytest.mark.usefixtures("path")
def test_counts_equal_the_definition(n_cells, n_columns, n_heads):
    factors, images = draw(n_cells, n_cells=n_cells, n_columns=n_columns, n_heads=n_heads)
    permutations = stream(n_cells).batch(0, 61).tolist()
    counts = exceedances(factors, images, n_permutations=61)
    np.testing.assert_array_equal(counts.exceedances, oracle.exceedances(factors, images, permutations))
    assert counts.exceedances.dtype == np.int64
    assert counts.n_permutations == 61
    assert not counts.dead.any()


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize(
    "tiny",
    [
        {},
        {"INLINE_PRODUCTS": 0},
        {"INLINE_PRODUCTS": 0, "TASK_PRODUCTS": 1},
        {"INLINE_PRODUCTS": 0, "STORED_INDICES": 203 * 37, "TORCH_ENTRIES": 5000, "_CELLS": 29},
        {"INLINE_PRODUCTS": 0, "_GRAM_COLUMNS": 11, "TASK_PRODUCTS": 9000, "TORCH_ENTRIES": 1, "_CELLS": 1000},
    ],
)
def test_form_threads_and_pieces_change_no_count(path, tiny, n_threads, monkeypatch):
    factors, images = draw(7, n_cells=203, n_columns=7, n_heads=5, signal=0.01)
    expected = permutation_exceedances_of(factors, images, 101)
    assert np.all((expected > 0) & (expected < 101))  # counts at the ends could agree by luck
    for name, value in tiny.items():
        monkeypatch.setattr(f"amici_eval.stats.permutation.statistics.{name}", value)
    found = count(factors, images, n_permutations=101, n_threads=n_threads)
    np.testing.assert_array_equal(found, expected)


def permutation_exceedances_of(factors, images, n_permutations):
    predictions, targets = factors.transpose(2, 0, 1), images.transpose(2, 0, 1)
    return np.array(
        [
            permutation_exceedances(p[None], y, stream=stream(len(y)), n_permutations=n_permutations).exceedances[0]
            for p, y in zip(predictions, targets, strict=True)
        ]
    )


def test_counts_are_those_of_the_whole_prediction(path):
    rng = np.random.default_rng(3)
    factors = rng.normal(size=(40, 4, 6)) + 2.0
    readouts = rng.normal(size=(6, 25, 4))
    predictions = np.einsum("iah,hga->hig", factors, readouts) + rng.normal(size=25)
    targets = rng.normal(size=(40, 25)) + 0.05 * predictions.mean(axis=0)
    expected = permutation_exceedances(predictions, targets, stream=stream(40), n_permutations=400).exceedances
    images = np.einsum("ig,hga->iah", targets, readouts)
    found = count(factors, images, n_permutations=400)
    np.testing.assert_array_equal(found, expected)
    assert 0 < expected.min() < expected.max() < 400


def tied(seed=0, *, n_heads=10):
    """Cells 0 to 2 have one image and cells 3 to 5 another: whoever keeps the halves apart ties with the truth."""
    rng = np.random.default_rng(seed)
    images = np.repeat(rng.normal(size=(2, 7, n_heads)), 3, axis=0)
    return rng.normal(size=(6, 7, n_heads)), images


def test_permutations_that_fit_equally_well_count(path):
    factors, images = tied()
    permutations = stream(6).batch(0, 300)
    ties = np.all(np.sort(permutations[:, :3], axis=1) == [0, 1, 2], axis=1)
    assert ties.sum() > 5
    found = count(factors, images, n_permutations=300)
    for head, number in enumerate(found):
        f, z = factors[..., head], images[..., head]
        better = [np.sum(f[row] * z) > np.sum(f * z) for row in permutations[~ties]]
        assert number == ties.sum() + sum(better)


def test_float32_alone_would_decide_ties_wrongly(monkeypatch):
    factors, images = tied()
    right = count(factors, images, n_permutations=300)
    monkeypatch.setattr(statistics, "_FLOAT32_UNIT", 0.0)
    assert np.any(count(factors, images, n_permutations=300) != right)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_float32_sums_are_within_their_bound(shift, monkeypatch):
    kernels = compiled_kernels()
    rng = np.random.default_rng(1)
    # all products of one sign: nothing cancels
    f, z = (np.abs(rng.standard_normal((100, 33, 2))).astype(np.float32) + np.float32(shift) for _ in range(2))
    pair = statistics.pack(heads_of(f, z))
    orders = np.zeros((104, 50), dtype=np.uint32)
    kernels.shuffle_columns(stream(100).key(), 0, 0, 50, 100, orders)
    panels = [
        statistics._panels(pair, values, size) for values, size in ((pair.factors, 16), (pair.images, kernels.ROWS))
    ]
    found = statistics._gram_sums(orders, *panels, 0, 13)
    exact = statistics.float64_sums(pair, stream(100).key(), np.arange(50)).T
    error = np.abs(found - exact).max(axis=1)
    assert np.all(error > 0)
    assert np.all(error <= (33 + 8 + 2) * 2.0**-24 * pair.sizes)


def test_the_sums_of_the_kernel_are_the_direct_sums():
    kernels = compiled_kernels()
    factors, images = draw(4, n_cells=19, n_columns=5, n_heads=21)
    pair = statistics.pack(heads_of(factors, images))
    numbers = np.array([kernels.IDENTITY, 0, 7, 2**40, 3])
    orders = [np.arange(19), *(stream(19).batch(number, number + 1)[0] for number in numbers[1:])]
    found = statistics.float64_sums(pair, stream(19).key(), numbers)
    for head in range(21):
        f, z = (pair.of_head(values, head).astype(np.float64) for values in (pair.factors, pair.images))
        np.testing.assert_allclose(found[:, head], [np.sum(f[order] * z) for order in orders], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_heads", [1, 2, 3, 5, 8, 16, 17, 40])
@pytest.mark.parametrize("n_columns", [1, 4, 33])
def test_packing_keeps_the_centred_numbers(n_columns, n_heads):
    factors, images = draw(5, n_cells=9, n_columns=n_columns, n_heads=n_heads)
    dead = np.arange(n_heads) % 3 == 1
    pair = statistics.pack(heads_of(factors, images, dead))
    np.testing.assert_array_equal(pair.heads, np.flatnonzero(~dead))
    for values, packed in ((factors, pair.factors), (images, pair.images)):
        assert packed.shape[2] % statistics.LANES == 0
        assert packed.ctypes.data % 64 == 0
        for number, head in enumerate(pair.heads):
            expected = oracle.rounded(values[:, :, head])
            stored = pair.of_head(packed, number)
            power = np.log2(np.linalg.norm(stored) / np.linalg.norm(expected))
            np.testing.assert_array_equal(stored, expected * np.float32(2.0 ** round(power)))
        # nothing else is there
        own = sum(np.sum(np.abs(pair.of_head(packed, k)), dtype=np.float64) for k in range(pair.heads.size))
        assert np.sum(np.abs(packed), dtype=np.float64) == pytest.approx(own)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_heads", [5, 8, 19])
@pytest.mark.parametrize("block", [1, 300, 2**16])
def test_packing_is_the_same_in_threads_blocks_and_another_order(dtype, n_heads, block, monkeypatch):
    monkeypatch.setattr(statistics, "_BLOCK_ENTRIES", block)
    factors, images = (values.astype(dtype) for values in draw(9, n_cells=61, n_columns=3, n_heads=n_heads))
    factors[:, :, 1] = 0.3
    images[:, :, 2] = 0.3
    factors[7, 1, 3] = np.nan
    order = np.random.default_rng(0).permutation(61)
    dead = np.arange(n_heads) == 4
    pairs = []
    for inline in (2**18, 0):
        monkeypatch.setattr(statistics, "_INLINE_ENTRIES", inline)
        pairs.append(statistics.pack(heads_of(factors, images, dead), order=order))
    plain = statistics.pack(heads_of(factors, images, dead))
    for pair in pairs:
        np.testing.assert_array_equal(pair.heads, [h for h in range(n_heads) if h not in (1, 3, 4)])
        for name in ("factors", "images"):
            np.testing.assert_array_equal(getattr(pair, name), getattr(plain, name)[:, order])
        np.testing.assert_allclose(pair.sizes, plain.sizes, rtol=1e-12)


@pytest.mark.parametrize("sampling", ["independent", "cyclic"])
@pytest.mark.parametrize("block", [1, 100, 2**16])
def test_offset_scale_layout_and_blocks_change_no_count(sampling, block, monkeypatch):
    monkeypatch.setattr(statistics, "_BLOCK_ENTRIES", block)
    factors, images = (np.round(64 * values) for values in draw(8, n_cells=32, n_columns=5, signal=0.1))
    expected = count(factors, images, n_permutations=200, sampling=sampling)
    assert len(set(expected)) == 3
    for f, z in (
        (factors + 7, images - 5),
        (factors.astype(np.float64) * 2.0**-300, images.astype(np.float64) * 2.0**300),
        (factors.astype(np.float64), images.astype(np.float32)),
        (np.asfortranarray(factors), images[::-1][::-1]),
    ):
        np.testing.assert_array_equal(count(f, z, n_permutations=200, sampling=sampling), expected)


def test_every_permutation_of_a_constant_image_counts(path):
    factors, _ = draw(1, n_cells=7)
    images = np.full(factors.shape, 0.3)
    np.testing.assert_array_equal(count(factors, images, n_permutations=30), [30, 30, 30])
    np.testing.assert_array_equal(count(factors, images, sampling="cyclic"), [6, 6, 6])


@pytest.mark.parametrize("sampling", ["independent", "cyclic"])
def test_dead_heads_are_left_out_and_change_nothing(path, sampling):
    factors, images = draw(3, n_cells=20, n_heads=6)
    alone = count(factors[..., 1:2], images[..., 1:2], sampling=sampling)
    factors[..., 0] = 0.1
    factors[4, 1, 2] = np.nan
    images[4, 1, 3] = np.inf
    dead = np.array([False, False, False, False, True, False])
    result = exceedances(factors, images, dead=dead, sampling=sampling)
    np.testing.assert_array_equal(result.dead, [True, False, True, True, True, False])
    assert result.exceedances[1] == alone[0]
    np.testing.assert_array_equal(dead, [False, False, False, False, True, False])


@pytest.mark.parametrize("sampling", ["independent", "cyclic"])
def test_without_a_living_head_nothing_is_counted(path, sampling):
    factors, images = draw(3)
    steps = []
    result = exceedances(factors, images, dead=np.ones(3, dtype=bool), sampling=sampling, progress=steps.append)
    assert result.dead.all()
    np.testing.assert_array_equal(result.exceedances, 0)
    assert sum(steps) == 3 * result.n_permutations


def test_heads_know_nothing_of_each_other(path):
    factors, images = draw(6, n_heads=19)
    together = count(factors, images)
    order = np.random.default_rng(0).permutation(19)
    np.testing.assert_array_equal(count(factors[..., order], images[..., order]), together[order])
    np.testing.assert_array_equal(count(factors[..., 4:6], images[..., 4:6]), together[4:6])


@pytest.mark.parametrize(
    ("n_cells", "n_columns", "n_heads"), [(3, 1, 1), (4, 2, 3), (25, 3, 5), (36, 2, 18), (37, 1, 2)]
)
@pytest.mark.parametrize(("entries", "inline"), [(2**23, 2**18), (1, 0)])
@pytest.mark.parametrize("engine", ["compiled", "torch"])
def test_cyclic_counts_are_those_of_all_shifts(n_cells, n_columns, n_heads, entries, inline, engine, monkeypatch):
    monkeypatch.setattr(statistics, "TORCH_ENTRIES", entries)
    monkeypatch.setattr(statistics, "_INLINE_ENTRIES", inline)
    if engine == "torch":
        use_torch(monkeypatch)
    factors, images = draw(n_cells, n_cells=n_cells, n_columns=n_columns, n_heads=n_heads)
    every = oracle.shifts(order_of_shifts(n_cells))
    assert every[0] == list(range(n_cells))
    result = exceedances(factors, images, n_permutations=99, sampling="cyclic")
    assert result.n_permutations == n_cells - 1
    np.testing.assert_array_equal(result.exceedances, oracle.exceedances(factors, images, every[1:]))


@pytest.mark.parametrize("n_cells", [130, 144, 149, 151])
@pytest.mark.parametrize("engine", ["compiled", "torch"])
def test_cyclic_statistics_are_the_direct_sums(n_cells, engine, monkeypatch):
    if engine == "torch":
        use_torch(monkeypatch)
    monkeypatch.setattr(statistics, "_INLINE_ENTRIES", 0)
    factors, images = draw(1, n_cells=n_cells, n_columns=5, n_heads=11)
    pair = statistics.pack(heads_of(factors, images))
    found = statistics.cyclic_statistics(pair, device="cpu")
    assert found.shape == (n_cells, 11)
    for head in range(11):
        f, z = (pair.of_head(values, head).astype(np.float64) for values in (pair.factors, pair.images))
        direct = [np.sum(np.roll(f, -shift, axis=0) * z) for shift in range(n_cells)]
        np.testing.assert_allclose(found[:, head], direct, rtol=0, atol=1e-13 * pair.sizes[head])


def test_only_lengths_with_a_fast_transform_are_not_padded():
    assert [n for n in range(3, 40) if not statistics._has_fast_transform(n)] == [17, 19, 23, 29, 31, 34, 37, 38]


def test_cyclic_ranks_are_exactly_uniform_over_the_group():
    factors, images = draw(2, n_cells=31, n_heads=2, signal=0.0)
    ranks = [count(factors[order], images, sampling="cyclic") for order in oracle.shifts(order_of_shifts(31))]
    for head in range(2):
        assert sorted(rank[head] for rank in ranks) == list(range(31))


def test_cyclic_ties_count():
    # the image is 1 at two cells and 0 elsewhere, the factor takes two values: most shifts tie with others
    order = order_of_shifts(24)
    factors, images = np.zeros((24, 1, 1)), np.zeros((24, 1, 1))
    factors[order[:12]], images[order[[0, 5]]] = 1.0, 1.0
    # both cells stay in the half for shifts 0 to 6
    np.testing.assert_array_equal(count(factors, images, sampling="cyclic"), [6])


@pytest.mark.parametrize("sampling", ["independent", "cyclic"])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_progress_adds_up_and_comes_from_the_calling_thread(path, sampling, n_threads, monkeypatch):
    monkeypatch.setattr(statistics, "INLINE_PRODUCTS", 0)
    monkeypatch.setattr(statistics, "_GRAM_COLUMNS", 48)
    factors, images = draw(2)
    factors[..., 1] = 1.0  # a dead head is work done, too
    steps, threads = [], set()

    def progress(step):
        steps.append(step)
        threads.add(threading.current_thread())

    arguments = {"n_permutations": 100, "sampling": sampling}
    result = exceedances(factors, images, **arguments, n_threads=n_threads, progress=progress)
    assert sum(steps) == 3 * result.n_permutations
    assert min(steps) > 0
    assert threads == {threading.current_thread()}


def test_an_interrupt_drops_what_is_queued(monkeypatch):
    monkeypatch.setattr(statistics, "INLINE_PRODUCTS", 0)
    monkeypatch.setattr(statistics, "TASK_PRODUCTS", 1)
    use_form("factor", monkeypatch)
    factors, images = draw(2, n_cells=500)
    done, sums = [], statistics.float64_sums

    def slowly(*arguments):
        done.append(1)
        return sums(*arguments)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(statistics, "float64_sums", slowly)
    with pytest.raises(KeyboardInterrupt):
        count(factors, images, n_permutations=40_000, n_threads=2, progress=interrupt)
    assert len(done) < 5_000
    assert threading.active_count() < 20


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("n_tasks", [0, 1, 2, 500])
def test_results_come_in_order_and_tasks_are_made_as_they_are_needed(n_tasks, n_threads):
    made, found, ahead = [], [], []

    def tasks():
        for number in range(n_tasks):
            made.append(number)
            yield lambda number=number: number

    def done(number):
        found.append(number)
        ahead.append(len(made) - len(found))

    in_threads(tasks(), n_threads, done)
    assert found == list(range(n_tasks))
    assert max(ahead, default=0) <= 8 * n_threads


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_after_an_error_what_has_not_begun_does_not_begin(error):
    begun, go_on = [], threading.Event()

    def task(number):
        begun.append(number)
        if number:
            go_on.wait(20)

    def fail(_):
        threading.Timer(0.2, go_on.set).start()
        raise error

    with pytest.raises(error):
        in_threads((partial(task, number) for number in range(1000)), 2, fail)
    assert len(begun) <= 4


@pytest.mark.parametrize("form", ["factor", "gram"])
@pytest.mark.parametrize("room", [1, 7])
def test_a_device_without_memory_takes_fewer_permutations_at_once(form, room, monkeypatch):
    factors, images = draw(7, n_cells=203, n_columns=7, n_heads=5, signal=0.01)
    expected = count(factors, images, n_permutations=101)
    use_torch(monkeypatch)
    use_form(form, monkeypatch)
    monkeypatch.setattr(statistics, "STORED_INDICES", 203 * 37)
    few, seen = statistics.torch_factor, []

    def limited(pair, f, z, orders):
        seen.append(len(orders))
        if len(orders) > room:
            raise torch.OutOfMemoryError
        return few(pair, f, z, orders)

    monkeypatch.setattr(statistics, "torch_factor", limited)

    def none_at_all(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(statistics, "_torch_gram", none_at_all)
    steps = []
    found = count(factors, images, n_permutations=101, progress=steps.append)
    np.testing.assert_array_equal(found, expected)
    assert sum(steps) == 101 * 5
    assert max(seen) > room
    monkeypatch.setattr(statistics, "torch_factor", lambda *a: few(*a) if a[3][0, 0] == 0 else none_at_all())
    with pytest.raises(DeviceMemoryError, match="out of memory on cpu"):
        count(factors, images, n_permutations=101)


def test_a_device_without_memory_takes_fewer_columns_at_once(monkeypatch):
    use_torch(monkeypatch)
    factors, images = draw(7, n_cells=203, n_columns=7, n_heads=3, signal=0.01)
    expected = count(factors, images, sampling="cyclic")
    transform, room = torch.fft.rfft, 4

    def limited(columns, **arguments):
        if len(columns) > room:
            raise torch.OutOfMemoryError
        return transform(columns, **arguments)

    monkeypatch.setattr(torch.fft, "rfft", limited)
    np.testing.assert_array_equal(count(factors, images, sampling="cyclic"), expected)
    room = 3
    with pytest.raises(DeviceMemoryError, match="out of memory on cpu"):
        count(factors, images, sampling="cyclic")


def test_orders_are_drawn_ahead_in_any_chunks():
    for chunk in (1, 4, 10, 99):
        chunks = list(statistics._drawn_ahead(stream(9), 10, chunk))
        assert [len(orders) for orders in chunks[:-1]] == [chunk] * (len(chunks) - 1)
        np.testing.assert_array_equal(np.concatenate(chunks), stream(9).batch(0, 10))


@pytest.mark.parametrize("sampling", ["independent", "cyclic"])
def test_inputs_and_global_generators_are_left_alone(path, sampling):
    factors, images = draw(2)
    copies = factors.copy(), images.copy()
    factors.flags.writeable = images.flags.writeable = False
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    count(factors, images, sampling=sampling)
    np.testing.assert_array_equal(factors, copies[0])
    np.testing.assert_array_equal(images, copies[1])
    assert torch.equal(torch.random.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_more_permutations_add_to_the_counts_of_fewer():
    factors, images = draw(6)
    few, many = (count(factors, images, n_permutations=m) for m in (40, 400))
    assert np.all((many >= few) & (many <= few + 360))
    assert many.sum() > few.sum()
    np.testing.assert_array_equal(count(factors, images, n_permutations=0), 0)


N_DATA_SETS, N_CELLS, N_PERMUTATIONS = 2000, 40, 39


def simulated(sampling, signal, *, n_data_sets=N_DATA_SETS):
    """Counts of independent data sets: skewed numbers with correlated columns that share ``signal``."""
    mixing = np.array([[1.0, 0.8, 0.2], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    counts = []
    for number in range(n_data_sets):
        rng = np.random.default_rng([3, number])
        shared = signal * rng.normal(size=(N_CELLS, 1))
        factors, images = (rng.exponential(size=(N_CELLS, 3)) @ mixing + shared for _ in range(2))
        chosen = PermutationStream(seed=number, cell_type="T", n_cells=N_CELLS)
        arguments = {"stream": chosen, "n_permutations": N_PERMUTATIONS, "sampling": sampling}
        heads = heads_of(factors[..., None], images[..., None])
        counts.append(factor_exceedances(heads, **arguments).exceedances[0])
    return np.array(counts)


@pytest.fixture
def one_thread():
    """Tiny Fourier transforms wait for threads longer than they take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("sampling", ["independent", "cyclic"])
def test_p_is_uniform_under_the_null_and_small_where_an_effect_is_planted(sampling):
    # 39 permutations, and 39 shifts of 40 cells: b is uniform on 0..39 under the null
    found = simulated(sampling, 0.0)
    spread = np.random.default_rng(2).uniform(size=N_DATA_SETS)
    assert kstest((found + spread) / (N_PERMUTATIONS + 1), "uniform").pvalue > 0.01
    p = p_values(found, n_permutations=N_PERMUTATIONS).p
    for alpha in (0.05, 0.1):
        assert binomtest(int(np.count_nonzero(p <= alpha)), N_DATA_SETS, alpha).pvalue > 0.01
    p = p_values(simulated(sampling, 1.5, n_data_sets=100), n_permutations=N_PERMUTATIONS).p
    assert np.mean(p <= 0.05) > 0.95


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", ["factor", "gram"])
@pytest.mark.parametrize("sampling", ["independent", "cyclic"])
def test_cuda_counts_what_the_cpu_counts(form, sampling, monkeypatch):
    use_form(form, monkeypatch)
    for factors, images in (draw(11, n_cells=503, n_columns=9, n_heads=5, signal=0.005), tied()):
        arguments = {"n_permutations": 500, "sampling": sampling}
        here = count(factors, images, **arguments)
        np.testing.assert_array_equal(count(factors, images, **arguments, device="cuda"), here)
