"""A pytest plugin that imitates another BLAS: neighbouring entries of a matrix product are summed in different orders.

The order depends on the shape of the product and on row and column, as in a real BLAS, whose kernels differ between
whole blocks and their edges. Every result is a valid rounding of the same sum, and the same product, asked again, gives
the same bits. A test that fails with ``-p tests.reordered`` asks for bits that no BLAS promises.
"""

from __future__ import annotations

import itertools
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_ATEN = torch.ops.aten
_MATMUL = np.matmul
_OVERRIDES = torch.library.Library("aten", "IMPL")


def _parts(rows: int, inner: int, columns: int) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yield rows and columns, and the order in which their entries are summed."""
    first = np.roll(np.arange(inner), (7 * rows + 3 * columns) % max(inner, 1))
    for row, column in itertools.product(range(min(2, rows)), range(min(2, columns))):
        yield slice(row, None, 2), slice(column, None, 2), first[::-1].copy() if (row + column) % 2 else first


def _numpy_product(left: Any, right: Any, *others: Any, **options: Any) -> Any:
    left, right = np.asanyarray(left), np.asanyarray(right)
    plain = others or options or not left.ndim or not right.ndim or left.ndim + right.ndim < 3
    if plain or left.dtype.kind != "f" or right.dtype.kind != "f":
        return _MATMUL(left, right, *others, **options)
    a, b = np.atleast_2d(left), right if right.ndim > 1 else right[:, None]
    if a.shape[-1] != b.shape[-2]:
        return _MATMUL(left, right)
    found = _MATMUL(a, b)
    for rows, columns, order in _parts(a.shape[-2], a.shape[-1], b.shape[-1]):
        found[..., rows, columns] = _MATMUL(a[..., rows, :][..., order], b[..., columns][..., order, :])
    return found[..., 0] if right.ndim == 1 else found[..., 0, :] if left.ndim == 1 else found


def _numpy_dot(left: Any, right: Any) -> Any:
    both = np.asanyarray(left), np.asanyarray(right)
    return _numpy_product(*both) if all(one.ndim in (1, 2) for one in both) else _DOT(left, right)


def _torch_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if right.dim() == 1:
        return _torch_product(left, right[:, None])[:, 0]
    product = (_ATEN.bmm if left.dim() == 3 else _ATEN.mm).out
    out = left.new_zeros((*left.shape[:-1], right.shape[-1]))
    for rows, columns, order in _parts(left.shape[-2], left.shape[-1], right.shape[-1]):
        a, b = left[..., rows, :][..., order], right[..., columns][..., order, :]
        out[..., rows, columns] = product(a, b, out=left.new_empty((*a.shape[:-1], b.shape[-1])))
    return out


def _torch_sum(own: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = _torch_product(left, right) * alpha
    return product if beta == 0 else product + own * beta


def _torch_add(own: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return own.copy_(_torch_sum(own, left, right, beta=beta, alpha=alpha))


_DOT = np.core.numeric.dot
np.core.numeric.dot = _numpy_dot  # tensordot, and einsum with optimize
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # set_numeric_ops is deprecated; Library.impl says that it replaces a kernel
    np.set_numeric_ops(matmul=_numpy_product)
    for name in ("mm", "bmm", "mv"):
        _OVERRIDES.impl(name, _torch_product, "CPU")
    for name in ("addmm", "baddbmm", "addmv"):
        _OVERRIDES.impl(name, _torch_sum, "CPU")
        _OVERRIDES.impl(f"{name}_", _torch_add, "CPU")
