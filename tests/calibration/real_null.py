"""What is found by trained models where there is nothing to find: real tissue whose expression was moved about."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from tests.benchmarks.common import say, write_table
from tests.calibration.common import spread

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from tests.calibration.common import Options, Row

FILE = "osmfish_sscortex.h5ad"
WAYS = ("shuffled", "slid", "as it is")
"""Within each type: any order; a shift of the whole type, which leaves expression as smooth as it was; no change."""
_ALPHA = 0.05
_HELD_OUT_SHARE = 0.3


def run(options: Options) -> None:
    """Write ``real_null.csv``; without AMICI or data nothing is done."""
    path = None if options.data is None else options.data / FILE
    if path is None or not path.is_file():
        say(f"real_null left out: no {FILE}; set --data DIR")
        return
    try:
        import amici  # noqa: F401
    except ImportError:
        say("real_null left out: amici cannot be imported")
        return
    if options.quick:
        say("real_null left out: it is slow")
        return
    jobs = [
        {"path": path, "way": way, "number": number, "seed": options.seed}
        for number, way in [*product((0, 1, 2), WAYS[:2]), (0, WAYS[2])]
    ]
    write_table(options.results / "real_null.csv", spread(one_training, jobs, workers=options.workers))


def one_training(*, path: Path, way: str, number: int, seed: int, max_epochs: int = 15) -> list[Row]:
    """Train a model on moved expression and count the heads that are significant, in-sample and held out."""
    import anndata

    from amici_eval.evaluation.pipeline import evaluate
    from amici_eval.model.training import DEMO_TRAINING, train_amici
    from amici_eval.settings.evaluation import AblationSpec, DataSpec, EvaluationSpec, PermutationSpec, SubsetSpec

    adata = moved(anndata.read_h5ad(path), way, np.random.default_rng([seed, 11, number]))
    # a region, not a random draw: a cell with training cells around it is not held out
    y = adata.obsm["spatial"][:, 1]
    train = np.flatnonzero(y > np.quantile(y, _HELD_OUT_SHARE))
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = replace(DEMO_TRAINING, max_epochs=max_epochs)
        model = train_amici(adata, seed=seed + number, train_indices=train, **recipe.kwargs())
        for held_out in (False, True):
            spec = EvaluationSpec(
                data=DataSpec(subset=SubsetSpec(held_out=held_out)),
                ablation=AblationSpec(modes=("keep_one",), baselines=False, without_nearest=False),
                permutation=PermutationSpec(n_permutations=999, n_bootstrap=0, seed=seed),
            )
            found = evaluate(model, adata, spec)
            assert found.spatial is not None
            row: Row = {"way": way, "number": number, "cells": "held out" if held_out else "in-sample"}
            row["expl_var_full"] = float(np.nanmedian(found.expl_var_full))
            for name, p, adjusted in (
                ("free", found.p_value, found.p_value_adj),
                ("lag", found.spatial.p_value, found.spatial.p_value_adj),
            ):
                row[f"{name}_tests"] = int(np.isfinite(p).sum())
                row[f"{name}_at_05"] = int((p <= _ALPHA).sum())
                row[f"{name}_significant"] = int((adjusted <= _ALPHA).sum())
            rows.append(row)
    return rows


def moved(adata: AnnData, way: str, rng: np.random.Generator) -> AnnData:
    """Return a copy in which cells of a type have one another's expression."""
    moved_to = np.arange(adata.n_obs)
    xy = np.asarray(adata.obsm["spatial"], dtype=np.float64)
    labels = adata.obs["cell_type"].astype(str).to_numpy()
    if way != "as it is":
        for cell_type in np.unique(labels):
            rows = np.flatnonzero(labels == cell_type)
            moved_to[rows] = rows[_shuffled(len(rows), rng) if way == "shuffled" else _slid(xy[rows], rng)]
    copy = adata.copy()
    copy.X = np.asarray(adata.X)[moved_to]
    return copy


def _shuffled(n_cells: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(n_cells)


def _slid(xy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return whose expression each cell gets if all slide over the edges, every cell's being taken once."""
    low, box = xy.min(axis=0), np.ptp(xy, axis=0) * (1.0 + 1.0 / np.sqrt(len(xy)))
    # at least a quarter of the window away, so that expression leaves its neighbourhood
    slide = rng.uniform(0.25, 0.75, 2) * box
    there = np.mod(xy - low + slide, box)
    away = [np.minimum(d, side - d) for d, side in ((cdist(there[:, [i]], (xy - low)[:, [i]]), box[i]) for i in (0, 1))]
    return linear_sum_assignment(np.hypot(*away))[1]
