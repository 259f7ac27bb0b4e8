"""Whether two results are the same, bit by bit or up to rounding; docs/reliability.md says which is promised where.

A test asks for bits where the same products of the same shapes are computed: the same evaluation again, one that was
saved and loaded, one that was resumed. Where products have other shapes (tiles, chunks, batches, threads, devices,
engines) no BLAS promises bits, and a test asks for rounding. ``make test-processors`` checks that tests keep to this.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

ROUNDINGS = 64
"""How many roundings another order of summation may make: up to 16 were seen, faults make thousands."""
FLOAT32 = ROUNDINGS * float(np.finfo(np.float32).eps)


def assert_rounded(found: Any, expected: Any, *, precision: float = FLOAT32, name: str = "") -> None:
    """Fail where two arrays differ by more than ``precision`` times the largest number that is expected."""
    expected = np.asarray(expected)
    largest = float(np.max(np.abs(expected[np.isfinite(expected)]), initial=0.0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=precision * largest, err_msg=name)


def assert_counts(found: Any, expected: Any) -> None:
    """Fail where counts of permutations differ, but for one that may lie within rounding of the order that was seen."""
    different = int(np.abs(np.asarray(found) - np.asarray(expected)).sum())
    assert different <= 1, f"{different} permutations of {np.sum(expected)} fell on another side"


def differences(left: Any, right: Any, *, where: str = "") -> list[str]:
    """Return the places at which two values differ, with the largest difference of arrays; NaN equals NaN."""
    if type(left) is not type(right):
        return [f"{where}: {type(left).__name__} and {type(right).__name__}"]
    if is_dataclass(left):
        found = []
        for entry in fields(left):
            found += differences(getattr(left, entry.name), getattr(right, entry.name), where=f"{where}.{entry.name}")
        return found
    if isinstance(left, dict):
        if list(left) != list(right):
            return [f"{where}: keys {list(left)} and {list(right)}"]
        return [text for key in left for text in differences(left[key], right[key], where=f"{where}[{key!r}]")]
    if isinstance(left, (tuple, list)):
        if len(left) != len(right):
            return [f"{where}: {len(left)} and {len(right)} entries"]
        pairs = enumerate(zip(left, right, strict=True))
        return [text for place, (one, other) in pairs for text in differences(one, other, where=f"{where}[{place}]")]
    if isinstance(left, np.ndarray):
        return _of_arrays(left, right, where)
    if isinstance(left, float):
        return _of_arrays(np.array(left), np.array(right), where)
    return [] if left == right else [f"{where}: {left!r} and {right!r}"]


def _of_arrays(left: np.ndarray, right: np.ndarray, where: str) -> list[str]:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return [f"{where}: {left.dtype} {left.shape} and {right.dtype} {right.shape}"]
    has_nan = left.dtype.kind in "fc"
    if np.array_equal(left, right, equal_nan=has_nan):
        return []
    largest = float(np.nanmax(np.abs(left.astype(float) - right.astype(float)))) if left.dtype.kind in "fiu" else None
    return [f"{where}: differs by up to {largest}"]
