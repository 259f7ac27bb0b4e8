"""An evaluation as tables and sentences: what a run holds beside its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from amici_eval.names import slugify
from amici_eval.report.wording import (
    VALIDITY,
    effect,
    engine_sentence,
    made_folder,
    p_text,
    permutations_text,
    permutations_used,
    printable,
    samplings,
    undefined_sentences,
    unwritable,
)

if TYPE_CHECKING:
    from amici_eval.results import HeadEvaluation

__all__ = ["SIGNIFICANCE_SCHEMA_VERSION", "best_heads", "summary_lines", "write_significance", "write_tables"]

SIGNIFICANCE_SCHEMA_VERSION = 2


def write_tables(evaluation: HeadEvaluation, directory: str | Path) -> tuple[Path, ...]:
    """Write the tables of a run below ``directory/tables`` and return the files.

    Parameters
    ----------
    evaluation
        What to write.
    directory
        The folder of the run; made if missing.

    Returns
    -------
    tuple of Path
        ``explained_variance.csv`` and ``.parquet`` (:meth:`HeadEvaluation.to_frame`), ``heads.csv``
        (:meth:`HeadEvaluation.heads`), ``baselines.csv``, ``ablations.csv``
        (:meth:`HeadEvaluation.ablations_frame`), ``head_interactions.csv``
        (:meth:`HeadEvaluation.interactions_frame`) and ``labels.csv`` (columns ``kind, slug, label``: the names that
        stand for cell types in metric keys and file names). A table of what was not computed has its header only.

    Raises
    ------
    OutputError
        If the folder or a file cannot be written.

    Notes
    -----
    CSV is UTF-8 with line feeds at line ends, booleans as ``True`` and ``False``, missing values as empty fields and
    floats with all their digits. To read them back equal, use
    ``pandas.read_csv(file, float_precision="round_trip", keep_default_na=False, na_values={...})``: with the defaults
    of pandas a cell type named ``NA`` becomes missing. The Parquet file needs no such care.
    """
    folder = made_folder(Path(directory) / "tables")
    labels = pd.DataFrame(
        [("cell_type", slugify(label), label) for label in evaluation.cell_types], columns=["kind", "slug", "label"]
    )
    genes = evaluation.to_frame()
    tables = {
        "explained_variance.csv": genes,
        "explained_variance.parquet": genes,
        "heads.csv": evaluation.heads(),
        "baselines.csv": evaluation.baselines(),
        "ablations.csv": evaluation.ablations_frame(),
        "head_interactions.csv": evaluation.interactions_frame(),
        "labels.csv": labels,
    }
    for name, frame in tables.items():
        try:
            if name.endswith(".parquet"):
                frame.to_parquet(folder / name, engine="pyarrow", index=False)
            else:
                frame.to_csv(folder / name, index=False, encoding="utf-8", lineterminator="\n")
        except OSError as error:
            raise unwritable(folder / name, error) from error
    return tuple(folder / name for name in tables)


def write_significance(evaluation: HeadEvaluation, directory: str | Path) -> Path:
    """Write what the tests were and what came of them to ``directory/significance.json`` and return the file.

    Parameters
    ----------
    evaluation
        What to write.
    directory
        The folder of the run; made if missing.

    Raises
    ------
    OutputError
        If the file cannot be written.

    Notes
    -----
    Schema version 2, all keys always present::

        schema_version   2
        engine           what produced the numbers: factored or hooked
        test             null, method, convention, adjustment, alpha, seed: as in PermutationSpec;
                         n_permutations: independent random permutations per type;
                         n_permutations_by_type: permutations that were used, by type (0: no test)
        sampling         number of types by how their permutations were drawn: independent, cyclic, none (no test)
        families         heads_x_types: the family over which p-values are adjusted
                           n_heads, n_types
                           n_pairs        n_heads * n_types
                           n_tests        pairs with a p-value: the size of the adjustment
                           n_significant  pairs with adjusted p <= alpha
                           n_undefined    pairs without a p-value; n_tests + n_undefined = n_pairs
                           undefined_reasons  number of pairs without a p-value by reason; adds up to n_undefined
        undefined_genes  number of genes without explained variance by reason, summed over types (and heads, where
                         the reason is a head's)
        parity           comparison of the factored with the hooked engine; null where none was made
                           max_abs_difference  of predictions; null if it is no finite number
                           n_cells             cells on which they were compared
        validity         a sentence on what the null can and cannot say
    """
    settings = evaluation.spec.permutation
    untested = evaluation.heads().loc[lambda frame: frame["p_value_head"].isna(), "undefined_reason"]
    gene_reasons = pd.Series([u.reason for u in evaluation.undefined if u.gene is not None], dtype=object)
    drawn, used = samplings(evaluation), permutations_used(evaluation)
    parity = None
    if evaluation.parity is not None:
        difference = evaluation.parity if np.isfinite(evaluation.parity) else None
        parity = {"max_abs_difference": difference, "n_cells": evaluation.parity_cells}
    record: dict[str, Any] = {
        "schema_version": SIGNIFICANCE_SCHEMA_VERSION,
        "engine": evaluation.engine,
        "test": {
            "null": settings.null,
            "method": settings.method,
            "convention": settings.convention,
            "n_permutations": evaluation.n_permutations,
            "n_permutations_by_type": dict(zip(evaluation.cell_types, used, strict=True)),
            "alpha": settings.alpha,
            "seed": settings.seed,
            "adjustment": settings.adjustment,
        },
        "sampling": {name: drawn.count(name) for name in ("independent", "cyclic", "none")},
        "families": {
            "heads_x_types": {
                "n_heads": evaluation.n_heads,
                "n_types": len(evaluation.cell_types),
                "n_pairs": evaluation.n_heads * len(evaluation.cell_types),
                "n_tests": evaluation.n_tests,
                "n_significant": evaluation.n_significant,
                "n_undefined": evaluation.n_undefined,
                "undefined_reasons": _counts(untested),
            }
        },
        "undefined_genes": _counts(gene_reasons),
        "parity": parity,
        "validity": VALIDITY.get(settings.null, ""),
    }
    path = made_folder(directory) / "significance.json"
    try:
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def best_heads(evaluation: HeadEvaluation) -> pd.DataFrame:
    """Return the rows of :meth:`HeadEvaluation.heads` with each type's best head; types without one are left out.

    Notes
    -----
    Best by explained variance over all genes, which is what the test is about. ``HeadEvaluation.best_head`` is AMICI's
    choice instead: the head with the largest explained variance of any one gene, the winner of many.
    """
    heads = evaluation.heads()
    defined = heads[heads["expl_var_head"].notna()]
    chosen = defined.groupby("ct_name", sort=True)["expl_var_head"].idxmax()
    return heads.loc[chosen].reset_index(drop=True)


def summary_lines(evaluation: HeadEvaluation) -> list[str]:
    """Return an evaluation in a few plain sentences and a small text table, for logs and terminals.

    Parameters
    ----------
    evaluation
        What to summarise.

    Returns
    -------
    list of str
        What was evaluated, the effects, the tests, in-sample or held out, the engine, notes, the best head of each
        type, then what is undefined and why; no line breaks within a line. Effects come before p-values.
    """
    lines = [*headline_sentences(evaluation), held_out_sentence(evaluation), engine_sentence(evaluation)]
    lines += [f"Note: {printable(note)}" for note in evaluation.notes]
    lines += _best_head_table(evaluation)
    return lines + [f"Undefined: {line}." for line in undefined_sentences(evaluation)]


def headline_sentences(evaluation: HeadEvaluation) -> list[str]:
    """Return what was evaluated, the largest effect, the baselines and the outcome of the tests: a sentence each."""
    settings = evaluation.spec.permutation
    n_types, n_genes = len(evaluation.cell_types), len(evaluation.genes)
    sentences = [
        f"{evaluation.n_heads} attention heads x {n_types} cell types evaluated on {int(evaluation.n_cells.sum()):,} "
        f"cells and {n_genes:,} genes."
    ]
    if not np.all(np.isnan(evaluation.expl_var)):
        head, index = np.unravel_index(np.nanargmax(evaluation.expl_var), evaluation.expl_var.shape)
        sentences.append(
            f"Largest effect: head {head}, kept alone, explains {effect(evaluation.expl_var[head, index])} of the "
            f"expression variance of {printable(evaluation.cell_types[index])}; the median over all pairs is "
            f"{effect(float(np.nanmedian(evaluation.expl_var)))}."
        )
    if not np.all(np.isnan(evaluation.expl_var_full)) and not np.all(np.isnan(evaluation.expl_var_none)):
        sentences.append(
            f"Median over types: {effect(float(np.nanmedian(evaluation.expl_var_full)))} explained with all heads, "
            f"{effect(float(np.nanmedian(evaluation.expl_var_none)))} without any."
        )
    untested = f" {evaluation.n_undefined} of {evaluation.p_value.size} pairs have no test."
    sentences.append(
        f"{evaluation.n_significant} of {evaluation.n_tests} tested head x type pairs are significant at adjusted "
        f"p <= {settings.alpha:g} ({settings.null} null, {permutations_text(evaluation)}, "
        f"{settings.adjustment.upper()} over all tests).{untested if evaluation.n_undefined else ''}"
    )
    if settings.convention == "reference":
        sentences.append("p = b/m as in amici-st: 0 stands for fewer than one in m, and is no valid p-value.")
    elif (most := max(permutations_used(evaluation), default=0) or evaluation.n_permutations) < 1 / settings.alpha - 1:
        sentences.append(
            f"With {most:,} permutations no p-value can be below {1 / (most + 1):.2g}: nothing can be significant; "
            "draw more."
        )
    if settings.null in VALIDITY:
        sentences.append(VALIDITY[settings.null])
    return sentences


def held_out_sentence(evaluation: HeadEvaluation) -> str:
    """Return which types were evaluated on cells that the model was not fitted on."""
    n_types = len(evaluation.held_out)
    held, in_sample = (sum(value is truth for value in evaluation.held_out) for truth in (True, False))
    if held == n_types:
        return "Held out: the model was fitted on none of the evaluated cells."
    if in_sample == n_types:
        return (
            "In-sample: the model was fitted on some or all of the evaluated cells of every type, so effects are "
            "optimistic."
        )
    if not held and not in_sample:
        return "It is not known which cells the model was fitted on; read the effects as in-sample, so optimistic."
    unknown = n_types - held - in_sample
    return (
        f"Of {n_types} types, {held} are held out, {in_sample} in-sample (their effects are optimistic)"
        f"{f' and {unknown} unknown' if unknown else ''}."
    )


def _best_head_table(evaluation: HeadEvaluation) -> list[str]:
    best = best_heads(evaluation)
    if best.empty:
        return []
    alpha = evaluation.spec.permutation.alpha
    rows = [("cell type", "cells", "best head", "EV all genes", "best gene", "EV gene", "p adj")]
    for row in best.to_dict("records"):
        mark = " *" if row["p_value_adj_head"] <= alpha else "  "
        rows.append(
            (
                printable(row["ct_name"], longest=28),
                f"{row['n_cells']:,}",
                str(row["head"]),
                effect(row["expl_var_head"]),
                printable(row["best_gene"], longest=16),
                effect(row["expl_var_best_gene"]),
                p_text(row["p_value_adj_head"]) + mark,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = {0, 4}
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [
        f"Best head per type (largest explained variance, EV, over all genes; * adjusted p <= {alpha:g}):",
        *lines,
    ]


def _counts(reasons: pd.Series) -> dict[str, int]:
    counted = reasons.replace("", "no reason recorded").value_counts()
    return {str(reason): int(counted[reason]) for reason in sorted(counted.index)}
