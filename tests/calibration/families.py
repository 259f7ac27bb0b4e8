"""Errors over whole families of tests; tests that stop early; p-values from a fitted tail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import norm

from amici_eval.stats.permutation.exact_moments import pearson3_tail, permutation_moments
from amici_eval.stats.permutation.nulls import factor_draw
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.pvalues import (
    adjust_p_values,
    max_t_p_values,
    p_values,
    sequential_exceedances,
    tail_p_values,
)
from tests.benchmarks.common import write_table
from tests.builders import heads_of
from tests.calibration.common import spread

if TYPE_CHECKING:
    from tests.calibration.common import Options, Row

_N_CELLS, _RANK, _N_HEADS, _N_TYPES = 40, 3, 4, 5
_ALPHA = 0.05


def run(options: Options) -> None:
    """Write ``families.csv``, ``fdr.csv``, ``sequential.csv`` and ``tails.csv``."""
    n = options.simulations(1000)
    half = -(-n // 2)
    jobs = [{"first": first, "last": min(first + half, n), "seed": options.seed} for first in range(0, n, half)]
    rows = spread(family_wise, jobs, workers=options.workers)
    write_table(
        options.results / "families.csv",
        [_rate(method, [row[method] for row in rows]) for method in ("maxt", "holm", "none")],
    )
    write_table(options.results / "fdr.csv", _false_discoveries(options))
    write_table(options.results / "sequential.csv", _sequential(options))
    write_table(options.results / "tails.csv", _tails(options))


def _rate(method: str, errors: list[bool]) -> Row:
    rate, n = float(np.mean(errors)), len(errors)
    return {"method": method, "simulations": n, "rate": rate, "se": float(np.sqrt(max(rate * (1 - rate), 1 / n) / n))}


def _heads(rng: np.random.Generator, *, shared: float, effect: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return heads whose factors have a part in common; with an effect, it is in expression, too."""
    common = rng.exponential(size=(_N_CELLS, _RANK, 1))
    factors = np.sqrt(shared) * common + np.sqrt(1.0 - shared) * rng.exponential(size=(_N_CELLS, _RANK, _N_HEADS))
    images = rng.exponential(size=(_N_CELLS, _RANK, 1)) + effect * common
    return factors, np.repeat(images, _N_HEADS, axis=2).astype(np.float32)


def family_wise(*, first: int, last: int, seed: int) -> list[Row]:
    """Whether anything is rejected where all is null: 4 heads that resemble each other in 5 types."""
    n_permutations = 399
    rows = []
    for number in range(first, last):
        rng = np.random.default_rng([seed, 7, number])
        observed = np.empty((_N_HEADS, _N_TYPES))
        permuted = np.empty((n_permutations, _N_HEADS, _N_TYPES))
        p = np.empty((_N_HEADS, _N_TYPES))
        for index in range(_N_TYPES):
            factors, images = _heads(rng, shared=0.7)
            stream = PermutationStream(seed=number, cell_type=f"type {index}", n_cells=_N_CELLS)
            found = factor_draw(
                heads_of(factors, images),
                stream=stream,
                n_threads=1,
            )(0, n_permutations)
            deviation = np.sqrt(permutation_moments(factors, images).variance)
            observed[:, index], permuted[:, :, index] = found.observed / deviation, found.statistics / deviation
            p[:, index] = p_values(np.count_nonzero(found.reached, axis=0), n_permutations=n_permutations).p
        adjusted = {"maxt": max_t_p_values(observed, permuted), "holm": adjust_p_values(p, method="holm"), "none": p}
        rows.append({name: bool((values <= _ALPHA).any()) for name, values in adjusted.items()})
    return rows


