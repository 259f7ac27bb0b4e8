"""Sections of docs/validity.md on exact moments, families of tests, intervals, trained models; how rates are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.benchmarks.common import table

if TYPE_CHECKING:
    from tests.benchmarks.common import Row


def rate(value: float | None, error: float | None = None, *, marked: bool = False) -> str:
    """Return a rate with three digits and its standard error; bold if marked."""
    if value is None or np.isnan(value):
        return "–"
    text = f"{value:.3f}".removeprefix("0")
    text = f"**{text}**" if marked else text
    return text if error is None else f"{text} ± {f'{error:.3f}'.removeprefix('0')}"


def missing(title: str, part: str) -> list[str]:
    return [title, f"Not measured: run `python -m tests.calibration {part} report`."]


def percent(rows: list[Row], method: str) -> str:
    """Return the rate of a method in percent."""
    return f"{100 * next(row['rate'] for row in rows if row['method'] == method):.0f} %"


def exact(tables: dict[str, list[Row]]) -> list[str]:
    title = "## Exact moments"
    moments, drawn, tail = (tables.get(name, []) for name in ("exact_moments", "exact_drawn", "exact_tail"))
    if not moments:
        return missing(title, "exact")
    worst = max(row[name] for row in moments for name in ("mean_off", "variance_off", "skewness_off"))
    errors = ("mean_se", "variance_se", "third_se")
    off = max(abs(row[name]) for row in drawn for name in errors)
    quantiles = sorted({row["p"] for row in tail}, reverse=True)
    lines = []
    for row in drawn:
        own = {one["p"]: one for one in tail if one["law"] == row["law"]}
        cells = [f"{own[p]['pearson'] / own[p]['counted']:.3f} ({own[p]['se']:+.1f})" for p in quantiles]
        lines.append([row["law"], f"{row['skewness']:+.3f}", *cells])
    far = tail[int(np.argmax([abs(row["se"]) for row in tail]))]
    ratios = [row["pearson"] / row["counted"] for row in tail]
    return [
        title,
        f"Against all permutations of {moments[0]['n_cells']} to {moments[-1]['n_cells']} cells, mean, variance and "
        f"skewness are off by {worst:.0e} at most: rounding. Against {drawn[0]['permutations']:,} drawn permutations "
        f"of 60 cells they are off by at most {off:.1f} standard errors of the drawing ({len(errors) * len(drawn)} "
        "numbers).",
        table(" | ".join(["F and Z", "skewness of T", *(f"at p = {p:g}" for p in quantiles)]), lines),
        "p by Pearson III over the counted share, and in brackets the difference in standard errors of the count: p "
        f"is {min(ratios):.2f} to {max(ratios):.2f} times the counted share, so it errs on the safe side far out. The "
        f"largest difference is {far['se']:+.1f} standard errors ({far['law']}, p = {far['p']:g}): sparse "
        "counts make T a lattice, which no smooth law follows; it takes a million permutations to see. Types of fewer "
        "than 50 cells are counted instead.",
    ]


def families(tables: dict[str, list[Row]]) -> list[str]:
    title = "## Families of tests, stopping early, fitted tails"
    any_error, fdr, early, tails = (tables.get(name, []) for name in ("families", "fdr", "sequential", "tails"))
    if not any_error:
        return missing(title, "families")
    largest = max(row["fdr"] for row in fdr if row["method"] == "bh")
    medians = " and ".join(f"{row['ratio']:.2f}" for row in tails)
    lowest = max(row["ratio_05"] for row in tails)
    names = {"maxt": "`adjustment=maxt`", "holm": "Holm (of the same p)", "none": "unadjusted"}
    return [
        title,
        "Any false rejection among 20 tests (4 heads that resemble each other, 5 types, 399 permutations), "
        f"{any_error[0]['simulations']:,} simulations: unadjusted in {percent(any_error, 'none')} of them; with maxT, "
        f"which uses what the tests have in common, in {percent(any_error, 'maxt')}.",
        table(
            " | probability of any rejection at .05",
            [[names[r["method"]], rate(r["rate"], r["se"])] for r in any_error],
        ),
        f"False discoveries among 200 tests of which 40 have an effect of 3 standard deviations, "
        f"{fdr[0]['simulations']:,} simulations: BH should stay at .05 times the share of true nulls, "
        f"{rate(fdr[0]['bound'])}; it is at {rate(largest)} at most, also with dependence. BY costs power.",
        table(
            " | correlation of tests | false discovery rate | power",
            [
                [f"`adjustment={r['method']}`", f"{r['correlation']:g}", rate(r["fdr"], r["se"]), rate(r["power"])]
                for r in fdr
            ],
        ),
        f"Stopping at 20 exceedances beside all 2,000 permutations ({early[0]['tests']} tests each): tests at or "
        "below .05 are about as many, and most of the draws are saved where there is nothing to find. Typical: root of "
        "the mean squared difference of p.",
        table(
            "effect | at .05, all | at .05, stopped | decided otherwise | mean difference of p | typical | draws saved",
            [
                [
                    f"{r['effect']:g}",
                    rate(r["fixed_at_05"]),
                    rate(r["early_at_05"]),
                    rate(r["other_side"]),
                    f"{r['mean_difference']:+.4f}",
                    f"{r['typical_difference']:.4f}",
                    f"{100 * r['saved']:.0f} %",
                ]
                for r in early
            ],
        ),
        "A generalised Pareto tail (`tail=gpd`) fitted to 2,000 permutations, at p = 1e-4, over the truth "
        f"({tails[0]['fits']} fits each): medians of {medians}, but one fit in twenty is {lowest:.2f} or less. Use it "
        "to rank heads, not to claim a small p; exact moments (`method=moments`) need no permutation and do not vary.",
        table(
            "F and Z | fits that describe the tail | 5 % | median | 95 % | exact moments",
            [
                [
                    r["law"],
                    f"{100 * r['fitted']:.0f} %",
                    *(f"{r[name]:.2f}" for name in ("ratio_05", "ratio", "ratio_95", "moments_ratio")),
                ]
                for r in tails
            ],
        ),
    ]


def intervals(rows: list[Row]) -> list[str]:
    title = "## Intervals of explained variance"
    if not rows:
        return missing(title, "intervals")
    lengths = sorted({row["length"] for row in rows})
    lines = []
    for even in (True, False):
        for n in sorted({row["tiles"] for row in rows}):
            own = {row["length"]: row for row in rows if row["tiles"] == n and row["even"] == even}
            cells = [f"{rate(own[x]['coverage'], own[x]['se'])} (width {own[x]['median_width']:.2f})" for x in lengths]
            lines.append([str(n), "even" if even else "uneven", *cells])
    covers = [row["coverage"] for row in rows]
    means = {x: np.mean([row["coverage"] for row in rows if row["length"] == x]) for x in lengths}
    by_length = ", ".join(f"{100 * mean:.0f} % at length {x:g}" for x, mean in means.items())
    return [
        title,
        "A prediction that explains 30 % of expression, both smooth; 40 cells a tile on average; the truth is that "
        f"of endless tissue of the same fields. {rows[0]['simulations']} simulations each. Intervals of 95 % hold the "
        f"truth in {100 * min(covers):.0f} to {100 * max(covers):.0f} % of simulations (mean: {by_length}): the more "
        "fields reach across tiles, the more neighbouring tiles tell the same, and the fewer hold it.",
        "![Coverage against the number of tiles](figures/intervals.png)",
        table(" | ".join(["tiles", "cells", *(f"length {x:g} of a side" for x in lengths)]), lines),
    ]


def real_null(rows: list[Row]) -> list[str]:
    title = "## Models trained where there is nothing to find"
    if not rows:
        return missing(title, "real_null --data DIR")
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        for cells in ("in-sample", "held out"):
            own = [row for row in rows if row["way"] == way and row["cells"] == cells]
            counts = []
            for null in ("free", "lag"):
                tests, low, found = (
                    sum(r[f"{null}_{name}"] for r in own) for name in ("tests", "at_05", "significant")
                )
                counts += [f"{low} of {tests}", str(found)]
            explained = float(np.median([row["expl_var_full"] for row in own]))
            lines.append([way, cells, str(len(own)), f"{explained:+.4f}", *counts])
    null_rows = [row for row in rows if row["way"] != "as it is" and row["cells"] == "held out"]
    sums = {
        (null, name): sum(row[f"{null}_{name}"] for row in null_rows)
        for null in ("free", "lag")
        for name in ("tests", "at_05", "significant")
    }
    return [
        title,
        "AMICI (4 heads, 15 epochs) on the osmFISH section, with a region of 30 % of the cells held out. `shuffled`: "
        "cells of a type have one another's expression, at random. `slid`: the expression of each type is slid over "
        "the section by at least a quarter of the window, so that it stays as smooth as it was. Neither leaves "
        f"anything of the neighbourhood to find. On held-out cells `lag` calls {sums['lag', 'significant']} of "
        f"{sums['lag', 'tests']} heads significant after BH and `free` {sums['free', 'significant']} of "
        f"{sums['free', 'tests']} (p at .05 or below: {sums['lag', 'at_05']} and {sums['free', 'at_05']}; 5 % of the "
        f"tests are {0.05 * sums['lag', 'tests']:.0f}). In-sample p-values are of a model fitted on the same cells and "
        "mean less.",
        table(
            "expression | cells | models | EV of the whole model, median type | `free` at .05 | `free` significant | "
            "`lag` at .05 | `lag` significant",
            lines,
        ),
    ]
