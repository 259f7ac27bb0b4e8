"""Exact mean, variance and skewness of permutation nulls, and p-values from Pearson's type III."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import gammainc, gammaincc, gammaln, ndtr

from amici_eval.common.memory import Shrinking
from amici_eval.stats.permutation.nulls import MIN_CELLS_TEST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float, Float64, Int64
    from torch import Tensor

__all__ = [
    "DRAWN_FOR_FEW",
    "FEW_CELLS",
    "PermutationMoments",
    "StratumSums",
    "pearson3_tail",
    "permutation_moments",
    "stratum_sums",
]

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


_NEARLY_NORMAL = 0.02
"""Below this skewness an expansion takes over: the relative error of p is then less than 1e-7."""
_TRUSTED_SHARE = 0.6
"""Of a bounded support: beyond, Pearson III falls to 0 faster than the third moment can tell."""
_LEAST = float(np.finfo(np.float64).tiny)


def pearson3_tail(
    standardised: Float64[np.ndarray, ...] | float, skewness: Float64[np.ndarray, ...] | float
) -> Float64[np.ndarray, ...]:
    """Return ``P(X >= standardised)`` of a Pearson III variable of mean 0, variance 1 and this skewness, never 0.

    Parameters
    ----------
    standardised, skewness
        Any shapes that broadcast.

    Returns
    -------
    numpy.ndarray
        In (0, 1], at least 2.2e-308; NaN where an argument is not finite.

    Notes
    -----
    With negative skewness g the support ends at ``-2 / g``, which no permutation knows of: beyond six tenths of it the
    logarithm of p goes on along its tangent. That is above Pearson III, falls throughout, is never 0, and is an upper
    bound of the tail of any law that agrees up to there and whose hazard goes on rising, as that of the normal law
    does. Among permutations of skewed factors (g from -.3 to -1.9) it was never below the true p by more than drawing
    explains, and several times above it where p is small; a bound from the variance alone (Cantelli) would be ten
    times as large.

    Skewness under .02 goes by the uniform expansion of the incomplete gamma function (Temme 1979; to this order
    Lugannani & Rice 1980), which passes into the normal tail at 0. There ``scipy.stats.pearson3`` errs by .3 %
    at t = 12: it takes the normal law below 1.6e-5, and its series for negative skewness ends too early.
    """
    t, skew = np.broadcast_arrays(np.asarray(standardised, dtype=np.float64), np.asarray(skewness, dtype=np.float64))
    p = np.full(t.shape, np.nan)
    defined = np.isfinite(t) & np.isfinite(skew)
    # wider than any permutation reaches, and narrow enough that no product overflows
    t, skew = np.clip(t[defined], -1e9, 1e9), np.clip(skew[defined], -1e6, 1e6)
    with np.errstate(divide="ignore", over="ignore"):
        trusted = np.where(skew < 0.0, np.minimum(t, _TRUSTED_SHARE * 2.0 / np.abs(skew)), t)
    near = np.abs(skew) < _NEARLY_NORMAL
    tail = np.empty(t.shape)
    tail[near] = _nearly_normal_tail(trusted[near], skew[near])
    tail[~near] = _gamma_tail(trusted[~near], skew[~near])
    beyond = (t > trusted) & (tail > _LEAST)
    hazard = _density(trusted[beyond], skew[beyond]) / tail[beyond]
    tail[beyond] *= np.exp(-hazard * (t - trusted)[beyond])
    p[defined] = np.clip(tail, _LEAST, 1.0)
    return p


def _gamma_tail(t: Float64[np.ndarray, " n"], skew: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    alpha = 4.0 / skew**2
    x = np.maximum(alpha * (1.0 + t * skew / 2.0), 0.0)
    return np.where(skew > 0.0, gammaincc(alpha, x), gammainc(alpha, x))


def _density(t: Float64[np.ndarray, " n"], skew: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    alpha = 4.0 / skew**2
    x = alpha * (1.0 + t * skew / 2.0)
    return np.asarray(2.0 / np.abs(skew) * np.exp((alpha - 1.0) * np.log(x) - x - gammaln(alpha)))


def _nearly_normal_tail(t: Float64[np.ndarray, " n"], skew: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Return the normal tail at a moved point plus a correction, each written so that nothing cancels near 0."""
    t = np.clip(t, -1e3, 1e3)
    m = np.maximum(t * skew / 2.0, -0.99)
    r = m / (2.0 + m)
    # log(1 + m) = 2 artanh(r) = 2 r + 2 r^3 rest
    small = np.abs(r) < 0.15
    wide = np.where(small, 0.5, r)
    powers = [(r * r) ** k / (2 * k + 3) for k in range(10)]
    rest = np.where(small, sum(powers), (np.arctanh(wide) - wide) / wide**3)
    # 2 (m - log(1 + m)) / m^2 = 1 + m k
    k = -(1.0 + 4.0 * rest / (2.0 + m) ** 2) / (2.0 + m)
    stretch = np.sqrt(1.0 + m * k)
    u = t * stretch
    density = np.exp(-0.5 * u * u) / np.sqrt(2.0 * np.pi)
    return np.asarray(ndtr(-u) + density * skew / 2.0 * k / (stretch * (stretch + 1.0)))


