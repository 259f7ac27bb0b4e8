"""One page that shows an evaluation: a single file that needs no network and runs no script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from amici_eval.names import slugify
from amici_eval.report.ablation_summary import ablations_section
from amici_eval.report.headline import best_heads, effect_sentences, held_out_sentences, outcome_sentences
from amici_eval.report.markup import cell, row, section, table, text
from amici_eval.report.page import write_page
from amici_eval.report.sections import (
    genes_section,
    held_out_section,
    scale_section,
    width_section,
    without_heads_section,
)
from amici_eval.report.svg import inline_figure
from amici_eval.report.wording import (
    WHY_THIS_ORDER,
    effect,
    engine_sentence,
    in_sample_text,
    interval,
    made_folder,
    p_text,
    permutations_text,
    printable,
    rounded,
    undefined_sentences,
)

if TYPE_CHECKING:
    from pathlib import Path

    from amici_eval.results import HeadEvaluation

__all__ = ["write_html"]

_EFFECTIVE = "Effective cells (lag)"
_HOW_TO_READ = (
    "Each head was kept alone: the attention of all other heads was set to zero, and the model predicted the "
    "expression of every receiver cell again (keep-one ablation). Explained variance (EV) compares that prediction "
    "with the measured expression over the cells of one type: 1 is perfect, 0 is no better than the type's mean, "
    "below 0 is worse. Heads overlap, so the values of several heads do not add up. A p-value says how often "
    "predictions would fit at least as well by chance, as its null has it (free: handed to shuffled cells of the same "
    "type; spatial: unrelated to expression, but as smooth in the tissue); it says that a head carries "
    "information about single cells, not that the effect is large, nor what causes it. Effects and p-values on cells "
    "that the model was fitted on (in-sample) are optimistic, and the best of many genes is optimistic everywhere. "
    "Undefined values are left empty and explained; they count neither for nor against a head."
)


def write_html(evaluation: HeadEvaluation, directory: str | Path, *, figures: Mapping[str, Path] | None = None) -> Path:
    """Write ``directory/report.html``, one self-contained file, and return it.

    Parameters
    ----------
    evaluation
        What to show.
    directory
        Folder of the page; made if missing.
    figures
        PNG or SVG files by name, shown in this order. Names of figures by ``save_figures`` (file names without ending)
        are captioned in words; any other name is its own caption.

    Raises
    ------
    DataError
        If a figure is missing or damaged.
    OutputError
        If the file cannot be written.

    Notes
    -----
    All that comes from the model, the data or a file is escaped, and the page forbids scripts and network itself.
    """
    name = printable(evaluation.model.get("name") or "AMICI model")
    version = evaluation.model.get("version")
    title = f"Attention heads of {name}" + (f", version {printable(version)}" if version is not None else "")
    body = "\n".join(
        [
            f"<h1>{text(title)}</h1>",
            _identity_line(evaluation),
            _summary(evaluation),
            _matrix(evaluation),
            _best(evaluation),
            held_out_section(evaluation),
            without_heads_section(evaluation),
            ablations_section(evaluation),
            genes_section(evaluation),
            scale_section(evaluation),
            width_section(evaluation),
            _undefined(evaluation),
            _figures(evaluation, figures or {}),
            section("read", "How to read this", f"<p>{text(_HOW_TO_READ)}</p>"),
            _heads(evaluation),
            _identity(evaluation),
        ]
    )
    return write_page(made_folder(directory) / "report.html", title=title, body=body)


def _summary(evaluation: HeadEvaluation) -> str:
    effects = effect_sentences(evaluation)
    paragraphs = [
        f'<p class="lead">{text(" ".join(effects[:2]))}</p>',
        *(
            f"<p>{text(' '.join(sentences))}</p>"
            for sentences in (
                [*effects[2:], *held_out_sentences(evaluation)],
                [WHY_THIS_ORDER],
                outcome_sentences(evaluation),
                [engine_sentence(evaluation)],
            )
        ),
    ]
    notes = "".join(f"<li>{text(note)}</li>" for note in evaluation.notes)
    return "".join(paragraphs) + (f'<div class="notes"><h2>Notes</h2><ul>{notes}</ul></div>' if notes else "")


def _identity_line(evaluation: HeadEvaluation) -> str:
    lines = [
        f"{heading}: "
        + " · ".join(f"{key} {_plain(value)}" for key, value in values.items() if len(_plain(value)) <= 80)
        for heading, values in (("Model", evaluation.model), ("Data", evaluation.data))
        if values
    ]
    return "".join(f'<p class="identity">{text(line)}</p>' for line in lines)


def _matrix(evaluation: HeadEvaluation) -> str:
    alpha = evaluation.spec.permutation.alpha
    values = evaluation.expl_var
    largest = float(np.max(np.abs(values), where=~np.isnan(values), initial=0.0)) or 1.0
    header = ["Receiver type", "Cells", *(f"Head {head}" for head in range(evaluation.n_heads))]
    rows = []
    for index, cell_type in enumerate(evaluation.cell_types):
        cells = [cell(f"{evaluation.n_cells[index]:,}")]
        for head in range(evaluation.n_heads):
            value, adjusted = float(values[head, index]), float(evaluation.adjusted[head, index])
            if np.isnan(value):
                cells.append('<td class="none" title="undefined">–</td>')
                continue
            hue = "178,24,43" if value > 0 else "33,102,172"
            strength = 0.55 * min(1.0, abs(value) / largest)
            mark = '<span class="mark">*</span>' if adjusted <= alpha else '<span class="mark"></span>'
            bounds = evaluation.intervals
            between = "" if bounds is None else interval(bounds.low[head, index], bounds.high[head, index])
            tip = text(
                f"head {head}: EV {effect(value)}{f' ({between})' if between else ''}, adjusted p {p_text(adjusted)}"
            )
            cells.append(
                f'<td style="background:rgba({hue},{strength:.2f})" title="{tip}">{text(effect(value))}{mark}</td>'
            )
        rows.append(row(cell_type, cells))
    caption = (
        f"Explained variance over all genes, one head kept alone. * adjusted p ≤ {alpha:g} "
        f"({evaluation.decided_by} null{in_sample_text(evaluation)}). Red above 0, blue below. – undefined."
    )
    return section("matrix", "Heads and cell types", table(header, rows, caption, kind="matrix"))


def _best(evaluation: HeadEvaluation) -> str:
    spatial, parts = evaluation.spatial is not None, evaluation.parts
    header = ["Receiver type", "Best head", "EV, all genes"]
    header += _where(evaluation.intervals, "Interval") + _where(evaluation.trivial, "Gain", "EV, nearest masked")
    header += [*_where(parts, "EV, held out"), "Best gene", "EV, best gene"]
    header += [_EFFECTIVE, f"Adjusted p ({evaluation.decided_by})"] if spatial else ["Adjusted p"]
    rows = []
    for best in best_heads(evaluation).to_dict("records"):
        cells = [best["head"], effect(best["expl_var_head"])]
        cells += _where(evaluation.intervals, interval(best["ci_low"], best["ci_high"]))
        cells += _where(evaluation.trivial, effect(best["gain"]), effect(best["expl_var_without_nearest"]))
        if parts is not None:
            cells.append(effect(float(parts.expl_var[1, best["head"], evaluation.type_index(best["ct_name"])])))
        shown = [cell(value) for value in cells]
        shown += [cell(best["best_gene"], words=True), cell(effect(best["expl_var_best_gene"]))]
        if spatial:
            shown += [cell(_cells(best["ess"])), cell(p_text(best["p_value_adj_spatial"]))]
        else:
            shown.append(cell(p_text(best["p_value_adj_head"])))
        rows.append(row(best["ct_name"], shown))
    caption = (
        "The head with the largest explained variance (EV) over all genes, per type, and its best gene: both were "
        "picked for being largest, so both are optimistic."
    )
    return section("best", "Best head of each type", table(header, rows, caption)) if rows else ""


def _undefined(evaluation: HeadEvaluation) -> str:
    lines = "".join(f"<li>{text(line)}</li>" for line in undefined_sentences(evaluation))
    return section("undefined", "Undefined, and why", f"<ul>{lines}</ul>") if lines else ""


def _figures(evaluation: HeadEvaluation, figures: Mapping[str, Path]) -> str:
    if not figures:
        return ""
    captions = {"expl_variance_barplot_per_head": "Explained variance of the best gene per head and receiver type"}
    captions["effects"] = (
        "Explained variance of each head kept alone, with its interval, beside the best predictor without heads"
    )
    captions["ablations"] = (
        "What each head explains alone, what is lost without it, and its fair share, per receiver type"
    )
    captions["head_interactions"] = (
        "Interaction of heads per receiver type: red pairs explain more together than the sum of what each adds, blue "
        "pairs explain partly the same"
    )
    for cell_type in evaluation.cell_types:
        captions[f"expl_variance_heatmap_{slugify(cell_type)}"] = f"Explained variance of genes per head in {cell_type}"
    parts = []
    for number, (name, path) in enumerate(figures.items()):
        caption = printable(captions.get(name, name))
        wide = ' class="wide"' if "heatmap" not in name else ""
        markup = inline_figure(path, prefix=f"f{number}-", alt=caption)
        label = escape(f"Figure: {caption}")
        parts.append(
            f'<figure{wide}><div class="scroll" tabindex="0" role="region" aria-label="{label}">{markup}</div>'
            f"<figcaption>{text(caption)}</figcaption></figure>"
        )
    return section("figures", "Figures", f'<div class="figures">{"".join(parts)}</div>')


def _heads(evaluation: HeadEvaluation) -> str:
    spatial, bounds, trivial = evaluation.spatial is not None, evaluation.intervals, evaluation.trivial
    header = ["Receiver type", "Head", "Cells", "EV, all genes"]
    header += (
        _where(bounds, "Interval") + _where(trivial, "Gain", "EV, nearest masked") + ["Best gene", "EV, best gene"]
    )
    if spatial:
        null = evaluation.decided_by
        header += [_EFFECTIVE, "Detectable EV (lag)", f"p ({null})", f"Adjusted p ({null})"]
    free = f" ({evaluation.spec.permutation.null}, anticonservative)" if spatial else ""
    header += [f"p{free}", f"p interval{free and ' (free)'}", f"Adjusted p{free}"]
    header += [f"Significant ({evaluation.decided_by})", "Held out", "Undefined because"]
    rows = []
    for entry in evaluation.heads().to_dict("records"):
        between = "" if np.isnan(entry["p_ci_low"]) else f"{p_text(entry['p_ci_low'])} to {p_text(entry['p_ci_high'])}"
        cells = [cell(entry["head"]), cell(f"{entry['n_cells']:,}"), cell(effect(entry["expl_var_head"]))]
        cells += _where(bounds, cell(interval(entry["ci_low"], entry["ci_high"])))
        cells += _where(trivial, cell(effect(entry["gain"])), cell(effect(entry["expl_var_without_nearest"])))
        cells += [cell(entry["best_gene"] or "", words=True), cell(effect(entry["expl_var_best_gene"]))]
        if spatial:
            cells += [cell(_cells(entry["ess"])), cell(effect(entry["detectable_expl_var"]))]
            cells += [cell(p_text(entry[name])) for name in ("p_value_spatial", "p_value_adj_spatial")]
        cells += [cell(p_text(entry["p_value_head"])), cell(between), cell(p_text(entry["p_value_adj_head"]))]
        cells += [cell(_yes_no(entry["significant"]), words=True)]
        cells += [cell(_yes_no(entry["held_out"], missing="unknown"), words=True)]
        rows.append(row(entry["ct_name"], [*cells, cell(entry["undefined_reason"], words=True)]))
    caption = (
        "Every head and type; p interval: Monte Carlo uncertainty of the free p. All columns are in tables/heads.csv."
    )
    content = table(header, rows, caption)
    return section("heads", "All heads", f"<details><summary>{len(rows)} rows</summary>{content}</details>")


def _identity(evaluation: HeadEvaluation) -> str:
    def listed(values: Mapping[str, Any]) -> str:
        rows = [row(key, [cell(_plain(value), words=True)]) for key, value in values.items()]
        return "".join(rows)

    settings = {
        "engine used": evaluation.engine,
        "permutations used": permutations_text(evaluation),
        **evaluation.spec.to_dict(),
    }
    parts = [
        f'<h3>{heading}</h3><div class="scroll" tabindex="0" role="region" aria-label="{heading}">'
        f'<table class="facts"><tbody>{listed(values)}</tbody></table></div>'
        for heading, values in (("Model", evaluation.model), ("Data", evaluation.data), ("Settings", settings))
        if values
    ]
    return section("identity", "What was evaluated", "".join(parts))


def _plain(value: object) -> str:
    return (
        json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (Mapping, list, tuple)) else str(value)
    )


def _yes_no(value: object, *, missing: str = "") -> str:
    return missing if value is None or value is pd.NA else ("yes" if value else "no")


def _where(computed: object, *values: Any) -> list[Any]:
    """Return the values, or none where what they are of was not computed."""
    return [] if computed is None else list(values)


def _cells(number: float) -> str:
    return "undefined" if np.isnan(number) else rounded(number)
