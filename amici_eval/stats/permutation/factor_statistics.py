"""The permutation statistic on packed factors to the last bit, for any range of permutations and for the identity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from amici_eval.common import threads as compiled
from amici_eval.stats.permutation.compiled_statistics import exact_sums
from amici_eval.stats.permutation.torch_statistics import torch_factor, torch_statistics

if TYPE_CHECKING:
    from types import ModuleType

    from jaxtyping import Float64

    from amici_eval.stats.permutation.packed_factors import PackedPair
    from amici_eval.stats.permutation.permutations import PermutationStream

__all__ = ["exact_statistics", "identity_statistics"]


def exact_statistics(
    pair: PackedPair, stream: PermutationStream, start: int, stop: int, *, device: str
) -> Float64[np.ndarray, "permutations alive"]:
    """Return T of permutations ``start`` to ``stop - 1`` in float64, in the calling thread; with numba, T of one
    permutation is the same to the last bit whatever range it is computed with.
    """
    if (kernels := _cpu_kernels(device)) is not None:
        return exact_sums(kernels, pair, stream.key(), np.arange(start, stop))
    found = [np.empty((0, pair.heads.size))]
    if stop > start:
        torch_statistics(
            pair,
            stream,
            stop - start,
            start=start,
            form="factor",
            device=device,
            take=lambda sums, _: found.append(sums),
        )
    return np.concatenate(found)


def identity_statistics(pair: PackedPair, *, device: str) -> Float64[np.ndarray, " alive"]:
    """Return T with all cells where they are, from the kernel of ``exact_statistics``."""
    if (kernels := _cpu_kernels(device)) is not None:
        identity = np.array([kernels.IDENTITY])
        sums = exact_sums(kernels, pair, np.zeros(2, dtype=np.uint64), identity)
    else:
        f, z = (torch.from_numpy(values).to(device) for values in (pair.f, pair.z))
        sums = torch_factor(pair, f, z, np.arange(pair.f.shape[1], dtype=np.int32)[None])
    own: Float64[np.ndarray, " alive"] = sums[0]
    return own


def _cpu_kernels(device: str) -> ModuleType | None:
    return compiled.kernels() if torch.device(device).type == "cpu" else None
