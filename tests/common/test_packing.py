"""Parts of the work as files: read back bit for bit, or refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amici_eval.common.files import (
    PARTIAL_SUFFIX,
    DamagedPackError,
    FolderLock,
    is_disk_full,
    read_pack,
    write_durably,
    write_pack,
    write_text_durably,
)
from amici_eval.evaluation.all_types import FinishedParts


@dataclass(frozen=True)
class Inner:
    values: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    inner: Inner | None
    numbers: tuple[float, ...]
    text: str
    count: int


LABEL = {"name": "type 'β cell'", "key": "k"}
VALUE = Outer(
    inner=Inner(np.array([[0.1, math.nan], [-0.0, math.inf]]), {3: "dead", -1: "<&>"}),
    numbers=(0.1 + 0.2, math.nan, -math.inf),
    text="β\n",
    count=2**60,
)


def same(one, other) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, (Inner, Outer)):
        return type(one) is type(other) and same(vars(one), vars(other))
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and (one == other or (one != one and other != other))


def test_a_part_comes_back_bit_for_bit(tmp_path):
    write_pack(tmp_path / "a", VALUE, label=LABEL)
    assert same(read_pack(tmp_path / "a", label=LABEL, classes=[Inner, Outer]), VALUE)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 5), dtype=np.float32),
        np.arange(6, dtype=np.int64).reshape(2, 3).T,
        np.array([True, False]),
        np.zeros((3, 0, 2)),
        np.full((2, 2), np.nan, dtype=np.float32)[:, ::-1],
    ],
)
def test_arrays_of_all_kinds(tmp_path, array):
    write_pack(tmp_path / "a", [array, None, True], label=LABEL)
    found = read_pack(tmp_path / "a", label=LABEL, classes=())
    assert same(found, [np.ascontiguousarray(array), None, True])


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array(["text"]), np.array([object()]), lambda: 0, Inner])
def test_what_is_no_plain_value_is_not_kept(tmp_path, value):
    with pytest.raises(TypeError, match="cannot be kept"):
        write_pack(tmp_path / "a", [value], label=LABEL)


def test_a_part_of_something_else_or_of_another_class_is_refused(tmp_path):
    write_pack(tmp_path / "a", VALUE, label=LABEL)
    with pytest.raises(DamagedPackError, match="it is of"):
        read_pack(tmp_path / "a", label={**LABEL, "key": "other"}, classes=[Inner, Outer])
    with pytest.raises(DamagedPackError, match="Inner"):
        read_pack(tmp_path / "a", label=LABEL, classes=[Outer])
    with pytest.raises(FileNotFoundError):
        read_pack(tmp_path / "none", label=LABEL, classes=[])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_damage_is_noticed_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    write_pack(folder / "a", VALUE, label=LABEL)
    content = bytearray((folder / "a").read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "a").write_bytes(bytes(content))
    try:
        found = read_pack(folder / "a", label=LABEL, classes=[Inner, Outer])
    except DamagedPackError:
        return
    assert same(found, VALUE)


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "a"
    write_text_durably(path, "old")

    def fail(partial):
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_durably(path, fail)
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
    write_text_durably(path, "new")
    assert path.read_text() == "new"
    assert not list(tmp_path.glob(f"*{PARTIAL_SUFFIX}"))


def test_what_a_killed_writer_left_is_swept_away(tmp_path):
    parts = FinishedParts(tmp_path, key="k")
    parts.put("attention", (1, 2))
    (tmp_path / f"x{PARTIAL_SUFFIX}").write_bytes(b"half")
    parts.sweep()
    assert FinishedParts.count_in(tmp_path) == len(list(tmp_path.iterdir())) == 1
    assert parts.get("attention") == (1, 2)


def test_a_folder_has_one_owner(tmp_path):
    lock = FolderLock.take(tmp_path)
    assert lock is not None
    assert FolderLock.take(tmp_path) is None
    lock.release()
    again = FolderLock.take(tmp_path)
    assert again is not None
    again.release(remove=True)
    assert list(tmp_path.iterdir()) == []
    assert FolderLock.take(tmp_path / "none") is None


def test_a_lock_is_no_way_out_of_the_folder(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "target")
    assert FolderLock.take(tmp_path / "run") is None
    assert (tmp_path / "target").read_text() == "mine"


def test_a_full_disk_is_told_from_other_errors():
    import errno

    assert is_disk_full(OSError(errno.ENOSPC, "no room"))
    wrapped = RuntimeError("x")
    wrapped.__cause__ = OSError(errno.EROFS, "read-only")
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(errno.ECONNRESET, "reset"))
    assert not is_disk_full(ValueError("x"))
