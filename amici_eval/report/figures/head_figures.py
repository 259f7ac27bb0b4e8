"""Bar plot and heatmaps of explained variance of heads kept alone."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

from amici_eval.common.errors import InvalidSpecError
from amici_eval.common.names import slugify
from amici_eval.report.figures.drawing import (
    INK,
    MUTED,
    UNDEFINED,
    add_caption,
    add_legend,
    add_marks,
    drawn_label,
    literal,
    new_axes,
    opened,
    type_colours,
)
from amici_eval.report.sentences import VALIDITY_SHORT, in_sample_text, type_reasons

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float64, Int64
    from matplotlib.axes import Axes

    from amici_eval.report.figures.drawing import Palette
    from amici_eval.results.evaluation import HeadEvaluation

__all__ = [
    "BARPLOT_STEM",
    "barplot_size",
    "check_n_top_genes",
    "heatmap_size",
    "heatmap_stem",
    "plot_barplot",
    "plot_heatmap",
    "significance_note",
    "top_genes",
]

BARPLOT_STEM = "expl_variance_barplot_per_head"

_GROUP_WIDTH = 0.86
_ASTERISK = (6, 2, 0)


def heatmap_stem(evaluation: HeadEvaluation, cell_type: str) -> str:
    """Return the file name, without ending, of a type's heatmap."""
    return f"expl_variance_heatmap_{slugify(cell_type, evaluation.cell_types)}"


def plot_barplot(
    evaluation: HeadEvaluation,
    *,
    ax: Axes | None = None,
    palette: Palette | None = "tab10",
    cell_types: Sequence[str] | None = None,
) -> Axes:
    """Show how well each head, kept alone, explains its best gene in every receiver type.

    Parameters
    ----------
    evaluation
        What to show.
    ax
        Axes to draw into; ``None`` makes a new pyplot figure, which notebooks show.
    palette
        Name of a seaborn or matplotlib palette, a list of colours, or a mapping of cell type to colour. A palette with
        fewer colours than the evaluation has types is replaced by a larger one. A type has the same colour whichever
        types are shown.
    cell_types
        The types to show; ``None`` shows all. They are drawn in sorted order.

    Returns
    -------
    Axes
        Bars grouped by head, coloured by type. An asterisk marks an adjusted p-value of at most alpha by the null that
        decides, a grey cross stands where a bar is undefined. No interval: the best of many genes has none.

    Raises
    ------
    DataError
        If a type was not evaluated.
    InvalidSpecError
        If the palette is unknown, or lacks a type.
    """
    colours = type_colours(evaluation.cell_types, palette)
    canvas = opened(
        evaluation, ax=ax, cell_types=cell_types, size=lambda names: barplot_size(evaluation.n_heads, len(names))
    )
    ax, chosen = canvas.ax, canvas.names
    heights = _max_over_genes(evaluation)
    alpha = evaluation.spec.permutation.alpha
    tested = np.isfinite(evaluation.adjusted)
    width = _GROUP_WIDTH / max(1, len(chosen))
    heads = np.arange(evaluation.n_heads)
    shown = heights[:, canvas.rows]
    finite = shown[np.isfinite(shown)]
    low, high = min(0.0, finite.min(initial=0.0)), max(0.0, finite.max(initial=0.0))
    span = (high - low) or 1.0

    for head in heads[1::2]:
        ax.axvspan(head - 0.5, head + 0.5, color="#f4f4f4", zorder=0, linewidth=0)
    marks: list[tuple[float, float]] = []
    gaps: list[tuple[float, float]] = []
    for position, name in enumerate(chosen):
        index = evaluation.type_index(name)
        x = heads + (position - (len(chosen) - 1) / 2) * width
        defined = np.isfinite(heights[:, index])
        # a type of a few cells can reach any height: what has no test stays in the background
        for shown_as, opacity in ((defined & tested[:, index], 1.0), (defined & ~tested[:, index], 0.2)):
            ax.bar(
                x[shown_as],
                heights[shown_as, index],
                width=width * 0.92,
                color=colours[name],
                linewidth=0,
                zorder=2,
                alpha=opacity,
            )
        significant = defined & (evaluation.adjusted[:, index] <= alpha)
        marks += [(x[h], max(0.0, heights[h, index]) + 0.025 * span) for h in np.flatnonzero(significant)]
        gaps += [(x[h], 0.015 * span) for h in np.flatnonzero(~defined)]
    size = min(6.0, 72 * ax.get_window_extent().width / ax.figure.dpi / max(1, shown.size) * 0.8)
    add_marks(ax, marks, marker=_ASTERISK, size=max(size, 4.0), color=INK, gid="significant")
    add_marks(ax, gaps, marker="x", size=max(size * 0.7, 3.0), color="#999999", gid="undefined")

    ax.axhline(0, color=INK, linewidth=0.8, zorder=3)
    ax.set_xlim(-0.5, evaluation.n_heads - 0.5)
    ax.set_ylim(low - (0.04 * span if low < 0 else 0), (high or 1.0) + 0.07 * span)
    ax.set_xticks(heads, [str(head) for head in heads])
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel("Head")
    ax.set_ylabel("Explained variance of the best gene")
    # y, here and below: else matplotlib measures all labels at each drawing to find the title's place
    ax.set_title("Best gene of each head kept alone, by receiver cell type", loc="left", fontsize=12, y=1.0)
    ax.grid(axis="y", color="#e3e3e3", linewidth=0.6, zorder=0)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    add_legend(ax, chosen, colours)
    empty = [name for name in chosen if not np.isfinite(heights[:, evaluation.type_index(name)]).any()]
    others = len(gaps) - evaluation.n_heads * len(empty)
    said = [drawn_label(name) for name in empty] + ([f"{others} single heads"] if others else [])
    untested = bool((np.isfinite(shown) & ~tested[:, canvas.rows]).any())
    few = "too few cells" if evaluation.spatial is None else f"by the {evaluation.decided_by} null: too few cells"
    faint = f"pale: no test ({few}, or a head that predicts the same for all)" if untested else ""
    add_caption(
        ax,
        f"{significance_note(evaluation)}; the test is of the head over all genes",
        faint,
        f"× undefined, no bar: {', '.join(said)}" if said else "",
    )
    return ax


