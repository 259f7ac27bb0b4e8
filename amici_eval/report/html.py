"""One page that shows an evaluation: a single file that needs no network and runs no script."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from amici_eval.names import slugify
from amici_eval.report.svg import inline_figure
from amici_eval.report.tables import best_heads, headline_sentences, held_out_sentence
from amici_eval.report.wording import (
    BASELINE_NAMES,
    effect,
    made_folder,
    p_text,
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
            f"<h1>{_text(title)}</h1>",
            _identity_line(evaluation),
            _summary(evaluation),
            _matrix(evaluation),
            _best(evaluation),
            _undefined(evaluation),
            _figures(evaluation, figures or {}),
            _section("read", "How to read this", f"<p>{_text(_HOW_TO_READ)}</p>"),
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
        f"<title>{_text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
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
    lead = f'<p class="lead">{_text(" ".join(sentences[:2]))}</p>'
    rest = f"<p>{_text(' '.join([*sentences[2:], held_out_sentence(evaluation)]))}</p>"
    notes = "".join(f"<li>{_text(note)}</li>" for note in evaluation.notes)
    return lead + rest + (f'<div class="notes"><h2>Notes</h2><ul>{notes}</ul></div>' if notes else "")


def _identity_line(evaluation: HeadEvaluation) -> str:
    lines = [
        f"{heading}: "
        + " · ".join(f"{key} {_plain(value)}" for key, value in values.items() if len(_plain(value)) <= 80)
        for heading, values in (("Model", evaluation.model), ("Data", evaluation.data))
        if values
    ]
    return "".join(f'<p class="identity">{_text(line)}</p>' for line in lines)


def _matrix(evaluation: HeadEvaluation) -> str:
    alpha = evaluation.spec.permutation.alpha
    values = evaluation.expl_var
    largest = float(np.max(np.abs(values), where=~np.isnan(values), initial=0.0)) or 1.0
    header = ["Receiver type", "Cells", *(f"Head {head}" for head in range(evaluation.n_heads))]
    rows = []
    for index, cell_type in enumerate(evaluation.cell_types):
        cells = [_cell(f"{evaluation.n_cells[index]:,}")]
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
        rows.append(_row(cell_type, cells))
    caption = (
        f"Explained variance over all genes, one head kept alone. * adjusted p ≤ {alpha:g} "
        f"({evaluation.spec.permutation.null} null). Red above 0, blue below. – undefined."
    )
    return _section("matrix", "Heads and cell types", _table(header, rows, caption, kind="matrix"))


def _best(evaluation: HeadEvaluation) -> str:
    header = ["Receiver type", "Best head", "EV, all genes", "Best gene", "EV, best gene", "Adjusted p"]
    rows = [
        _row(
            row["ct_name"],
            [
                _cell(row["head"]),
                _cell(effect(row["expl_var_head"])),
                _cell(row["best_gene"], words=True),
                _cell(effect(row["expl_var_best_gene"])),
                _cell(p_text(row["p_value_adj_head"])),
            ],
        )
        for row in best_heads(evaluation).to_dict("records")
    ]
    caption = "The head with the largest explained variance over all genes, per type, and its best gene."
    return _section("best", "Best head of each type", _table(header, rows, caption)) if rows else ""


def _undefined(evaluation: HeadEvaluation) -> str:
    lines = "".join(f"<li>{_text(line)}</li>" for line in undefined_sentences(evaluation))
    return _section("undefined", "Undefined, and why", f"<ul>{lines}</ul>") if lines else ""


def _figures(evaluation: HeadEvaluation, figures: Mapping[str, Path]) -> str:
    if not figures:
        return ""
    captions = {"expl_variance_barplot_per_head": "Explained variance of the best gene per head and receiver type"}
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
            f"<figcaption>{_text(caption)}</figcaption></figure>"
        )
    return _section("figures", "Figures", f'<div class="figures">{"".join(parts)}</div>')


def _heads(evaluation: HeadEvaluation) -> str:
    header = ["Receiver type", "Head", "Cells", "EV, all genes", "Best gene", "EV, best gene", "p", "p interval"]
    header += ["Adjusted p", "Significant", "Held out", "Undefined because"]
    rows = []
    for row in evaluation.heads().to_dict("records"):
        interval = "" if np.isnan(row["p_ci_low"]) else f"{p_text(row['p_ci_low'])} to {p_text(row['p_ci_high'])}"
        cells = [
            _cell(row["head"]),
            _cell(f"{row['n_cells']:,}"),
            *(_cell(effect(row["expl_var_head"])), _cell(row["best_gene"] or "", words=True)),
            *(_cell(effect(row["expl_var_best_gene"])), _cell(p_text(row["p_value_head"])), _cell(interval)),
            *(_cell(p_text(row["p_value_adj_head"])), _cell(_yes_no(row["significant"]), words=True)),
            *(
                _cell(_yes_no(row["held_out"], missing="unknown"), words=True),
                _cell(row["undefined_reason"], words=True),
            ),
        ]
        rows.append(_row(row["ct_name"], cells))
    caption = "Every head and type; p interval: Monte Carlo uncertainty of p. All columns are in tables/heads.csv."
    table = _table(header, rows, caption)
    return _section("heads", "All heads", f"<details><summary>{len(rows)} rows</summary>{table}</details>")


def _baselines(evaluation: HeadEvaluation) -> str:
    frame = evaluation.baselines()
    names = list(dict.fromkeys(frame["baseline"]))
    rows = [
        _row(
            cell_type,
            [_cell(effect(float(group.loc[group["baseline"] == name, "expl_var"].iloc[0]))) for name in names],
        )
        for cell_type, group in frame.groupby("ct_name", sort=False)
    ]
    header = ["Receiver type", *(BASELINE_NAMES.get(name, name).capitalize() for name in names)]
    return _section("baselines", "Baselines", _table(header, rows, "Explained variance over all genes."))


def _identity(evaluation: HeadEvaluation) -> str:
    def listed(values: Mapping[str, Any]) -> str:
        rows = [_row(key, [_cell(_plain(value), words=True)]) for key, value in values.items()]
        return "".join(rows)

    settings = {"n_permutations used": evaluation.n_permutations, **evaluation.spec.to_dict()}
    parts = [
        f'<h3>{heading}</h3><div class="scroll" tabindex="0" role="region" aria-label="{heading}">'
        f'<table class="facts"><tbody>{listed(values)}</tbody></table></div>'
        for heading, values in (("Model", evaluation.model), ("Data", evaluation.data), ("Settings", settings))
        if values
    ]
    return _section("identity", "What was evaluated", "".join(parts))


def _section(identifier: str, heading: str, content: str) -> str:
    return f'<section id="{identifier}"><h2>{heading}</h2>{content}</section>'


def _table(header: Sequence[str], rows: Iterable[str], caption: str, *, kind: str = "plain") -> str:
    cells = "".join(f'<th scope="col">{_text(name)}</th>' for name in header)
    return (
        f'<p class="caption">{_text(caption)}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}"><table class="{kind}">'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(name: object, cells: Iterable[str]) -> str:
    return f'<tr><th scope="row">{_text(name)}</th>{"".join(cells)}</tr>\n'


def _cell(value: object, *, words: bool = False) -> str:
    return f'<td class="words">{_text(value)}</td>' if words else f"<td>{_text(value)}</td>"


def _text(value: object) -> str:
    return escape(printable(value))


def _plain(value: object) -> str:
    return (
        json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (Mapping, list, tuple)) else str(value)
    )


def _yes_no(value: object, *, missing: str = "") -> str:
    return missing if value is None or value is pd.NA else ("yes" if value else "no")
