"""Compiled kernels of the permutation test.

Importing this loads the compiler: use ``compiled_kernels()``. The inner loops of the sums are LLVM vectors of 16
numbers, which the compiler splits to the processor's width: one kernel serves all shapes, without automatic
vectorisation.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from amici_eval.common.threads import compiled
from amici_eval.stats.permutation.permutations import LANES

if TYPE_CHECKING:
    from collections.abc import Callable

IDENTITY = -1
"""Number that stands for leaving all cells where they are."""
ROWS = 8
"""Cells per panel, whose products with all cells are held at a time."""
_TOGETHER = 4
"""Permutations that are summed together and share the loads of Z."""
_TILE = 64
"""Cells transposed at a time."""
_AHEAD = 16
"""Cells between prefetching a row of F and using it."""

_FLOAT, _I8, _I32, _I64, _I128 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.IntType(128)
_SINGLES, _DOUBLES = ir.VectorType(_FLOAT, LANES), ir.VectorType(ir.DoubleType(), LANES)
_FUSED = ("contract",)
_intrinsic: Callable[[Callable[..., Any]], Any] = intrinsic


_compiled = functools.partial(compiled, error_model="numpy")


@_intrinsic
def _wide_product(typing_context: Any, a: Any, b: Any) -> Any:
    """Return the high and low 64 bits of the product of two unsigned numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right = (builder.zext(value, _I128) for value in arguments)
        product = builder.mul(left, right)
        high = builder.trunc(builder.lshr(product, ir.Constant(_I128, 64)), _I64)
        return context.make_tuple(builder, signature.return_type, (high, builder.trunc(product, _I64)))

    return types.UniTuple(types.uint64, 2)(types.uint64, types.uint64), generate


@_compiled
def _philox(block: Any, index: Any, key: Any) -> Any:
    """Return four words of Philox-4x64-10 (Salmon et al. 2011) at counter [block, index, 0, 0]."""
    c0, c1, c2, c3 = np.uint64(block), np.uint64(index), np.uint64(0), np.uint64(0)
    k0, k1 = key[0], key[1]
    for _ in range(10):
        high_0, low_0 = _wide_product(np.uint64(0xD2E7470EE14C6C93), c0)
        high_1, low_1 = _wide_product(np.uint64(0xCA5A826395121157), c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 += np.uint64(0x9E3779B97F4A7C15)
        k1 += np.uint64(0xBB67AE8584CAA73B)
    return c0, c1, c2, c3


@_compiled
def _shuffle(key: Any, index: Any, order: Any) -> None:
    """Write permutation ``index`` (see ``PermutationStream``), or the identity, into ``order``."""
    n_cells = np.int64(order.size)
    for cell in range(n_cells):
        order[cell] = cell
    i = n_cells - 1 if index != IDENTITY else 0
    block = np.uint64(0)
    while i > 0:
        block += np.uint64(1)  # NumPy increments the counter before each block
        for word in _philox(block, index, key):
            if i > 0:
                j = np.int64(_wide_product(word, np.uint64(i + 1))[0])
                order[i], order[j] = order[j], order[i]
                i -= 1


@_compiled
def shuffle_rows(key: Any, start: Any, orders: Any) -> None:
    """Write permutations ``start``, ``start + 1``, ... into the rows of ``orders``, uint32 (permutations, cells)."""
    for row in range(orders.shape[0]):
        _shuffle(key, start + row, orders[row])


@_compiled
def shuffle_columns(key: Any, start: Any, first: Any, last: Any, n_cells: Any, orders: Any) -> None:
    """Write permutations ``start + first`` to ``start + last - 1`` into columns ``first`` to ``last - 1``.

    ``orders``: uint32 (cells or more, permutations); its rows from ``n_cells`` on are left alone.
    """
    some = np.empty((LANES, n_cells), dtype=np.uint32)
    for column in range(first, last, LANES):
        width = min(LANES, last - column)
        for row in range(width):
            _shuffle(key, start + column + row, some[row])
        for cell in range(n_cells):
            for row in range(width):
                orders[cell, column + row] = some[row, cell]


def _data(context: Any, builder: Any, signature: Any, arguments: Any, position: int) -> Any:
    """Return a pointer to the first entry of an array among the arguments."""
    return make_array(signature.args[position])(context, builder, arguments[position]).data


def _vector_at(builder: Any, pointer: Any, index: Any, kind: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [index]), kind.as_pointer())


