"""Exact mean, variance and skewness of permutation nulls, and p-values from Pearson's type III."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import gammainc, gammaincc, gammaln, ndtr

from amici_eval.common.memory import Shrinking
from amici_eval.stats.permutation.statistics import ROUNDING, float64_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float, Float64, Int64
    from torch import Tensor

_ENTRIES = 2**18
"""Products held at a time on a CPU, so that they stay in its cache."""
_ENTRIES_ELSEWHERE = 2**24
_LEAST_ENTRIES = 2**10
_ALWAYS_BATCHED = 100
"""Strata up to this size are batched: one by one, the calls would cost more than the arithmetic."""
_MOST_BYTES = 2**28
"""Memory limit for D of a stratum, and for third moments of F and Z; beyond it, work is split by head and block."""
_ENTRY_COST = 6
"""Operations per entry of D (read, square, cube, sum) besides the 2 x rank of its product."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StratumSums:
    """Sums over strata from which the moments of T follow.

    n_cells: cells per stratum; excess: observed T minus its mean; cumulant: third cumulant of T; f_ss, z_ss: sums of
    squares of F and Z centred within strata; f_size, z_size: the same, not centred; aligned: what the variance would be
    if F and Z had rank 1, an upper bound of it.
    """

    n_cells: Int64[np.ndarray, " strata"]
    excess: Float64[np.ndarray, " heads"]
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
    """Return the sums from which each head's moments over permutations within strata follow.

    See ``permutation_moments``; factors need not be centred.
    """
    device = float64_device(device)
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
    # shrinks in proportion to ``entries``
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
    """Return the largest stratum for which D = f z^T costs less than the third moments of F and Z."""
    return max(_ALWAYS_BATCHED, 2 * rank * (rank + 1) ** 2 // (2 * rank + _ENTRY_COST))


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
    variance, aligned = squared / (n - 1), own[0] * own[1] / (n - 1)
    return torch.stack([excess, variance, cubed * (n / ((n - 1) * (n - 2))), *own, *(own + means_squared), aligned])


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
    cumulant = cubed * (n / ((n - 1) * (n - 2)))
    found = [(f * z).sum(), squared / (n - 1), cumulant, *own, *(x.square().sum() for x in both)]
    return torch.stack([*found, own[0] * own[1] / (n - 1)])[:, None]


def _batches(
    order: Int64[np.ndarray, " cells"],
    ends: Int64[np.ndarray, " strata"],
    sizes: Int64[np.ndarray, " strata"],
    *,
    entries: int,
    rank: int,
) -> Iterator[Int64[np.ndarray, "strata most"]]:
    """Yield the cells of batches of strata of similar size, one stratum per row, padded with -1."""
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
    """Return the sums over a batch of strata from D = f z^T; padded entries are 0 and add nothing."""
    n_strata, most = rows.shape
    _, rank, n_heads = factors.shape
    there = torch.from_numpy(rows >= 0).to(device, torch.float64)
    n = there.sum(dim=1)
    centred, sizes = [], []
    for values in (factors, images):
        x = torch.from_numpy(values[rows.ravel()]).to(device, torch.float64).reshape(n_strata, most, rank, n_heads)
        x = x.permute(0, 3, 1, 2) * there[:, None, :, None]
        mean = x.sum(dim=2, keepdim=True) / n[:, None, None, None]
        sizes.append(x.square().sum(dim=(0, 2, 3)))
        centred.append((x - mean).mul_(there[:, None, :, None]).reshape(-1, most, rank))
    f, z = centred
    d = torch.bmm(f, z.transpose(1, 2)).view(n_strata, n_heads, most * most)
    excess = d[:, :, :: most + 1].sum(dim=(0, 2))
    powers = d.square()
    squared = powers.sum(dim=2)
    cubed = powers.mul_(d).sum(dim=2)
    own = torch.stack([x.square().sum(dim=(1, 2)).view(n_strata, n_heads) for x in centred])
    # D is 0 for one cell, and the sum of D^3 is 0 for two
    one_less, two_less = (n - 1.0).clamp(min=1.0)[:, None], (n - 2.0).clamp(min=1.0)[:, None]
    cumulant = torch.where(n[:, None] > 2.0, cubed * n[:, None] / (one_less * two_less), 0.0)
    variance, aligned = (squared / one_less).sum(dim=0), (own[0] * own[1] / one_less).sum(dim=0)
    return torch.stack([excess, variance, cumulant.sum(dim=0), *own.sum(dim=1), *sizes, aligned])


_NEARLY_NORMAL = 0.02
"""Below this absolute skewness an expansion is used; its relative error of p is less than 1e-7."""
_TRUSTED_SHARE = 0.6
"""Of a bounded support: beyond, Pearson III falls to 0 faster than a third moment can justify."""
_LEAST = float(np.finfo(np.float64).tiny)


def pearson3_tail(
    standardised: Float64[np.ndarray, ...] | float, skewness: Float64[np.ndarray, ...] | float
) -> Float64[np.ndarray, ...]:
    """Return ``P(X >= standardised)`` of a Pearson III variable of mean 0, variance 1 and this skewness, never 0.

    NaN where an argument is not finite. With skewness g < 0 the support would end at ``-2 / g``: beyond six tenths of
    it, log p follows its tangent, which lies above Pearson III. Among permutations of skewed factors (g from -.3 to
    -1.9) this was below the true p only by sampling error. If |g| < .02, the uniform expansion of the incomplete gamma
    function is used (Temme 1979; to this order Lugannani & Rice 1980): ``scipy.stats.pearson3`` errs there by .3 % at t
    = 12, as it takes the normal law for |g| < 1.6e-5 and ends its series for g < 0 too early.
    """
    t, skew = np.broadcast_arrays(np.asarray(standardised, dtype=np.float64), np.asarray(skewness, dtype=np.float64))
    p = np.full(t.shape, np.nan)
    defined = np.isfinite(t) & np.isfinite(skew)
    # no permutation lies beyond these bounds, and within them no product overflows
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
    """Return the normal tail at a shifted point plus a correction, written without cancellation near 0."""
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


_VARIANCE_ROUNDING = 1e-13
"""A variance of at most this share of ``StratumSums.aligned`` is rounding noise and set to zero."""
FEW_CELLS = 50
"""With fewer cells, three moments do not describe T; callers draw permutations instead, at little cost."""
DRAWN_FOR_FEW = 100_000


@dataclass(frozen=True, kw_only=True, eq=False)
class PermutationMoments:
    """The moments of T = sum_i <F_i, Z_i> of each head over all permutations within strata.

    excess: T minus its mean, summed from centred numbers, so exact for a large mean. A head that does not vary has
    variance 0 and skewness NaN; a head with numbers that are not finite has NaN in all. log_permutations: natural
    logarithm of the product of the strata's factorials.
    """

    excess: Float64[np.ndarray, " heads"]
    variance: Float64[np.ndarray, " heads"]
    skewness: Float64[np.ndarray, " heads"]
    log_permutations: float

    @property
    def standardised(self) -> Float64[np.ndarray, " heads"]:
        """Return ``excess / sd``, NaN where nothing varies."""
        varies = self.variance > 0.0
        deviation = np.sqrt(np.where(varies, self.variance, np.nan))
        return np.asarray(self.excess / deviation)

    def p_values(self) -> Float64[np.ndarray, " heads"]:
        """Return the share of permutations that fit at least as well as the truth, in (0, 1] or NaN.

        It comes from Pearson III with the exact moments and is at least 1 / (number of permutations), for the identity.
        """
        p = pearson3_tail(self.standardised, self.skewness)
        return np.asarray(np.maximum(p, np.exp(-self.log_permutations)))


def permutation_moments(
    factors: Float[np.ndarray, "cells rank heads"],
    images: Float[np.ndarray, "cells rank heads"],
    *,
    strata: Int64[np.ndarray, " cells"] | None = None,
    device: str = "cpu",
) -> PermutationMoments:
    """Return the exact moments of each head's fit over all permutations of cells within strata.

    Null: rows of the prediction are shuffled within each stratum. Exchangeable if, there, cells' expression is
    independent of their neighbourhoods and of each other; spatial autocorrelation below a stratum's scale breaks this.
    D = f z^T, centred in a stratum of n cells: Var T = sum D^2 / (n - 1), third cumulant n / ((n - 1)(n - 2)) sum D^3,
    added over strata (Hoeffding 1951; Mantel 1967); if large, sum D^3 = sum_abc M^F_abc M^Z_abc, M_abc = sum_i f_ia
    f_ib f_ic. Head h predicts ``constant + F_h @ A_h.T``, Z_h is ``Y @ A_h``; neither need be centred.
    """
    labels = np.zeros(len(factors), dtype=np.int64) if strata is None else strata
    sums = stratum_sums(factors, images, labels, device=device)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        constant = (sums.f_ss <= ROUNDING**2 * sums.f_size) | (sums.z_ss <= ROUNDING**2 * sums.z_size)
        variance = np.where(constant | (sums.variance <= _VARIANCE_ROUNDING * sums.aligned), 0.0, sums.variance)
        skewness = np.where(variance > 0.0, sums.cumulant / variance**1.5, np.nan)
        # NaN for heads with values that are not finite (all their numbers become NaN), else 0
        unknown = 0.0 * (sums.f_size + sums.z_size + sums.variance + sums.cumulant)
    return PermutationMoments(
        excess=sums.excess + unknown,
        variance=variance + unknown,
        skewness=skewness + unknown,
        log_permutations=float(gammaln(sums.n_cells + 1.0).sum()),
    )
