"""Sentences, number formats and folders that figures, tables and the page share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.errors import OutputError

if TYPE_CHECKING:
    from amici_eval.results import HeadEvaluation, Undefined

__all__ = [
    "BASELINE_NAMES",
    "VALIDITY",
    "VALIDITY_SHORT",
    "effect",
    "engine_sentence",
    "made_folder",
    "p_text",
    "permutations_text",
    "permutations_used",
    "printable",
    "samplings",
    "type_reasons",
    "undefined_sentences",
    "unwritable",
]

VALIDITY = {
    "free": (
        "The free null shuffles the cells of a type freely, as if they were exchangeable. In spatially autocorrelated "
        "tissue neighbouring cells resemble each other, so its p-values are too small (anticonservative): a "
        "significant pair is a lead to follow, not a proof."
    )
}
VALIDITY_SHORT = {"free": "free null; anticonservative in spatially autocorrelated tissue"}
BASELINE_NAMES = {"full_model": "all heads (whole model)", "no_head": "no head"}

# control characters, lone surrogates and the two non-characters: XML forbids them, terminals obey them
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def printable(text: object, *, longest: int | None = None) -> str:
    """Return text that is safe to draw and print: no control characters, cut with an ellipsis if too long."""
    safe = _UNPRINTABLE.sub("\ufffd", str(text))
    return safe if longest is None or len(safe) <= longest else safe[: longest - 1] + "…"


def effect(value: float) -> str:
    """Return an explained variance as text with three decimals; what would round to zero says on which side it is."""
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


def made_folder(directory: str | Path) -> Path:
    """Return the folder, made if missing.

    Raises
    ------
    OutputError
        If it cannot be made.
    """
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
    """Return how the permutations of each type were drawn: ``independent``, ``cyclic``, or ``none`` without a test."""
    given = evaluation.sampling or ("independent",) * len(evaluation.cell_types)
    tested = (evaluation.exceedances >= 0).any(axis=0)
    return [name if name and has_test else "none" for name, has_test in zip(given, tested, strict=True)]


def permutations_used(evaluation: HeadEvaluation) -> list[int]:
    """Return the number of permutations of each type, 0 without a test."""
    given = evaluation.n_permutations_by_type
    numbers = [evaluation.n_permutations] * len(evaluation.cell_types) if given is None else given.tolist()
    return [0 if name == "none" else int(number) for name, number in zip(samplings(evaluation), numbers, strict=True)]


def permutations_text(evaluation: HeadEvaluation) -> str:
    """Return how many permutations were used and how they were drawn."""
    parts = []
    for sampling, how in (("independent", ""), ("cyclic", " as cyclic shifts of one random order")):
        used = [
            number
            for number, name in zip(permutations_used(evaluation), samplings(evaluation), strict=True)
            if name == sampling
        ]
        if used:
            low, high = min(used), max(used)
            types = f" in {_count(len(used), 'type')}" if "cyclic" in evaluation.sampling else ""
            parts.append(f"{low:,}{f' to {high:,}' if high > low else ''} permutations{how}{types}")
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
