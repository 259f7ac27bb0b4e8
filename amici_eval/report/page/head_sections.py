"""Sections of the page on one head each, and the verdict on all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.report.markup import cell, cells_text, folded, row, section, table, text, yes_no
from amici_eval.report.sentences import effect, in_sample_text, interval, p_text, printable, span

if TYPE_CHECKING:
    from collections.abc import Mapping

    from amici_eval.results.evaluation import HeadEvaluation

__all__ = ["head_sections", "verdict_sentence"]

_GENES_PER_TYPE = 10
_MOST_TYPES_NAMED = 8


def verdict_sentence(evaluation: HeadEvaluation) -> str:
    """Return how many heads carry signal, by which test, and whether they say more than what needs no head."""
    significant = evaluation.adjusted <= evaluation.spec.permutation.alpha
    if not evaluation.n_decided:
        return f"No head could be tested ({evaluation.decided_by} null); why is said below."
    heads = np.flatnonzero(significant.any(axis=1))
    test = (
        f"{evaluation.n_significant} of {evaluation.n_decided} tested head x type pairs at adjusted p ≤ "
        f"{evaluation.spec.permutation.alpha:g}, {evaluation.decided_by} null{in_sample_text(evaluation)}"
    )
    if not heads.size:
        return f"Verdict: no head is significant in any cell type ({test})."
    n_heads = evaluation.n_heads
    who = f"{heads.size} of {n_heads} heads {'is' if heads.size == 1 else 'are'} significant in at least one cell type"
    verdict = f"Verdict: {who} ({test})."
    found = evaluation.trivial
    if found is not None:
        more = np.count_nonzero(significant & (found.gain > 0))
        also = "explains" if more == 1 else "explain"
        verdict += f" Of these pairs, {more} also {also} more than the best predictor without heads."
    return verdict


def head_sections(evaluation: HeadEvaluation) -> str:
    """Return a section per head, with its effect and tests in each type and the genes that it explains best."""
    entries: list[dict[str, Any]] = evaluation.heads().to_dict("records")  # type: ignore[assignment]
    parts = [
        _head(evaluation, head, [entry for entry in entries if entry["head"] == head])
        for head in range(evaluation.n_heads)
    ]
    return section("each-head", "Head by head", "".join(parts))


def _head(evaluation: HeadEvaluation, head: int, entries: list[dict[str, Any]]) -> str:
    entries = sorted(entries, key=lambda entry: -np.nan_to_num(entry["expl_var_head"], nan=-np.inf))
    types = _types_table(evaluation, head, entries)
    return (
        f'<section id="head-{head}" class="head" aria-labelledby="head-{head}-name">'
        f'<h3 id="head-{head}-name">Head {head}</h3><p>{text(_sentences(evaluation, head, entries))}</p>'
        + folded(types, f"Head {head} in {len(entries)} cell types", is_open=True)
        + _genes(evaluation, head)
        + '<p class="back"><a href="#matrix">Back to heads and cell types</a></p></section>'
    )


def _sentences(evaluation: HeadEvaluation, head: int, entries: list[dict[str, Any]]) -> str:
    tested = int(np.count_nonzero(~np.isnan(evaluation.adjusted[head])))
    where = [printable(entry["ct_name"], longest=40) for entry in entries if yes_no(entry["significant"]) == "yes"]
    test = (
        f"adjusted p ≤ {evaluation.spec.permutation.alpha:g}, {evaluation.decided_by} null{in_sample_text(evaluation)}"
    )
    listed = ", ".join(where[:_MOST_TYPES_NAMED])
    more = f" and {len(where) - _MOST_TYPES_NAMED} more" if len(where) > _MOST_TYPES_NAMED else ""
    said = [
        f"Significant in {len(where) or 'none'} of {tested} tested types ({test}){': ' if where else ''}{listed}{more}."
    ]
    best = entries[0] if entries else {}
    if best and not np.isnan(best["expl_var_head"]):
        between = interval(best["ci_low"], best["ci_high"])
        said.append(
            f"Kept alone it explains most in {printable(best['ct_name'])}: {effect(best['expl_var_head'])}"
            f"{f' ({between})' if between else ''}."
        )
    found, spatial = evaluation.trivial, evaluation.spatial
    if found is not None and not np.isnan(found.gain[head]).all():
        gains = found.gain[head][~np.isnan(found.gain[head])]
        said.append(
            f"It explains more than the best predictor without heads in {np.count_nonzero(gains > 0)} of {gains.size} "
            "types."
        )
    if spatial is not None and not np.isnan(spatial.ess[head]).all():
        said.append(f"Effective sample size (lag null): {span(spatial.ess[head])}.")
    return " ".join(said)


def _types_table(evaluation: HeadEvaluation, head: int, entries: list[dict[str, Any]]) -> str:
    null, of_genes = evaluation.decided_by, _significant_genes(evaluation, head)
    spatial, parts = evaluation.spatial is not None, evaluation.parts
    p, adjusted = (f"p_value{one}_{'spatial' if spatial else 'head'}" for one in ("", "_adj"))
    header = ["Receiver type", "Cells", "EV, all genes"]
    header += ["Interval"] if evaluation.intervals is not None else []
    header += ["Gain"] if evaluation.trivial is not None else []
    header += ["EV, held out"] if parts is not None else []
    header += ["Effective cells (lag)", "Detectable EV (lag)"] if spatial else []
    header += [f"p ({null})", f"Adjusted p ({null})", "Significant"]
    header += [] if of_genes is None else ["Genes *"]
    header += ["Best gene", "Undefined because"]
    rows = []
    for entry in entries:
        at = evaluation.type_index(entry["ct_name"])
        cells = [cell(f"{entry['n_cells']:,}"), cell(effect(entry["expl_var_head"]))]
        cells += [cell(interval(entry["ci_low"], entry["ci_high"]))] if evaluation.intervals is not None else []
        cells += [cell(effect(entry["gain"]))] if evaluation.trivial is not None else []
        cells += [cell(effect(float(parts.expl_var[1, head, at])))] if parts is not None else []
        cells += [cell(cells_text(entry["ess"])), cell(effect(entry["detectable_expl_var"]))] if spatial else []
        cells += [cell(p_text(entry[p])), cell(p_text(entry[adjusted])), cell(yes_no(entry["significant"]), words=True)]
        cells += [] if of_genes is None else [cell(of_genes[entry["ct_name"]])]
        cells += [cell(_best_gene(entry), words=True), cell(entry["undefined_reason"], words=True, long=True)]
        rows.append(row(entry["ct_name"], cells))
    caption = f"Head {head} kept alone, by receiver type, the largest explained variance (EV) first."
    return table(header, rows, caption)


def _significant_genes(evaluation: HeadEvaluation, head: int) -> Mapping[str, int] | None:
    """Return how many genes of each type are significant and explained, or ``None`` without tests of genes."""
    found = evaluation.spatial
    if found is None or np.all(np.isnan(found.p_value_gene)):
        return None
    small = found.p_value_adj_gene[head] <= evaluation.spec.permutation.alpha
    counts = np.count_nonzero(small & (evaluation.expl_var_gene[head] > 0), axis=1)
    return dict(zip(evaluation.cell_types, counts.tolist(), strict=True))


def _genes(evaluation: HeadEvaluation, head: int) -> str:
    found, alpha = evaluation.spatial, evaluation.spec.permutation.alpha
    tested = found is not None and not np.all(np.isnan(found.p_value_gene))
    chosen: list[tuple[float, int, int]] = []
    for index, effects in enumerate(evaluation.expl_var_gene[head]):
        largest = np.argsort(-np.nan_to_num(effects, nan=-np.inf), kind="stable")[:_GENES_PER_TYPE]
        chosen += [(float(effects[gene]), index, int(gene)) for gene in largest if effects[gene] > 0]
    if not chosen:
        return "<p>It explains no gene in any type.</p>"
    chosen.sort(key=lambda one: (-one[0], one[1], one[2]))
    header = ["Gene", "Receiver type", "EV", *(["Adjusted p (lag)"] if tested else [])]
    rows = []
    for value, index, gene in chosen:
        cells = [cell(evaluation.cell_types[index], words=True), cell(effect(value))]
        if found is not None and tested:
            p = float(found.p_value_adj_gene[head, index, gene])
            cells.append(cell(f"{p_text(p)}{' *' if p <= alpha else ''}"))
        rows.append(row(evaluation.genes[gene], cells))
    caption = (
        f"Up to {_GENES_PER_TYPE} genes of each type with the largest explained variance above 0: picked for being "
        f"largest, so optimistic. {f'* adjusted p ≤ {alpha:g} (lag null, family of all genes). ' if tested else ''}"
        f"All {len(evaluation.genes):,} genes are in tables/explained_variance.csv."
    )
    return folded(table(header, rows, caption), f"Genes that head {head} explains best: {len(rows)} rows")


def _best_gene(entry: Mapping[str, Any]) -> str:
    if not entry["best_gene"]:
        return ""
    return f"{printable(entry['best_gene'], longest=24)}: {effect(entry['expl_var_best_gene'])}"
