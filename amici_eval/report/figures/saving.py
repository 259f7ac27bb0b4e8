"""All figures of an evaluation as files."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from amici_eval.common.errors import InvalidSpecError
from amici_eval.report.figures.ablation_figures import (
    ABLATIONS_STEM,
    INTERACTIONS_STEM,
    ablations_size,
    has_interactions,
    interactions_size,
    plot_ablations,
    plot_interactions,
)
from amici_eval.report.figures.drawing import chosen_types
from amici_eval.report.figures.head_figures import (
    BARPLOT_STEM,
    EFFECTS_STEM,
    barplot_size,
    check_n_top_genes,
    effects_size,
    has_effects,
    heatmap_size,
    heatmap_stem,
    plot_barplot,
    plot_effects,
    plot_heatmap,
    top_genes,
)
from amici_eval.report.figures.senders_figure import (
    SENDER_GRAPH_STEM,
    SENDERS_STEM,
    graph_size,
    has_senders,
    plot_sender_graph,
    plot_senders,
    senders_size,
)
from amici_eval.report.sentences import made_folder, unwritable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from amici_eval.report.figures.drawing import Palette
    from amici_eval.results.evaluation import HeadEvaluation

    Drawing = tuple[str, tuple[float, float], Callable[[Axes], object]]

FORMATS = ("png", "svg")

_DPI, _MARGIN_INCHES = 150, 0.12
# text is not drawn as paths, and the same evaluation gives the same bytes
_FILE_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "amici_eval"}


def save_figures(
    evaluation: HeadEvaluation,
    directory: str | Path,
    *,
    cell_types: Sequence[str] | None = None,
    palette: Palette | None = None,
    n_top_genes: int = 20,
    formats: Sequence[str] = FORMATS,
    progress: Callable[[int], None] | None = None,
) -> tuple[Path, ...]:
    """Write the forest plot of effects, the bar plot, a heatmap of every type, ablations, and the senders.

    The style is matplotlib's default whatever the caller has set, so the same evaluation gives the same files. No
    pyplot figure is made, and matplotlib's settings are restored.
    """
    chosen = chosen_types(evaluation, cell_types)
    check_n_top_genes(n_top_genes)
    drawings = _drawings(evaluation, chosen, palette=palette, n_top_genes=n_top_genes)
    return save_drawings(drawings, directory, formats=formats, progress=progress)


def save_drawings(
    drawings: Iterable[Drawing],
    directory: str | Path,
    *,
    formats: Sequence[str] = FORMATS,
    progress: Callable[[int], None] | None = None,
) -> tuple[Path, ...]:
    """Write drawings as files in a folder, each in all formats; see :func:`save_figures`."""
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats or isinstance(formats, str):
        raise InvalidSpecError(
            value=f"formats={formats!r}",
            rule=f"it must list some of {', '.join(FORMATS)}",
            fix=f"set formats={FORMATS!r}",
        )
    folder = made_folder(directory)
    written: list[Path] = []
    with matplotlib.rc_context(), warnings.catch_warnings():
        # a label in a script that the font lacks is drawn as boxes in PNG and right in SVG: no reason to warn 40 times
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_FILE_SETTINGS)  # type: ignore[arg-type]
        for stem, size, draw in drawings:
            figure = Figure(figsize=size, dpi=_DPI)
            draw(figure.add_subplot())
            paths = [folder / f"{stem}.{kind}" for kind in formats]
            _write(figure, paths)
            written += paths
            if progress is not None:
                progress(1)
    return tuple(written)


def _drawings(
    evaluation: HeadEvaluation, chosen: Sequence[str], *, palette: Palette | None, n_top_genes: int
) -> Iterator[Drawing]:
    """Yield name, size in inches and drawing of each figure."""
    if chosen and has_effects(evaluation, chosen):
        yield (
            EFFECTS_STEM,
            effects_size(evaluation, len(chosen)),
            lambda ax: plot_effects(evaluation, ax=ax, cell_types=chosen),
        )
    yield (
        BARPLOT_STEM,
        barplot_size(evaluation.n_heads, len(chosen)),
        lambda ax: plot_barplot(evaluation, ax=ax, palette=palette, cell_types=chosen),
    )
    for name in chosen:
        n_shown = len(top_genes(evaluation.expl_var_gene[:, evaluation.type_index(name)].T, n_top_genes))
        yield (
            heatmap_stem(evaluation, name),
            heatmap_size(evaluation.n_heads, n_shown),
            partial(_draw_heatmap, evaluation, name, n_top_genes),
        )
    if chosen and evaluation.ablations is not None and evaluation.ablations.modes:
        yield (
            ABLATIONS_STEM,
            ablations_size(evaluation, len(chosen)),
            lambda ax: plot_ablations(evaluation, ax=ax, cell_types=chosen),
        )
    if chosen and has_interactions(evaluation, chosen):
        yield (
            INTERACTIONS_STEM,
            interactions_size(evaluation, chosen),
            lambda ax: plot_interactions(evaluation, ax=ax, cell_types=chosen),
        )
    if chosen and has_senders(evaluation, chosen):
        yield (
            SENDERS_STEM,
            senders_size(evaluation, len(chosen)),
            lambda ax: plot_senders(evaluation, ax=ax, cell_types=chosen),
        )
        yield (
            SENDER_GRAPH_STEM,
            graph_size(evaluation),
            lambda ax: plot_sender_graph(evaluation, ax=ax, cell_types=chosen),
        )


def _draw_heatmap(evaluation: HeadEvaluation, name: str, n_top_genes: int, ax: Axes) -> Axes:
    return plot_heatmap(evaluation, name, ax=ax, n_top_genes=n_top_genes)


def _write(figure: Figure, paths: Sequence[Path]) -> None:
    # what surrounds the labels is measured once for all formats: it costs as much as drawing
    figure.draw_without_rendering()
    box = figure.get_tightbbox().padded(_MARGIN_INCHES)
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            label = axis.label
            place = label.get_transform().transform(label.get_position())
            axis.set_label_coords(*ax.transAxes.inverted().transform(place))
    for path in paths:
        options: dict[str, Any] = (
            {"metadata": {"Date": None}} if path.suffix == ".svg" else {"pil_kwargs": {"compress_level": 3}}
        )
        try:
            figure.savefig(path, bbox_inches=box, dpi=_DPI, **options)
        except OSError as error:
            raise unwritable(path, error) from error
