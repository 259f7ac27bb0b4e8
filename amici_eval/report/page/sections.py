"""Sections of the page on what is inferred: held-out cells, predictors without heads, genes, scale and power."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.text import printable
from amici_eval.report.markup import cell, cells_text, folded, row, section, table, text, yes_no
from amici_eval.report.sentences import (
    BASELINE_MEANINGS,
    BASELINE_NAMES,
    adjustment_text,
    effect,
    in_sample_text,
    interval,
    p_text,
    rounded,
    span,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float64

    from amici_eval.results.evaluation import HeadEvaluation

_N_GENES = 5
_MOST_OPEN_ROWS = 30
_HELD_OUT = (
    "Explained variance over all genes on the cells that the model was fitted on / on the others; an effect that does "
    "not remain on the others may have been memorised. After a random split the others still have cells of training "
    "among their neighbours; only a region or section that was held out as a whole shows what carries over to new "
    "tissue. – too few cells. Intervals are in tables/held_out.csv, and show where the pointer rests."
)
_NEAREST = (
    "Explained variance over all genes / the same with the nearest neighbour of every cell masked out. A head that "
    "loses most of its effect without the nearest neighbour may read segmentation bleed: expression that segmentation "
    "put into the wrong cell."
)


def held_out_section(evaluation: HeadEvaluation) -> str:
    """Return in-sample and held-out effects side by side; nothing if it is not known which cells were fitted."""
    found = evaluation.parts
    if found is None:
        return ""
    header = ["Receiver type", "Cells", "All heads", *(f"Head {head}" for head in range(evaluation.n_heads))]
    rows = []
    for index, cell_type in enumerate(evaluation.cell_types):
        n_cells = " / ".join(f"{number:,}" for number in found.n_cells[:, index])
        cells = [cell(n_cells), _pair(found.full[:, index])]
        for head in range(evaluation.n_heads):
            bounds = [interval(found.low[part, head, index], found.high[part, head, index]) for part in range(2)]
            cells.append(_pair(found.expl_var[:, head, index], tip=" / ".join(one or "–" for one in bounds)))
        rows.append(row(cell_type, cells))
    return section("held-out", "Held out", table(header, rows, _HELD_OUT))


def without_heads_section(evaluation: HeadEvaluation) -> str:
    """Return what predictors without heads explain, what heads add, and what is left without the nearest neighbour."""
    found = evaluation.trivial
    frame = evaluation.baselines()
    names = [name for name in dict.fromkeys(frame["baseline"]) if name != "full_model_without_nearest"]
    header = ["Receiver type", *(_sentence_case(BASELINE_NAMES.get(name, name)) for name in names)]
    if found is not None:
        header += ["Gain, all heads", *(f"Gain, head {head}" for head in range(evaluation.n_heads))]
    rows = []
    for index, (cell_type, group) in enumerate(frame.groupby("ct_name", sort=False)):
        values = [float(group.loc[group["baseline"] == name, "expl_var"].iloc[0]) for name in names]
        if found is not None:
            values += [float(found.full_gain[index]), *(float(value) for value in found.gain[:, index])]
        rows.append(row(cell_type, [cell(effect(value)) for value in values]))
    caption = "Explained variance over all genes."
    about = ""
    if found is not None:
        caption = (
            "Explained variance over all genes. Gain: that of a head kept alone, or of the whole model, minus that of "
            "the best predictor of the type that knows no head; below 0 the head adds nothing that needs attention."
        )
        meanings = "".join(
            f"<li>{text(BASELINE_MEANINGS[name])}</li>" for name in found.names if name in BASELINE_MEANINGS
        )
        about = f"<ul>{meanings}</ul>" if meanings else ""
        about += (
            f"<p>{text(f'They were fitted on {found.fitted_on}.')} A cell is never scored by a fit that has seen it, "
            "unlike the heads on cells that the model was fitted on: there gains flatter the heads.</p>"
        )
    content = about + table(header, rows, caption)
    return section("baselines", "Without heads", content + _nearest(evaluation))


def _nearest(evaluation: HeadEvaluation) -> str:
    found = evaluation.trivial
    if found is None or np.all(np.isnan(found.without_nearest)):
        return ""
    header = ["Receiver type", "All heads", *(f"Head {head}" for head in range(evaluation.n_heads))]
    rows = [
        row(
            cell_type,
            [
                _pair(np.array([evaluation.expl_var_full[index], found.full_without_nearest[index]])),
                *(
                    _pair(np.array([evaluation.expl_var[head, index], found.without_nearest[head, index]]))
                    for head in range(evaluation.n_heads)
                ),
            ],
        )
        for index, cell_type in enumerate(evaluation.cell_types)
    ]
    return f"<h3>Nearest neighbour masked</h3>{table(header, rows, _NEAREST)}"


def genes_section(evaluation: HeadEvaluation) -> str:
    """Return the genes with the smallest adjusted p of each significant head and type; nothing without such tests.

    Genes with explained variance of 0 or less are left out: a small p says that prediction and expression are related,
    which they may be although the prediction is too large or too small to explain anything.
    """
    found, alpha = evaluation.spatial, evaluation.spec.permutation.alpha
    if found is None or np.all(np.isnan(found.p_value_gene)):
        return ""
    header = ["Receiver type", "Head", "Genes *", *(f"Gene {number}" for number in range(1, _N_GENES + 1))]
    rows, unexplained = [], 0
    for index, cell_type in enumerate(evaluation.cell_types):
        for head in np.flatnonzero(evaluation.adjusted[:, index] <= alpha):
            p, effects = found.p_value_adj_gene[head, index], evaluation.expl_var_gene[head, index]
            unexplained += int(np.count_nonzero((p <= alpha) & ~(effects > 0)))
            p = np.where(effects > 0, p, np.nan)
            # many p are equal at the smallest float: then the larger effect comes first
            order = [gene for gene in np.lexsort((-np.nan_to_num(effects), p)) if not np.isnan(p[gene])][:_N_GENES]
            shown = [
                f"{printable(evaluation.genes[gene], longest=24)}: {effect(effects[gene])}, p {p_text(p[gene])}"
                f"{' *' if p[gene] <= alpha else ''}"
                for gene in order
            ]
            cells = [cell(head), cell(np.count_nonzero(p <= alpha))]
            cells += [cell(one, words=True) for one in shown + [""] * (_N_GENES - len(shown))]
            rows.append(row(cell_type, cells))
    n_tests = int(np.count_nonzero(~np.isnan(found.p_value_gene)))
    caption = (
        f"Up to {_N_GENES} genes with the smallest adjusted p of each significant head and type, with explained "
        f"variance. * adjusted p ≤ {alpha:g} (lag null): one family of {n_tests:,} tests, all heads x types x genes "
        f"({adjustment_text(evaluation, null='lag')}), apart from the family of heads x types. "
        + (
            f"Left out, {unexplained:,} more with such a p, but without explained variance above 0: related to the "
            "prediction, but badly scaled. "
            if unexplained
            else ""
        )
        + "All genes are in tables/explained_variance.csv."
    )
    if not rows:
        return section("genes", "Genes", "<p>No head is significant in any type.</p>")
    return section("genes", "Genes", _folded(table(header, rows, caption), len(rows)))


def scale_section(evaluation: HeadEvaluation) -> str:
    """Return the correlation length, effective sample size and detectable effect of each type, and its tiles."""
    spatial, bounds = evaluation.spatial, evaluation.intervals
    if spatial is None and bounds is None:
        return ""
    header, caption = ["Receiver type", "Cells"], ""
    columns: list[list[str]] = [[f"{number:,}" for number in evaluation.n_cells]]
    if spatial is not None:
        of_lag = "" if spatial.null == "lag" else " (lag null)"
        reach = "Tile width" if spatial.null == "tile" else f"Reach{of_lag}"
        tested = ~np.isnan(spatial.ess).all(axis=0)
        header += ["Correlation length", reach, f"Effective sample size{of_lag}", f"Detectable EV{of_lag}"]
        columns += [
            [
                "none found" if has_test and np.isnan(value) else _known(rounded(float(value)))
                for value, has_test in zip(spatial.correlation_length, tested, strict=True)
            ],
            [_known(rounded(float(value))) for value in spatial.reach],
            [_known(span(values)) for values in spatial.ess.T],
            [_effects(values) for values in spatial.detectable.T],
        ]
        caption += (
            "Correlation length: distance at which the correlation of expression within the type has fallen to 1/e. "
            + (
                "Tile width: side of the squares within which cells are shuffled. "
                if spatial.null == "tile"
                else "Reach: distance up to which the lag null takes correlation into account. "
            )
            + "Effective sample size: as many independent cells would say as much. Detectable EV: smallest explained "
            "variance that the lag null would have found with 80 % power before any adjustment; where a "
            "head is not significant and this is large, the tissue is too small to tell. Ranges are over heads. "
            + (
                f"All of these{' but the tile width' if spatial.null == 'tile' else ''}, and the p of genes, come from "
                f"the lag null, not from the {printable(spatial.null)} null. "
                if of_lag
                else ""
            )
        )
    if bounds is not None:
        header.append("Tiles")
        columns.append([f"{number:,}" for number in bounds.n_tiles])
        caption += (
            f"Tiles: of width {rounded(bounds.tile_width)}, resampled {bounds.n_resamples:,} times for the "
            f"{100 * bounds.confidence:g} % intervals. "
        )
    rows = [
        row(cell_type, [cell(values[index]) for values in columns])
        for index, cell_type in enumerate(evaluation.cell_types)
    ]
    return section(
        "scale", "Scale and power", table(header, rows, caption + "Lengths are in units of the coordinates.")
    )


def width_section(evaluation: HeadEvaluation) -> str:
    """Return p within tiles of several widths; nothing where there are no widths."""
    found = evaluation.spatial
    if found is None or not np.isfinite(found.widths).any():
        return ""
    header = ["Receiver type", "Head", *(f"Width {number}" for number in range(1, len(found.widths) + 1))]
    rows = []
    for index, cell_type in enumerate(evaluation.cell_types):
        widths = found.widths[:, index]
        for head in range(evaluation.n_heads) if np.isfinite(widths).any() else ():
            shown = [
                f"{rounded(float(width))}: {_known(p_text(p))}" if np.isfinite(width) else ""
                for width, p in zip(widths, found.p_by_width[:, head, index], strict=True)
            ]
            rows.append(row(cell_type, [cell(head), *(cell(one) for one in shown)]))
    caption = (
        "Tile width in units of the coordinates, and p where cells are shuffled within tiles of that width (not "
        "adjusted). p grows as tiles become narrower both where the fit lives on the scale that they take away and "
        "because ever fewer cells are left to compare; p that stays small in the narrowest tiles speaks for a fit "
        "between close neighbours. All numbers are in tables/scales.csv."
    )
    return section("widths", "p against tile width", _folded(table(header, rows, caption), len(rows)))


def _pair(values: Float64[np.ndarray, " two"], *, tip: str = "") -> str:
    shown = " / ".join("–" if np.isnan(value) else effect(float(value)) for value in values)
    return f'<td title="{text(tip)}">{text(shown)}</td>' if tip else cell(shown)


def _known(shown: str) -> str:
    return "–" if shown == "undefined" else shown


def _effects(values: Float64[np.ndarray, " heads"]) -> str:
    defined = values[~np.isnan(values)]
    if not defined.size:
        return "–"
    low, high = effect(float(defined.min())), effect(float(defined.max()))
    return low if low == high else f"{low} to {high}"


def _sentence_case(name: str) -> str:
    return name[:1].upper() + name[1:]


def _folded(content: str, n_rows: int) -> str:
    """Return a table that can be folded and is open if it is short."""
    return f"<details{' open' if n_rows <= _MOST_OPEN_ROWS else ''}><summary>{n_rows} rows</summary>{content}</details>"


_GENES_PER_TYPE = 10
_MOST_TYPES_NAMED = 8


def verdict_sentence(evaluation: HeadEvaluation) -> str:
    """Return how many heads are significant, by which test, and how many pairs beat predictors without heads."""
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


_CAPTION = (
    "Lost without it: what the whole model explains more than the model without this head. Fair share: Shapley value; "
    "the shares of a type add up to all heads minus no head. Interaction below 0: two heads explain partly the same; "
    "above 0: they explain more together than the sum of what each adds. All numbers are in tables/ablations.csv and "
    "tables/head_interactions.csv."
)


def ablations_section(evaluation: HeadEvaluation) -> str:
    """Return the section on ablations, or nothing if no losses, shares or interactions were computed."""
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
            # only negative interactions make heads alike, only positive ones make them need each other
            cells += _largest(names, np.where(pairs[index] < 0, -pairs[index], np.nan), sign=-1.0)
            cells += _largest(names, np.where(pairs[index] > 0, pairs[index], np.nan))
        rows.append(row(evaluation.cell_types[index], cells))
    return section("ablations", "Heads taken away", table(header, rows, _CAPTION)) if rows else ""


def _largest(names: list[str], values: Float64[np.ndarray, " names"], *, sign: float = 1.0) -> list[str]:
    if np.isnan(values).all():
        return [cell("–"), cell("")]
    best = int(np.nanargmax(values))
    return [cell(names[best]), cell(effect(sign * float(values[best])))]
