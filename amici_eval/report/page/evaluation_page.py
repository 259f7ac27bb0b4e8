"""The page of one evaluation: the values of its sections; headings, captions and order are in the template."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from amici_eval.common.text import mask_mapping, masked, printable, slugify
from amici_eval.report.evaluation_sentences import (
    BASELINE_MEANINGS,
    BASELINE_NAMES,
    WHY_THIS_ORDER,
    adjustment_text,
    best_heads,
    effect_sentences,
    engine_sentence,
    head_sentences,
    held_out_sentences,
    in_sample_text,
    outcome_sentences,
    permutations_text,
    significance_sentence,
    sure_links,
    undefined_sentences,
)
from amici_eval.report.numbers import dash, effect, interval, p_text, rounded, span
from amici_eval.report.page.rendering import write_page

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float64

    from amici_eval.results.evaluation import HeadEvaluation

    Record = dict[str, Any]

_GENES_PER_HEAD_AND_TYPE = 5
_GENES_PER_TYPE = 10
_MOST_LINKS = 30
_LONGEST_GENE = 24
_LONGEST_IN_LINE = 80
_PACKAGES = ("amici-eval", "amici-st", "torch", "numpy", "scipy", "numba", "mlflow")


def write_html(
    evaluation: HeadEvaluation,
    directory: str | Path,
    *,
    figures: Mapping[str, Path] | None = None,
    run: Mapping[str, object] | None = None,
    written: datetime | None = None,
) -> Path:
    """Write ``directory/report.html``, one self-contained file with all foreign text escaped, and return it."""
    records = _head_records(evaluation)
    return write_page(
        directory,
        "evaluation.html.jinja",
        title=_title(evaluation),
        evaluation=evaluation,
        alpha=evaluation.spec.permutation.alpha,
        in_sample=in_sample_text(evaluation),
        gene_adjustment=adjustment_text(evaluation, null="lag"),
        identity=_identity(evaluation),
        summary=_summary(evaluation),
        head_links={f"Head {head}": f"#head-{head}" for head in range(evaluation.n_heads)},
        matrix=_matrix(evaluation),
        best=_best(evaluation, records),
        held_out=_held_out(evaluation),
        baselines=_baselines(evaluation),
        nearest_masked=_nearest_masked(evaluation),
        ablations=_ablations(evaluation),
        genes=_significant_genes(evaluation),
        senders=_senders(evaluation),
        scale=_scale_and_power(evaluation),
        widths=_widths(evaluation),
        undefined=undefined_sentences(evaluation),
        figures=figures or {},
        heatmaps={
            f"expl_variance_heatmap_{slugify(name, evaluation.cell_types)}": name for name in evaluation.cell_types
        },
        genes_per_type=_GENES_PER_TYPE,
        heads=[_head(evaluation, head, records) for head in range(evaluation.n_heads)],
        records=records,
        facts=_facts(evaluation, run=run, written=written),
    )


def _title(evaluation: HeadEvaluation) -> str:
    name, version = evaluation.model.get("name") or "AMICI model", evaluation.model.get("version")
    return f"Attention heads of {printable(name)}" + (f", version {printable(version)}" if version is not None else "")


def _identity(evaluation: HeadEvaluation) -> list[str]:
    """Return model and data in a line each, without values that are too long for it."""
    lines = []
    for heading, values in (("Model", evaluation.model), ("Data", evaluation.data)):
        texts = {key: _plain(value) for key, value in values.items()}
        if values:
            short = [f"{key} {text}" for key, text in texts.items() if len(text) <= _LONGEST_IN_LINE]
            lines.append(f"{heading}: {' · '.join(short)}")
    return lines


def _summary(evaluation: HeadEvaluation) -> Record:
    effects, held_out = effect_sentences(evaluation), held_out_sentences(evaluation)
    in_full = [
        [*effects[2:], *held_out[1:]],
        [WHY_THIS_ORDER],
        outcome_sentences(evaluation),
        [engine_sentence(evaluation)],
    ]
    return {
        "effects": " ".join(effects[:2]),
        "significance": significance_sentence(evaluation),
        "held_out": held_out[0],
        "in_full": [" ".join(sentences) for sentences in in_full if sentences],
    }


def _matrix(evaluation: HeadEvaluation) -> list[Record]:
    """Return a row for each type; the colour of a cell says how large its effect is beside the largest."""
    values, bounds = evaluation.expl_var, evaluation.intervals
    largest = float(np.max(np.abs(values), where=~np.isnan(values), initial=0.0)) or 1.0
    rows = []
    for index, cell_type in enumerate(evaluation.cell_types):
        cells: list[Record | None] = []
        for head in range(evaluation.n_heads):
            value, adjusted = float(values[head, index]), float(evaluation.adjusted[head, index])
            if np.isnan(value):
                cells.append(None)
                continue
            hue = "178,24,43" if value > 0 else "33,102,172"
            cells.append(
                {
                    "effect": effect(value),
                    "significant": adjusted <= evaluation.spec.permutation.alpha,
                    "interval": "" if bounds is None else interval(bounds.low[head, index], bounds.high[head, index]),
                    "tip": f"head {head}: EV {effect(value)}, adjusted p {p_text(adjusted)}",
                    "colour": f"rgba({hue},{0.55 * min(1.0, abs(value) / largest):.2f})",
                }
            )
        rows.append({"cell_type": cell_type, "n_cells": evaluation.n_cells[index], "cells": cells})
    return rows


def _head_records(evaluation: HeadEvaluation) -> list[Record]:
    """Return the rows of ``tables/heads.csv`` with what pages show in place of several columns."""
    records: list[Record] = evaluation.heads().to_dict("records")  # type: ignore[assignment]
    spatial, parts = evaluation.spatial is not None, evaluation.parts
    for record in records:
        at = record["head"], evaluation.type_index(record["ct_name"])
        low, high = record["p_ci_low"], record["p_ci_high"]
        record |= {
            "interval": interval(record["ci_low"], record["ci_high"]),
            "p_interval": "" if np.isnan(low) else f"{p_text(low)} to {p_text(high)}",
            "p": record["p_value_spatial" if spatial else "p_value_head"],
            "p_adjusted": record["p_value_adj_spatial" if spatial else "p_value_adj_head"],
            "held_out_effect": np.nan if parts is None else float(parts.expl_var[1][at]),
            "significant": _yes_no(record["significant"], missing=""),
            "held_out": _yes_no(record["held_out"], missing="unknown"),
        }
    return records


def _yes_no(value: object, *, missing: str) -> str:
    return missing if value is None or value is pd.NA else ("yes" if value else "no")


def _best(evaluation: HeadEvaluation, records: list[Record]) -> list[Record]:
    best = best_heads(evaluation)
    chosen = set(zip(best["head"], best["ct_name"], strict=True))
    return sorted(
        (record for record in records if (record["head"], record["ct_name"]) in chosen),
        key=lambda record: evaluation.type_index(record["ct_name"]),
    )


def _held_out(evaluation: HeadEvaluation) -> list[Record]:
    """Return effects on cells of training and on the others; nothing if it is not known which cells were fitted."""
    found = evaluation.parts
    if found is None:
        return []
    rows = []
    for index, cell_type in enumerate(evaluation.cell_types):
        heads = []
        for head in range(evaluation.n_heads):
            bounds = [interval(found.low[part, head, index], found.high[part, head, index]) for part in range(2)]
            heads.append(
                {"effects": found.expl_var[:, head, index], "tip": " / ".join(one or "–" for one in bounds)},
            )
        n_cells = " / ".join(f"{number:,}" for number in found.n_cells[:, index])
        rows.append({"cell_type": cell_type, "n_cells": n_cells, "whole": found.full[:, index], "heads": heads})
    return rows


def _baselines(evaluation: HeadEvaluation) -> Record:
    """Return what predictors without heads explain of each type, and what heads add to the best of them."""
    found, frame = evaluation.trivial, evaluation.baselines()
    names = [name for name in dict.fromkeys(frame["baseline"]) if name != "full_model_without_nearest"]
    shown = [BASELINE_NAMES.get(name, name) for name in names]
    rows = []
    for index, (cell_type, group) in enumerate(frame.groupby("ct_name", sort=False)):
        values = [float(group.loc[group["baseline"] == name, "expl_var"].iloc[0]) for name in names]
        if found is not None:
            values += [float(found.full_gain[index]), *(float(value) for value in found.gain[:, index])]
        rows.append({"cell_type": cell_type, "values": values})
    return {
        "names": [name[:1].upper() + name[1:] for name in shown],
        "rows": rows,
        "meanings": [BASELINE_MEANINGS[name] for name in names if name in BASELINE_MEANINGS],
    }


def _nearest_masked(evaluation: HeadEvaluation) -> list[Record]:
    """Return effects as they are and with the nearest neighbour masked: all heads first, then each head."""
    found = evaluation.trivial
    if found is None or np.all(np.isnan(found.without_nearest)):
        return []
    effects = np.vstack([evaluation.expl_var_full, evaluation.expl_var])
    masked_effects = np.vstack([found.full_without_nearest, found.without_nearest])
    return [
        {"cell_type": cell_type, "pairs": np.stack([effects[:, index], masked_effects[:, index]], axis=1)}
        for index, cell_type in enumerate(evaluation.cell_types)
    ]


def _ablations(evaluation: HeadEvaluation) -> Record:
    """Return which heads and pairs stand out in each type; nothing if no losses, shares or interactions are known."""
    ablations = evaluation.ablations
    if ablations is None:
        return {"rows": []}
    first, second = np.triu_indices(evaluation.n_heads, k=1)
    interactions = ablations.interaction[:, first, second]
    shown = {
        "lost": "leave_one_out" in ablations.modes,
        "share": "shapley" in ablations.modes,
        "pairs": bool(np.isfinite(interactions).any()),
    }
    heads = [str(head) for head in range(evaluation.n_heads)]
    pairs = [f"{a} + {b}" for a, b in zip(first, second, strict=True)]
    rows = []
    for index in np.flatnonzero(~np.isnan(evaluation.expl_var_full)) if any(shown.values()) else ():
        row = {"cell_type": evaluation.cell_types[index], "full": float(evaluation.expl_var_full[index])}
        if shown["lost"]:
            lost = evaluation.expl_var_full[index] - ablations.of("leave_one_out")[:, index]
            row["missed_head"], row["lost"] = _largest(heads, lost)
        if shown["share"]:
            row["share_head"], row["share"] = _largest(heads, ablations.of("shapley")[:, index])
        if shown["pairs"]:
            # only negative interactions make heads alike, only positive ones make them need each other
            values = interactions[index]
            row["alike"], row["below_0"] = _largest(pairs, np.where(values < 0, -values, np.nan), sign=-1.0)
            row["needed"], row["above_0"] = _largest(pairs, np.where(values > 0, values, np.nan))
        rows.append(row)
    return {"rows": rows, "shown": shown}


def _largest(names: list[str], values: Float64[np.ndarray, " names"], *, sign: float = 1.0) -> tuple[str, str]:
    if np.isnan(values).all():
        return "–", ""
    best = int(np.nanargmax(values))
    return names[best], effect(sign * float(values[best]))


def _significant_genes(evaluation: HeadEvaluation) -> Record | None:
    """Return the genes with the smallest adjusted p of each significant head and type; nothing without such tests.

    Genes with explained variance of 0 or less are left out: a small p says that prediction and expression are related,
    which they may be although the prediction is too large or too small to explain anything.
    """
    found, alpha = evaluation.spatial, evaluation.spec.permutation.alpha
    if found is None or np.all(np.isnan(found.p_value_gene)):
        return None
    rows, unexplained = [], 0
    for index, cell_type in enumerate(evaluation.cell_types):
        for head in np.flatnonzero(evaluation.adjusted[:, index] <= alpha):
            p, effects = found.p_value_adj_gene[head, index], evaluation.expl_var_gene[head, index]
            unexplained += int(np.count_nonzero((p <= alpha) & ~(effects > 0)))
            p = np.where(effects > 0, p, np.nan)
            # many p are equal at the smallest float: then the larger effect comes first
            order = [gene for gene in np.lexsort((-np.nan_to_num(effects), p)) if not np.isnan(p[gene])]
            shown = [
                f"{_gene(evaluation, gene)}: {effect(effects[gene])}, p {_starred(p[gene], alpha)}"
                for gene in order[:_GENES_PER_HEAD_AND_TYPE]
            ]
            shown += [""] * (_GENES_PER_HEAD_AND_TYPE - len(shown))
            n_significant = np.count_nonzero(p <= alpha)
            rows.append({"cell_type": cell_type, "head": head, "n_significant": n_significant, "genes": shown})
    n_tests = int(np.count_nonzero(~np.isnan(found.p_value_gene)))
    return {"rows": rows, "most": _GENES_PER_HEAD_AND_TYPE, "n_tests": n_tests, "unexplained": unexplained}


def _gene(evaluation: HeadEvaluation, gene: int) -> str:
    return printable(evaluation.genes[gene], longest=_LONGEST_GENE)


def _starred(p: float, alpha: float) -> str:
    return f"{p_text(p)}{' *' if p <= alpha else ''}"


def _senders(evaluation: HeadEvaluation) -> Record | None:
    """Return the links with an interval above 0, the largest losses first; nothing if senders were not computed."""
    found = evaluation.senders
    if found is None:
        return None
    links = sure_links(evaluation, range(len(evaluation.cell_types)))
    rows = []
    for head, receiver, sender in links[:_MOST_LINKS].tolist():
        at = head, receiver, sender
        best = int(found.best_gene[at])
        rows.append(
            {
                "receiver": evaluation.cell_types[receiver],
                "sender": found.senders[sender],
                "head": head,
                "attention": found.attention[at],
                "expl_var": evaluation.expl_var[head, receiver],
                "lost": found.effect[at],
                "interval": interval(found.low[at], found.high[at]),
                "p": _starred(float(found.p_value_adj[at]), evaluation.spec.permutation.alpha),
                "gene": "" if best < 0 else _gene(evaluation, best),
                "lost_gene": found.effect_best_gene[at],
                "distance": found.distance[at],
                "n_receivers": found.n_receivers[receiver, sender],
            }
        )
    n_tests = int(np.count_nonzero(~np.isnan(found.p_value)))
    return {"rows": rows, "n_links": len(links), "n_tests": n_tests, "confidence": found.confidence}


def _scale_and_power(evaluation: HeadEvaluation) -> list[Record]:
    """Return the correlation length, effective sample size and detectable effect of each type, and its tiles."""
    spatial, bounds = evaluation.spatial, evaluation.intervals
    rows = []
    for index, cell_type in enumerate(evaluation.cell_types):
        row: Record = {"cell_type": cell_type, "n_cells": evaluation.n_cells[index]}
        if spatial is not None:
            length, is_tested = spatial.correlation_length[index], not np.isnan(spatial.ess[:, index]).all()
            row |= {
                "length": "none found" if is_tested and np.isnan(length) else dash(rounded(float(length))),
                "reach": spatial.reach[index],
                "ess": dash(span(spatial.ess[:, index])),
                "detectable": dash(span(spatial.detectable[:, index], as_text=effect)),
            }
        if bounds is not None:
            row["n_tiles"] = bounds.n_tiles[index]
        rows.append(row)
    return rows


def _widths(evaluation: HeadEvaluation) -> Record | None:
    """Return p within tiles of several widths; nothing where there are no widths."""
    found = evaluation.spatial
    if found is None or not np.isfinite(found.widths).any():
        return None
    rows = []
    for index, cell_type in enumerate(evaluation.cell_types):
        widths = found.widths[:, index]
        for head in range(evaluation.n_heads) if np.isfinite(widths).any() else ():
            shown = [
                f"{rounded(float(width))}: {dash(p_text(p))}" if np.isfinite(width) else ""
                for width, p in zip(widths, found.p_by_width[:, head, index], strict=True)
            ]
            rows.append({"cell_type": cell_type, "head": head, "shown": shown})
    return {"rows": rows, "n_widths": len(found.widths)}


def _head(evaluation: HeadEvaluation, head: int, records: list[Record]) -> Record:
    """Return the effects and tests of a head in each type, the largest effect first, and what it explains best."""
    chosen = sorted(
        (dict(record) for record in records if record["head"] == head),
        key=lambda record: -np.nan_to_num(record["expl_var_head"], nan=-np.inf),
    )
    found = evaluation.spatial
    for record in chosen:
        index = evaluation.type_index(record["ct_name"])
        if record["best_gene"]:
            gene = printable(record["best_gene"], longest=_LONGEST_GENE)
            record["best_gene"] = f"{gene}: {effect(record['expl_var_best_gene'])}"
        if found is not None:
            small = found.p_value_adj_gene[head, index] <= evaluation.spec.permutation.alpha
            record["n_genes"] = np.count_nonzero(small & (evaluation.expl_var_gene[head, index] > 0))
    return {
        "sentences": head_sentences(evaluation, head, chosen),
        "types": chosen,
        "genes": _best_genes(evaluation, head),
    }


def _best_genes(evaluation: HeadEvaluation, head: int) -> list[Record]:
    """Return the genes of all types that a head explains best, the largest effect first."""
    chosen: list[tuple[float, int, int]] = []
    for index, effects in enumerate(evaluation.expl_var_gene[head]):
        largest = np.argsort(-np.nan_to_num(effects, nan=-np.inf), kind="stable")[:_GENES_PER_TYPE]
        chosen += [(float(effects[gene]), index, int(gene)) for gene in largest if effects[gene] > 0]
    found, alpha = evaluation.spatial, evaluation.spec.permutation.alpha
    return [
        {
            "gene": evaluation.genes[gene],
            "cell_type": evaluation.cell_types[index],
            "expl_var": value,
            "p": "" if found is None else _starred(float(found.p_value_adj_gene[head, index, gene]), alpha),
        }
        for value, index, gene in sorted(chosen, key=lambda one: (-one[0], one[1], one[2]))
    ]


def _facts(
    evaluation: HeadEvaluation, *, run: Mapping[str, object] | None, written: datetime | None
) -> dict[str, dict[str, str]]:
    """Return what was evaluated, by which versions, on which device, when, with which settings."""
    facts = {
        "engine used": evaluation.engine,
        "device asked for": evaluation.spec.ablation.device,
        "permutations used": permutations_text(evaluation),
        "parity of engines": _parity(evaluation),
        **(run or {}),
        "page written": (written or datetime.now(timezone.utc)).strftime("%Y-%m-%d %H:%M:%S %Z").strip(),
    }
    groups: dict[str, Mapping[str, object]] = {
        "Model": evaluation.model,
        "Data": evaluation.data,
        "Run": facts,
        "Versions, where the page was written": _versions(),
        "Settings": dict(_flat(evaluation.spec.to_dict())),
    }
    return {
        heading: {key: _plain(value) for key, value in mask_mapping(values).items()}
        for heading, values in groups.items()
        if values
    }


def _plain(value: object) -> str:
    """Return a value as text without credentials: a list or mapping as JSON."""
    known = masked(value)
    if isinstance(known, (Mapping, list, tuple)):
        return json.dumps(known, ensure_ascii=False, default=str)
    return str(known)


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Return settings by their dotted names, as ``permutation.alpha``."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{before}{key}.")
        else:
            found.append((f"{before}{key}", value))
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
