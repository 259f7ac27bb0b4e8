"""Side by side with amici-st: same model, data and number of permutations; time, memory, agreement of numbers."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.benchmarks.clock import cost_of, process_peak_mb
from tests.benchmarks.common import Job, Options, measure, say, write_table
from tests.benchmarks.engines import SIDES, Source, settings, time_evaluation, warm_up

if TYPE_CHECKING:
    from tests.benchmarks.common import Emit, Row

_BATCH = 32  # of amici-st's own permutations


@dataclass(frozen=True)
class Case:
    """A model on a tissue, and how many permutations per head and type (``None``: the default of both sides)."""

    name: str
    source: Source
    n_permutations: int | None


def run(options: Options) -> None:
    """Measure all cases and write ``reference.csv``, ``agreement.csv`` and ``compile.csv``."""
    rows, agreement = [], []
    with options.folder("reference") as scratch:
        cases = [simulated_case(scratch, quick=options.quick)]
        cases += [Case(Path(data).stem, Source(model, data), None) for model, data in options.real]
        write_table(options.results / "compile.csv", _compile_times(cases[0], scratch, options))
        for case in cases:
            sides = [side for side, engine in SIDES.items() if options.engine in (None, engine)]
            for side in (*sides, "amici-st"):
                numbers = scratch / f"{case.name}-{side}.npz"
                for row in measure(_job(case, side, numbers, options), options):
                    rows.append({"case": case.name, "side": side, **row})
                    say(f"{case.name}, {side}: {row['wall_s']:.2f} s ({row['basis']})")
                write_table(options.results / "reference.csv", rows)
            for side in sides:
                both = [scratch / f"{case.name}-{name}.npz" for name in (side, "amici-st")]
                if all(path.is_file() for path in both):
                    agreement.append({"case": case.name, "side": side, **compare(*both)})
            write_table(options.results / "agreement.csv", agreement)


def simulated_case(folder: Path, *, quick: bool) -> Case:
    """Simulate a tissue and give it a model with random weights."""
    from amici_eval.data.simulate import TissueSpec, simulate_tissue
    from tests.benchmarks.tissues import random_model

    n_cells, n_types = (240, 3) if quick else (6000, 6)
    side = 10.0 * n_cells**0.5
    spec = TissueSpec(
        n_cells=n_cells,
        n_genes=12 if quick else 300,
        cell_types=tuple(f"type_{index}" for index in range(n_types)),
        proportions=(1 / n_types,) * n_types,
        effects=(),
        window_um=(side, side),
        n_markers=2,
        mean_counts=300.0,
    )
    adata = simulate_tissue(spec).adata
    adata.write_h5ad(folder / "simulated.h5ad")
    small = {"n_nn_embed": 16, "n_nn_embed_hidden": 16, "n_kv_dim": 16, "n_pos_coef_mlp_hidden": 16} if quick else {}
    heads, size, neighbours = (2, 4, 6) if quick else (8, 32, 50)
    model = random_model(adata, n_heads=heads, head_size=size, n_neighbors=neighbours, **small)
    model.save(folder / "simulated-model")
    source = Source(str(folder / "simulated-model"), str(folder / "simulated.h5ad"))
    return Case("simulated", source, 40 if quick else 960)


def _job(case: Case, side: str, numbers: Path, options: Options) -> Job:
    arguments: Row = {
        "model": case.source.model,
        "data": case.source.data,
        "n_permutations": case.n_permutations,
        "numbers": str(numbers),
    }
    if side == "amici-st":
        return Job(function=f"{__name__}:measure_amici_st", arguments={**arguments, "limit_s": options.limit_s})
    repeats = 1 if side == "hooked" else options.repeats
    return Job(function=f"{__name__}:measure_ours", arguments={**arguments, "side": side, "repeats": repeats})


def measure_ours(
    emit: Emit, *, model: str, data: str, side: str, n_permutations: int | None, repeats: int, numbers: str
) -> None:
    """Time our evaluation, from loaded model and data to all numbers, after a warm-up on a tiny part of the data."""
    from amici_eval.data.tissue import prepare
    from amici_eval.settings.evaluation import DataSpec

    trained, adata = Source(model, data).load()
    warm_up(trained, adata, side)
    started = time.perf_counter()
    tissue = prepare(adata, trained.card, DataSpec())
    prepare_s = time.perf_counter() - started
    timing = time_evaluation(trained, tissue, settings(side, n_permutations=n_permutations), repeats=repeats)
    result, cost = timing.cost.value, timing.cost
    np.savez(
        numbers,
        cell_types=np.array(result.cell_types),
        genes=np.array(result.genes),
        expl_var_gene=result.expl_var_gene,
        expl_var=result.expl_var,
        exceedances=np.where(result.exceedances < 0, np.nan, result.exceedances),
        n_permutations=result.n_permutations,
    )
    emit(
        {
            **_sizes(trained.card, tissue.n_cells, len(result.cell_types), result.n_permutations),
            **cost.row(),
            "open_s": timing.open_s,
            "check_s": prepare_s,
            "basis": "measured",
        }
    )


def measure_amici_st(
    emit: Emit, *, model: str, data: str, n_permutations: int | None, limit_s: float, numbers: str
) -> None:
    """Time amici-st's own explained variance; pairs of head and type only, if all would take longer than the limit."""
    from amici_eval.model.cards import card_of

    started = time.perf_counter()
    native = Source(model, data).load_native()
    open_s = time.perf_counter() - started
    card = card_of(native, adata=native.adata)
    labels = native.adata.obs[card.labels_key]
    counts = labels.value_counts()
    counts = counts[counts > 0].sort_values()
    if n_permutations is None:
        n_permutations = _module()._min_n_permutations(card.n_heads, len(counts), 0.05)
    estimate = _estimate(native, counts, card.n_heads, n_permutations)
    say(f"amici-st: about {estimate:.0f} s expected")
    measured = _everything if estimate <= limit_s else _some_pairs
    values, row = measured(native, counts, card, n_permutations)
    np.savez(numbers, genes=np.array(card.genes), n_permutations=n_permutations, **values)
    emit({**_sizes(card, native.adata.n_obs, len(counts), n_permutations), **row, "open_s": open_s})