def _load(builder: Any, place: Any) -> Any:
    # NumPy guarantees only the alignment of one number
    loaded = builder.load(place)
    loaded.align = 4
    return loaded


def _add_product(builder: Any, total: Any, left: Any, right: Any) -> None:
    product = builder.fmul(left, right, flags=_FUSED)
    builder.store(builder.fadd(builder.load(total), product, flags=_FUSED), total)


def _ask(builder: Any, pointer: Any, index: Any) -> None:
    """Prefetch a cache line."""
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    for_reading_soon = [ir.Constant(_I32, value) for value in (0, 2, 1)]
    builder.call(prefetch, [_vector_at(builder, pointer, index, _I8), *for_reading_soon])


@_intrinsic
def _ask_for(typing_context: Any, values: Any, index: Any) -> Any:
    """Prefetch the cache line of entry ``index`` of a flat array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _ask(builder, _data(context, builder, signature, arguments, 0), arguments[1])
        return context.get_dummy_value()

    return types.none(values, types.int64), generate


@_intrinsic
def _gather(typing_context: Any, f: Any, z: Any, orders: Any, n_cells: Any, n_vectors: Any, sums: Any) -> Any:
    """Write sum_i sum_v F[order(i), v] * Z[i, v] of vectors v, in float64, for each of _TOGETHER orders."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        f, z, orders, sums = (_data(context, builder, signature, arguments, k) for k in (0, 1, 2, 5))
        n_cells, n_vectors = arguments[3], arguments[4]
        width = builder.mul(n_vectors, ir.Constant(_I64, LANES))
        last = builder.sub(n_cells, ir.Constant(_I64, 1))
        zero = ir.Constant(_DOUBLES, None)
        totals = [cgutils.alloca_once(builder, _DOUBLES) for _ in range(_TOGETHER)]
        for total in totals:
            builder.store(zero, total)

        def row_of(order: int, cell: Any) -> Any:
            place = builder.add(builder.mul(n_cells, ir.Constant(_I64, order)), cell)
            return builder.mul(builder.zext(builder.load(builder.gep(orders, [place])), _I64), width)

        with cgutils.for_range(builder, n_cells) as outer:
            ahead = builder.add(outer.index, ir.Constant(_I64, _AHEAD))
            ahead = builder.select(builder.icmp_signed("<", ahead, last), ahead, last)
            now = [row_of(order, outer.index) for order in range(_TOGETHER)]
            soon = [row_of(order, ahead) for order in range(_TOGETHER)]
            own = builder.mul(outer.index, width)
            with cgutils.for_range(builder, n_vectors) as inner:
                column = builder.mul(inner.index, ir.Constant(_I64, LANES))
                right = _load(builder, _vector_at(builder, z, builder.add(own, column), _SINGLES))
                right = builder.fpext(right, _DOUBLES)
                for order, total in enumerate(totals):
                    _ask(builder, f, builder.add(soon[order], column))
                    left = _load(builder, _vector_at(builder, f, builder.add(now[order], column), _SINGLES))
                    _add_product(builder, total, builder.fpext(left, _DOUBLES), right)
        for order, total in enumerate(totals):
            place = _vector_at(builder, sums, ir.Constant(_I64, order * LANES), _DOUBLES)
            builder.store(builder.load(total), place).align = 8
        return context.get_dummy_value()

    return types.none(f, z, orders, types.int64, types.int64, sums), generate


