"""Sums by tile that an evaluation keeps, so that later questions need no second pass over the cells."""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.common.errors import DataError
from amici_eval.common.files import check_names, load_npz, parse_json
from amici_eval.results.codec import Record
from amici_eval.stats.explained_variance import squares_about

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64, Int64

MOMENTS_FILE = "moments.npz"
SCHEMA_VERSION = 4
_MOST_VALUES = 2**24
_DAMAGE = (
    *(OSError, LookupError, TypeError, ValueError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error),
    # zipfile raises these for encrypted members, unknown compressions and impossible sizes
    *(RuntimeError, MemoryError, OverflowError),
)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Moments(Record):
    """Moments per receiver type and spatial tile, and a sketch of the heads' outputs.

    Each *row* is one type in one tile. Tiles are squares of the tissue, the same for all types.

    Parameters
    ----------
    cell_types, genes, n_heads
        As in the evaluation.
    row_type, row_tile, n_cells
        Type (index into ``cell_types``), tile and number of cells of each row, shape (rows,).
    row_held_out
        Whether the row's cells are held out (1) or those the model was fitted on (0); -1: not known. Shape (rows,).
        Where it is known, a type has up to two rows in a tile.
    target_mean, target_m2
        Mean and centred sum of squares of expression, shape (rows, genes), float32.
    residual_mean, residual_m2
        The same of prediction minus expression, each head kept alone, shape (rows, heads, genes), float32.
    full_mean, full_m2
        The same of the whole model, shape (rows, genes), float32.
    sketch_type, sketch_names, sketch_outputs
        Some cells of each type (index into ``cell_types``), their names, and what attention brought to them, shape
        (sketched cells, heads * head_size), float32.
    sketch_tile
        Tile of each of these cells, shape (sketched cells,); -1: not known.
    attended
        Some of the sketched cells, as places in the sketch, of which attention is kept, shape (attended,).
    attention
        Their attention to each neighbour, nearest first, and to the dummy, shape (attended, heads, neighbours + 1),
        float32.
    attended_neighbours
        CRC-32 of the names of these neighbours, shape (attended, neighbours), so that other evaluations know them.
    tile_center
        Mean position of each tile's evaluated cells, in coordinate units, shape (tiles, 2); row t is tile number t.
    senders, lost_squares
        Types of senders, if they were asked for, and what a head, kept alone, leaves more of each tile's squares where
        these senders are masked out (:class:`~amici_eval.results.analyses.Senders`), shape (heads, types,
        senders, tiles), float32; NaN where undefined.
    query_weights, head_weights
        How attention outputs become expression (:class:`amici_eval.stats.readout.Readout`): its first column, which
        depends on the type, shape (types, genes), and the others, shape (genes, heads * head_size); float32.
    query_gram, head_gram
        The same of its gram: first row, shape (types, 1 + heads * head_size), and the block of the heads; float64.
    readout_offset, readout_epsilon
        Its other parts: shape (types, genes) and (1,), float64.
    """

    cell_types: tuple[str, ...]
    genes: tuple[str, ...]
    n_heads: int
    row_type: Int64[np.ndarray, " rows"]
    row_tile: Int64[np.ndarray, " rows"]
    row_held_out: Int64[np.ndarray, " rows"]
    n_cells: Int64[np.ndarray, " rows"]
    target_mean: Float32[np.ndarray, "rows genes"]
    target_m2: Float32[np.ndarray, "rows genes"]
    residual_mean: Float32[np.ndarray, "rows heads genes"]
    residual_m2: Float32[np.ndarray, "rows heads genes"]
    full_mean: Float32[np.ndarray, "rows genes"]
    full_m2: Float32[np.ndarray, "rows genes"]
    sketch_type: Int64[np.ndarray, " sketched"]
    sketch_names: tuple[str, ...]
    sketch_outputs: Float32[np.ndarray, "sketched outputs"]
    sketch_tile: Int64[np.ndarray, " sketched"]
    attended: Int64[np.ndarray, " attended"]
    attention: Float32[np.ndarray, "attended heads places"]
    attended_neighbours: Int64[np.ndarray, "attended neighbours"]
    tile_center: Float64[np.ndarray, "tiles two"]
    senders: tuple[str, ...]
    lost_squares: Float32[np.ndarray, "heads types senders tiles"]
    query_weights: Float32[np.ndarray, "types genes"]
    head_weights: Float32[np.ndarray, "genes outputs"]
    query_gram: Float64[np.ndarray, "types columns"]
    head_gram: Float64[np.ndarray, "outputs outputs"]
    readout_offset: Float64[np.ndarray, "types genes"]
    readout_epsilon: Float64[np.ndarray, " one"]

    def __post_init__(self) -> None:
        n_heads, n_types, n_sketched = self.n_heads, len(self.cell_types), len(self.sketch_names)
        n_outputs = np.size(self.head_gram, 0) if np.ndim(self.head_gram) else 0
        n_tiles = int(np.max(self.row_tile, initial=-1)) + 1
        n_neighbours = np.size(self.attended_neighbours, 1) if np.ndim(self.attended_neighbours) == 2 else 0
        if n_heads < 1 or n_outputs % n_heads:
            msg = f"{n_outputs} outputs cannot be those of {n_heads} heads"
            raise ValueError(msg)
        self.check(
            {
                "rows": np.size(self.row_type),
                "heads": n_heads,
                "types": n_types,
                "genes": len(self.genes),
                "senders": len(self.senders),
                "outputs": n_outputs,
                "columns": 1 + n_outputs,
                "sketched": n_sketched,
                "attended": np.size(self.attended),
                "neighbours": n_neighbours,
                "places": n_neighbours + 1,
                "tiles": n_tiles,
                "one": 1,
                "two": 2,
            }
        )
        for name, first, stop in (
            ("row_type", 0, n_types),
            ("sketch_type", 0, n_types),
            ("row_tile", 0, n_tiles),
            ("sketch_tile", -1, n_tiles),
            ("attended", 0, n_sketched),
        ):
            values = getattr(self, name)
            if values.dtype.kind not in "iu" or not np.all((values >= first) & (values < stop)):
                msg = f"{name} holds other values than whole numbers from {first} below {stop}"
                raise ValueError(msg)

    def __repr__(self) -> str:
        return f"Moments({len(self.row_type)} rows of type x tile, {len(self.sketch_names)} sketched cells)"

    def explained_variance(self, *, tiles: Any = None) -> Float64[np.ndarray, "heads types"]:
        """Return explained variance over all genes, per head and type, over some tiles (all by default).

        Parameters
        ----------
        tiles
            Tile numbers; a number that occurs twice counts twice, as a block bootstrap draws them.

        Raises
        ------
        DataError
            If there is no such tile.

        Notes
        -----
        A type without two cells in these tiles, or without variance, gives NaN.
        """
        n_tiles = len(self.tile_center)
        asked = np.arange(n_tiles) if tiles is None else np.asarray(tiles)
        if asked.dtype.kind not in "iu" or (asked.size and not (0 <= asked.min() and asked.max() < n_tiles)):
            raise DataError(
                value=f"tiles={tiles!r}",
                rule=f"tiles are whole numbers from 0 to {n_tiles - 1}; tile_center says where each lies",
                fix="choose among these",
            )
        times = np.bincount(asked.ravel(), minlength=n_tiles).astype(np.float64)[self.row_tile]
        values = np.full((self.n_heads, len(self.cell_types)), np.nan)
        for index in range(len(self.cell_types)):
            rows = np.flatnonzero((self.row_type == index) & (times > 0))
            weight = times[rows] * self.n_cells[rows]
            if weight.sum() < 2:
                continue
            target = _merged(times[rows], weight, self.target_mean[rows], self.target_m2[rows]).sum()
            residual = _merged(times[rows], weight, self.residual_mean[rows], self.residual_m2[rows]).sum(axis=-1)
            if target > 0.0:
                values[:, index] = 1.0 - residual / target
        return values

    def without_tiles(self) -> Moments:
        """Return the sketch with numbers of cells alone: enough to tell how alike heads are, and small."""
        types, place = np.unique(self.row_type, return_inverse=True)
        unknown: dict[str, Any] = {
            entry.name: np.full((len(types), *getattr(self, entry.name).shape[1:]), np.nan, dtype=np.float32)
            for entry in fields(self)
            if entry.name.startswith(("target_", "residual_", "full_"))
        }
        return replace(
            self,
            row_type=types,
            row_tile=np.zeros(len(types), dtype=np.int64),
            row_held_out=np.full(len(types), -1, dtype=np.int64),
            n_cells=np.bincount(place, weights=self.n_cells, minlength=len(types)).astype(np.int64),
            sketch_tile=np.full(len(self.sketch_names), -1, dtype=np.int64),
            tile_center=self.tile_center[:1],
            senders=(),
            lost_squares=np.zeros((self.n_heads, len(self.cell_types), 0, 1), dtype=np.float32),
            **unknown,
        )

    def save(self, path: str | Path) -> Path:
        """Write a compressed ``.npz`` without pickles and return its path."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, np.ndarray] = {}
        texts: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, np.ndarray):
                arrays[entry.name] = value
            else:
                texts[entry.name] = value
        header = np.frombuffer(json.dumps(texts, ensure_ascii=False).encode(), dtype=np.uint8)
        with target.open("wb") as file:
            np.savez_compressed(file, header=header, **arrays)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read what :meth:`save` wrote.

        Raises
        ------
        DataError
            If the file is missing, damaged, of arrays that do not fit each other, or of another schema.
        """
        try:
            arrays: dict[str, Any] = load_npz(Path(path))
            texts = parse_json(arrays.pop("header").tobytes(), max_values=_MOST_VALUES)
            version = texts.pop("schema_version")
            if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
                raise DataError(
                    value=f"{path} is of schema version {version!a:.80}",
                    rule=f"this version of amici_eval reads moments of schema versions up to {SCHEMA_VERSION}",
                    fix="read it with the version of amici_eval that wrote it, or evaluate again",
                )
            if type(texts["n_heads"]) is not int:
                msg = f"n_heads={texts['n_heads']!a:.80} is no number of heads"
                raise ValueError(msg)  # noqa: TRY004, RUF100 - damage like any other
            if version < 2:
                arrays |= _new_in_2(arrays)
            if version < 3:
                arrays |= _new_in_3(arrays, texts)
            if version < 4:
                texts["senders"] = []
                shape = (texts["n_heads"], len(texts["cell_types"]), 0, len(arrays["tile_center"]))
                arrays["lost_squares"] = np.zeros(shape, dtype=np.float32)
            for name in ("cell_types", "genes", "sketch_names", "senders"):
                # the sketch may hold cells of several runs, so names may repeat
                check_names(texts[name], name, distinct=name != "sketch_names", printable=False)
                texts[name] = tuple(texts[name])
            return cls(**texts, **arrays)
        except DataError:
            raise
        except _DAMAGE as error:
            raise DataError(
                value=f"{path} cannot be read ({type(error).__name__}: {error})",
                rule=f"it must be the {MOMENTS_FILE} of a run",
                fix="download it again or evaluate again",
            ) from error


