"""Simulated spatial transcriptomics tissue with planted sender-to-receiver effects."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from amici_eval.common.errors import InvalidSpecError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float32, Float64, Int64

_N_WAVES = 48
_KERNEL_REACH = 3.0  # exp(-3**2) is .0001: farther senders are negligible
_PROPORTION_STEPS = 50


@dataclass(frozen=True)
class PlantedEffect:
    """One known effect: receivers near a sender express more, or less, of some genes.

    Parameters
    ----------
    sender
        Cell type whose presence causes the effect.
    receiver
        Cell type that responds.
    genes
        Names of the genes that respond.
    range_um
        Length scale of the kernel ``exp(-(distance / range_um) ** 2)``, in micrometres.
    strength
        Natural logarithm of the fold change of a fully exposed receiver; negative for down-regulation.

    Raises
    ------
    InvalidSpecError
        If a value is outside what it may be.
    """

    sender: str
    receiver: str
    genes: tuple[str, ...]
    range_um: float
    strength: float

    def __post_init__(self) -> None:
        ends = f"sender and receiver are both {self.sender!r}"
        rule = "a planted effect goes from one cell type to another"
        _check(self.sender != self.receiver, ends, rule, "name two different cell types")
        rule = "an effect needs at least one gene, and each gene once"
        listed = len(self.genes) > 0 and len(set(self.genes)) == len(self.genes)
        _check(listed, f"genes={self.genes!r}", rule, "name every responding gene exactly once")
        _check_positive(range_um=self.range_um)
        rule = "the log fold change must be finite and not 0"
        usable = math.isfinite(self.strength) and self.strength != 0
        _check(usable, f"strength={self.strength!r}", rule, "give a number such as 1.5, or leave the effect out")


@dataclass(frozen=True)
class TissueSpec:
    """What a simulated tissue looks like.

    Parameters
    ----------
    n_cells, n_genes
        Size of the tissue. The genes are those of the effects, `n_markers` per cell type, and background genes.
    cell_types, proportions
        Names of the cell types and the expected share of each; the shares sum to 1.
    effects
        The planted effects. A type that is no effect's receiver is a true null.
    window_um
        Width and height of the window, in micrometres.
    niche_um
        Length scale over which the density of a type varies, in micrometres.
    niche_contrast
        Standard deviation of the log density of a type over the window; 0 mixes all types evenly.
    n_markers
        Marker genes per cell type.
    mean_counts
        Expected counts of a cell without effects.
    dispersion
        Dispersion of the negative binomial counts (variance ``mu + dispersion * mu ** 2``); 0 gives Poisson counts.
    depth_sd
        Standard deviation of the log sequencing depth over cells.
    region_fraction
        Share of the window's width taken by the region ``"left_strip"``.
    seed
        Seed of the one generator that draws everything.

    Raises
    ------
    InvalidSpecError
        If a value is outside what it may be.
    """

    n_cells: int
    n_genes: int
    cell_types: tuple[str, ...]
    proportions: tuple[float, ...]
    effects: tuple[PlantedEffect, ...] = ()
    window_um: tuple[float, float] = (500.0, 500.0)
    niche_um: float = 60.0
    niche_contrast: float = 1.5
    n_markers: int = 4
    mean_counts: float = 300.0
    dispersion: float = 0.05
    depth_sd: float = 0.15
    region_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        n_types = len(self.cell_types)
        named = n_types >= 2 and len(set(self.cell_types)) == n_types and all(self.cell_types)
        rule = "at least two cell types, with different names that are not empty"
        _check(named, f"cell_types={self.cell_types!r}", rule, "name each cell type once")
        shares = math.isclose(sum(self.proportions), 1.0, abs_tol=1e-6) and all(p > 0 for p in self.proportions)
        value = f"proportions={self.proportions!r} for {n_types} cell types"
        rule = "one positive proportion per cell type, summing to 1"
        fix = "give as many proportions as cell types and divide them by their sum"
        _check(shares and len(self.proportions) == n_types, value, rule, fix)
        value = f"n_cells={self.n_cells} for {n_types} cell types"
        fix = f"use n_cells={10 * n_types} or more"
        _check(self.n_cells >= 10 * n_types, value, "at least 10 cells per cell type", fix)
        unknown = sorted({t for e in self.effects for t in (e.sender, e.receiver)} - set(self.cell_types))
        rule = f"senders and receivers are among the cell types {', '.join(self.cell_types)}"
        fix = "add the type to cell_types or correct the effect"
        _check(not unknown, f"effects name {', '.join(unknown)}", rule, fix)
        _check_not_negative(n_markers=self.n_markers)
        needed = len(_planted_genes(self.effects)) + self.n_markers * n_types
        rule = f"the effects and the markers alone need {needed} genes"
        fix = f"use n_genes={needed} or more, or fewer markers"
        _check(self.n_genes >= needed, f"n_genes={self.n_genes}", rule, fix)
        sides = len(self.window_um) == 2 and all(0 < side < math.inf for side in self.window_um)
        fix = "give both in micrometres, such as (500.0, 500.0)"
        _check(sides, f"window_um={self.window_um!r}", "a positive width and a positive height", fix)
        _check_positive(niche_um=self.niche_um, mean_counts=self.mean_counts)
        _check_not_negative(
            niche_contrast=self.niche_contrast, dispersion=self.dispersion, depth_sd=self.depth_sd, seed=self.seed
        )
        value = f"region_fraction={self.region_fraction!r}"
        fix = "use a share such as 0.2"
        _check(0 < self.region_fraction < 1, value, "must lie between 0 and 1, both excluded", fix)


@dataclass(frozen=True)
class SimulatedTissue:
    """A simulated tissue and its planted effects.

    ``adata`` has log-normalised expression (``X``, float32), ``layers["counts"]``, ``obs["cell_type"]``,
    ``obs["region"]``, ``obsm["spatial"]`` in micrometres, and ``uns["planted_effects"]``, a frame with one row per
    effect and gene.
    """

    adata: ad.AnnData
    effects: tuple[PlantedEffect, ...]


def simulate_tissue(spec: TissueSpec) -> SimulatedTissue:
    """Draw a tissue whose sender-to-receiver effects are known.

    Parameters
    ----------
    spec
        What the tissue looks like.

    Returns
    -------
    SimulatedTissue
        The cells and the planted effects.

    Notes
    -----
    Cells sit on a jittered grid, so that none overlap. The log density of each type is its own smooth random field,
    so that cells of one type live in different neighbourhoods. A receiver's exposure to a sender type is
    ``1 - exp(-sum_j exp(-(d_ij / range_um) ** 2))`` over the senders ``j``: the first close sender counts most. The
    log rate of an effect's genes rises by ``strength`` times the exposure. Cells of a type that receives no effect
    are independent of their neighbours given their own depth.

    Normalisation is ``log1p(counts / total * median total)``; as in any measured tissue, strong effects therefore
    lower the other genes of an exposed cell slightly.
    """
    rng = np.random.default_rng(spec.seed)
    coords = _draw_positions(spec, rng)
    types = _draw_types(spec, coords, rng)
    genes = _gene_names(spec)

    log_rate = _baselines(spec, genes, rng)[types]
    log_rate += np.log(spec.mean_counts) - np.log(np.exp(log_rate).sum(axis=1, keepdims=True))
    for effect in spec.effects:
        rows = np.flatnonzero(types == spec.cell_types.index(effect.receiver))
        senders = np.flatnonzero(types == spec.cell_types.index(effect.sender))
        exposure = sender_exposure(coords[rows], coords[senders], range_um=effect.range_um)
        columns = np.array([genes.index(gene) for gene in effect.genes])
        log_rate[np.ix_(rows, columns)] += effect.strength * exposure[:, None]
    log_rate += spec.depth_sd * rng.standard_normal((spec.n_cells, 1))

    rate = np.exp(log_rate)
    if spec.dispersion > 0:
        rate *= rng.gamma(1 / spec.dispersion, spec.dispersion, size=rate.shape)
    counts = rng.poisson(rate).astype(np.float32)
    return SimulatedTissue(adata=_to_anndata(spec, coords, types, genes, counts), effects=spec.effects)


def sender_exposure(
    receivers_um: Float64[np.ndarray, "receivers 2"], senders_um: Float64[np.ndarray, "senders 2"], *, range_um: float
) -> Float64[np.ndarray, " receivers"]:
    """Return the exposure of each receiver to senders around it, from 0 (none near) to 1 (surrounded)."""
    if len(senders_um) == 0:
        return np.zeros(len(receivers_um))
    pairs = cKDTree(receivers_um).sparse_distance_matrix(
        cKDTree(senders_um), _KERNEL_REACH * range_um, output_type="coo_matrix"
    )
    kernel = np.exp(-((pairs.data / range_um) ** 2))
    return -np.expm1(-np.bincount(pairs.row, weights=kernel, minlength=len(receivers_um)))


def _draw_positions(spec: TissueSpec, rng: np.random.Generator) -> Float64[np.ndarray, "cells 2"]:
    width, height = spec.window_um
    n_columns = max(1, math.ceil(math.sqrt(spec.n_cells * width / height)))
    n_rows = math.ceil(spec.n_cells / n_columns)
    sites = np.sort(rng.choice(n_columns * n_rows, size=spec.n_cells, replace=False))
    grid = np.stack([sites % n_columns, sites // n_columns], axis=1) + 0.5
    jitter = rng.uniform(-0.4, 0.4, size=grid.shape)
    positions: Float64[np.ndarray, "cells 2"] = (grid + jitter) * np.array([width / n_columns, height / n_rows])
    return positions


def _draw_types(
    spec: TissueSpec, coords: Float64[np.ndarray, "cells 2"], rng: np.random.Generator
) -> Int64[np.ndarray, " cells"]:
    n_types = len(spec.cell_types)
    # a sum of random plane waves is a smooth Gaussian field with correlation length niche_um
    waves = rng.normal(0, 1 / spec.niche_um, size=(n_types, 2, _N_WAVES))
    phases = rng.uniform(0, 2 * np.pi, size=(n_types, 1, _N_WAVES))
    fields = math.sqrt(2 / _N_WAVES) * np.cos(coords @ waves + phases).sum(axis=2).T
    density = np.exp(spec.niche_contrast * fields)
    target = np.asarray(spec.proportions)
    weights = target.copy()
    for _ in range(_PROPORTION_STEPS):
        shares = weights * density / (density @ weights)[:, None]
        weights *= target / shares.mean(axis=0)
    cumulative = (weights * density / (density @ weights)[:, None]).cumsum(axis=1)
    # rounding may leave the last cumulative share just below 1
    types: Int64[np.ndarray, " cells"] = np.minimum(
        (rng.random((spec.n_cells, 1)) > cumulative).sum(axis=1), n_types - 1
    )
    return types


def _gene_names(spec: TissueSpec) -> list[str]:
    planted = _planted_genes(spec.effects)
    markers = [f"MARKER{t}_{i}" for t in range(len(spec.cell_types)) for i in range(spec.n_markers)]
    background = [f"GENE{i:03d}" for i in range(spec.n_genes - len(planted) - len(markers))]
    return planted + markers + background


def _baselines(spec: TissueSpec, genes: list[str], rng: np.random.Generator) -> Float64[np.ndarray, "types genes"]:
    log_rate = rng.normal(0, 0.4, size=len(genes)) + rng.normal(0, 0.2, size=(len(spec.cell_types), len(genes)))
    first = len(_planted_genes(spec.effects))
    # equally low baselines, so that detectability depends on the effect's strength alone
    log_rate[:, :first] = -1.2
    for t in range(len(spec.cell_types)):
        start = first + t * spec.n_markers
        log_rate[t, start : start + spec.n_markers] += 1.5
    return log_rate


def _to_anndata(
    spec: TissueSpec,
    coords: Float64[np.ndarray, "cells 2"],
    types: Int64[np.ndarray, " cells"],
    genes: list[str],
    counts: Float32[np.ndarray, "cells genes"],
) -> ad.AnnData:
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    left = coords[:, 0] < spec.region_fraction * spec.window_um[0]
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(np.array(spec.cell_types)[types], categories=list(spec.cell_types)),
            "region": pd.Categorical(np.where(left, "left_strip", "rest"), categories=["left_strip", "rest"]),
        },
        index=[f"cell{i:06d}" for i in range(spec.n_cells)],
    )
    planted = pd.DataFrame(
        [(e.sender, e.receiver, gene, e.range_um, e.strength) for e in spec.effects for gene in e.genes],
        columns=["sender", "receiver", "gene", "range_um", "strength"],
    )
    planted.index = planted.index.astype(str)
    return ad.AnnData(
        X=np.log1p(counts / total * np.median(total)).astype(np.float32),
        obs=obs,
        var=pd.DataFrame(index=genes),
        layers={"counts": counts},
        obsm={"spatial": coords},
        uns={"planted_effects": planted},
    )


def _planted_genes(effects: Iterable[PlantedEffect]) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(effect.genes for effect in effects)))


def _check(holds: bool, value: str, rule: str, fix: str) -> None:  # noqa: FBT001
    if not holds:
        raise InvalidSpecError(value, rule=rule, fix=fix)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        _check(0 < value < math.inf, f"{name}={value!r}", "must be a positive number", "use a value above 0")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        _check(0 <= value < math.inf, f"{name}={value!r}", "must not be negative", "use 0 or more")


DEMO_TISSUE = TissueSpec(
    n_cells=2000,
    n_genes=52,
    cell_types=("Tumor", "CD8+_T_Cells", "Fibroblasts", "Macrophages/Monocytes", "Endothelial"),
    proportions=(0.3, 0.2, 0.2, 0.15, 0.15),
    effects=(
        PlantedEffect("CD8+_T_Cells", "Tumor", ("CXCL9", "CXCL10", "STAT1", "IDO1"), range_um=15.0, strength=2.2),
        PlantedEffect("Tumor", "Fibroblasts", ("ACTA2", "FAP", "POSTN", "COL11A1"), range_um=20.0, strength=2.2),
        PlantedEffect(
            "Macrophages/Monocytes", "CD8+_T_Cells", ("PDCD1", "HAVCR2", "LAG3", "TOX"), range_um=15.0, strength=2.2
        ),
        PlantedEffect("Fibroblasts", "Tumor", ("VIM", "FN1", "ZEB1", "SNAI2"), range_um=20.0, strength=2.2),
    ),
    window_um=(470.0, 470.0),
    niche_contrast=2.0,
    mean_counts=800.0,
    dispersion=0.02,
)
"""A small tumour-like tissue on which AMICI learns its four planted effects in under a minute on two cores.

``"Tumor"`` receives two effects from two senders; ``"Endothelial"`` and ``"Macrophages/Monocytes"`` receive none: true
null types.
"""
