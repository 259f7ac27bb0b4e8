"""The section of the page on heads taken away: the heads and pairs that matter most in each type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amici_eval.report.markup import cell, row, section, table
from amici_eval.report.sentences import effect

if TYPE_CHECKING:
    from jaxtyping import Float64

    from amici_eval.results.evaluation import HeadEvaluation

__all__ = ["ablations_section"]

_CAPTION = (
    "Lost without it: what the whole model explains more than the model without this head. Fair share: Shapley value; "
    "the shares of a type add up to all heads minus no head. Interaction below 0: two heads explain partly the same; "
    "above 0: they explain more together than the sum of what each adds. All numbers are in tables/ablations.csv and "
    "tables/head_interactions.csv."
)


def ablations_section(evaluation: HeadEvaluation) -> str:
    """Return the section, or nothing if neither what is lost nor shares nor interactions were computed."""
    ablations = evaluation.ablations
    if ablations is None:
        return ""
    header = ["Receiver type", "EV, all heads"]
    columns = []
    if "leave_one_out" in ablations.modes:
        header += ["Most missed head", "Lost without it"]
        columns.append(evaluation.expl_var_full - ablations.of("leave_one_out"))
    if "shapley" in ablations.modes:
        header += ["Head with the largest share", "Fair share"]
        columns.append(ablations.of("shapley"))
    first, second = np.triu_indices(evaluation.n_heads, k=1)
    pairs = ablations.interaction[:, first, second]
    with_pairs = bool(np.isfinite(pairs).any())
    if with_pairs:
        header += ["Most alike", "Interaction", "Most in need of each other", "Interaction"]
    if not columns and not with_pairs:
        return ""
    names = [f"{a} + {b}" for a, b in zip(first, second, strict=True)]
    heads = [str(head) for head in range(evaluation.n_heads)]
    rows = []
    for index in np.flatnonzero(~np.isnan(evaluation.expl_var_full)):
        cells = [cell(effect(float(evaluation.expl_var_full[index])))]
        for values in columns:
            cells += _largest(heads, values[:, index])
        if with_pairs:
            # a pair that is merely the least of all is neither alike nor in need
            cells += _largest(names, np.where(pairs[index] < 0, -pairs[index], np.nan), sign=-1.0)
            cells += _largest(names, np.where(pairs[index] > 0, pairs[index], np.nan))
        rows.append(row(evaluation.cell_types[index], cells))
    return section("ablations", "Heads taken away", table(header, rows, _CAPTION)) if rows else ""


def _largest(names: list[str], values: Float64[np.ndarray, " names"], *, sign: float = 1.0) -> list[str]:
    if np.isnan(values).all():
        return [cell("–"), cell("")]
    best = int(np.nanargmax(values))
    return [cell(names[best]), cell(effect(sign * float(values[best])))]
