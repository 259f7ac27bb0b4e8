"""Sums over cells and strata that give the moments of a head's fit over all permutations."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.stats.shrinking import Shrinking

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float, Float64, Int64
    from torch import Tensor

__all__ = ["StratumSums", "stratum_sums"]

_ENTRIES = 2**18
"""Products held at a time: they stay in the processor's cache."""
_ENTRIES_ELSEWHERE = 2**24
_LEAST_ENTRIES = 2**10
_ALWAYS_BATCHED = 100
"""Strata up to this size go in batches: one by one they would cost more in calls than in arithmetic."""
_MOST_BYTES = 2**28
"""What D of a stratum, or third moments of F and of Z, may take; else they come head by head and block by block."""
_ENTRY_COST = 6
"""Of an entry of D in operations, beside its 2 x rank: it is read to be squared, cubed and summed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StratumSums:
    """Sums over strata that give the moments of T.

    Parameters
    ----------
    n_cells
        Cells of each stratum, shape (strata,).
    excess, mean, variance, cumulant
        Observed T less its mean, and the mean, variance and third cumulant of T, shape (heads,).
    f_ss, z_ss, f_size, z_size
        Squares of F and of Z, centred within strata and as they are, shape (heads,).
    aligned
        What the variance would be were F and Z of rank 1, an upper bound of it, shape (heads,).
    """

    n_cells: Int64[np.ndarray, " strata"]
    excess: Float64[np.ndarray, " heads"]
    mean: Float64[np.ndarray, " heads"]
    variance: Float64[np.ndarray, " heads"]
    cumulant: Float64[np.ndarray, " heads"]
    f_ss: Float64[np.ndarray, " heads"]
    z_ss: Float64[np.ndarray, " heads"]
    f_size: Float64[np.ndarray, " heads"]
    z_size: Float64[np.ndarray, " heads"]
    aligned: Float64[np.ndarray, " heads"]


def stratum_sums(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    strata: Int64[np.ndarray, " cells"],
    *,
    device: str = "cpu",
) -> StratumSums:
    """Return what each head's moments over permutations within strata follow from; see ``permutation_moments``.

    Parameters
    ----------
    factors, images
        Shape (cells, rank, heads), not necessarily centred.
    strata
        Label of each cell's stratum, shape (cells,).
    device
        Torch device; ``"mps"``, which has no float64, is taken as ``"cpu"``.
    """
    device = _with_float64(device)
    room = Shrinking(
        _room(device), floor=min(_room(device), _LEAST_ENTRIES), what="exact moments", unit="products", device=device
    )
    return room.run(lambda entries: _stratum_sums(factors, images, strata, device, entries))


def _stratum_sums(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    strata: Int64[np.ndarray, " cells"],
    device: str,
    entries: int,
) -> StratumSums:
    _, rank, n_heads = factors.shape
    # whatever is held at a time gets less in the same measure
    most_bytes = max(1, _MOST_BYTES * entries // _room(device))
    _, local, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    order = np.argsort(local, kind="stable")
    ends = np.cumsum(sizes)
    large = sizes > _largest_batched(rank)
    names = [field.name for field in fields(StratumSums) if field.name != "n_cells"]
    sums = torch.zeros((len(names), n_heads), dtype=torch.float64, device=device)
    wide = ~large & (sizes > 2) & (8 * n_heads * sizes**2 > most_bytes)
    heads_at_a_time = max(1, most_bytes // (8 * rank**2 * (rank + 1)))
    for end, size in zip(ends[large], sizes[large], strict=True):
        rows = order[end - size : end]
        for first in range(0, n_heads, heads_at_a_time):
            some = slice(first, first + heads_at_a_time)
            sums[:, some] += _of_large_stratum(factors[:, :, some], images[:, :, some], rows, device, entries)
    for end, size in zip(ends[wide], sizes[wide], strict=True):
        rows = order[end - size : end]
        for head in range(n_heads):
            one = slice(head, head + 1)
            sums[:, one] += _of_wide_stratum(factors[:, :, one], images[:, :, one], rows, device, most_bytes)
    small = ~large & ~wide
    for rows in _batches(order, ends[small], sizes[small], entries=entries // max(1, n_heads), rank=rank):
        sums += _of_small_strata(factors, images, rows, device)
    return StratumSums(**dict(zip(names, sums.cpu().numpy(), strict=True)), n_cells=sizes)


def _largest_batched(rank: int) -> int:
    """Return up to which size D = f z^T costs less than the third moments of F and Z."""
    return max(_ALWAYS_BATCHED, 2 * rank * (rank + 1) ** 2 // (2 * rank + _ENTRY_COST))


def _with_float64(device: str) -> str:
    return "cpu" if torch.device(device).type == "mps" else device


def _room(device: str) -> int:
    return _ENTRIES if torch.device(device).type == "cpu" else _ENTRIES_ELSEWHERE


def _columns(
    values: Float[np.ndarray, "cells rank heads"], rows: Int64[np.ndarray, " rows"], device: str
) -> Float64[Tensor, "heads rank rows"]:
    taken = torch.from_numpy(values[rows]).to(device)
    return taken.permute(2, 1, 0).to(torch.float64, memory_format=torch.contiguous_format)


def _parts(rows: Int64[np.ndarray, " rows"], row: int, entries: int) -> Iterator[Int64[np.ndarray, " part"]]:
    step = max(1, entries // max(1, row))
    return (rows[first : first + step] for first in range(0, len(rows), step))


def _mean(
    values: Float[np.ndarray, "cells rank heads"], rows: Int64[np.ndarray, " rows"], device: str, entries: int
) -> Float64[Tensor, "heads rank 1"]:
    _, rank, n_heads = values.shape
    total = torch.zeros((n_heads, rank, 1), dtype=torch.float64, device=device)
    for part in _parts(rows, rank * n_heads, entries):
        total += _columns(values, part, device).sum(dim=2, keepdim=True)
    return total / len(rows)


def _add_third(x: Float64[Tensor, "heads rank rows"], total: Float64[Tensor, "heads pairs rank"]) -> None:
    """Add ``sum_i x_ia x_ib x_ic`` to pairs a <= b and all c."""
    n_heads, rank, n_rows = x.shape
    products = x.new_empty((n_heads, total.shape[1], n_rows))
    first = 0
    for a in range(rank):
        torch.mul(x[:, a : a + 1], x[:, a:], out=products[:, first : first + rank - a])
        first += rank - a
    total.baddbmm_(products, x.transpose(1, 2))


def _of_large_stratum(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    rows: Int64[np.ndarray, " rows"],
    device: str,
    entries: int,
) -> Float64[Tensor, "sums heads"]:
    """Return the sums of one stratum from moments of F and of Z."""
    _, rank, n_heads = factors.shape
    n, n_pairs = len(rows), rank * (rank + 1) // 2
    means = [_mean(values, rows, device, entries) for values in (factors, images)]
    squares = torch.zeros((2, n_heads, rank, rank), dtype=torch.float64, device=device)
    cubes = torch.zeros((2, n_heads, n_pairs, rank), dtype=torch.float64, device=device)
    excess = torch.zeros(n_heads, dtype=torch.float64, device=device)
    for part in _parts(rows, n_pairs * n_heads, entries):
        f, z = (_columns(v, part, device).sub_(m) for v, m in zip((factors, images), means, strict=True))
        excess += torch.einsum("hai,hai->h", f, z)
        for x, square, cube in zip((f, z), squares, cubes, strict=True):
            square.baddbmm_(x, x.transpose(1, 2))
            _add_third(x, cube)
    # a pair a < b stands for (a, b) and (b, a)
    first, second = torch.triu_indices(rank, rank, device=device)
    twice = torch.where(first == second, 1.0, 2.0).to(torch.float64)
    cubed = ((cubes[0] * cubes[1]).sum(dim=2) * twice).sum(dim=1)
    squared = (squares[0] * squares[1]).sum(dim=(1, 2))
    own = squares.diagonal(dim1=2, dim2=3).sum(dim=2)
    means_squared = torch.stack([n * mean.square().sum(dim=(1, 2)) for mean in means])
    mean = n * (means[0] * means[1]).sum(dim=(1, 2))
    variance, aligned = squared / (n - 1), own[0] * own[1] / (n - 1)
    return torch.stack(
        [excess, mean, variance, cubed * (n / ((n - 1) * (n - 2))), *own, *(own + means_squared), aligned]
    )


def _of_wide_stratum(
    factors: Float[np.ndarray, "cells rank 1"],
    images: Float[np.ndarray, "cells rank 1"],
    rows: Int64[np.ndarray, " rows"],
    device: str,
    most_bytes: int,
) -> Float64[Tensor, "sums 1"]:
    """Return the sums of one head in a stratum whose D = f z^T is too large to be held at once."""
    n = len(rows)
    both = [_columns(values, rows, device)[0] for values in (factors, images)]
    means = [x.mean(dim=1, keepdim=True) for x in both]
    f, z = (x - mean for x, mean in zip(both, means, strict=True))
    squared, cubed = torch.zeros((2,), dtype=torch.float64, device=device)
    step = max(1, most_bytes // (16 * n))
    for first in range(0, n, step):
        d = f[:, first : first + step].T @ z
        powers = d.square()
        squared = squared + powers.sum()
        cubed = cubed + powers.mul_(d).sum()
    own = [x.square().sum() for x in (f, z)]
    mean = n * (means[0] * means[1]).sum()
    cumulant = cubed * (n / ((n - 1) * (n - 2)))
    found = [(f * z).sum(), mean, squared / (n - 1), cumulant, *own, *(x.square().sum() for x in both)]
    return torch.stack([*found, own[0] * own[1] / (n - 1)])[:, None]


def _batches(
    order: Int64[np.ndarray, " cells"],
    ends: Int64[np.ndarray, " strata"],
    sizes: Int64[np.ndarray, " strata"],
    *,
    entries: int,
    rank: int,
) -> Iterator[Int64[np.ndarray, "strata most"]]:
    """Yield the cells of some strata at a time, those of similar size together, filled up with -1."""
    chosen = np.argsort(-sizes, kind="stable")
    while chosen.size:
        most = int(sizes[chosen[0]])
        step = max(1, entries // (most * max(most, rank)))
        own, chosen = chosen[:step], chosen[step:]
        place = np.arange(most)
        cells = order[np.maximum(ends[own, None] - 1 - place, 0)]
        yield np.where(place < sizes[own, None], cells, -1)


def _of_small_strata(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    rows: Int64[np.ndarray, "strata most"],
    device: str,
) -> Float64[Tensor, "sums heads"]:
    """Return the summed sums of some strata from D = f z^T; a row that is filled up is 0 and adds nothing."""
    n_strata, most = rows.shape
    _, rank, n_heads = factors.shape
    there = torch.from_numpy(rows >= 0).to(device, torch.float64)
    n = there.sum(dim=1)
    centred, means, sizes = [], [], []
    for values in (factors, images):
        x = torch.from_numpy(values[rows.ravel()]).to(device, torch.float64).reshape(n_strata, most, rank, n_heads)
        x = x.permute(0, 3, 1, 2) * there[:, None, :, None]
        mean = x.sum(dim=2, keepdim=True) / n[:, None, None, None]
        sizes.append(x.square().sum(dim=(0, 2, 3)))
        centred.append((x - mean).mul_(there[:, None, :, None]).reshape(-1, most, rank))
        means.append(mean.squeeze(2))
    f, z = centred
    d = torch.bmm(f, z.transpose(1, 2)).view(n_strata, n_heads, most * most)
    excess = d[:, :, :: most + 1].sum(dim=(0, 2))
    powers = d.square()
    squared = powers.sum(dim=2)
    cubed = powers.mul_(d).sum(dim=2)
    own = torch.stack([x.square().sum(dim=(1, 2)).view(n_strata, n_heads) for x in centred])
    # one cell has D = 0, two have D^3 = 0 in sum
    one_less, two_less = (n - 1.0).clamp(min=1.0)[:, None], (n - 2.0).clamp(min=1.0)[:, None]
    mean = (n[:, None] * (means[0] * means[1]).sum(dim=2)).sum(dim=0)
    cumulant = torch.where(n[:, None] > 2.0, cubed * n[:, None] / (one_less * two_less), 0.0)
    variance, aligned = (squared / one_less).sum(dim=0), (own[0] * own[1] / one_less).sum(dim=0)
    return torch.stack([excess, mean, variance, cumulant.sum(dim=0), *own.sum(dim=1), *sizes, aligned])
