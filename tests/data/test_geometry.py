"""What is said of the positions of cells, and which sections statistics then go by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from amici_eval.data.geometry import Geometry
from amici_eval.evaluation.tiles import Tiling

if TYPE_CHECKING:
    from collections.abc import Mapping

SIDE = 200.0
N = 1200


def look(coordinates, obs: Mapping[str, object] | None = None, *, sample_key=None, expression=None) -> Geometry:
    n_cells = len(coordinates)
    adata = ad.AnnData(obs=pd.DataFrame(obs or {}, index=[f"c{number}" for number in range(n_cells)]))
    named = None if sample_key is None else adata.obs[sample_key]
    return Geometry.of(adata, np.asarray(coordinates, float), named=named, expression=lambda: expression)


def scattered(n_cells=N, *, seed=0):
    return np.random.default_rng(seed).uniform(0.0, SIDE, (n_cells, 2))


def grouped(n_groups=4, *, n_cells=N):
    return np.arange(n_cells) % n_groups


# --- cells at one place


def test_cells_apart_need_no_note():
    found = look(scattered())
    assert (found.notes, found.samples, found.sections) == ((), None, None)
    xy = scattered()
    distances = np.linalg.norm(xy[:, None] - xy[None], axis=2) + np.diag(np.full(N, np.inf))
    assert found.nn_distance == pytest.approx(np.median(distances.min(axis=1)))


def placeholders(xy, expression):
    xy[:70] = 0.0
    return "70 of 1200 cells share a position with another cell, 70 of them at (0, 0); 0 have"


def rounded(xy, expression):
    xy[:] = np.round(xy / 40.0) * 40.0
    return "1200 of 1200 cells share a position"


def copied(xy, expression):
    xy[:30], expression[:30] = xy[30:60], expression[30:60]
    return "60 of 1200 cells share a position with another cell, 2 of them at"


def segmented_twice_at_one_place_of_three(xy, expression):
    xy[1], xy[2], expression[1] = xy[0], xy[0], expression[0]
    return "3 of 1200 cells share a position with another cell, 3 of them at"


@pytest.mark.parametrize(
    ("spoil", "n_same"), [(placeholders, 0), (rounded, 0), (copied, 60), (segmented_twice_at_one_place_of_three, 2)]
)
@pytest.mark.parametrize("n_dimensions", [2, 3])
def test_cells_at_one_place_are_counted_whatever_put_them_there(spoil, n_same, n_dimensions):
    xy, expression = scattered(), np.arange(N, dtype=np.uint64)
    shown = spoil(xy, expression)
    (note,) = look(np.column_stack([xy, np.zeros(N)])[:, :n_dimensions], expression=expression).notes
    assert shown.replace("(0, 0)", "(0, 0, 0)" if n_dimensions == 3 else "(0, 0)") in note
    assert f"; {n_same} have the same expression as one there" in note
    assert "nearest neighbours is arbitrary" in note
    assert note.endswith("drop copies of cells and cells without a position before training")


# --- groups laid over each other

NAMES = ["fov", "FOV", "Slide_ID_numeric", "SampleID", "sample", "library_id", "batch", "image", "slice", "donor_id"]
FURTHER = ["Bregma", "section", "orig.ident", "brain_section_label", "fovs", "Animal_ID", "z", "z_plane", "Replicate"]


@pytest.mark.parametrize("name", NAMES + FURTHER)
@pytest.mark.parametrize("kind", [str, int, float, "category", object])
def test_groups_laid_over_each_other_are_named_and_counted(name, kind):
    (note,) = look(scattered(), {name: pd.Series(grouped()).astype(kind).to_numpy()}).notes
    assert note.startswith(f"groups of adata.obs column {name} (4 groups) lie over each other: ")
    crossing = int(note.split(": ")[1].split(" of ")[0])
    assert 0.65 * N < crossing < 0.85 * N
    assert f"set data.sample_key={name}" in note
    assert "add 399" in note or "add 400" in note


@pytest.mark.parametrize(
    "name", ["cell_type", "cluster", "leiden", "batch_score", "sample_cluster", "z_score", "region", "sampled", "zone"]
)
def test_columns_of_other_names_are_not_asked(name):
    assert look(scattered(), {name: grouped()}).notes == ()


def test_a_column_of_single_cells_or_of_one_group_splits_nothing():
    assert look(scattered(), {"sample": np.arange(N), "z": np.zeros(N), "slide": ["one"] * N}).notes == ()


@pytest.mark.parametrize("n_along", [2, 3, 6, 10])
@pytest.mark.parametrize("overlap", [0.0, 0.1])
def test_fields_of_view_beside_each_other_need_no_note(n_along, overlap):
    rng = np.random.default_rng(n_along)
    field = np.arange(N) % n_along**2
    corners = np.stack(np.divmod(field, n_along), axis=1)
    xy = (corners + rng.uniform(0.0, 1.0 + overlap, (N, 2))) * SIDE / n_along
    assert look(xy, {"fov": field, "slide": (field < n_along).astype(int)}).notes == ()
    # the same in local coordinates
    (note,) = look(xy - corners * SIDE / n_along, {"fov": field}).notes
    assert f"fov ({n_along**2} groups) lie over each other" in note


@pytest.mark.parametrize("n_cells", [40, 120])
def test_few_cells_are_told_apart_too(n_cells):
    halves, xy = np.arange(n_cells) * 2 // n_cells, scattered(n_cells)
    assert len(look(xy, {"slide": halves}).notes) == 1
    assert look(xy + halves[:, None] * SIDE, {"slide": halves}).notes == ()


def test_some_sections_over_each_other_among_others_apart_are_noted():
    section = grouped(8)
    xy = scattered() + np.maximum(section - 1, 0)[:, None] * 2 * SIDE
    (note,) = look(xy, {"section": section}).notes
    crossing = int(note.split(": ")[1].split(" of ")[0])
    assert 0.4 * N / 4 < crossing < 0.6 * N / 4


def test_equal_positions_in_all_fields_belong_to_different_groups():
    lattice = np.tile(np.stack(np.divmod(np.arange(N // 4), 20), axis=1) * 10.0, (4, 1))
    shared, over = look(lattice, {"library_id": np.repeat(list("abcd"), N // 4)}, expression=np.arange(N)).notes
    assert shared.startswith("1200 of 1200 cells share a position")
    assert "library_id (4 groups) lie over each other: 1200 of 1200 cells" in over


def test_columns_that_split_alike_share_a_note_that_names_the_finest():
    (note,) = look(scattered(), {"slide": grouped(2), "fov": grouped(6), "donor": pd.Categorical(grouped(2))}).notes
    assert "column slide (2 groups) and fov (6 groups) and donor (2 groups) lie over each other" in note
    assert "set data.sample_key=fov" in note


def test_missing_values_are_a_group():
    (note,) = look(scattered(), {"sample": pd.Series(grouped(2)).map({0: "a"}).to_numpy()}).notes
    assert "sample (2 groups)" in note


def test_the_named_sections_are_left_to_the_check_of_neighbours_and_others_are_not():
    slide = grouped(2)
    xy = scattered() + slide[:, None] * 2 * SIDE
    found = look(xy, {"slide": slide, "fov": np.arange(N) // 2 % 3}, sample_key="slide")
    assert [note.split(" (")[0] for note in found.notes] == ["groups of adata.obs column fov"]
    np.testing.assert_array_equal(found.samples, slide.astype(str))
    np.testing.assert_array_equal(found.sections, slide.astype(str))
    assert look(scattered(), {"slide": slide}, sample_key="slide").notes == ()


# --- planes in z


def volume(z):
    return np.column_stack([scattered(len(z)), z])


def planes_of(found):
    return pd.factorize(found.samples)[0]


LEVELS = grouped(4)
NOISE = np.random.default_rng(1).normal(0.0, 0.2, N)


@pytest.mark.parametrize(
    "z", [LEVELS, 10.0 * LEVELS, -0.15 * LEVELS, 40.0 * LEVELS + NOISE], ids=["index", "um", "mm", "jitter"]
)
def test_planes_are_sections_for_statistics_and_neighbours_may_cross_them(z):
    found = look(volume(z), {"slice": LEVELS})
    np.testing.assert_array_equal(planes_of(found), LEVELS)
    assert found.sections is None
    (note,) = found.notes
    assert note.startswith(
        "coordinates lie in 4 planes of z: tests, tiles and intervals go by x and y within each plane"
    )
    assert note.endswith("attention crosses planes as the model does")


def test_many_planes_far_apart_are_planes():
    planes = grouped(30)
    np.testing.assert_array_equal(planes_of(look(volume(50.0 * planes))), planes)


def test_planes_of_named_sections_are_sections():
    slide = np.arange(N) // 4 % 2
    found = look(volume(10.0 * LEVELS) + slide[:, None] * [2 * SIDE, 0, 0], {"slide": slide}, sample_key="slide")
    np.testing.assert_array_equal(planes_of(found), pd.factorize(slide * 4 + LEVELS)[0])
    np.testing.assert_array_equal(found.sections, slide.astype(str))
    assert "within each plane of a section" in found.notes[0]


@pytest.mark.parametrize("noise", [0.2, 6.0])
def test_neighbours_may_cross_named_sections_that_are_stacked_in_z(noise):
    z = 20.0 * LEVELS + np.random.default_rng(2).normal(0.0, noise, N)
    found = look(volume(z), {"slice": LEVELS}, sample_key="slice")
    np.testing.assert_array_equal(planes_of(found), LEVELS)
    assert found.sections is None
    assert len(found.notes) == 1


def test_a_third_dimension_without_planes_is_said_with_the_column_that_has_them():
    rng = np.random.default_rng(3)
    for z in (rng.uniform(0.0, 30.0, N), np.round(rng.uniform(0.0, 30.0, N)), np.append(rng.normal(size=N - 1), 500.0)):
        found = look(volume(z))
        assert found.samples is None
        assert "tests, tiles and intervals go by x and y alone" in found.notes[0]
        assert found.notes[0].endswith("thinner than expression is correlated")
    found = look(volume(5.0 * grouped(20) + rng.normal(0.0, 4.0, N)), {"section_id": grouped(20)})
    assert found.notes[0].endswith("; data.sample_key=section_id keeps its groups apart")


def test_one_plane_is_none():
    assert look(volume(np.full(N, 7.0))).notes == ()


def test_groups_over_each_other_in_planes_are_noted():
    found = look(volume(10.0 * LEVELS), {"fov": np.arange(N) // 4 % 5})
    assert len(found.notes) == 2
    assert "fov (5 groups) lie over each other" in found.notes[0]


def test_no_tile_holds_cells_of_two_planes():
    coordinates = volume(10.0 * LEVELS)
    found = look(coordinates)

    class Located:
        def coordinates(self, rows):
            return coordinates[rows]

        def samples(self, rows):
            return found.samples[rows]

    tiling = Tiling.of(Located(), np.arange(N), fitted=None, n_types=1)
    planes_by_tile = pd.Series(LEVELS).groupby(tiling.keys).nunique()
    assert (planes_by_tile == 1).all()
    assert len(planes_by_tile) >= 8