def _false_discoveries(options: Options) -> list[Row]:
    """Share of false discoveries among 200 tests of which 40 have an effect, with and without dependence."""
    n_tests, n_effects = 200, 40
    rows = []
    for correlation in (0.0, 0.5):
        rates: dict[str, list[tuple[float, float]]] = {"bh": [], "by": []}
        for number in range(options.simulations(2000)):
            rng = np.random.default_rng([options.seed, 8, number, round(10 * correlation)])
            z = np.sqrt(correlation) * rng.normal() + np.sqrt(1.0 - correlation) * rng.normal(size=n_tests)
            z[:n_effects] += 3.0
            for method, found in rates.items():
                rejected = adjust_p_values(norm.sf(z), method=method) <= _ALPHA
                false = np.count_nonzero(rejected[n_effects:])
                found.append((false / max(1, np.count_nonzero(rejected)), rejected[:n_effects].mean()))
        for method, found in rates.items():
            fdp, power = np.array(found).T
            error = float(fdp.std() / np.sqrt(len(fdp)))
            row = {"correlation": correlation, "method": method, "simulations": len(fdp), "fdr": float(fdp.mean())}
            rows.append({**row, "se": error, "power": float(power.mean()), "bound": _ALPHA * (1 - n_effects / n_tests)})
    return rows


def _sequential(options: Options) -> list[Row]:
    """Compare tests stopped at 20 exceedances with all permutations, with nothing to find and with something."""
    n_permutations = 2_000
    rows = []
    for effect in (0.0, 0.4):
        fixed, early, needed = [], [], []
        for number in range(options.simulations(150)):
            rng = np.random.default_rng([options.seed, 9, number])
            factors, images = _heads(rng, shared=0.5, effect=effect)
            stream = PermutationStream(seed=number, cell_type="T", n_cells=_N_CELLS)
            draw = factor_draw(
                heads_of(factors, images),
                stream=stream,
                n_threads=1,
            )
            whole = np.count_nonzero(draw(0, n_permutations).reached, axis=0)
            fixed.append(p_values(whole, n_permutations=n_permutations).p)
            found = sequential_exceedances(draw, max_permutations=n_permutations)
            early.append(found.p)
            needed.append(found.n_permutations)
        p, q = np.array(early), np.array(fixed)
        rows.append(
            {
                "effect": effect,
                "simulations": len(p),
                "tests": p.size,
                "mean_difference": float((p - q).mean()),
                "typical_difference": float(np.sqrt(np.square(p - q).mean())),
                "fixed_at_05": float((q <= _ALPHA).mean()),
                "early_at_05": float((p <= _ALPHA).mean()),
                "other_side": float(((q <= _ALPHA) != (p <= _ALPHA)).mean()),
                "saved": 1.0 - float(np.mean(needed)) / n_permutations,
            }
        )
    return rows


def _tails(options: Options) -> list[Row]:
    """Compare p of a fitted tail, from 2,000 permutations, with the share of far more of them."""
    per_fit, repeats = 2_000, 3 if options.quick else 200
    n_truth = 20_000 if options.quick else 2_000_000
    target = 1e-4
    rows = []
    for number, name in enumerate(("normal", "skewed")):
        rng = np.random.default_rng([options.seed, 10, number])
        draw = rng.normal if name == "normal" else rng.exponential
        factors, images = draw(size=(60, _RANK, 1)), draw(size=(60, _RANK, 1)).astype(np.float32)
        stream = PermutationStream(seed=options.seed, cell_type=name, n_cells=60)
        # other permutations than those that are fitted
        far = factor_draw(
            heads_of(factors, images),
            stream=stream,
            n_threads=1,
        )(10**6, 10**6 + n_truth).statistics
        at = float(np.quantile(far[:, 0], 1.0 - target))
        own = factor_draw(
            heads_of(factors, images),
            stream=stream,
            n_threads=1,
        )(0, per_fit * repeats)
        exact = permutation_moments(factors.astype(np.float32), images)
        by_moments = pearson3_tail(at / np.sqrt(exact.variance), exact.skewness)
        fits = [tail_p_values(at, own.statistics[i * per_fit : (i + 1) * per_fit, 0]) for i in range(repeats)]
        ratio = np.array([fit.p for fit in fits]) / target
        low, middle, high = np.quantile(ratio, [0.05, 0.5, 0.95])
        rows.append(
            {
                "law": name,
                "fits": repeats,
                "fitted": float(np.mean([fit.fits for fit in fits])),
                "ratio_05": float(low),
                "ratio": float(middle),
                "ratio_95": float(high),
                "moments_ratio": float(by_moments[0]) / target,
            }
        )
    return rows
