"""Tables as CSV files and as text: of one evaluation and of a comparison."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from amici_eval.common.text import csv_text, from_csv_text, printable, slugify
from amici_eval.report.page.headline import best_heads, effect_sentences, held_out_sentences, outcome_sentences
from amici_eval.report.sentences import (
    WHY_THIS_ORDER,
    effect,
    engine_sentence,
    in_sample_text,
    interval,
    made_folder,
    p_text,
    undefined_sentences,
    unwritable,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from amici_eval.results.comparison import HeadComparison
    from amici_eval.results.evaluation import HeadEvaluation


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table; texts that a spreadsheet would take for formulas get an apostrophe before them.

    UTF-8, line feeds, ``True`` and ``False``, missing values as empty fields, floats with all their digits.
    """
    safe = _changed(frame, csv_text)
    # the csv module does not quote a carriage return, at which readers would begin a new row
    breaks = any("\r" in value for name in safe for value in safe[name] if isinstance(value, str))
    try:
        safe.to_csv(
            path,
            index=False,
            encoding="utf-8",
            errors="backslashreplace",
            lineterminator="\n",
            quoting=csv.QUOTE_NONNUMERIC if breaks else csv.QUOTE_MINIMAL,
        )
    except OSError as error:
        raise unwritable(path, error) from error


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
    for name, frame in tables.items():
        try:
            if name.endswith(".parquet"):
                frame.to_parquet(folder / name, engine="pyarrow", index=False)
            else:
                write_csv(frame, folder / name)
        except OSError as error:
            raise unwritable(folder / name, error) from error
    return tuple(folder / name for name in tables)


def summary_lines(evaluation: HeadEvaluation) -> list[str]:
    """Return an evaluation in a few plain sentences and a small text table, for logs and terminals."""
    lines = [*effect_sentences(evaluation), *held_out_sentences(evaluation), WHY_THIS_ORDER]
    lines += [*outcome_sentences(evaluation), engine_sentence(evaluation)]
    lines += [f"Note: {printable(note)}" for note in evaluation.notes]
    lines += _best_head_table(evaluation)
    return lines + [f"Undefined: {line}." for line in undefined_sentences(evaluation)]


def _best_head_table(evaluation: HeadEvaluation) -> list[str]:
    best = best_heads(evaluation)
    if best.empty:
        return []
    alpha, spatial = evaluation.spec.permutation.alpha, evaluation.spatial is not None
    decisive = "p_value_adj_spatial" if spatial else "p_value_adj_head"
    remaining = np.full((evaluation.n_heads, len(evaluation.cell_types)), np.nan)
    if evaluation.parts is not None:
        remaining = evaluation.parts.expl_var[1]
    columns: dict[str, list[str]] = {"cell type": [], "cells": [], "best head": [], "EV all genes": []}
    if evaluation.intervals is not None:
        columns["interval"] = []
    if evaluation.trivial is not None:
        columns["gain"] = []
    if evaluation.parts is not None:
        columns["held out"] = []
    columns |= {"best gene": [], "EV gene": []} | ({"ESS": []} if spatial else {}) | {"p adj": []}
    for row in best.to_dict("records"):
        texts = {
            "cell type": printable(row["ct_name"], longest=28 if len(columns) < 8 else 20),
            "cells": f"{row['n_cells']:,}",
            "best head": str(row["head"]),
            "EV all genes": effect(row["expl_var_head"]),
            "interval": interval(row["ci_low"], row["ci_high"]) or "undefined",
            "gain": effect(row["gain"]),
            "held out": effect(float(remaining[row["head"], evaluation.type_index(row["ct_name"])])),
            "best gene": printable(row["best_gene"], longest=16 if len(columns) < 8 else 12),
            "EV gene": effect(row["expl_var_best_gene"]),
            "ESS": "undefined" if np.isnan(row["ess"]) else f"{row['ess']:,.0f}",
            "p adj": p_text(row[decisive]) + (" *" if row[decisive] <= alpha else "  "),
        }
        for name, cells in columns.items():
            cells.append(texts[name])
    lines = []
    for number in range(-1, len(best)):
        cells = []
        for name, texts_of in columns.items():
            width = max(len(name), *map(len, texts_of))
            shown = name if number < 0 else texts_of[number]
            cells.append(shown.ljust(width) if name in ("cell type", "best gene") else shown.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return [
        f"Best head per type (largest explained variance, EV, over all genes; * adjusted p <= {alpha:g}, "
        f"{evaluation.decided_by} null{in_sample_text(evaluation)}):",
        *lines,
    ]


def write_comparison_tables(comparison: HeadComparison, directory: str | Path) -> tuple[Path, ...]:
    """Write the tables of a comparison, genes as Parquet, below ``directory/tables`` and return the files."""
    folder = made_folder(made_folder(directory) / "tables")
    written = []
    for name, frame in (
        ("head_matches.csv", comparison.matches_frame()),
        ("head_differences.csv", comparison.differences_frame()),
        ("sender_differences.csv", comparison.senders_frame()),
        ("versions.csv", comparison.versions_frame()),
        ("gene_differences.parquet", comparison.gene_differences_frame()),
    ):
        path = folder / name
        try:
            if path.suffix == ".csv":
                write_csv(frame, path)
            else:
                frame.to_parquet(path, index=False)
        except OSError as error:
            raise unwritable(path, error) from error
        written.append(path)
    return tuple(written)