def plot_heatmap(evaluation: HeadEvaluation, cell_type: str, *, ax: Axes | None = None, n_top_genes: int = 20) -> Axes:
    """Show which genes of one receiver type each head, kept alone, explains.

    Parameters
    ----------
    evaluation
        What to show.
    cell_type
        The receiver type.
    ax
        Axes to draw into; ``None`` makes a new pyplot figure, which notebooks show.
    n_top_genes
        Number of genes to show: those with the largest mean explained variance over heads, the largest on top.

    Returns
    -------
    Axes
        Genes x heads, white at 0; an asterisk at a head marks an adjusted p-value of at most alpha by the null that
        decides. A type without any defined value gets axes with the reason in words.

    Raises
    ------
    DataError
        If the type was not evaluated.
    InvalidSpecError
        If ``n_top_genes`` is no whole number of at least 1.

    Notes
    -----
    Values below -1 have the colour of -1: explained variance has no lower bound, and one bad gene would else take
    all the contrast.
    """
    index = evaluation.type_index(cell_type)
    check_n_top_genes(n_top_genes)
    values = evaluation.expl_var_gene[:, index].T
    top = top_genes(values, n_top_genes)
    ax = ax if ax is not None else new_axes(heatmap_size(evaluation.n_heads, len(top)))
    title = f"{drawn_label(cell_type)} ({_cells(evaluation.n_cells[index])})"
    ax.set_title(literal(title), loc="left", fontsize=12, y=1.0)
    if not len(top):
        ax.set_axis_off()
        reason = textwrap.fill(f"Explained variance is undefined: {type_reasons(evaluation, cell_type)}", 46)
        ax.text(0.5, 0.5, literal(reason), ha="center", va="center", color=MUTED, transform=ax.transAxes)
        return ax
    shown = values[top]
    limit = min(1.0, float(np.nanmax(np.abs(shown)))) or 1.0
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad=UNDEFINED)
    mesh = ax.pcolormesh(shown, cmap=colours, vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.6)
    beyond = "min" if np.nanmin(shown) < -limit else "neither"
    bar = ax.figure.colorbar(mesh, ax=ax, extend=beyond, fraction=0.06, pad=0.03, aspect=30)
    bar.set_label("Explained variance (one head kept)")
    bar.outline.set_visible(False)
    significant = evaluation.adjusted[:, index] <= evaluation.spec.permutation.alpha
    ax.set_xticks(
        np.arange(evaluation.n_heads) + 0.5, [f"{h}*" if yes else str(h) for h, yes in enumerate(significant)]
    )
    ax.set_yticks(np.arange(len(top)) + 0.5, [literal(drawn_label(evaluation.genes[g])) for g in top], fontsize=8)
    ax.tick_params(length=0)
    ax.set_ylim(len(top), 0)
    ax.set_xlabel("Head")
    ax.set_ylabel(f"Top {len(top)} genes by mean over heads" if len(top) < len(evaluation.genes) else "Gene")
    ax.spines[:].set_visible(False)
    add_caption(ax, significance_note(evaluation), "Grey: undefined" if np.isnan(shown).any() else "")
    return ax


