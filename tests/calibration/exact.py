"""Exact moments beside all permutations, and the p-values that follow from them beside a million drawn ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amici_eval.stats.permutation.exact_moments import pearson3_tail, permutation_moments
from amici_eval.stats.permutation.nulls import factor_draw
from amici_eval.stats.permutation.permutations import PermutationStream
from tests.benchmarks.common import write_table
from tests.builders import heads_of
from tests.oracles.exact_moments import all_statistics

if TYPE_CHECKING:
    from amici_eval.stats.permutation.exact_moments import PermutationMoments
    from tests.calibration.common import Options, Row

QUANTILES = (0.5, 0.1, 0.05, 0.01, 1e-3, 1e-4)
_N_CELLS, _RANK = 60, 3
_LAWS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "skewed": lambda rng, shape: rng.exponential(size=shape),
    "heavy": lambda rng, shape: rng.standard_t(5, size=shape),
    "sparse": lambda rng, shape: np.log1p(rng.poisson(0.3, size=shape)),
}


def run(options: Options) -> None:
    """Write ``exact_moments.csv``, ``exact_drawn.csv`` and ``exact_tail.csv``."""
    write_table(options.results / "exact_moments.csv", [_enumerated(n, options.seed) for n in (3, 4, 5, 6, 7)])
    n_permutations = 2_000 if options.quick else 1_000_000
    drawn, tail = [], []
    for number, name in enumerate(_LAWS):
        rng = np.random.default_rng([options.seed, 4, number])
        factors, images = (_LAWS[name](rng, (_N_CELLS, _RANK, 1)) for _ in range(2))
        images = images.astype(np.float32)
        # the moments belong to the same rounded numbers that the stream permutes
        exact = permutation_moments(factors.astype(np.float32), images)
        stream = PermutationStream(seed=options.seed, cell_type=name, n_cells=_N_CELLS)
        found = factor_draw(
            heads_of(factors, images),
            stream=stream,
            n_threads=1,
        )(0, n_permutations)
        statistics = found.statistics[:, 0] / np.sqrt(exact.variance[0])
        drawn.append({"law": name, "permutations": n_permutations, **_moments(statistics, exact)})
        tail += [{"law": name, **row} for row in _tail(statistics, exact)]
    write_table(options.results / "exact_drawn.csv", drawn)
    write_table(options.results / "exact_tail.csv", tail)


def _enumerated(n_cells: int, seed: int) -> Row:
    """Compare with all ``n_cells!`` permutations."""
    rng = np.random.default_rng([seed, 5, n_cells])
    factors, images = rng.exponential(size=(2, n_cells, _RANK, 2))
    exact = permutation_moments(factors, images)
    every = all_statistics(factors, images, np.zeros(n_cells, dtype=np.int64))
    mean, variance = every.mean(axis=0), every.var(axis=0)
    skewness = ((every - mean) ** 3).mean(axis=0) / variance**1.5
    return {
        "n_cells": n_cells,
        "permutations": len(every),
        "mean_off": float(np.max(np.abs(every[0] - exact.excess - mean) / np.abs(mean))),
        "variance_off": float(np.max(np.abs(exact.variance - variance) / variance)),
        "skewness_off": float(np.max(np.abs(exact.skewness - skewness))),
    }


def _moments(statistics: np.ndarray, exact: PermutationMoments) -> Row:
    """Return how far drawn moments are from the exact ones, in standard errors of the drawing."""
    n = len(statistics)
    skewness = float(exact.skewness[0])
    powers = [statistics**power for power in (1, 2, 3)]
    expected = [0.0, 1.0, skewness]
    off = [(x.mean() - e) / (x.std(ddof=1) / np.sqrt(n)) for x, e in zip(powers, expected, strict=True)]
    names = ("mean_se", "variance_se", "third_se")
    return {"skewness": skewness, **dict(zip(names, map(float, off), strict=True))}


def _tail(statistics: np.ndarray, exact: PermutationMoments) -> list[Row]:
    rows = []
    n = len(statistics)
    for p in QUANTILES:
        # between two statistics, so that no tie is in doubt
        at = float(np.quantile(statistics, 1.0 - p, method="midpoint"))
        counted = np.count_nonzero(statistics >= at) / n
        error = np.sqrt(counted * (1.0 - counted) / n)
        of_moments = float(pearson3_tail(at, exact.skewness[0]))
        rows.append({"p": p, "counted": counted, "pearson": of_moments, "se": (of_moments - counted) / error})
    return rows