def _module() -> Any:
    from amici.interpretation import AMICIExplainedVarianceModule

    return AMICIExplainedVarianceModule


def _sizes(card: Any, n_cells: int, n_types: int, n_permutations: int) -> Row:
    return {
        "n_cells": n_cells,
        "n_genes": len(card.genes),
        "n_heads": card.n_heads,
        "n_neighbors": card.n_neighbors,
        "n_types": n_types,
        "n_permutations": n_permutations,
    }


def _estimate(native: Any, counts: Any, n_heads: int, n_permutations: int) -> float:
    """Guess the time of the whole call from one type of middling size and one batch of permutations."""
    cell_type, n_cells = counts.index[len(counts) // 2], int(counts.iloc[len(counts) // 2])
    started = time.perf_counter()
    predictions, truth = _module()._get_ct_predictions_for_ablated_head(
        native, adata=native.adata, head_idx=0, cell_type=cell_type
    )
    halfway = time.perf_counter()
    _module()._run_permutation_test_expl_variance(predictions, truth, _BATCH)
    ended = time.perf_counter()
    per_cell = (halfway - started + (ended - halfway) * n_permutations / _BATCH) / n_cells
    return per_cell * n_heads * int(counts.sum())


def _everything(native: Any, counts: Any, card: Any, n_permutations: int) -> tuple[dict[str, Any], Row]:
    cost = cost_of(lambda: native.get_expl_variance_scores(n_permutations=n_permutations))
    table = cost.value._explained_variance_df
    types = sorted(str(name) for name in counts.index)
    shape = (card.n_heads, len(types))
    per_gene = np.full((*shape, len(card.genes)), np.nan)
    values = np.full(shape, np.nan)
    exceedances = np.full(shape, np.nan)
    for (head, cell_type), rows in table.groupby(["head", "ct_name"], observed=True, sort=False):
        place = (head, types.index(str(cell_type)))
        per_gene[place] = rows["expl_var_head_gene"]
        values[place] = rows["expl_var_head"].iloc[0]
        exceedances[place] = np.rint(rows["p_value_head"].iloc[0] * n_permutations)
    numbers = {"expl_var_gene": per_gene, "expl_var": values, "exceedances": exceedances}
    return {"cell_types": np.array(types), **numbers}, {**cost.row(), "basis": "measured"}


def _some_pairs(native: Any, counts: Any, card: Any, n_permutations: int) -> tuple[dict[str, Any], Row]:
    """Measure head 0 of a small, a middling and the largest type with amici-st's own functions and extrapolate.

    Cost is fitted as a constant plus a share per cell, both not negative. The table that amici-st builds row by row
    and the adjustment of its p-values are left out, in its favour.
    """
    from scipy.optimize import nnls

    module = _module()
    types = sorted(str(name) for name in counts.index)
    chosen = sorted({len(counts) // 4, len(counts) // 2, len(counts) - 1})
    shape = (card.n_heads, len(types))
    per_gene = np.full((*shape, len(card.genes)), np.nan)
    values, exceedances = np.full(shape, np.nan), np.full(shape, np.nan)
    sizes, walls, busy, above = [], [], [], 0.0

    for row in chosen:
        cell_type = counts.index[row]

        def pair(cell_type: Any = cell_type) -> tuple[Any, Any, float]:
            predictions, truth = module._get_ct_predictions_for_ablated_head(
                native, adata=native.adata, head_idx=0, cell_type=cell_type
            )
            gene = module._compute_expl_variance(predictions - truth, truth)
            whole = module._compute_expl_variance(predictions - truth, truth, aggregate_across_genes=True)
            return gene, whole, module._run_permutation_test_expl_variance(predictions, truth, n_permutations)

        cost = cost_of(pair)
        place = (0, types.index(str(cell_type)))
        per_gene[place], values[place], p = cost.value
        exceedances[place] = np.rint(p * n_permutations)
        sizes.append(int(counts.iloc[row]))
        walls.append(cost.wall_s)
        busy.append(cost.cpu_s)
        above = max(above, cost.above_mb)

    design = np.stack([np.ones(len(sizes)), np.array(sizes)], axis=1)

    def whole_call(seconds: list[float]) -> float:
        constant, per_cell = nnls(design, np.array(seconds))[0]
        return float(card.n_heads * (constant * len(counts) + per_cell * int(counts.sum())))

    row = {
        "wall_s": whole_call(walls),
        "cpu_s": whole_call(busy),
        "peak_mb": process_peak_mb(),
        "above_mb": above,
        "basis": f"extrapolated from {len(chosen)} of {card.n_heads * len(counts)} pairs",
        "repeats": 1,
    }
    numbers = {"expl_var_gene": per_gene, "expl_var": values, "exceedances": exceedances}
    return {"cell_types": np.array(types), **numbers}, row


def compare(ours: Path, theirs: Path) -> Row:
    """Compare two sides where both have a value.

    Both draw their own permutations, so counts differ at random: with a common p, the difference of two counts has
    variance 2 m p (1 - p), and .27 % of the tests lie beyond three standard deviations.
    """
    a, b = np.load(ours), np.load(theirs)
    order = [list(b["cell_types"]).index(name) for name in a["cell_types"]]
    m = int(a["n_permutations"])
    gene = np.abs(a["expl_var_gene"] - b["expl_var_gene"][:, order])
    whole = np.abs(a["expl_var"] - b["expl_var"][:, order])
    left, right = a["exceedances"], b["exceedances"][:, order]
    both = np.isfinite(left) & np.isfinite(right)
    left, right = left[both], right[both]
    p = (left + right + 1) / (2 * m + 2)
    z = np.abs(left - right) / np.sqrt(2 * m * p * (1 - p))
    return {
        "max_abs_gene": _largest(gene),
        "max_abs_aggregated": _largest(whole),
        "values_compared": int(np.isfinite(gene).sum()),
        "tests_compared": int(both.sum()),
        "tests_without_ours": int((~np.isfinite(a["exceedances"]) & np.isfinite(b["exceedances"][:, order])).sum()),
        "max_count_difference": _largest(np.abs(left - right)),
        "max_z": _largest(z),
        "beyond_three_sd": int((z > 3).sum()),
    }


def _largest(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else float("nan")


def _compile_times(case: Case, scratch: Path, options: Options) -> list[Row]:
    """Time the very first evaluation, with an empty cache of compiled code, and that of the next process."""
    rows = []
    for state in ("cold", "warm"):
        job = Job(
            function=f"{__name__}:measure_first_call",
            arguments={"model": case.source.model, "data": case.source.data},
            environment={"NUMBA_CACHE_DIR": str(scratch / "numba-cache")},
        )
        rows += [{"cache": state, **row} for row in measure(job, replace(options, repeats=1))]
    return rows


def measure_first_call(emit: Emit, *, model: str, data: str) -> None:
    """Time the first evaluations of a process on a tiny part of the data, and the same again."""
    started = time.perf_counter()
    import amici  # noqa: F401

    import_s = time.perf_counter() - started
    trained, adata = Source(model, data).load()
    emit(
        {
            "import_s": import_s,
            "first_s": warm_up(trained, adata, "catalogue"),
            "second_s": warm_up(trained, adata, "catalogue"),
        }
    )
