"""Positions of the cells of a type on a grid, and covariances of spatial fields by distance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float64, Int64

_LEAST_SIDE, _LARGEST_SIDE = 16, 64
"""Pixels along the longer side of a window."""
_PIXELS_PER_CELL = 4
_MOST_PIXELS = 2**14
"""Limit for all sections together: each pixel holds a sum of every gene."""
_RING = 4.2
"""Longest offset of one level, in its pixels; coarser levels cover longer distances."""
_EDGES = (_RING / 2, 2.55, 3.05, 3.4, 3.85, _RING)
"""About one ring per length of offsets: a product of covariances averaged over a wide ring is too small."""
_FIRST_EDGES = (0.5, 1.2, 1.7, *_EDGES)
_NEAR_BINS = 3
"""Bins of cells in the same or touching pixels, whose pairs ``NearPairs`` bins by finer distances."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LagGrid:
    """Cells of one type on a grid of pixels, for covariances between cells at a distance.

    Pairs are binned by distance between pixels, in rings of about half a pixel up to 4.2 pixels; beyond, on pixels of
    twice the side, and so on up to the window's extent, so that a ring's cost does not grow with the cells or the
    distance. Pairs in the same or touching pixels are left to :class:`NearPairs`; pairs never cross sections. ``pixel``
    counts through all sections; ``shape``: sections, rows and columns of the finest grid; ``side``: of its pixels, in
    coordinate units.
    """

    pixel: Int64[np.ndarray, " cells"]
    section: Int64[np.ndarray, " cells"]
    shape: tuple[int, int, int]
    side: float

    @classmethod
    def of(cls, coordinates: Float64[np.ndarray, "cells dimensions"], *, samples: np.ndarray | None = None) -> LagGrid:
        """Lay a grid over the cells of each section, by the first two coordinates."""
        n_cells = len(coordinates)
        names, section = np.unique(np.zeros(n_cells) if samples is None else samples.astype(str), return_inverse=True)
        xy = np.asarray(coordinates[:, :2], dtype=np.float64).copy()
        for index in range(len(names)):
            xy[section == index] -= xy[section == index].min(axis=0)
        extent = float(xy.max())
        wanted = 2 ** int(np.ceil(np.log2(max(1.0, np.sqrt(_PIXELS_PER_CELL * n_cells / len(names))))))
        affordable = 2 ** int(np.log2(np.sqrt(_MOST_PIXELS / len(names))))
        n_along = int(np.clip(min(wanted, affordable), _LEAST_SIDE, _LARGEST_SIDE))
        side = extent / n_along or 1.0
        steps = np.minimum((xy / side).astype(np.int64), n_along - 1)
        # coarser levels halve both sides
        rows, columns = (int(2 ** np.ceil(np.log2(size))) for size in steps.max(axis=0) + 1)
        pixel = (section * rows + steps[:, 0]) * columns + steps[:, 1]
        return cls(
            pixel=pixel.astype(np.int64),
            section=section.astype(np.int64),
            shape=(len(names), rows, columns),
            side=side,
        )

    @property
    def n_pixels(self) -> int:
        """Number of pixels of all sections."""
        return int(np.prod(self.shape))

    @property
    def n_sections(self) -> int:
        """Number of sections."""
        return self.shape[0]

    @cached_property
    def counts(self) -> Int64[np.ndarray, " pixels"]:
        """Cells in each pixel."""
        return np.bincount(self.pixel, minlength=self.n_pixels)

    @cached_property
    def section_counts(self) -> Int64[np.ndarray, " sections"]:
        """Cells in each section."""
        return np.bincount(self.section, minlength=self.n_sections)

    @cached_property
    def n_levels(self) -> int:
        """Number of grids of growing pixels; the coarsest rings reach across the window."""
        return max(1, int(np.ceil(np.log2(max(self.shape[1:]) / _RING))) + 1)

    @cached_property
    def edges(self) -> Float64[np.ndarray, " edges"]:
        """Edges of the bins of distance, in coordinate units."""
        coarser = [edge * 2**level for level in range(1, self.n_levels) for edge in _EDGES[1:]]
        return np.array([*_FIRST_EDGES[_NEAR_BINS - 1 :], *coarser]) * self.side

    @property
    def n_near(self) -> float:
        """Ordered pairs of different cells in the same or touching pixels."""
        return float(self._all_pairs[:_NEAR_BINS].sum())

    @property
    def pairs(self) -> Float64[np.ndarray, " bins"]:
        """Ordered pairs of cells whose distance, from pixel to pixel, falls into each bin."""
        return self._all_pairs[_NEAR_BINS:]

    @cached_property
    def _all_pairs(self) -> Float64[np.ndarray, " all_bins"]:
        _, rows, columns = self.shape
        image = self.counts.reshape(self.shape).astype(np.float64)
        spectrum = np.fft.rfft2(image, s=(2 * rows, 2 * columns))
        found = np.fft.irfft2(np.abs(spectrum) ** 2, s=(2 * rows, 2 * columns)).sum(axis=0)
        along = [np.minimum(np.arange(2 * size), 2 * size - np.arange(2 * size)) for size in (rows, columns)]
        distance = np.hypot(along[0][:, None], along[1][None, :]) * self.side
        edges = np.concatenate([np.array(_FIRST_EDGES[: _NEAR_BINS - 1]) * self.side, self.edges])
        number = np.searchsorted(edges, distance.ravel(), side="left")
        pairs = np.bincount(number, weights=np.round(found.ravel()), minlength=len(edges) + 1)[: len(edges)]
        pairs[0] -= len(self.pixel)
        return pairs

    @cached_property
    def distances(self) -> Float64[np.ndarray, " bins"]:
        """Middle of each bin, in coordinate units."""
        middles: Float64[np.ndarray, " bins"] = (self.edges[:-1] + self.edges[1:]) / 2
        return middles

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Return sums over the cells of each pixel; ``values`` (cells, ...) becomes (pixels, ...), float64."""
        wide = values.double()
        image = wide.new_zeros((self.n_pixels, *wide.shape[1:]))
        return image.index_add_(0, torch.from_numpy(self.pixel).to(wide.device), wide)

    def centred(self, image: torch.Tensor) -> torch.Tensor:
        """Return pixel sums of a field minus its mean in each section."""
        counts = torch.from_numpy(self.counts.astype(np.float64)).to(image.device)
        by_section = image.view(self.n_sections, -1, *image.shape[1:])
        totals = torch.from_numpy(np.maximum(self.section_counts, 1).astype(np.float64)).to(image.device)
        ones = (1,) * (image.dim() - 1)
        means = by_section.sum(dim=1) / totals.view(-1, *ones)
        own = counts.view(self.n_sections, -1, *ones) * means[:, None]
        return (by_section - own).reshape(image.shape)

    def products(self, image: torch.Tensor) -> torch.Tensor:
        """Return mean outer products of cells in each bin of distance; 0 in bins without pairs.

        ``image``: centred sums over pixels; (fields, pixels, columns) becomes (bins, fields, columns, columns),
        symmetric.
        """
        n_fields, _, n_columns = image.shape
        sums = image.new_zeros((len(self.pairs), n_fields, n_columns, n_columns))
        for level, flat in self._levels(image):
            for number, shifts in level.shifts.items():
                for shift in shifts:
                    sums[number].baddbmm_(flat[:, :-shift].transpose(1, 2), flat[:, shift:])
        sums += sums.transpose(2, 3).clone()
        return sums / self._counted(image)[:, None, None, None]

    def squares(self, image: torch.Tensor) -> torch.Tensor:
        """Return mean products in each bin of fields of one column each: (fields, pixels) becomes (bins, fields)."""
        sums = image.new_zeros((len(self.pairs), len(image)))
        for level, flat in self._levels(image[:, :, None]):
            fields = flat[:, :, 0].contiguous()
            room = torch.empty_like(fields)
            for number, shifts in level.shifts.items():
                for shift in shifts:
                    product = torch.mul(fields[:, :-shift], fields[:, shift:], out=room[:, :-shift])
                    sums[number].add_(product.sum(dim=1), alpha=2.0)
        return sums / self._counted(image)[:, None]

    def _counted(self, like: torch.Tensor) -> torch.Tensor:
        """Return the number of pairs that the products of each bin are summed over, at least 1."""
        return torch.from_numpy(np.maximum(self._pairs_summed, 1.0)).to(like.device)

    @cached_property
    def _pairs_summed(self) -> Float64[np.ndarray, " bins"]:
        image = torch.from_numpy(self.counts.astype(np.float64))[None, :, None]
        pairs = np.zeros(len(self.pairs))
        for level, flat in self._levels(image):
            for number, shifts in level.shifts.items():
                pairs[number] = 2.0 * sum(float(flat[0, :-shift, 0] @ flat[0, shift:, 0]) for shift in shifts)
        return pairs

    def _levels(self, image: torch.Tensor) -> Iterator[tuple[_Level, torch.Tensor]]:
        """Yield each level, and the sums over its pixels laid out so that an offset is a shift."""
        summed = image.view(len(image), *self.shape, image.shape[2])
        for number, level in enumerate(self._grids):
            if number:
                # merge neighbours in twos along each axis, unless the window is one pixel wide there
                for axis in (2, 3):
                    if summed.shape[axis] > 1:
                        even, odd = (
                            summed.narrow(axis, 0, summed.shape[axis]).index_select(
                                axis, torch.arange(start, summed.shape[axis], 2, device=image.device)
                            )
                            for start in (0, 1)
                        )
                        summed = even.add_(odd)
            yield level, level.padded(summed)

    @cached_property
    def _grids(self) -> tuple[_Level, ...]:
        return tuple(_Level.of(self.shape, level) for level in range(self.n_levels))


@dataclass(frozen=True)
class _Level:
    """A grid of pixels of ``2**level`` times the finest side, and the shifts of its padded image by bin."""

    shape: tuple[int, int, int]
    shifts: dict[int, list[int]]

    @classmethod
    def of(cls, shape: tuple[int, int, int], level: int) -> _Level:
        n_sections, rows, columns = shape
        own = (n_sections, max(1, rows // 2**level), max(1, columns // 2**level))
        first = 0 if level == 0 else len(_FIRST_EDGES) - _NEAR_BINS + (len(_EDGES) - 1) * (level - 1)
        reach = int(_RING)
        shifts: dict[int, list[int]] = {}
        width = own[2] + reach
        edges = _FIRST_EDGES[_NEAR_BINS - 1 :] if level == 0 else _EDGES
        for down in range(reach + 1):
            for right in range(-reach, reach + 1):
                # half of the offsets: the others are their mirror images
                if (down, right) <= (0, 0) or down >= own[1] or abs(right) >= own[2]:
                    continue
                number = int(np.searchsorted(edges, np.hypot(down, right), side="left")) - 1
                if 0 <= number < len(edges) - 1:
                    shifts.setdefault(first + number, []).append(down * width + right)
        return cls(shape=own, shifts=shifts)

    def padded(self, summed: torch.Tensor) -> torch.Tensor:
        """Return sums over the level's pixels with zeros between rows and sections, so that an offset is a shift."""
        n_fields, n_columns = summed.shape[0], summed.shape[-1]
        n_sections, rows, columns = self.shape
        reach = int(_RING)
        out = summed.new_zeros((n_fields, n_sections, rows + reach, columns + reach, n_columns))
        out[:, :, :rows, :columns] = summed
        return out.view(n_fields, -1, n_columns)


