"""Moments that a run keeps: they give back what was computed, over all tiles and over any of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest

from amici_eval.common.errors import DataError
from amici_eval.results.moments import Moments
from amici_eval.stats.explained_variance import squares_about
from amici_eval.stats.readout import Readout
from amici_eval.stats.spatial.tiles import square_tiles
from amici_eval.stats.type_sums import factors_of, gather_sums
from tests.builders import make_moments
from tests.oracles import reference


@dataclass
class Piece:
    positions: np.ndarray
    values: np.ndarray


def make_case(n_cells=60, n_heads=3, size=2, n_genes=5, seed=0):
    rng = np.random.default_rng(seed)
    columns = 1 + n_heads * size
    root = rng.normal(size=(columns, columns))
    readout = Readout(
        weights=rng.normal(size=(n_genes, columns)),
        gram=root @ root.T / columns,
        offset=rng.normal(size=n_genes),
        epsilon=1e-5,
        n_heads=n_heads,
        head_size=size,
    )
    outputs = rng.normal(size=(n_cells, columns - 1)).astype(np.float32)
    targets = (readout.predict(outputs) + rng.normal(size=(n_cells, n_genes))).astype(np.float32)
    return outputs, targets, readout, rng.integers(0, 4, n_cells)


def pieces(targets, order, length):
    return [Piece(order[s : s + length], targets[order[s : s + length]]) for s in range(0, len(order), length)]


def test_explained_variance_is_its_definition():
    outputs, targets, readout, tiles = make_case()
    targets[:, 2] = 0.7
    found = gather_sums(outputs, readout, pieces(targets, np.arange(60), 60), tiles=tiles)
    per_gene, overall = found.by_tile.explained_variance_gene, found.by_tile.explained_variance
    for head in range(3):
        genes, total = reference.explained_variance(readout.predict(outputs, (head,)), targets)
        np.testing.assert_allclose(per_gene[head], genes, atol=1e-12)
        assert overall[head] == pytest.approx(total, abs=1e-12)
    assert found.by_tile.varies.tolist() == [True, True, False, True, True]
    assert np.isnan(per_gene[:, 2]).all()


def test_without_a_gene_that_varies_nothing_is_explained():
    outputs, targets, readout, tiles = make_case()
    targets[:] = 1.5
    found = gather_sums(outputs, readout, pieces(targets, np.arange(60), 60), tiles=tiles)
    assert found.by_tile.target_ss == 0.0
    assert np.isnan(found.by_tile.explained_variance).all()
    assert np.isnan(found.by_tile.explained_variance_gene).all()


def test_blocks_and_tiles_change_nothing():
    outputs, targets, readout, tiles = make_case()
    base = gather_sums(outputs, readout, pieces(targets, np.arange(60), 60), tiles=np.zeros(60, dtype=np.int64))
    order = np.random.default_rng(1).permutation(60)
    for length in (1, 7, 60):
        found = gather_sums(outputs, readout, pieces(targets, order, length), tiles=tiles)
        for name in ("explained_variance", "explained_variance_gene"):
            ours, expected = (getattr(one.by_tile, name) for one in (found, base))
            np.testing.assert_allclose(ours, expected, atol=1e-12)
        np.testing.assert_allclose(found.projected, base.projected, atol=1e-5)
        np.testing.assert_allclose(found.scale, base.scale, rtol=1e-12)
        np.testing.assert_allclose(found.predicted_ss, base.predicted_ss, rtol=1e-10)
        np.testing.assert_allclose(found.predicted_size, base.predicted_size, rtol=1e-10)
        assert found.by_tile.target_ss == pytest.approx(base.by_tile.target_ss, rel=1e-12)


def test_every_tile_has_its_own_moments():
    outputs, targets, readout, tiles = make_case()
    tiles = tiles * 10 + 3  # numbers with gaps
    found = gather_sums(outputs, readout, pieces(targets, np.arange(60), 13), tiles=tiles).by_tile
    assert found.tiles.tolist() == [3, 13, 23, 33]
    for row, tile in enumerate(found.tiles):
        own = tiles == tile
        assert found.n_cells[row] == own.sum()
        np.testing.assert_allclose(found.target_mean[row], targets[own].mean(axis=0, dtype=np.float64), atol=1e-12)
        for head in range(3):
            residual = readout.predict(outputs[own], (head,)) - targets[own]
            np.testing.assert_allclose(found.residual_mean[row, head], residual.mean(axis=0), atol=1e-12)
            squares = ((residual - residual.mean(axis=0)) ** 2).sum(axis=0)
            np.testing.assert_allclose(found.residual_m2[row, head], squares, atol=1e-10)


def test_size_and_spread_of_predictions_tell_dead_heads():
    outputs, targets, readout, tiles = make_case()
    outputs[:, 2:4] = 0.25  # head 1 brings the same to all cells
    found = gather_sums(outputs, readout, pieces(targets, np.arange(60), 60), tiles=tiles)
    for head in range(3):
        prediction = readout.predict(outputs, (head,))
        spread = ((prediction - prediction.mean(axis=0)) ** 2).sum()
        assert found.predicted_ss[head] == pytest.approx(spread, rel=1e-9, abs=1e-9)
        assert found.predicted_size[head] == pytest.approx((prediction**2).sum(), rel=1e-9)
    assert found.predicted_ss[1] < 1e-12 * found.predicted_size[1]


def test_factors_and_images_stand_for_predictions_and_expression():
    outputs, targets, readout, tiles = make_case()
    found = gather_sums(outputs, readout, pieces(targets, np.arange(60), 60), tiles=tiles)
    factors, images = factors_of(outputs, found, readout)
    centred = targets - targets.mean(axis=0, dtype=np.float64)
    for head in range(3):
        ours = factors[:, :, head] @ images[:, :, head].astype(np.float64).T
        np.testing.assert_allclose(ours, (readout.predict(outputs, (head,)) - readout.offset) @ centred.T, atol=1e-4)


def test_merged_tiles_are_one_group():
    values = np.random.default_rng(0).normal(3.0, 1.0, (40, 2))
    parts = np.split(values, [3, 4, 30])
    merged = squares_about(
        np.array([len(part) for part in parts]),
        np.array([part.mean(axis=0) for part in parts]),
        np.array([((part - part.mean(axis=0)) ** 2).sum(axis=0) for part in parts]),
    ).sum(axis=0)
    np.testing.assert_allclose(merged, values.var(axis=0) * 40)


def test_the_file_gives_everything_back(tmp_path):
    moments = make_moments()
    loaded = Moments.load(moments.save(tmp_path / "new" / "moments.npz"))
    for entry in fields(Moments):
        ours, theirs = getattr(loaded, entry.name), getattr(moments, entry.name)
        assert np.array_equal(ours, theirs) if isinstance(theirs, np.ndarray) else ours == theirs
        assert not isinstance(theirs, np.ndarray) or ours.dtype == theirs.dtype


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "no header", "odd header", "bits"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = make_moments().save(tmp_path / "moments.npz")
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "text":
        path.write_text("no archive")
    elif damage == "no header":
        np.savez(path, a=np.zeros(2))
    elif damage == "odd header":
        np.savez(path, header=np.frombuffer(b'"text"', dtype=np.uint8))
    else:
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 200] = b"\xff" * 200
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"moments.npz cannot be read .*it must be the moments.npz of a run"):
        Moments.load(path)


def changed(path, folder, *, arrays=None, **texts):
    """Write a file of moments again with other entries (``None`` drops one)."""
    with np.load(path) as stored:
        parts = {name: stored[name] for name in stored.files}
    header = {**json.loads(parts.pop("header").tobytes()), **texts}
    parts = {name: values for name, values in {**parts, **(arrays or {})}.items() if values is not None}
    header = np.frombuffer(json.dumps({k: v for k, v in header.items() if v is not None}).encode(), dtype=np.uint8)
    np.savez(folder / "changed.npz", header=header, **parts)
    return folder / "changed.npz"


@pytest.mark.parametrize("version", [0, 5, 99, "1", 1.0, True, [1]])
def test_another_schema_is_told_whether_older_or_newer(tmp_path, version):
    path = changed(make_moments().save(tmp_path / "moments.npz"), tmp_path, schema_version=version)
    with pytest.raises(DataError) as caught:
        Moments.load(path)
    assert caught.value.value == f"{path} is of schema version {version!r}"
    assert caught.value.rule == "this version of amici_eval reads moments of schema versions up to 4"
    assert caught.value.fix == "read it with the version of amici_eval that wrote it, or evaluate again"


ARRAYS = tuple(entry.name for entry in fields(Moments) if isinstance(getattr(make_moments(), entry.name), np.ndarray))


@pytest.mark.parametrize("how", ["longer", "flat", "nothing"])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_do_not_fit_are_refused(tmp_path, name, how):
    moments = make_moments()
    values = getattr(moments, name)
    other = {
        "longer": np.concatenate([values, values[:1]]),
        "flat": values.reshape(-1, 1),
        "nothing": np.float32(1.0),
    }[how]
    with pytest.raises(ValueError, match=r"has shape|outputs cannot be those of"):
        replace(moments, **{name: other})
    path = changed(moments.save(tmp_path / "moments.npz"), tmp_path, arrays={name: other})
    with pytest.raises(DataError, match=r"changed.npz cannot be read"):
        Moments.load(path)


@pytest.mark.parametrize("name", ["cell_types", "genes", "sketch_names", "n_heads"])
def test_names_and_heads_that_do_not_fit_are_refused(tmp_path, name):
    moments = make_moments()
    value = getattr(moments, name)
    other = value + 1 if name == "n_heads" else value[:-1]
    with pytest.raises(ValueError, match=r"has shape|cannot be those of 3 heads"):
        replace(moments, **{name: other})
    path = changed(moments.save(tmp_path / "moments.npz"), tmp_path, **{name: other})
    with pytest.raises(DataError, match=r"changed.npz cannot be read \(ValueError"):
        Moments.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("row_type", 3), ("row_type", -1), ("sketch_type", 3), ("row_tile", -1), ("sketch_tile", -2), ("attended", 6)],
)
def test_rows_of_no_type_or_tile_are_refused(name, value):
    moments = make_moments()
    values = getattr(moments, name).copy()
    values[-1] = value
    with pytest.raises(ValueError, match=rf"^{name} holds other values than whole numbers from"):
        replace(moments, **{name: values})
    with pytest.raises(ValueError, match=rf"^{name} holds other values than whole numbers from"):
        replace(moments, **{name: getattr(moments, name).astype(np.float64)})


def test_tiles_drawn_with_replacement_are_cells_drawn_with_their_tiles():
    rng = np.random.default_rng(3)
    outputs, targets, readout, tiles = make_case(n_cells=80)
    found = gather_sums(outputs, readout, pieces(targets, np.arange(80), 80), tiles=tiles).by_tile
    of_heads = found.of_models([0, 1, 2])
    moments = Moments(
        **{
            **{entry.name: getattr(make_moments(3, 1, 5), entry.name) for entry in fields(Moments)},
            "row_type": np.zeros(4, dtype=np.int64),
            "row_tile": found.tiles,
            "tile_center": np.zeros((4, 2)),
            "lost_squares": np.zeros((3, 1, 2, 4), dtype=np.float32),
            "n_cells": found.n_cells,
            "target_mean": found.target_mean.astype(np.float32),
            "target_m2": found.target_m2.astype(np.float32),
            "residual_mean": of_heads.residual_mean.astype(np.float32),
            "residual_m2": of_heads.residual_m2.astype(np.float32),
        }
    )
    np.testing.assert_allclose(moments.explained_variance()[:, 0], of_heads.explained_variance, atol=1e-6)
    for _ in range(3):
        drawn = rng.integers(0, 4, 4)
        rows = np.concatenate([np.flatnonzero(tiles == tile) for tile in drawn])
        for head in range(3):
            expected = reference.explained_variance(readout.predict(outputs[rows], (head,)), targets[rows])[1]
            assert moments.explained_variance(tiles=drawn)[head, 0] == pytest.approx(expected, abs=1e-5)
    for wrong in ([77], [0, -1], ["a"], [0.5]):
        with pytest.raises(DataError, match=r"tiles=.*tiles are whole numbers from 0 to 3; tile_center says where"):
            moments.explained_variance(tiles=wrong)


def test_tiles_are_squares_within_sections():
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, [400.0, 100.0], (4000, 2))
    tiles = square_tiles(xy, n_tiles=16)
    assert set(tiles) == set(range(tiles.max() + 1))
    assert 12 <= tiles.max() + 1 <= 24
    for tile in np.unique(tiles):
        assert np.ptp(xy[tiles == tile], axis=0).max() <= np.sqrt(400 * 100 / 16) + 1e-9
    sections = np.repeat(["a", "b"], 2000)
    apart = square_tiles(xy, n_tiles=16, samples=sections)
    assert not set(apart[:2000]) & set(apart[2000:])
    # one place, one line
    assert square_tiles(np.zeros((5, 2)), n_tiles=9).tolist() == [0] * 5
    line = square_tiles(np.column_stack([np.arange(90.0), np.zeros(90)]), n_tiles=9)
    assert line.max() + 1 == 9
    # the cells at the far edge are in the last tile, not in one of their own
    square = square_tiles(rng.uniform(size=(3000, 2)), n_tiles=9)
    assert np.bincount(square).min() > 200
    lattice = np.stack(np.meshgrid(np.arange(40.0), np.arange(40.0)), axis=-1).reshape(-1, 2)
    assert square_tiles(lattice, n_tiles=9).max() + 1 == 9
