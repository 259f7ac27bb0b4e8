"""Files of results for programs: tables as CSV and Parquet, and significance.json."""

from __future__ import annotations

import csv
import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from amici_eval.common.errors import OutputError
from amici_eval.common.text import csv_text, from_csv_text, slugify
from amici_eval.report.evaluation_sentences import VALIDITY, adjustment_text, permutations_used, samplings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from jaxtyping import Float64

    from amici_eval.results.comparison import HeadComparison
    from amici_eval.results.evaluation import HeadEvaluation

SIGNIFICANCE_SCHEMA_VERSION = 3
_SAMPLINGS = ("independent", "cyclic", "sequential", "gpd", "moments", "none")


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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file that the system refuses to write."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            value=f"{path} cannot be written ({error.strerror or error})",
            rule="the folder must take new files",
            fix="free space or give another folder",
        ) from error


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table; texts that a spreadsheet would take for formulas get an apostrophe before them.

    UTF-8, line feeds, ``True`` and ``False``, missing values as empty fields, floats with all their digits.
    """
    safe = _changed(frame, csv_text)
    # the csv module does not quote a carriage return, at which readers would begin a new row
    breaks = any("\r" in value for name in safe for value in safe[name] if isinstance(value, str))
    with writing(path):
        safe.to_csv(
            path,
            index=False,
            encoding="utf-8",
            errors="backslashreplace",
            lineterminator="\n",
            quoting=csv.QUOTE_NONNUMERIC if breaks else csv.QUOTE_MINIMAL,
        )


def read_csv(path: str | Path, **options: Any) -> pd.DataFrame:
    """Read a table of :func:`write_csv`, without the apostrophes that it put before names."""
    return _changed(pd.read_csv(path, **{"float_precision": "round_trip", **options}), from_csv_text)


def _changed(frame: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    changed = frame.copy()
    for name in frame.columns:
        if frame[name].dtype.kind == "O":
            # texts, categories, and objects, which may be numbers beside texts, as "head" of held_out.csv is
            values = [change(value) if isinstance(value, str) else value for value in frame[name]]
            changed[name] = pd.Series(values, index=frame.index, dtype=object)
    return changed


def _write_frames(frames: Mapping[str, pd.DataFrame], folder: Path) -> tuple[Path, ...]:
    for name, frame in frames.items():
        if name.endswith(".csv"):
            write_csv(frame, folder / name)
        else:
            with writing(folder / name):
                frame.to_parquet(folder / name, engine="pyarrow", index=False)
    return tuple(folder / name for name in frames)


def write_tables(evaluation: HeadEvaluation, directory: str | Path) -> tuple[Path, ...]:
    """Write the tables of a run below ``directory/tables`` and return the files.

    To read a CSV file back equal, call :func:`read_csv` with ``keep_default_na=False, na_values={...}``: with the
    defaults of pandas a cell type named ``NA`` becomes missing. The Parquet file needs no such care.
    """
    folder = made_folder(Path(directory) / "tables")
    labels = pd.DataFrame(
        [("cell_type", slugify(label, evaluation.cell_types), label) for label in evaluation.cell_types],
        columns=["kind", "slug", "label"],
    )
    genes = evaluation.to_frame()
    tables = {
        "explained_variance.csv": genes,
        "explained_variance.parquet": genes,
        "heads.csv": evaluation.heads(),
        "baselines.csv": evaluation.baselines(),
        "held_out.csv": evaluation.held_out_frame(),
        "scales.csv": evaluation.scales_frame(),
        "ablations.csv": evaluation.ablations_frame(),
        "head_interactions.csv": evaluation.interactions_frame(),
        "senders.csv": evaluation.senders_frame(),
        "sender_genes.parquet": evaluation.sender_genes_frame(),
        "labels.csv": labels,
    }
    return _write_frames(tables, folder)


def write_comparison_tables(comparison: HeadComparison, directory: str | Path) -> tuple[Path, ...]:
    """Write the tables of a comparison, genes as Parquet, below ``directory/tables`` and return the files."""
    tables = {
        "head_matches.csv": comparison.matches_frame(),
        "head_differences.csv": comparison.differences_frame(),
        "sender_differences.csv": comparison.senders_frame(),
        "versions.csv": comparison.versions_frame(),
        "gene_differences.parquet": comparison.gene_differences_frame(),
    }
    return _write_frames(tables, made_folder(Path(directory) / "tables"))


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
    with writing(path):
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
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
