"""Sentences, number formats and folders that figures, tables and the page share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.common.errors import OutputError
from amici_eval.common.text import printable

if TYPE_CHECKING:
    import numpy.typing as npt

    from amici_eval.results.evaluation import HeadEvaluation, Undefined

VALIDITY = {
    "free": (
        "The free null shuffles the cells of a type freely, as if they were exchangeable. In spatially autocorrelated "
        "tissue neighbouring cells resemble each other, so its p-values are too small (anticonservative): a "
        "significant pair is a lead to follow, not a proof."
    ),
    "lag": (
        "The lag null shuffles nothing: prediction and expression keep the smoothness they have, and p says how often "
        "unrelated ones would fit as well; it takes both to have the same mean and the same correlation all over a "
        "section, so that a trend across it, or a type that lives in a few patches, can make p too small."
    ),
    "tile": (
        "The tile null shuffles cells within squares of tissue, which holds only where squares are narrower than "
        "expression is smooth: in wider ones p is too small (anticonservative), in narrow ones little can be found."
    ),
    "sample": (
        "The sample null shuffles the cells of a type freely within each section: differences between sections no "
        "longer count, but wherever neighbouring cells resemble each other its p-values are too small "
        "(anticonservative), as those of the free null are."
    ),
    "torus": (
        "The torus null slides the predictions of a section as a whole over its edges, which keeps them as smooth as "
        "they are; it is made for sections that are filled rectangles without a trend, and holes, odd outlines and "
        "trends make its p-values wrong."
    ),
}
"""What each null assumes, and how that fails, in one sentence or two."""
VALIDITY_SHORT = {
    "free": "free null; anticonservative in spatially autocorrelated tissue",
    "lag": "lag null; can be too lenient for a type in a few patches or with a trend",
    "tile": "tile null; anticonservative where tiles are wider than expression is smooth",
    "sample": "sample null; anticonservative where neighbouring cells resemble each other",
    "torus": "torus null; made for sections that are filled rectangles without a trend",
}
WHY_THIS_ORDER = (
    "Effects come first, p-values second: with thousands of cells p alone says little, because it falls below any "
    "threshold for effects too small to matter. What a head is worth shows in its explained variance with the "
    "interval, in what it adds to predictors without any head, and in what remains on cells that the model was not "
    "fitted on and without the nearest neighbour. p says only whether there is anything at all."
)
BASELINE_NAMES = {
    "full_model": "all heads (whole model)",
    "no_head": "no head",
    "neighbour_types": "types of neighbours",
    "neighbour_expression": "expression of neighbours",
    "position": "position",
    "full_model_without_nearest": "all heads, nearest neighbour masked",
}
BASELINE_MEANINGS = {
    "neighbour_types": "Types of neighbours: ridge regression on how many of a cell's neighbours are of each type.",
    "neighbour_expression": "Expression of neighbours: ridge regression on their mean expression.",
    "position": "Position: a smooth function of where in the section a cell lies.",
}

_DRAWN = {
    "independent": "",
    "cyclic": " as cyclic shifts of one random order",
    "sequential": " at most, stopped once enough exceeded,",
    "gpd": " with a fitted tail",
    "moments": "exact moments of all permutations",
}


def effect(value: float) -> str:
    """Return an explained variance as text with three decimals, or <0.001 or >-0.001 if it would round to zero."""
    if np.isnan(value):
        return "undefined"
    if value != 0 and abs(value) < 5e-4:
        return "<0.001" if value > 0 else ">-0.001"
    return f"{value:.3f}"


def p_text(value: float) -> str:
    """Return a p-value as text: three decimals, or scientific where that says too little."""
    if np.isnan(value):
        return "undefined"
    if value == 0:
        return "0"
    return f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"


def interval(low: float, high: float) -> str:
    """Return a confidence interval of an explained variance as text, empty where there is none."""
    return "" if np.isnan(low) or np.isnan(high) else f"{effect(low)} to {effect(high)}"


def span(values: npt.ArrayLike, *, digits: int = 3) -> str:
    """Return the smallest and the largest of numbers that are defined, as text, or ``undefined``."""
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return "undefined"
    low, high = (rounded(float(value), digits=digits) for value in (numbers.min(), numbers.max()))
    return low if low == high else f"{low} to {high}"


def rounded(value: float, *, digits: int = 3) -> str:
    """Return a length or a count as text with some digits, never in scientific notation above 1."""
    if np.isnan(value):
        return "undefined"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def adjustment_text(evaluation: HeadEvaluation, *, null: str) -> str:
    """Return what the p-values of a null are adjusted by."""
    adjustment = evaluation.spec.permutation.adjustment
    if adjustment == "maxt":
        return "step-down maxT" if null == evaluation.spec.permutation.null else "Holm"
    return adjustment.upper()


def in_sample_text(evaluation: HeadEvaluation) -> str:
    """Return a caveat for counts or marks of significant heads; empty unless cells are in-sample."""
    if False not in evaluation.held_out:
        return ""
    return ", in-sample" if set(evaluation.held_out) == {False} else ", in part in-sample"


def made_folder(directory: str | Path) -> Path:
    """Return the folder, made if missing."""
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            value=f"folder {path} cannot be made ({error.strerror or error})",
            rule="reports need a folder that can be written",
            fix="give another folder",
        ) from error
    return path


def unwritable(path: Path, error: OSError) -> OutputError:
    """Return the error to raise for a file that the system refused to write."""
    return OutputError(
        value=f"{path} cannot be written ({error.strerror or error})",
        rule="the folder must take new files",
        fix="free space or give another folder",
    )


def samplings(evaluation: HeadEvaluation) -> list[str]:
    """Return how the free p-values of each type came about, as ``HeadEvaluation.sampling``; ``none`` without a test."""
    given = evaluation.sampling or ("independent",) * len(evaluation.cell_types)
    tested = (~np.isnan(evaluation.p_value)).any(axis=0)
    return [name if name and has_test else "none" for name, has_test in zip(given, tested, strict=True)]


def permutations_used(evaluation: HeadEvaluation) -> list[int]:
    """Return the number of permutations of each type, 0 without a test."""
    given = evaluation.n_permutations_by_type
    numbers = [evaluation.n_permutations] * len(evaluation.cell_types) if given is None else given.tolist()
    return [0 if name == "none" else int(number) for name, number in zip(samplings(evaluation), numbers, strict=True)]


def permutations_text(evaluation: HeadEvaluation) -> str:
    """Return how many permutations were used and how they were drawn."""
    parts = []
    only_one = set(samplings(evaluation)) <= {"independent", "none"}
    for sampling, how in _DRAWN.items():
        used = [
            number
            for number, name in zip(permutations_used(evaluation), samplings(evaluation), strict=True)
            if name == sampling
        ]
        if used:
            low, high = min(used), max(used)
            types = "" if only_one else f" in {_count(len(used), 'type')}"
            number = f"{low:,}{f' to {high:,}' if high > low else ''} permutations"
            parts.append(f"{how if sampling == 'moments' else number + how}{types}")
    return " and ".join(parts) or f"{evaluation.n_permutations:,} permutations"


def engine_sentence(evaluation: HeadEvaluation) -> str:
    """Return what computed the predictions, and how far the two engines were apart where they were compared."""
    computed = f"Predictions by the {evaluation.engine} engine"
    if evaluation.parity is None:
        return f"{computed}."
    cells = _count(evaluation.parity_cells, "cell")
    if not np.isfinite(evaluation.parity):
        return f"{computed}; on {cells} the factored and the hooked engine differ by no finite number."
    return (
        f"{computed}; on {cells} the factored and the hooked engine differ by at most {evaluation.parity:.2g} in any "
        "predicted value."
    )


def type_reasons(evaluation: HeadEvaluation, cell_type: str) -> str:
    """Return why a type has no explained variance at all, in the words of the evaluation."""
    reasons = [u.reason for u in evaluation.undefined if u.cell_type == cell_type and u.gene is None]
    return "; ".join(dict.fromkeys(reasons)) or "no gene has a defined explained variance"


def undefined_sentences(evaluation: HeadEvaluation) -> list[str]:
    """Return a line per type and reason that says what is undefined: whole types and heads first, then genes."""
    groups: dict[tuple[bool, str, str], list[Undefined]] = {}
    for item in evaluation.undefined:
        groups.setdefault((item.gene is not None, item.cell_type, item.reason), []).append(item)
    lines = []
    for (about_genes, cell_type, reason), items in sorted(groups.items(), key=lambda pair: pair[0][0]):
        if about_genes:
            genes = list(dict.fromkeys(str(u.gene) for u in items))
            more = f" and {len(genes) - 5} more" if len(genes) > 5 else ""
            what = f"{_count(len(genes), 'gene')} ({', '.join(printable(g) for g in genes[:5])}{more})"
        elif any(u.head is None for u in items):
            what = "all heads"
        else:
            heads = sorted({u.head for u in items if u.head is not None})
            what = f"head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"
        lines.append(f"{printable(cell_type)}, {what}: {printable(reason)}")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