_NEAR_EDGES = np.array([0.03, 0.06, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0])
"""Outer edges of the rings, in pixels; the last ring reaches across a pixel and the eight around it."""
_MOST_CELLS, _MOST_BYTES, _MOST_CANDIDATES = 2**14, 2**26, 2**20
_PAIRS_PER_RING = 10_000
"""Most pairs of a ring: the noise of a mean product is then a hundredth of the variance."""
_CHUNK = 4096


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class NearPairs:
    """Pairs of cells in the same or in touching pixels, in rings of distance.

    They serve where correlation reaches less far than a pixel: the product of two covariances averaged over a pixel is
    too small. Where cells are many, only pairs around pixels chosen by a fixed rule are kept, so that they depend on
    the cells alone. ``first`` and ``second`` are places in ``cells`` (ascending), sorted by ring; ring r begins at
    ``starts[r]``; ``pairs``: ordered pairs of the whole tissue in each ring, estimated from the kept ones;
    ``distances``: middles of rings, in coordinate units.
    """

    cells: Int64[np.ndarray, " sampled"]
    first: Int64[np.ndarray, " pairs"]
    second: Int64[np.ndarray, " pairs"]
    starts: Int64[np.ndarray, " edges"]
    pairs: Float64[np.ndarray, " rings"]
    distances: Float64[np.ndarray, " rings"]

    @classmethod
    def of(cls, grid: LagGrid, coordinates: Float64[np.ndarray, "cells dimensions"], *, n_genes: int) -> NearPairs:
        """Choose pairs; ``n_genes`` limits how many cells keep their expression."""
        order = np.argsort(grid.pixel, kind="stable")
        starts = np.concatenate([[0], np.cumsum(grid.counts)])
        _, rows, columns = grid.shape
        occupied = np.flatnonzero(grid.counts)
        # a fixed shuffle (Knuth's multiplicative hash), because consecutive pixels are neighbours
        occupied = occupied[np.argsort((occupied * 2654435761) % 2**32, kind="stable")]
        row, column = occupied // columns % rows, occupied % columns
        around = np.full((9, len(occupied)), -1)
        for number, (down, right) in enumerate((d, r) for d in (-1, 0, 1) for r in (-1, 0, 1)):
            inside = (row + down >= 0) & (row + down < rows) & (column + right >= 0) & (column + right < columns)
            around[number, inside] = (occupied + down * columns + right)[inside]
        sizes = np.where(around >= 0, grid.counts[around], 0)
        in_block = sizes.sum(axis=0)
        # where many cells lie at one place, use some of them
        n_own = np.minimum(grid.counts[occupied], np.maximum(1, _MOST_CANDIDATES // in_block))
        kept = np.cumsum(n_own * in_block) <= _MOST_CANDIDATES
        most_cells = int(np.clip(_MOST_BYTES // (4 * max(1, n_genes)), 1024, _MOST_CELLS))
        if len(order) > most_cells:
            kept &= np.cumsum(in_block) <= most_cells
        kept[0] = True
        first, second = [], []
        own, n_own = starts[occupied[kept]], n_own[kept]
        for number in range(9):
            n_other = sizes[number, kept]
            other = starts[np.maximum(around[number, kept], 0)]
            total = n_own * n_other
            which = np.repeat(np.arange(len(total)), total)
            place = np.arange(total.sum()) - np.repeat(np.cumsum(total) - total, total)
            first.append(order[own[which] + place // np.maximum(n_other[which], 1)])
            second.append(order[other[which] + place % np.maximum(n_other[which], 1)])
        left, right = np.concatenate(first), np.concatenate(second)
        different = left != right
        left, right = left[different], right[different]
        distance = np.linalg.norm(coordinates[left, :2] - coordinates[right, :2], axis=1)
        ring = np.minimum(np.searchsorted(_NEAR_EDGES * grid.side, distance, side="left"), len(_NEAR_EDGES) - 1)
        counted = np.bincount(ring, minlength=len(_NEAR_EDGES)).astype(np.float64)
        chosen, ends = [], [0]
        for number in range(len(_NEAR_EDGES)):
            members = np.flatnonzero(ring == number)
            step = max(1, -(-len(members) // _PAIRS_PER_RING))
            chosen.append(members[::step])
            ends.append(ends[-1] + len(chosen[-1]))
        pick = np.concatenate(chosen)
        cells, places = np.unique(np.concatenate([left[pick], right[pick]]), return_inverse=True)
        middles = (np.concatenate([[0.0], _NEAR_EDGES[:-1]]) + _NEAR_EDGES) / 2
        return cls(
            cells=cells,
            first=places[: len(pick)],
            second=places[len(pick) :],
            starts=np.array(ends),
            pairs=counted * (grid.n_near / max(counted.sum(), 1.0)),
            distances=middles * grid.side,
        )

    def products(self, values: torch.Tensor) -> torch.Tensor:
        """Return mean outer products by ring: (fields, cells, columns) becomes (rings, fields, columns, columns)."""
        n_fields, _, n_columns = values.shape
        own = values[:, torch.from_numpy(self.cells).to(values.device)]
        sums = values.new_zeros((len(self.pairs), n_fields, n_columns, n_columns))
        for ring, left, right in self._chunks(values.device):
            sums[ring].baddbmm_(own[:, left].transpose(1, 2), own[:, right])
        sums += sums.transpose(2, 3).clone()
        return sums / (2.0 * self._counted(values))[:, None, None, None]

    def squares(self, values: torch.Tensor) -> torch.Tensor:
        """Return mean products in each ring of fields over ``cells``; (sampled, fields) becomes (rings, fields)."""
        sums = values.new_zeros((len(self.pairs), values.shape[1]))
        for ring, left, right in self._chunks(values.device):
            sums[ring] += (values[left] * values[right]).sum(dim=0)
        return sums / self._counted(values)[:, None]

    def _chunks(self, device: torch.device) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        for ring, (start, stop) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            for begin in range(start, stop, _CHUNK):
                part = slice(begin, min(begin + _CHUNK, stop))
                yield (
                    ring,
                    torch.from_numpy(self.first[part]).to(device),
                    torch.from_numpy(self.second[part]).to(device),
                )

    def _counted(self, like: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.maximum(np.diff(self.starts), 1).astype(np.float64)).to(like.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class CellPositions:
    """Coordinates of the cells of one type, with the pixels over them and their near pairs.

    ``coordinates`` are in the unit of the AnnData; ``samples``: section of each cell, None if not known.
    """

    coordinates: Float64[np.ndarray, "cells dimensions"]
    samples: np.ndarray | None
    grid: LagGrid
    near: NearPairs

    @classmethod
    def of(
        cls, coordinates: Float64[np.ndarray, "cells dimensions"], *, samples: np.ndarray | None = None, n_genes: int
    ) -> CellPositions:
        """Lay a grid over cells and find near pairs; ``n_genes`` limits how many cells keep their expression."""
        grid = LagGrid.of(coordinates, samples=samples)
        near = NearPairs.of(grid, coordinates, n_genes=n_genes)
        return cls(coordinates=coordinates, samples=samples, grid=grid, near=near)
