"""The page of one evaluation: its sections in order, and where its numbers come from."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.text import mask_mapping, masked, printable, slugify
from amici_eval.report.figures.svg import inline_figure
from amici_eval.report.markup import cell, cells_text, folded, row, section, table, text, yes_no
from amici_eval.report.page.frame import write_page
from amici_eval.report.page.headline import best_heads, effect_sentences, held_out_sentences, outcome_sentences
from amici_eval.report.page.sections import (
    ablations_section,
    genes_section,
    head_sections,
    held_out_section,
    scale_section,
    verdict_sentence,
    width_section,
    without_heads_section,
)
from amici_eval.report.senders_section import senders_section
from amici_eval.report.sentences import (
    WHY_THIS_ORDER,
    effect,
    engine_sentence,
    in_sample_text,
    interval,
    made_folder,
    p_text,
    permutations_text,
    undefined_sentences,
)

if TYPE_CHECKING:
    from pathlib import Path

    from amici_eval.results.evaluation import HeadEvaluation

_PACKAGES = ("amici-eval", "amici-st", "torch", "numpy", "scipy", "numba", "mlflow")
_LONGEST_IN_LINE = 80


def identity_line(evaluation: HeadEvaluation) -> str:
    """Return model and data in a line each."""
    lines = [
        f"{heading}: "
        + " · ".join(f"{key} {plain(value)}" for key, value in values.items() if len(plain(value)) <= _LONGEST_IN_LINE)
        for heading, values in (("Model", evaluation.model), ("Data", evaluation.data))
        if values
    ]
    return "".join(f'<p class="identity">{text(line)}</p>' for line in lines)


def provenance_section(
    evaluation: HeadEvaluation, *, run: Mapping[str, object] | None = None, written: datetime | None = None
) -> str:
    """Return what was evaluated, by which versions, on which device, when, with which settings."""
    settings = dict(_flat(evaluation.spec.to_dict()))
    facts = {
        "engine used": evaluation.engine,
        "device asked for": evaluation.spec.ablation.device,
        "permutations used": permutations_text(evaluation),
        "parity of engines": _parity(evaluation),
        **(run or {}),
        "page written": (written or datetime.now(timezone.utc)).strftime("%Y-%m-%d %H:%M:%S %Z").strip(),
    }
    groups = (
        ("Model", evaluation.model),
        ("Data", evaluation.data),
        ("Run", facts),
        ("Versions, where the page was written", _versions()),
        ("Settings", settings),
    )
    parts = [
        f'<h3>{text(heading)}</h3><div class="scroll" tabindex="0" role="region" aria-label="{text(heading)}">'
        f'<table class="facts"><tbody>{_listed(values)}</tbody></table></div>'
        for heading, values in groups
        if values
    ]
    return section("identity", "What was evaluated", "".join(parts))


def plain(value: object) -> str:
    """Return a value as text without credentials: a list or mapping as JSON."""
    known = masked(value)
    return (
        json.dumps(known, ensure_ascii=False, default=str) if isinstance(known, (Mapping, list, tuple)) else str(known)
    )


def _listed(values: Mapping[str, Any]) -> str:
    return "".join(row(key, [cell(plain(value), words=True)]) for key, value in mask_mapping(values).items())


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Return settings by their dotted names, as ``permutation.alpha``."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += (
            _flat(value, f"{before}{key}.") if isinstance(value, Mapping) and value else [(f"{before}{key}", value)]
        )
    return found


def _parity(evaluation: HeadEvaluation) -> str:
    if evaluation.parity is None:
        return "not compared"
    if not np.isfinite(evaluation.parity):
        return f"no finite number on {evaluation.parity_cells:,} cells"
    return f"largest difference {evaluation.parity:.2g} on {evaluation.parity_cells:,} cells"


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            # a page may be written from a stored evaluation where some packages are not installed
            continue
    return found


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


def write_html(
    evaluation: HeadEvaluation,
    directory: str | Path,
    *,
    figures: Mapping[str, Path] | None = None,
    run: Mapping[str, object] | None = None,
    written: datetime | None = None,
) -> Path:
    """Write ``directory/report.html``, one self-contained file with all foreign text escaped, and return it."""
    name = printable(evaluation.model.get("name") or "AMICI model")
    version = evaluation.model.get("version")
    title = f"Attention heads of {name}" + (f", version {printable(version)}" if version is not None else "")
    body = "\n".join(
        [
            f"<h1>{text(title)}</h1>",
            identity_line(evaluation),
            _summary(evaluation),
            _matrix(evaluation),
            _best(evaluation),
            held_out_section(evaluation),
            without_heads_section(evaluation),
            ablations_section(evaluation),
            genes_section(evaluation),
            senders_section(evaluation),
            scale_section(evaluation),
            width_section(evaluation),
            _undefined(evaluation),
            _figures(evaluation, figures or {}),
            section("read", "How to read this", f"<p>{text(_HOW_TO_READ)}</p>"),
            head_sections(evaluation),
            _heads(evaluation),
            provenance_section(evaluation, run=run, written=written),
        ]
    )
    return write_page(made_folder(directory) / "report.html", title=title, body=body)


def _summary(evaluation: HeadEvaluation) -> str:
    effects, held_out = effect_sentences(evaluation), held_out_sentences(evaluation)
    in_full = "".join(
        f"<p>{text(' '.join(sentences))}</p>"
        for sentences in (
            [*effects[2:], *held_out[1:]],
            [WHY_THIS_ORDER],
            outcome_sentences(evaluation),
            [engine_sentence(evaluation)],
        )
        if sentences
    )
    notes = "".join(f"<li>{text(note)}</li>" for note in evaluation.notes)
    return (
        f'<p class="lead">{text(" ".join(effects[:2]))}</p>'
        f'<p class="lead">{text(verdict_sentence(evaluation))}</p><p>{text(held_out[0])}</p>'
        + (f'<div class="notes"><h2>Notes</h2><ul>{notes}</ul></div>' if notes else "")
        + folded(in_full, "The outcome in full: effects, tests, and what they take for granted")
    )


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
            mark = f'<span class="mark">{"*" if adjusted <= alpha else ""}</span>'
            bounds = evaluation.intervals
            between = "" if bounds is None else interval(bounds.low[head, index], bounds.high[head, index])
            tip = text(f"head {head}: EV {effect(value)}, adjusted p {p_text(adjusted)}")
            below = f"<br><small>{text(between)}</small>" if between else ""
            cells.append(
                f'<td style="background:rgba({hue},{strength:.2f})" title="{tip}">'
                f"{text(effect(value))}{mark}{below}</td>"
            )
        rows.append(row(cell_type, cells))
    caption = (
        f"Explained variance over all genes, one head kept alone. * adjusted p ≤ {alpha:g} "
        f"({evaluation.decided_by} null{in_sample_text(evaluation)}). Red above 0, blue below. – undefined. "
        + (
            ""
            if evaluation.intervals is None
            else f"Below an effect, its {100 * evaluation.intervals.confidence:g} % interval, given enough tiles. "
        )
        + "The number of a head leads to its genes and tests."
    )
    return section("matrix", "Heads and cell types", table(header, rows, caption, kind="matrix", linked=True))


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
            shown += [cell(cells_text(best["ess"])), cell(p_text(best["p_value_adj_spatial"]))]
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
    captions["senders"] = (
        "Who talks to whom: explained variance that each head loses without each sender type, by receiver type"
    )
    captions["sender_graph"] = (
        "Who talks to whom: the strongest links from sender to receiver types as arrows, coloured by head"
    )
    for cell_type in evaluation.cell_types:
        stem = f"expl_variance_heatmap_{slugify(cell_type, evaluation.cell_types)}"
        captions[stem] = f"Explained variance of genes per head in {cell_type}"
    parts = []
    for number, (name, path) in enumerate(figures.items()):
        caption = printable(captions.get(name, name))
        wide = ' class="wide"' if "heatmap" not in name else ""
        markup = inline_figure(path, prefix=f"f{number}-", alt=caption)
        label = text(f"Figure: {caption}")
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
            cells += [cell(cells_text(entry["ess"])), cell(effect(entry["detectable_expl_var"]))]
            cells += [cell(p_text(entry[name])) for name in ("p_value_spatial", "p_value_adj_spatial")]
        cells += [cell(p_text(entry["p_value_head"])), cell(between), cell(p_text(entry["p_value_adj_head"]))]
        cells += [cell(yes_no(entry["significant"]), words=True)]
        cells += [cell(yes_no(entry["held_out"], missing="unknown"), words=True)]
        rows.append(row(entry["ct_name"], [*cells, cell(entry["undefined_reason"], words=True, long=True)]))
    caption = (
        "Every head and type; p interval: Monte Carlo uncertainty of the free p. All columns are in tables/heads.csv."
    )
    content = table(header, rows, caption)
    return section("heads", "All heads", folded(content, f"{len(rows)} rows"))


def _where(computed: object, *values: Any) -> list[Any]:
    """Return the values as a list, which is empty if ``computed`` is ``None``."""
    return [] if computed is None else list(values)
