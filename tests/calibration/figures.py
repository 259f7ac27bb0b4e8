"""Figures of docs/validity.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tests.benchmarks.common import Row

ALPHA, MARKED = 0.05, 0.08
NULLS = ("free", "sample", "tile 2 l", "tile 1 l", "tile 0.5 l", "torus", "lag", "lag, genes")
COLOURS = {
    "free": "#b3322c",
    "sample": "#d98b3a",
    "tile 2 l": "#a9b8c6",
    "tile 1 l": "#7d95ab",
    "tile 0.5 l": "#4f6d87",
    "torus": "#3d8a5f",
    "lag": "#1b4f8a",
    "lag, genes": "#6aa0d8",
    "tile": "#7d95ab",
}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bare(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#e4e4e4", lw=0.6)
    panel.set_axisbelow(True)


def draw_type_one(rows: list[Row], path: Path) -> None:
    """Draw the rejection rate of each null in each setting."""
    figure = _figure(8.0, 3.6)
    panel = figure.subplots()
    names = [name for name in NULLS if any(row["null"] == name for row in rows)]
    for place, name in enumerate(names):
        own = [row for row in rows if row["null"] == name and row["tests"]]
        for real, marker in ((False, "o"), (True, "^")):
            rates = [row["at_05"] for row in own if row["place"].startswith("uniform") != real]
            # side by side by rank, so that points do not hide each other
            x = place + (0.12 if real else -0.18) + np.linspace(-0.1, 0.1, len(rates))
            panel.plot(x, sorted(rates), marker, ms=4, color=COLOURS[name], alpha=0.85, mec="white", mew=0.3)
    panel.axhline(ALPHA, color="black", lw=1)
    panel.axhline(MARKED, color="black", lw=0.8, ls=":")
    for level, text in ((ALPHA, "nominal .05"), (MARKED, ".08")):
        # right of the axes
        panel.annotate(text, (1.01, level), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    panel.set_xticks(range(len(names)), names, fontsize=8)
    panel.set_xlim(-0.5, len(names) - 0.5)
    panel.set_ylim(bottom=0.0)
    panel.set_ylabel("share of p-values at .05 or below")
    circle = panel.plot([], [], "o", color="#555555", ms=4, label="simulated positions")[0]
    triangle = panel.plot([], [], "^", color="#555555", ms=4, label="positions of real cells")[0]
    panel.legend(handles=[circle, triangle], frameon=False, fontsize=8, loc="upper right")
    _bare(panel)
    figure.savefig(path, dpi=120)


def draw_histograms(rows: list[Row], path: Path) -> None:
    """Draw p-values on simulated positions: one row of panels for each length."""
    nulls = ("free", "tile 1 l", "lag", "torus")
    own = [row for row in rows if row["place"].startswith("uniform") and row["kernel"] == "gaussian"]
    own = [row for row in own if row["nugget"] == 0.0]
    lengths = sorted({row["length"] for row in own})
    if not lengths:
        return
    figure = _figure(8.0, 1.55 * len(lengths) + 0.4)
    panels = figure.subplots(len(lengths), len(nulls), squeeze=False, sharex=True, sharey=True)
    for line, length in zip(panels, lengths, strict=True):
        for panel, null in zip(line, nulls, strict=True):
            counts = next(
                (
                    np.array([row[name] for name in sorted(row) if name.startswith("bin_")], dtype=float)
                    for row in own
                    if row["null"] == null and row["length"] == length
                ),
                None,
            )
            if counts is None:
                panel.set_visible(False)
                continue
            n_bins = len(counts)
            panel.bar(
                (np.arange(n_bins) + 0.5) / n_bins,
                counts / counts.sum() * n_bins,
                width=0.92 / n_bins,
                color=COLOURS[null],
            )
            panel.axhline(1.0, color="black", lw=0.8)
            panel.set_title(f"{null}, length {length:g}", fontsize=8)
            panel.tick_params(labelsize=7)
            _bare(panel)
    for panel in panels[-1]:
        panel.set_xlabel("p", fontsize=8)
    for panel in panels[:, 0]:
        panel.set_ylabel("density", fontsize=8)
    figure.savefig(path, dpi=120)


def draw_few(rows: list[Row], path: Path) -> None:
    """Draw the rejection rate of `lag` against the effective sample size that it estimates."""
    figure = _figure(6.2, 3.2)
    panel = figure.subplots()
    bins = sorted({(row["from"], row["to"]) for row in rows})
    for shift, (kernel, colour) in enumerate((("gaussian", "#1b4f8a"), ("exponential", "#3d8a5f"))):
        x, y, error = [], [], []
        for index, (low, _) in enumerate(bins):
            own = [row for row in rows if row["from"] == low and row["kernel"] == kernel]
            tests = sum(row["tests"] for row in own)
            if tests >= 100:
                rate = sum(row["at_05"] for row in own) / tests
                x.append(index + 0.15 * (shift - 0.5))
                y.append(rate)
                error.append(2.0 * np.sqrt(max(rate * (1 - rate), 1 / tests) / tests))
        panel.errorbar(x, y, yerr=error, fmt="o", ms=4, lw=1.2, color=colour, label=f"{kernel} kernel")
    panel.axhline(ALPHA, color="black", lw=1)
    panel.axhline(MARKED, color="black", lw=0.8, ls=":")
    panel.set_xticks(range(len(bins)), [f"{a}–{b}" if b < 1000 else f"≥ {a}" for a, b in bins], fontsize=8)
    panel.set_ylim(0.0, max(0.1, panel.get_ylim()[1]))
    panel.set(xlabel="estimated effective sample size", ylabel="share of p-values at .05 or below")
    panel.legend(frameon=False, fontsize=8, loc="upper left")
    _bare(panel)
    figure.savefig(path, dpi=120)


def draw_power(curves: dict[str, dict[str, list[tuple[float, float]]]], path: Path) -> None:
    """Draw power against the size of the effect: a panel for each setting, a line for each null."""
    figure = _figure(8.4, 2.5 * -(-len(curves) // 3) + 0.3)
    panels = figure.subplots(-(-len(curves) // 3), min(3, len(curves)), squeeze=False, sharey=True).ravel()
    handles = {}
    for panel, (title, lines) in zip(panels, curves.items(), strict=False):
        for name, points in lines.items():
            style = "--" if name == "free" else "-"
            label = "tile, best calibrated width" if name == "tile" else name
            (handles[label],) = panel.plot(*zip(*points, strict=True), "o" + style, ms=3, lw=1.3, color=COLOURS[name])
        panel.axhline(ALPHA, color="black", lw=0.8)
        panel.set_title(title, fontsize=8)
        panel.tick_params(labelsize=7)
        panel.set_xlabel("effect, standard deviations", fontsize=8)
        _bare(panel)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    for panel in panels[::3]:
        panel.set_ylabel("share rejected", fontsize=8)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def draw_intervals(rows: list[Row], path: Path) -> None:
    """Draw the coverage of intervals against the number of tiles."""
    figure = _figure(7.0, 2.9)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, even in zip(panels, (True, False), strict=True):
        lengths = sorted({row["length"] for row in rows})
        for shift, (length, colour) in enumerate(zip(lengths, ("#1b4f8a", "#3d8a5f", "#b3322c"), strict=False)):
            own = sorted(
                (row for row in rows if row["length"] == length and row["even"] == even), key=lambda r: r["tiles"]
            )
            panel.errorbar(
                [row["tiles"] + 0.4 * (shift - 1) for row in own],
                [row["coverage"] for row in own],
                yerr=[2.0 * row["se"] for row in own],
                fmt="o-",
                ms=4,
                lw=1.1,
                color=colour,
                label=f"length {length:g} of a tile's side",
            )
        panel.axhline(0.95, color="black", lw=1)
        panel.set_title("cells spread evenly" if even else "cells 20 times as dense on one side", fontsize=9)
        panel.set_xticks(sorted({row["tiles"] for row in rows}))
        panel.set_xlabel("tiles")
        _bare(panel)
    panels[0].set_ylabel("coverage of 95 % intervals")
    panels[0].set_ylim(min(0.8, min(row["coverage"] - 2 * row["se"] for row in rows)), 1.0)
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)
