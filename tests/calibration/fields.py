"""Simulated tissue: smooth random fields for prediction and expression, on cells that lie anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.stats.spatial import lag as stats
from amici_eval.stats.spatial.lag_test import GeneSums

if TYPE_CHECKING:
    from pathlib import Path

RANK, N_GENES = 3, 6
_WAVES = 300

REAL_TYPES = {
    "osmFISH": ("osmfish_sscortex.h5ad", ("Pyramidal", "Oligodendrocyte", "Astrocyte")),
    "Xenium": ("xenium_breast_rep1_roi.h5ad", ("Myoepi_ACTA2+", "B_Cells", "IRF7+_DCs")),
    "STARmap": ("starmap_mpfc_3sections.h5ad", ("eL6-1", "Astro", "Lhx6")),
}
"""Types of different size; the last of Xenium is rare. STARmap has three sections."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CellPositions:
    """Where the cells of one type lie."""

    name: str
    coordinates: np.ndarray
    samples: np.ndarray | None = None

    @cached_property
    def cells(self) -> stats.CellPositions:
        """The same as tests take it."""
        return stats.CellPositions.of(self.coordinates, samples=self.samples, n_genes=N_GENES)

    @cached_property
    def sections(self) -> list[np.ndarray]:
        """Rows of each section."""
        if self.samples is None:
            return [np.arange(len(self.coordinates))]
        return [np.flatnonzero(self.samples == label) for label in np.unique(self.samples)]

    @cached_property
    def extent(self) -> float:
        """Longer side of the largest section's window."""
        return max(float(np.ptp(self.coordinates[rows], axis=0).max()) for rows in self.sections)


def uniform_place(rng: np.random.Generator, n_cells: int) -> CellPositions:
    return CellPositions(name=f"uniform, {n_cells} cells", coordinates=rng.uniform(size=(n_cells, 2)))


def real_places(data: Path | None) -> list[CellPositions]:
    """Return the positions of some types of real tissue; expression is not looked at."""
    if data is None:
        return []
    import anndata

    places = []
    for tissue, (file, types) in REAL_TYPES.items():
        if not (data / file).is_file():
            continue
        adata = anndata.read_h5ad(data / file, backed="r")
        labels = adata.obs["cell_type"].astype(str).to_numpy()
        xy = np.asarray(adata.obsm["spatial"], dtype=np.float64)[:, :2]
        samples = adata.obs["sample"].astype(str).to_numpy() if "sample" in adata.obs else None
        adata.file.close()
        for cell_type in types:
            rows = labels == cell_type
            places.append(
                CellPositions(
                    name=f"{tissue} {cell_type}, {np.count_nonzero(rows)} cells",
                    coordinates=xy[rows],
                    samples=None if samples is None else samples[rows],
                )
            )
    return places


@dataclass(frozen=True, kw_only=True)
class Smooth:
    """How smooth fields are.

    Parameters
    ----------
    kernel
        ``"gaussian"``: correlation exp(-d^2 / 2 l^2) at distance d; ``"exponential"``: exp(-d / l).
    length
        l, in coordinate units.
    nugget
        Share of the variance of expression that is noise of its own in each cell.
    """

    kernel: str
    length: float
    nugget: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Fields:
    """Smooth random fields at cells.

    Parameters
    ----------
    values
        Shape (cells, columns): independent columns of mean 0 and expected variance 1.
    variance
        Of each column over endless tissue of the same waves, shape (columns,); of the first section, if there are more.
    """

    values: np.ndarray
    variance: np.ndarray


def fields(rng: np.random.Generator, place: CellPositions, n_columns: int, smooth: Smooth) -> Fields:
    """Draw independent smooth fields, independent between sections, too.

    Random Fourier features (Rahimi & Recht 2007): cosine waves whose wave vectors are drawn from the spectrum of the
    kernel.
    """
    values = np.empty((len(place.coordinates), n_columns))
    variances = []
    for rows in place.sections:
        waves = rng.normal(size=(2, _WAVES)) / smooth.length
        if smooth.kernel == "exponential":
            # its spectrum is a Cauchy distribution: a normal one divided by the root of a chi square
            waves = waves / np.abs(rng.normal(size=_WAVES))
        phases = rng.uniform(0.0, 2.0 * np.pi, _WAVES)
        weights = rng.normal(size=(_WAVES, n_columns)) * np.sqrt(2.0 / _WAVES)
        values[rows] = np.cos(place.coordinates[rows] @ waves + phases) @ weights
        variances.append(np.square(weights).sum(axis=0) / 2.0)
    return Fields(values=values, variance=variances[0])


def field(rng: np.random.Generator, place: CellPositions, n_columns: int, smooth: Smooth) -> np.ndarray:
    """Return the values of :func:`fields`."""
    return fields(rng, place, n_columns, smooth).values


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """Factors and images of some heads, as evaluation hands them to the nulls."""

    factors: np.ndarray
    images: np.ndarray
    genes: GeneSums


def simulate(
    rng: np.random.Generator, place: CellPositions, smooth: Smooth, *, n_heads: int = 3, effect: float = 0.0
) -> Data:
    """Return heads that know nothing of expression, except that the first knows a part of it if there is an effect.

    Expression is a smooth field with a nugget, plus ``effect`` times the prediction of the first head, both in standard
    deviations.
    """
    n_cells = len(place.coordinates)
    weights = rng.normal(size=(n_heads, N_GENES, RANK))
    y = np.sqrt(1.0 - smooth.nugget) * field(rng, place, N_GENES, smooth)
    y += np.sqrt(smooth.nugget) * rng.normal(size=y.shape)
    factors = field(rng, place, RANK * n_heads, smooth).reshape(n_cells, RANK, n_heads)
    predicted = np.einsum("iah,hga->hig", factors, weights)
    predicted -= predicted.mean(axis=1, keepdims=True)
    if effect:
        y += effect * predicted[0] / predicted[0].std()
    centred = y - y.mean(axis=0)
    return Data(
        factors=factors,
        images=np.einsum("ig,hga->iah", y, weights).astype(np.float32),
        genes=GeneSums(
            weights=weights,
            pixel_sums=place.cells.grid.sums(torch.from_numpy(y)).numpy(),
            near=y[place.cells.near.cells],
            target_ss=np.square(centred).sum(axis=0),
            predicted_ss=np.square(predicted).sum(axis=1),
            common=np.einsum("hig,ig->hg", predicted, centred),
        ),
    )
