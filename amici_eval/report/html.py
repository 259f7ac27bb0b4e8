"""One page that shows an evaluation: a single file that needs no network and runs no script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from amici_eval.names import slugify
from amici_eval.report.ablation_summary import ablations_section
from amici_eval.report.markup import cell, row, section, table, text
from amici_eval.report.svg import inline_figure
from amici_eval.report.tables import best_heads, headline_sentences, held_out_sentence
from amici_eval.report.wording import (
    BASELINE_NAMES,
    effect,
    engine_sentence,
    made_folder,
    p_text,
    permutations_text,
    printable,
    undefined_sentences,
    unwritable,
)

if TYPE_CHECKING:
    from pathlib import Path

    from amici_eval.results import HeadEvaluation

__all__ = ["write_html"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_HOW_TO_READ = (
    "Each head was kept alone: the attention of all other heads was set to zero, and the model predicted the "
    "expression of every receiver cell again (keep-one ablation). Explained variance (EV) compares that prediction "
    "with the measured expression over the cells of one type: 1 is perfect, 0 is no better than the type's mean, "
    "below 0 is worse. Heads overlap, so the values of several heads do not add up. A p-value says how often "
    "predictions handed to shuffled cells of the same type fit at least as well; it says that a head carries "
    "information about single cells, not that the effect is large, nor what causes it. Effects on cells that the "
    "model was fitted on (in-sample) are optimistic, and the best of many genes is optimistic everywhere. Undefined "
    "values are left empty and explained; they count neither for nor against a head."
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
    style = files("amici_eval.report").joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(
        [
            f"<h1>{text(title)}</h1>",
            _identity_line(evaluation),
            _summary(evaluation),
            _matrix(evaluation),
            _best(evaluation),
            ablations_section(evaluation),
            _undefined(evaluation),
            _figures(evaluation, figures or {}),
            section("read", "How to read this", f"<p>{text(_HOW_TO_READ)}</p>"),
            _heads(evaluation),
            _baselines(evaluation),
            _identity(evaluation),
        ]
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )
    path = made_folder(directory) / "report.html"
    try:
        path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def _summary(evaluation: HeadEvaluation) -> str:
    sentences = headline_sentences(evaluation)
    lead = f'<p class="lead">{text(" ".join(sentences[:2]))}</p>'
    others = [*sentences[2:], held_out_sentence(evaluation), engine_sentence(evaluation)]
    rest = f"<p>{text(' '.join(others))}</p>"
    notes = "".join(f"<li>{text(note)}</li>" for note in evaluation.notes)
    return lead + rest + (f'<div class="notes"><h2>Notes</h2><ul>{notes}</ul></div>' if notes else "")


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
            value, adjusted = float(values[head, index]), float(evaluation.p_value_adj[head, index])
            if np.isnan(value):
                cells.append('<td class="none" title="undefined">–</td>')
                continue
            hue = "178,24,43" if value > 0 else "33,102,172"
            strength = 0.55 * min(1.0, abs(value) / largest)
            mark = '<span class="mark">*</span>' if adjusted <= alpha else '<span class="mark"></span>'
            tip = f"head {head}: EV {effect(value)}, adjusted p {p_text(adjusted)}"
            cells.append(f'<td style="background:rgba({hue},{strength:.2f})" title="{tip}">{effect(value)}{mark}</td>')
        rows.append(row(cell_type, cells))
    caption = (
        f"Explained variance over all genes, one head kept alone. * adjusted p ≤ {alpha:g} "
        f"({evaluation.spec.permutation.null} null). Red above 0, blue below. – undefined."
    )
    return section("matrix", "Heads and cell types", table(header, rows, caption, kind="matrix"))


def _best(evaluation: HeadEvaluation) -> str:
    header = ["Receiver type", "Best head", "EV, all genes", "Best gene", "EV, best gene", "Adjusted p"]
    rows = [
        row(
            best["ct_name"],
            [
                cell(best["head"]),
                cell(effect(best["expl_var_head"])),
                cell(best["best_gene"], words=True),
                cell(effect(best["expl_var_best_gene"])),
                cell(p_text(best["p_value_adj_head"])),
            ],
        )
        for best in best_heads(evaluation).to_dict("records")
    ]
    caption = "The head with the largest explained variance over all genes, per type, and its best gene."
    return section("best", "Best head of each type", table(header, rows, caption)) if rows else ""


def _undefined(evaluation: HeadEvaluation) -> str:
    lines = "".join(f"<li>{text(line)}</li>" for line in undefined_sentences(evaluation))
    return section("undefined", "Undefined, and why", f"<ul>{lines}</ul>") if lines else ""


def _figures(evaluation: HeadEvaluation, figures: Mapping[str, Path]) -> str:
    if not figures:
        return ""
    captions = {"expl_variance_barplot_per_head": "Explained variance of the best gene per head and receiver type"}
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
    header = ["Receiver type", "Head", "Cells", "EV, all genes", "Best gene", "EV, best gene", "p", "p interval"]
    header += ["Adjusted p", "Significant", "Held out", "Undefined because"]
    rows = []
    for entry in evaluation.heads().to_dict("records"):
        interval = "" if np.isnan(entry["p_ci_low"]) else f"{p_text(entry['p_ci_low'])} to {p_text(entry['p_ci_high'])}"
        cells = [
            cell(entry["head"]),
            cell(f"{entry['n_cells']:,}"),
            *(cell(effect(entry["expl_var_head"])), cell(entry["best_gene"] or "", words=True)),
            *(cell(effect(entry["expl_var_best_gene"])), cell(p_text(entry["p_value_head"])), cell(interval)),
            *(cell(p_text(entry["p_value_adj_head"])), cell(_yes_no(entry["significant"]), words=True)),
            *(
                cell(_yes_no(entry["held_out"], missing="unknown"), words=True),
                cell(entry["undefined_reason"], words=True),
            ),
        ]
        rows.append(row(entry["ct_name"], cells))
    caption = "Every head and type; p interval: Monte Carlo uncertainty of p. All columns are in tables/heads.csv."
    content = table(header, rows, caption)
    return section("heads", "All heads", f"<details><summary>{len(rows)} rows</summary>{content}</details>")


def _baselines(evaluation: HeadEvaluation) -> str:
    frame = evaluation.baselines()
    names = list(dict.fromkeys(frame["baseline"]))
    rows = [
        row(
            cell_type,
            [cell(effect(float(group.loc[group["baseline"] == name, "expl_var"].iloc[0]))) for name in names],
        )
        for cell_type, group in frame.groupby("ct_name", sort=False)
    ]
    header = ["Receiver type", *(BASELINE_NAMES.get(name, name).capitalize() for name in names)]
    return section("baselines", "Baselines", table(header, rows, "Explained variance over all genes."))


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