def _new_in_2(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the fields that moments of schema version 1 lack, all marked as unknown."""
    unknown = np.full(arrays["target_mean"].shape, np.nan, dtype=np.float32)
    held_out = np.full(len(arrays["row_type"]), -1, dtype=np.int64)
    return {"row_held_out": held_out, "full_mean": unknown, "full_m2": unknown}


def _new_in_3(arrays: dict[str, np.ndarray], texts: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the fields that moments of schema version 2 lack: tiles are unknown and no attention is kept."""
    return {
        "sketch_tile": np.full(len(texts["sketch_names"]), -1, dtype=np.int64),
        "attended": np.zeros(0, dtype=np.int64),
        "attention": np.zeros((0, texts["n_heads"], 1), dtype=np.float32),
        "attended_neighbours": np.zeros((0, 0), dtype=np.int64),
    }


def _merged(
    times: Float64[np.ndarray, " rows"],
    weight: Float64[np.ndarray, " rows"],
    mean: Float32[np.ndarray, "rows ..."],
    m2: Float32[np.ndarray, "rows ..."],
) -> Float64[np.ndarray, ...]:
    """Return the centred sum of squares over rows that count several times."""
    merged: Float64[np.ndarray, ...] = squares_about(weight, mean.astype(np.float64), (times * m2.T).T).sum(axis=0)
    return merged
