"""significance.json: what the tests were and what came of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from amici_eval.report.sentences import (
    VALIDITY,
    adjustment_text,
    made_folder,
    permutations_used,
    samplings,
    unwritable,
)

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float64

    from amici_eval.results.evaluation import HeadEvaluation

SIGNIFICANCE_SCHEMA_VERSION = 3
_SAMPLINGS = ("independent", "cyclic", "sequential", "gpd", "moments", "none")


def write_significance(evaluation: HeadEvaluation, directory: str | Path) -> Path:
    """Write what the tests were and what came of them to ``directory/significance.json`` and return the file.

    All keys are always there; ``null`` stands for what was not computed or is not finite. ``decided_by`` is the
    spatial null if it was tested, else free; ``test`` describes the free one. ``n_permutations_by_type`` is 0 without
    a test; ``reach`` is the distance up to which the null takes correlation into account, or the tile width, in the
    unit of the coordinates. In a family of pairs, ``n_tests`` (the size of the adjustment) and ``n_undefined`` add up
    to ``n_pairs``, ``undefined_reasons`` to ``n_undefined``.
    """
    settings, spatial, bounds = evaluation.spec.permutation, evaluation.spatial, evaluation.intervals
    gene_reasons = [u.reason for u in evaluation.undefined if u.gene is not None]
    drawn, used = samplings(evaluation), permutations_used(evaluation)
    parity = None
    if evaluation.parity is not None:
        difference = evaluation.parity if np.isfinite(evaluation.parity) else None
        parity = {"max_abs_difference": difference, "n_cells": evaluation.parity_cells}
    record: dict[str, Any] = {
        "schema_version": SIGNIFICANCE_SCHEMA_VERSION,
        "engine": evaluation.engine,
        "decided_by": evaluation.decided_by,
        "test": {
            "null": settings.null,
            "method": settings.method,
            "tail": settings.tail,
            "stop_at": settings.stop_at,
            "convention": settings.convention,
            "n_permutations": evaluation.n_permutations,
            "n_permutations_by_type": _by_type(evaluation, used),
            "alpha": settings.alpha,
            "seed": settings.seed,
            "adjustment": settings.adjustment,
            "spatial": None
            if spatial is None
            else {
                "null": spatial.null,
                "methods": _by_type(evaluation, spatial.method),
                "reach": _by_type(evaluation, _numbers(spatial.reach)),
                "correlation_length": _by_type(evaluation, _numbers(spatial.correlation_length)),
                "alpha": settings.alpha,
                "widths": _by_type(evaluation, [_numbers(one[np.isfinite(one)]) for one in spatial.widths.T]),
            },
        },
        "sampling": {name: drawn.count(name) for name in _SAMPLINGS},
        "families": {
            "heads_x_types": _pairs(evaluation, evaluation.p_value, evaluation.p_value_adj, with_spatial=False),
            "heads_x_types_spatial": None
            if spatial is None
            else {
                "null": spatial.null,
                "adjustment": adjustment_text(evaluation, null=spatial.null).lower(),
                **_pairs(evaluation, spatial.p_value, spatial.p_value_adj, with_spatial=True),
            },
            "genes": None
            if spatial is None
            else {
                "null": "lag",
                "adjustment": adjustment_text(evaluation, null="lag").lower(),
                "n_tests": int(np.count_nonzero(~np.isnan(spatial.p_value_gene))),
                "n_significant": int(np.count_nonzero(spatial.p_value_adj_gene <= settings.alpha)),
                "n_undefined": int(np.count_nonzero(np.isnan(spatial.p_value_gene))),
            },
        },
        "undefined_genes": _counts(gene_reasons),
        "parity": parity,
        "intervals": None
        if bounds is None
        else {
            "confidence": bounds.confidence,
            "n_resamples": bounds.n_resamples,
            "tile_width": _numbers(np.array([bounds.tile_width]))[0],
            "n_tiles": _by_type(evaluation, bounds.n_tiles.tolist()),
        },
        "baselines": None
        if evaluation.trivial is None
        else {"names": list(evaluation.trivial.names), "fitted_on": evaluation.trivial.fitted_on},
        "validity": {
            null: VALIDITY[null]
            for null in dict.fromkeys((evaluation.decided_by, "lag" if spatial is not None else "", settings.null))
            if null in VALIDITY
        },
    }
    path = made_folder(directory) / "significance.json"
    try:
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def _pairs(
    evaluation: HeadEvaluation,
    p: Float64[np.ndarray, "heads types"],
    adjusted: Float64[np.ndarray, "heads types"],
    *,
    with_spatial: bool,
) -> dict[str, Any]:
    """Return the counts of a family of heads x types."""
    untested = np.isnan(p)
    reasons = _pair_reasons(evaluation, with_spatial=with_spatial)
    return {
        "n_heads": evaluation.n_heads,
        "n_types": len(evaluation.cell_types),
        "n_pairs": p.size,
        "n_tests": int(np.count_nonzero(~untested)),
        "n_significant": int(np.count_nonzero(adjusted <= evaluation.spec.permutation.alpha)),
        "n_undefined": int(np.count_nonzero(untested)),
        "undefined_reasons": _counts(
            "; ".join(reasons.get((int(head), evaluation.cell_types[index]), []))
            for head, index in np.argwhere(untested)
        ),
    }


def _pair_reasons(evaluation: HeadEvaluation, *, with_spatial: bool) -> dict[tuple[int, str], list[str]]:
    """Return why heads have no test; reasons of the spatial null are left out unless ``with_spatial``."""
    given = [
        (-1 if item.head is None else item.head, item.cell_type, item.reason)
        for item in evaluation.undefined
        if item.gene is None
    ]
    if with_spatial and evaluation.spatial is not None:
        given += evaluation.spatial.reasons
    reasons: dict[tuple[int, str], list[str]] = {}
    for head, cell_type, reason in given:
        for one in range(evaluation.n_heads) if head < 0 else (head,):
            reasons.setdefault((one, cell_type), []).append(reason)
    return reasons


def _by_type(evaluation: HeadEvaluation, values: Any) -> dict[str, Any]:
    return dict(zip(evaluation.cell_types, values, strict=True))


def _numbers(values: Float64[np.ndarray, " numbers"]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _counts(reasons: Any) -> dict[str, int]:
    counted = pd.Series(list(reasons), dtype=object).replace("", "no reason recorded").value_counts()
    return {str(reason): int(counted[reason]) for reason in sorted(counted.index)}
