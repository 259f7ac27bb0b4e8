"""The evaluated cells, cut into tiles of tissue: sums by tile that are kept, and intervals from tiles."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from amici_eval.evaluation.protocols import LocatedAccess
from amici_eval.results.analyses import HeldOutParts, Intervals
from amici_eval.results.moments import Moments
from amici_eval.stats.explained_variance import MIN_CELLS_EXPLAINED_VARIANCE, TileSums, squares_about
from amici_eval.stats.spatial.tiles import square_tiles, tile_side
from amici_eval.stats.tile_tests import tile_bootstrap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Bool, Float64, Int64

    from amici_eval.evaluation.one_type import TypeEvaluation
    from amici_eval.evaluation.protocols import FactorAccess, ModelAccess
    from amici_eval.model.engines.factored import HeadOutputs
    from amici_eval.results.analyses import Senders
    from amici_eval.settings.evaluation import PermutationSpec
    from amici_eval.stats.tile_tests import TileBootstrap
    from amici_eval.stats.type_sums import TypeSums

IN_SAMPLE, HELD_OUT = 0, 1
_FEWEST_TILES, _MOST_TILES, _CELLS_PER_TILE = 9, 36, 100


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiling:
    """Tiles of some cells.

    ``keys`` hold tile and part of each cell in one number (:func:`tile_of`, :func:`part_of`); ``centers`` (mean
    position of a tile's cells) and ``width`` are in coordinate units.
    """

    keys: Int64[np.ndarray, " cells"]
    centers: Float64[np.ndarray, "tiles two"]
    width: float

    @classmethod
    def of(
        cls,
        access: LocatedAccess,
        rows: Int64[np.ndarray, " cells"],
        *,
        fitted: Bool[np.ndarray, " cells"] | None,
        n_types: int,
    ) -> Tiling:
        """Return the tiling of cells into squares."""
        samples, coordinates = access.samples(rows), access.coordinates(rows)
        n_sections = 1 if samples is None else len(set(samples.tolist()))
        in_all = int(np.clip(len(rows) // (n_types * _CELLS_PER_TILE), _FEWEST_TILES, _MOST_TILES))
        n_tiles = max(1, in_all // n_sections)
        tiles = square_tiles(coordinates, n_tiles=n_tiles, samples=samples)
        centers = np.stack([np.bincount(tiles, weights=column) for column in coordinates[:, :2].T], axis=1)
        return cls(
            keys=2 * tiles + (IN_SAMPLE if fitted is None else np.where(fitted, IN_SAMPLE, HELD_OUT)),
            centers=centers / np.bincount(tiles)[:, None],
            width=tile_side(coordinates, n_tiles=n_tiles, samples=samples),
        )


def tile_of(keys: Int64[np.ndarray, " keys"]) -> Int64[np.ndarray, " keys"]:
    """Return the tiles of keys."""
    return keys // 2


def part_of(keys: Int64[np.ndarray, " keys"]) -> Int64[np.ndarray, " keys"]:
    """Return the parts of keys: :data:`IN_SAMPLE` or :data:`HELD_OUT`."""
    return keys % 2


_ROUNDING = 1e-10
"""Share of a gene's squares below which its variance is float32 rounding of a constant."""


def sums_of_part(sums: TypeSums, part: int | None = None) -> TileSums:
    """Return the sums of a type by tile, of both parts together or of one; the whole model is the last."""
    by_tile = sums.by_tile
    chosen = np.ones(len(by_tile.tiles), dtype=bool) if part is None else part_of(by_tile.tiles) == part
    return by_tile.merged(tile_of(by_tile.tiles), chosen)


def kept_sums(moments: Moments, cell_type: str, genes: Sequence[str]) -> TileSums:
    """Return the kept moments of a type by tile, of some genes in the given order, for both parts together.

    Kept moments are float32: a gene varies if its variance over the type exceeds the rounding of a constant.
    """
    chosen = np.flatnonzero(moments.row_type == moments.cell_types.index(cell_type))
    position = {name: number for number, name in enumerate(moments.genes)}
    columns = np.array([position[name] for name in genes], dtype=np.int64)

    def of(values: np.ndarray) -> np.ndarray:
        return values[chosen][..., columns].astype(np.float64)

    n_cells, mean, m2 = moments.n_cells[chosen], of(moments.target_mean), of(moments.target_m2)
    size = m2.sum(axis=0) + (n_cells[:, None] * mean**2).sum(axis=0)
    spread = squares_about(n_cells, mean, m2).sum(axis=0) if len(chosen) else np.zeros(len(columns))
    rows = TileSums(
        tiles=moments.row_tile[chosen],
        n_cells=n_cells,
        target_mean=mean,
        target_m2=m2,
        residual_mean=np.concatenate([of(moments.residual_mean), of(moments.full_mean)[:, None]], axis=1),
        residual_m2=np.concatenate([of(moments.residual_m2), of(moments.full_m2)[:, None]], axis=1),
        varies=spread > _ROUNDING * size,
    )
    return rows.merged(rows.tiles, np.ones(len(chosen), dtype=bool))


_SKETCHED_CELLS = 256
_EVERY_ATTENDED = 4
"""Attention takes much memory, so it is kept of every fourth sketched cell."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Sketch:
    """The sketched cells, which are the same in every evaluation of the same cells.

    ``types``: name of each cell's type; ``places``: positions among all evaluated cells, one type after the other;
    ``attended``: positions in the sketch of those whose attention is kept.
    """

    types: tuple[str, ...]
    places: Int64[np.ndarray, " sketched"]
    attended: Int64[np.ndarray, " attended"]

    @classmethod
    def of(cls, usable: Mapping[str, Int64[np.ndarray, " cells"]]) -> Sketch:
        """Return the sketch: cells of each type, evenly through the canonical order."""
        start, types, places = 0, [], [np.zeros(0, dtype=np.int64)]
        for cell_type, rows in usable.items():
            chosen = np.linspace(0, len(rows) - 1, min(len(rows), _SKETCHED_CELLS)).astype(np.int64)
            types += [cell_type] * len(chosen)
            places.append(start + chosen)
            start += len(rows)
        return cls(
            types=tuple(types), places=np.concatenate(places), attended=np.arange(0, len(types), _EVERY_ATTENDED)
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EvaluatedCells:
    """The cells of one evaluation.

    ``receivers``: rows of each type; ``usable``: those of types with enough cells for explained variance; ``rows``: the
    usable ones, one type after the other, which is the order of ``tiling`` (None without coordinates) and ``sketch``.
    """

    receivers: Mapping[str, Int64[np.ndarray, " cells"]]
    usable: Mapping[str, Int64[np.ndarray, " cells"]]
    rows: Int64[np.ndarray, " evaluated"]
    tiling: Tiling | None
    sketch: Sketch

    @classmethod
    def of(cls, access: ModelAccess, receivers: Mapping[str, Int64[np.ndarray, " cells"]]) -> EvaluatedCells:
        """Return the cells of some receivers, with their tiles."""
        usable = {name: rows for name, rows in receivers.items() if len(rows) >= MIN_CELLS_EXPLAINED_VARIANCE}
        everyone = np.concatenate([*usable.values(), np.zeros(0, dtype=np.int64)]).astype(np.int64)
        tiling = None
        if isinstance(access, LocatedAccess) and len(everyone):
            fitted = None if access.fitted is None else access.fitted[everyone]
            tiling = Tiling.of(access, everyone, fitted=fitted, n_types=len(usable))
        return cls(receivers=receivers, usable=usable, rows=everyone, tiling=tiling, sketch=Sketch.of(usable))

    @property
    def n_receivers(self) -> int:
        """Number of cells of all types, also of those with too few."""
        return sum(len(rows) for rows in self.receivers.values())

    @property
    def slices(self) -> dict[str, slice]:
        """Where the cells of each usable type are among ``rows``."""
        ends = np.cumsum([0, *(len(rows) for rows in self.usable.values())]).tolist()
        return {name: slice(*ends_of) for name, ends_of in zip(self.usable, pairwise(ends), strict=True)}


def kept_moments(
    access: FactorAccess,
    cells: EvaluatedCells,
    evaluated: Sequence[TypeEvaluation | None],
    outputs: HeadOutputs,
    senders: Senders | None = None,
) -> Moments:
    """Return the sums by tile and the sketch that are kept of an evaluation with coordinates."""
    types, sketch, tiling = tuple(cells.receivers), cells.sketch, cells.tiling
    assert tiling is not None  # noqa: S101, RUF100 - for the type checker
    parts = [
        (index, item.sums.by_tile) for index, item in enumerate(evaluated) if item is not None and item.sums is not None
    ]
    rows = cells.rows[sketch.places]
    neighbours = access.neighbour_rows[rows[sketch.attended]]
    names = access.cell_names(neighbours.ravel().astype(np.int64))
    readouts = [access.readout(cell_type) for cell_type in types]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for _, part in parts])

    n_rows = sum(len(part.tiles) for _, part in parts)
    return Moments(
        cell_types=types,
        genes=access.card.genes,
        n_heads=access.card.n_heads,
        row_type=np.concatenate([np.full(len(part.tiles), index, dtype=np.int64) for index, part in parts]),
        row_tile=tile_of(joined("tiles")),
        row_held_out=part_of(joined("tiles")) if access.fitted is not None else np.full(n_rows, -1),
        n_cells=joined("n_cells"),
        target_mean=joined("target_mean").astype(np.float32),
        target_m2=joined("target_m2").astype(np.float32),
        residual_mean=joined("residual_mean")[:, :-1].astype(np.float32),
        residual_m2=joined("residual_m2")[:, :-1].astype(np.float32),
        full_mean=joined("residual_mean")[:, -1].astype(np.float32),
        full_m2=joined("residual_m2")[:, -1].astype(np.float32),
        sketch_type=np.array([types.index(name) for name in sketch.types], dtype=np.int64),
        sketch_names=tuple(access.cell_names(rows)),
        sketch_outputs=outputs.whole[sketch.places],
        sketch_tile=tile_of(tiling.keys[sketch.places]),
        attended=sketch.attended,
        attention=outputs.attention
        if outputs.attention is not None
        else np.zeros((len(sketch.attended), access.card.n_heads, neighbours.shape[1] + 1), dtype=np.float32),
        attended_neighbours=np.fromiter(
            (crc32(name.encode()) for name in names), dtype=np.int64, count=len(names)
        ).reshape(neighbours.shape),
        tile_center=tiling.centers,
        senders=() if senders is None else senders.senders,
        lost_squares=np.zeros((access.card.n_heads, len(types), 0, len(tiling.centers)), dtype=np.float32)
        if senders is None or senders.lost_squares is None
        else senders.lost_squares.astype(np.float32),
        query_weights=np.stack([readout.weights[:, 0] for readout in readouts]).astype(np.float32),
        head_weights=readouts[0].weights[:, 1:].astype(np.float32),
        query_gram=np.stack([readout.gram[0] for readout in readouts]),
        head_gram=readouts[0].gram[1:, 1:],
        readout_offset=np.stack([readout.offset for readout in readouts]),
        readout_epsilon=np.array([readouts[0].epsilon]),
    )


def _interval(rows: TileSums, test: PermutationSpec, cell_type: str) -> TileBootstrap:
    return tile_bootstrap(
        rows,
        confidence=test.confidence,
        n_resamples=test.n_bootstrap,
        seed=test.seed,
        cell_type=cell_type,
    )


def intervals(
    evaluated: Mapping[str, TypeEvaluation | None],
    *,
    test: PermutationSpec,
    n_heads: int,
    tile_width: float,
) -> Intervals:
    """Return confidence intervals of explained variance by resampling tiles; see :class:`Intervals`."""
    found = [
        None if item is None or item.sums is None else _interval(sums_of_part(item.sums), test, cell_type)
        for cell_type, item in evaluated.items()
    ]
    nothing = np.full(n_heads + 1, np.nan)
    low = np.stack([nothing if one is None else one.low for one in found], axis=1)
    high = np.stack([nothing if one is None else one.high for one in found], axis=1)
    return Intervals(
        confidence=test.confidence,
        n_resamples=test.n_bootstrap,
        tile_width=tile_width,
        n_tiles=np.array([0 if one is None else one.n_tiles for one in found], dtype=np.int64),
        low=low[:-1],
        high=high[:-1],
        full_low=low[-1],
        full_high=high[-1],
        reasons=tuple(
            (cell_type, one.reason)
            for cell_type, one in zip(evaluated, found, strict=True)
            if one is not None and one.reason is not None
        ),
    )


def held_out_parts(
    evaluated: Mapping[str, TypeEvaluation | None], *, test: PermutationSpec, n_heads: int
) -> HeldOutParts:
    """Return explained variance in-sample and held out, side by side; see :class:`HeldOutParts`."""
    n_types = len(evaluated)
    n_cells = np.zeros((2, n_types), dtype=np.int64)
    values, low, high = (np.full((2, n_heads + 1, n_types), np.nan) for _ in range(3))
    for index, (cell_type, item) in enumerate(evaluated.items()):
        if item is None or item.sums is None:
            continue
        for part in (IN_SAMPLE, HELD_OUT):
            rows = sums_of_part(item.sums, part)
            n_cells[part, index] = rows.n_cells.sum()
            values[part, :, index] = rows.explained_variance if len(rows.tiles) else np.nan
            if test.n_bootstrap and len(rows.tiles):
                found = _interval(rows, test, cell_type)
                low[part, :, index], high[part, :, index] = found.low, found.high
    return HeldOutParts(
        n_cells=n_cells,
        expl_var=values[:, :-1],
        full=values[:, -1],
        low=low[:, :-1],
        high=high[:, :-1],
    )
