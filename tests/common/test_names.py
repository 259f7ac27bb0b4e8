from __future__ import annotations

import itertools
import re
import unicodedata
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from amici_eval.common.text import meant_by, slugify

seeded = settings(max_examples=300, deadline=None, derandomize=True)
awkward = st.text(alphabet=st.sampled_from("aA1_-+/&. β\n\0é"), max_size=6) | st.text(max_size=80)


PATHS = ["..", ".", "/", "\\", "a/../..", "C:\\x", "\0", "~", "-rf", "CON", "x" * 400]


@pytest.mark.parametrize("label", ["Tumor", "CD8_T_cells", "0", "a" * 60])
def test_a_safe_label_is_its_own_name(label):
    assert slugify(label) == label


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("CD8+_T_Cells", "CD8_T_Cells-f839fcbf"),
        ("Microglia/PVM", "Microglia_PVM-108191b0"),
        ("Stromal_&_T_Cell_Hybrid", "Stromal_T_Cell_Hybrid-0fbc73d8"),
        ("β cell", "cell-d92e5577"),
        ("_hidden", "_hidden"),
        ("", "x-1271cf25"),
        ("a" * 61, "a" * 60 + "-a79c1fb9"),
    ],
)
def test_names_are_frozen(label, name):
    # other names would break the metric and file names of all runs so far
    assert slugify(label) == name


def test_awkward_labels_get_different_names():
    labels = {
        *"Aaxeé_-βα ",
        *("A+", "A/", "A_", "_A", "A-", "-A", "A ", " A", "A__", "A.", ""),
        *("β cell", "α cell", "Microglia/PVM", "Microglia_PVM", "Microglia\\PVM", "Stromal_&_T_Cell_Hybrid"),
        *("Stromal___T_Cell_Hybrid", "CD8+_T_Cells", "CD8-_T_Cells", "CD8__T_Cells", "..", "../x"),
        *("a" * 60, "a" * 61, "a" * 62, "a" * 60 + "b"),
    }
    # a label that looks like the name of another is not given that name
    labels |= {slugify(label) for label in labels if slugify(label) != label}
    assert len({slugify(label) for label in labels}) == len(labels)


@seeded
@given(label=awkward)
@example("\ud800")
@example("")
def test_a_name_has_safe_characters_and_a_bounded_length(label):
    name = slugify(label)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name)
    assert len(name) <= 69
    assert slugify(label) == name


@seeded
@given(label=st.text(max_size=400) | st.sampled_from(PATHS))
def test_a_name_is_one_part_of_a_path_below_the_folder(label):
    folder = PurePosixPath("/out")
    for path in (folder / f"{slugify(label)}.png", PureWindowsPath("D:/out") / f"{slugify(label)}.png"):
        assert len(path.relative_to(path.parents[0]).parts) == 1
        assert path.parent.name == "out"
    assert len(f"expl_variance_heatmap_{slugify(label)}.png".encode()) < 255


@seeded
@given(labels=st.sets(awkward, min_size=2, max_size=8))
@example({"A+", "A/"})
@example({"", "x"})
@example({"_A", "A"})
def test_different_labels_have_different_names(labels):
    for left, right in itertools.combinations(sorted(labels), 2):
        assert slugify(left) != slugify(right)


cases = st.text(alphabet=st.sampled_from("aAbBkK_1+ éÉ\u0301\u212aß"), max_size=4)


@seeded
@given(labels=st.sets(awkward | cases, min_size=2, max_size=8))
@example({"A", "a", "b"})
@example({"k", "K", "\u212a"})
@example({"é", "e\u0301"})
@example({"A" * 61, "a" * 61})
def test_names_stay_apart_where_case_does_not_count(labels):
    names = {label: slugify(label, labels) for label in labels}
    assert len({unicodedata.normalize("NFKC", name).casefold() for name in names.values()}) == len(labels)
    alone = [slugify(label).casefold() for label in labels]
    for label, name in names.items():
        # whoever collides with nobody keeps the name that it has alone
        assert name == slugify(label) or alone.count(slugify(label).casefold()) > 1


def test_types_that_differ_by_case_get_a_hash():
    types = ("A", "a", "B", "B+")
    assert [slugify(label, types) for label in types] == ["A-af3c7293", "a-ca234c55", "B", slugify("B+")]


@pytest.mark.parametrize(
    ("text", "known", "found"),
    [
        ("1", ["1.0", "2.0"], ["1.0"]),
        ("1.0", ["1", "10"], ["1"]),
        ("-1.", ["-1"], ["-1"]),
        ("true", ["True", "False"], ["True"]),
        ("1", ["1", "1.0"], ["1"]),
        ("1.00", ["1", "1.0"], ["1", "1.0"]),
        ("10_1", ["101", "10_1"], ["10_1"]),
        ("10_1", ["101"], []),
        ("1E1", ["10", "10.0"], []),
        ("007", ["7"], []),
        ("1.5", ["1"], []),
        ("1", ["True"], []),
        ("tumor", ["Tumor"], []),
    ],
)
def test_a_text_means_itself_or_the_same_whole_number_or_truth_value(text, known, found):
    assert meant_by(text, known) == found