@_compiled
def factor_sums(key: Any, indices: Any, f: Any, z: Any, out: Any) -> None:
    """Write the sums over cells and vectors, lane by lane, of the permutations numbered ``indices``.

    ``f``, ``z``: float32 (groups, cells, vectors x LANES), C order; ``indices``: int64; ``out``: float64 (indices,
    groups, LANES). A product of two float32 is exact in float64.
    """
    n_groups, n_cells, width = f.shape
    orders = np.empty((_TOGETHER, n_cells), dtype=np.uint32)
    sums = np.empty((_TOGETHER, LANES), dtype=np.float64)
    for start in range(0, indices.size, _TOGETHER):
        n_own = min(_TOGETHER, indices.size - start)
        for row in range(_TOGETHER):
            if row < n_own:
                _shuffle(key, indices[start + row], orders[row])
            else:
                orders[row] = orders[0]
        for group in range(n_groups):
            _gather(f[group], z[group], orders, n_cells, width // LANES, sums)
            out[start : start + n_own, group] = sums[:n_own]


@_intrinsic
def _multiply(typing_context: Any, f: Any, z: Any, panel: Any, n_columns: Any, n_vectors: Any, tile: Any) -> Any:
    """Write the products of ROWS cells with all: tile[r, 16 v + l] = sum_a z[panel, a, r] * f[v, a, l], in float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        f, z, tile = (_data(context, builder, signature, arguments, k) for k in (0, 1, 5))
        panel, n_columns, n_vectors = arguments[2:5]
        lanes, rows = ir.Constant(_I64, LANES), ir.Constant(_I64, ROWS)
        same_lane = ir.Constant(ir.VectorType(_I32, LANES), None)
        empty = ir.Constant(_SINGLES, ir.Undefined)
        z = builder.gep(z, [builder.mul(panel, builder.mul(n_columns, rows))])
        length = builder.mul(n_vectors, lanes)
        totals = [cgutils.alloca_once(builder, _SINGLES) for _ in range(ROWS)]
        with cgutils.for_range(builder, n_vectors) as outer:
            for total in totals:
                builder.store(ir.Constant(_SINGLES, None), total)
            base = builder.mul(outer.index, builder.mul(n_columns, lanes))
            with cgutils.for_range(builder, n_columns) as inner:
                place = builder.add(base, builder.mul(inner.index, lanes))
                left = _load(builder, _vector_at(builder, f, place, _SINGLES))
                own = builder.mul(inner.index, rows)
                for row, total in enumerate(totals):
                    one = builder.load(builder.gep(z, [builder.add(own, ir.Constant(_I64, row))]))
                    one = builder.insert_element(empty, one, ir.Constant(_I32, 0))
                    _add_product(builder, total, left, builder.shuffle_vector(one, empty, same_lane))
            for row, total in enumerate(totals):
                place = builder.add(builder.mul(length, ir.Constant(_I64, row)), builder.mul(outer.index, lanes))
                builder.store(builder.load(total), _vector_at(builder, tile, place, _SINGLES)).align = 4
        return context.get_dummy_value()

    return types.none(f, z, types.int64, types.int64, types.int64, tile), generate


@_compiled
def gram_sums(orders: Any, f: Any, z: Any, first: Any, last: Any, out: Any) -> None:
    """Add to ``out`` the terms of the cells of panels ``first`` to ``last - 1`` (ROWS cells each), per permutation.

    ``orders``: uint32 (panels x ROWS, permutations); ``f``: float32 (heads, vectors, columns, LANES), cells along
    vectors and lanes; ``z``: float32 (heads, panels, columns, ROWS); ``out``: float64 (heads, permutations). At most
    columns + ROWS float32 roundings lie between an entry and its sum in float64.
    """
    n_heads, n_vectors, n_columns, _ = f.shape
    tile = np.empty((ROWS, n_vectors * LANES), dtype=np.float32)
    for panel in range(first, last):
        own = orders[panel * ROWS : (panel + 1) * ROWS]
        for head in range(n_heads):
            _multiply(f[head], z[head], panel, n_columns, n_vectors, tile)
            for p in range(orders.shape[1]):
                left = (tile[0, own[0, p]] + tile[1, own[1, p]]) + (tile[2, own[2, p]] + tile[3, own[3, p]])
                right = (tile[4, own[4, p]] + tile[5, own[5, p]]) + (tile[6, own[6, p]] + tile[7, own[7, p]])
                out[head, p] += np.float64(left + right)


@_compiled
def block_moments(values: Any, step: Any, first: Any, last: Any, sums: Any, squares: Any) -> None:
    """Write the sum and the sum of squares of every column over blocks ``first`` to ``last - 1``, ``step`` cells each.

    ``values``: (cells, numbers); ``sums``, ``squares``: float64 (blocks, numbers).
    """
    n_cells, width = values.shape
    for block in range(first, last):
        total, square = sums[block], squares[block]
        total[:] = 0.0
        square[:] = 0.0
        for cell in range(block * step, min((block + 1) * step, n_cells)):
            row = values[cell]
            for number in range(width):
                value = np.float64(row[number])
                total[number] += value
                square[number] += value * value


@_compiled
def block_rows(
    values: Any,
    order: Any,
    mean: Any,
    scale: Any,
    source: Any,
    place: Any,
    step: Any,
    first: Any,
    last: Any,
    out: Any,
    sums: Any,
) -> None:
    """Centre, scale, round the cells of blocks ``first`` to ``last - 1``; write number ``source[k]`` to ``place[k]``.

    The many arguments are arrays because numba compiles no dataclasses.
    ``values``: (cells, numbers); ``order``: cells in the order of writing, empty to keep their order; ``mean``,
    ``scale``: float64 (numbers,); ``place``: (kept, 2), group and column of ``out``, float32 (groups, cells, width),
    whose other columns become zero; ``sums``: float64 (blocks, numbers), sums of squares of the rounded numbers.
    """
    n_cells, width = values.shape
    rounded = np.empty(width, dtype=np.float32)
    straight = source.size == width and out.shape[0] == 1
    for k in range(source.size):
        straight = straight and source[k] == k and place[k, 1] == k
    for block in range(first, last):
        square = sums[block]
        square[:] = 0.0
        for cell in range(block * step, min((block + 1) * step, n_cells)):
            row = values[order[cell] if order.size else cell]
            for number in range(width):
                value = np.float32((np.float64(row[number]) - mean[number]) * scale[number])
                rounded[number] = value
                square[number] += np.float64(value) * np.float64(value)
            if straight:
                own = out[0, cell]
                for number in range(width):
                    own[number] = rounded[number]
                own[width:] = 0.0
            else:
                out[:, cell] = 0.0
                for k in range(source.size):
                    out[place[k, 0], cell, place[k, 1]] = rounded[source[k]]


@_compiled
def turned(values: Any, column: Any, backwards: Any, first: Any, last: Any, out: Any) -> None:
    """Write ``values[k, column + l]`` to ``out[l, k]`` for k from ``first`` to ``last - 1``.

    If ``backwards``, it is ``values[-k % cells, column + l]``. ``values``: float32 (cells, width), C order; ``out``:
    float64 (LANES, cells or more).
    """
    n_cells, width = values.shape
    tile = np.empty((LANES, _TILE), dtype=np.float64)
    for start in range(first, last, _TILE):
        n_own = min(_TILE, last - start)
        for k in range(n_own):
            cell, ahead = start + k, min(start + k + _AHEAD, n_cells - 1)
            if backwards:
                cell, ahead = (n_cells - cell) % n_cells, n_cells - ahead
            _ask_for(values, ahead * width + column)
            row = values[cell]
            for lane in range(LANES):
                tile[lane, k] = row[column + lane]
        for lane in range(LANES):
            for k in range(n_own):
                out[lane, start + k] = tile[lane, k]