def barplot_size(n_heads: int, n_types: int) -> tuple[float, float]:
    """Return width and height in inches of :func:`plot_barplot`."""
    return float(np.clip(0.085 * n_heads * n_types + 2.0, 7.0, 40.0)), 5.0


def heatmap_size(n_heads: int, n_genes: int) -> tuple[float, float]:
    """Return width and height in inches of :func:`plot_heatmap`."""
    return float(np.clip(0.5 * n_heads + 2.6, 5.0, 40.0)), float(np.clip(0.22 * n_genes + 1.4, 3.2, 80.0))


def _max_over_genes(evaluation: HeadEvaluation) -> Float64[np.ndarray, "heads types"]:
    # fmax passes over NaN, and gives NaN without a warning where all genes are
    best: np.ndarray = np.fmax.reduce(evaluation.expl_var_gene, axis=2, initial=np.nan)
    return best


def top_genes(values: Float64[np.ndarray, "genes heads"], n_top: int) -> Int64[np.ndarray, " shown"]:
    """Return the positions of the genes with the largest mean over the heads that are defined, largest first."""
    defined = ~np.isnan(values)
    known = np.flatnonzero(defined.any(axis=1))
    means = np.where(defined, values, 0.0)[known].sum(axis=1) / defined[known].sum(axis=1)
    return known[np.argsort(-means, kind="stable")][:n_top]


def check_n_top_genes(n_top_genes: int) -> None:
    """Refuse what is no number of genes to show."""
    if isinstance(n_top_genes, bool) or not isinstance(n_top_genes, int) or n_top_genes < 1:
        raise InvalidSpecError(
            value=f"n_top_genes={n_top_genes!r}",
            rule="it must be a whole number of at least 1",
            fix="set n_top_genes=20",
        )


def significance_note(evaluation: HeadEvaluation) -> str:
    """Return what a mark of significance means: the level, the null that decides, and how that fails."""
    null = evaluation.decided_by
    level = f"* adjusted p ≤ {evaluation.spec.permutation.alpha:g}{in_sample_text(evaluation)}"
    return f"{level}; {VALIDITY_SHORT.get(null, null + ' null')}"


def _cells(number: int) -> str:
    return f"{number:,} cell{'' if number == 1 else 's'}"