_ROUNDING = 1e-12
"""Numbers that vary by less than this share of their size are constants that float64 rounded."""
_VARIANCE_ROUNDING = 1e-13
"""A variance below this share of what it would be were F and Z aligned is what rounding leaves of 0."""
FEW_CELLS = 50
"""Of fewer, the law of T is not told by a few moments: callers draw permutations instead, which costs nothing."""
DRAWN_FOR_FEW = 100_000


@dataclass(frozen=True, kw_only=True, eq=False)
class PermutationMoments:
    """Where a head's fit stands among all permutations of cells: its value, and the null's first three moments.

    Parameters
    ----------
    statistic
        T = sum_i <F_i, Z_i> as observed, shape (heads,).
    excess
        ``statistic - mean``, summed from centred numbers: exact also where the mean is large, shape (heads,).
    mean, variance, skewness
        Of T over all permutations within strata, shape (heads,). A head that does not vary has variance 0 and skewness
        NaN; a head whose numbers are not finite has NaN in all.
    n_strata
        Strata with at least two cells: the others have nothing to permute.
    log_permutations
        Logarithm of the number of permutations, the product of the strata's factorials.
    """

    statistic: Float64[np.ndarray, " heads"]
    excess: Float64[np.ndarray, " heads"]
    mean: Float64[np.ndarray, " heads"]
    variance: Float64[np.ndarray, " heads"]
    skewness: Float64[np.ndarray, " heads"]
    n_strata: int
    log_permutations: float

    @property
    def standardised(self) -> Float64[np.ndarray, " heads"]:
        """``(statistic - mean) / sd``, shape (heads,); NaN where nothing varies."""
        varies = self.variance > 0.0
        deviation = np.sqrt(np.where(varies, self.variance, np.nan))
        return np.asarray(self.excess / deviation)

    def p_values(self) -> Float64[np.ndarray, " heads"]:
        """Return the share of permutations that fit at least as well as the truth, shape (heads,), in (0, 1] or NaN.

        Pearson III with the exact moments (see :func:`pearson3_tail`), and at least one permutation, the identity.
        """
        return _at_least_one(pearson3_tail(self.standardised, self.skewness), self.log_permutations)


def permutation_moments(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    *,
    strata: Int64[np.ndarray, " cells"] | None = None,
    device: str = "cpu",
) -> PermutationMoments:
    """Return the exact moments of each head's fit over all permutations of cells within strata.

    Null: the rows of the head's prediction are shuffled among the cells of one stratum, in each stratum on its own.
    This is exchangeable when, within a stratum, a cell's expression is independent of its neighbourhood and cells are
    independent of each other; spatial autocorrelation at scales below a stratum breaks the second.

    Parameters
    ----------
    factors
        F, shape (cells, rank, heads): head h predicts ``constant + F[:, :, h] @ A_h.T``.
    images
        Z, same shape: expression as the head sees it, ``Y @ A_h``. Neither need be centred.
    strata
        Label of each cell's stratum, shape (cells,); all cells are one stratum if ``None``.
    device
        Torch device; ``"mps"``, which has no float64, is taken as ``"cpu"``.

    Raises
    ------
    ValueError
        If shapes disagree or there are fewer than three cells.

    Notes
    -----
    With rows f, z centred within a stratum of n cells and D = f z^T: E T = n <mean F, mean Z>, Var T = sum D^2 /
    (n - 1), third cumulant n / ((n - 1)(n - 2)) sum D^3, which add over strata (Hoeffding 1951; Mantel 1967). In large
    strata sum D^2 = tr(S_F S_Z) and sum D^3 = sum_abc M^F_abc M^Z_abc, with M_abc = sum_i f_ia f_ib f_ic.
    """
    n_cells = len(factors)
    labels = np.zeros(n_cells, dtype=np.int64) if strata is None else np.asarray(strata)
    if images.shape != factors.shape or labels.shape != (n_cells,):
        msg = f"factors {factors.shape}, images {images.shape} and strata {labels.shape} disagree"
        raise ValueError(msg)
    _check_cells(n_cells)

    sums = stratum_sums(factors, images, labels, device=device)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        constant = (sums.f_ss <= _ROUNDING**2 * sums.f_size) | (sums.z_ss <= _ROUNDING**2 * sums.z_size)
        variance = np.where(constant | (sums.variance <= _VARIANCE_ROUNDING * sums.aligned), 0.0, sums.variance)
        skewness = np.where(variance > 0.0, sums.cumulant / variance**1.5, np.nan)
        # what is not finite reached only its own head, all of whose numbers it makes unknown
        unknown = 0.0 * (sums.f_size + sums.z_size + sums.variance + sums.cumulant)
    return PermutationMoments(
        statistic=sums.mean + sums.excess + unknown,
        excess=sums.excess + unknown,
        mean=sums.mean + unknown,
        variance=variance + unknown,
        skewness=skewness + unknown,
        n_strata=int(np.count_nonzero(sums.n_cells > 1)),
        log_permutations=float(gammaln(sums.n_cells + 1.0).sum()),
    )


def _at_least_one(p: Float64[np.ndarray, ...], log_permutations: float) -> Float64[np.ndarray, ...]:
    return np.asarray(np.maximum(p, np.exp(-log_permutations)))


def _check_cells(n_cells: int) -> None:
    if n_cells < MIN_CELLS_TEST:
        msg = f"{n_cells} cells; at least {MIN_CELLS_TEST} are needed for a test"
        raise ValueError(msg)
