"""How long texts are is told without reading them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amici_eval import hdf5_checks
from amici_eval.errors import DataError
from amici_eval.files import open_anndata
from amici_eval.hdf5_texts import layout_of, text_bytes

TEXT = h5py.string_dtype()
LETTERS = st.characters(exclude_characters="\0", codec="utf-8")


def measured(path):
    with h5py.File(path, "r") as file:
        return {name: text_bytes(path, file[name], enough=2**40) for name in file}


@pytest.mark.parametrize("userblock", [0, 512])
@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize(
    "filters", [{}, {"compression": "gzip"}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf"}]
)
def test_texts_are_measured_wherever_and_however_they_are_stored(tmp_path, filters, libver, userblock):
    texts = ["ä" * (i % 7) for i in range(5000)]
    matrix = np.reshape(np.array(texts, dtype=object), (50, 100))
    lists = np.array([np.arange(3), np.arange(5)], dtype=object)
    table = np.zeros(10, dtype=[("n", "i4"), ("t", TEXT), ("y", "f8"), ("u", TEXT, (2,))])
    for i in range(10):
        table[i] = (i, "q" * i, 0.0, ["ab", "c"])
    with h5py.File(tmp_path / "a.h5", "w", libver=libver, userblock_size=userblock) as file:
        file.create_dataset("chunks", data=texts, dtype=TEXT, chunks=(700,), maxshape=(None,), **filters)
        file.create_dataset("matrix", data=matrix, dtype=TEXT, chunks=(30, 33), **filters)
        file.create_dataset("contiguous", data=texts, dtype=TEXT)
        file.create_dataset("table", data=table, chunks=(3,), **filters)
        file["numbers"] = h5py.Empty("f8")
        file["single"] = "hello"
        file.create_dataset("unwritten", shape=(100,), dtype=TEXT)
        file.create_dataset("nowhere", shape=(2**40,), dtype=TEXT, chunks=(2**10,), **filters)
        file.create_dataset("lists", data=lists, dtype=h5py.vlen_dtype("f4"))
    total = sum(len(text.encode()) for text in texts)
    assert measured(tmp_path / "a.h5") == {
        "chunks": total,
        "contiguous": total,
        "lists": 8 * 4,
        "matrix": total,
        "nowhere": 0,
        "numbers": 0,
        "single": 5,
        "table": 45 + 10 * 3,
        "unwritten": 0,
    }


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20), min_size=1, max_size=60
    ),
    size=st.integers(1, 70),
)
def test_any_texts_in_any_chunks(tmp_path_factory, texts, size):
    path = tmp_path_factory.mktemp("texts") / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a", data=texts, dtype=TEXT, chunks=(min(size, len(texts)),), compression="gzip")
    assert measured(path) == {"a": sum(len(text.encode()) for text in texts)}


def test_it_ends_where_it_is_enough(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, chunks in (("a", (10,)), ("b", None)):
            file.create_dataset(name, data=["x" * 100] * 200_000, dtype=TEXT, chunks=chunks)
        assert text_bytes(tmp_path / "a.h5", file["a"], enough=1500) == 2000
        assert text_bytes(tmp_path / "a.h5", file["b"], enough=1500) < 20_000_000


def test_files_are_opened_side_by_side(tmp_path):
    ad.AnnData(np.ones((500, 3), dtype=np.float32)).write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(open_anndata, [tmp_path / "a.h5ad"] * 24))
    assert {adata.n_obs for adata in opened} == {500}


def test_chunks_of_texts_are_of_a_size_that_is_unpacked(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", (2**20,), TEXT, chunks=(2**20,))
        file.create_dataset("b", (2**29,), TEXT, chunks=(2**29,))
        assert text_bytes(tmp_path / "a.h5", file["a"], enough=1) == 0
        with pytest.raises(ValueError, match="stored in chunks of 8589934592 bytes"):
            text_bytes(tmp_path / "a.h5", file["b"], enough=1)


def test_an_array_may_have_a_second_name_and_no_third(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_checks, "_SLACK_TEXTS", 0)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", data=["x" * 1000] * 1000, dtype=TEXT)
        file["b"] = file["a"]
    assert [size.texts for size in hdf5_checks.check_hdf5(tmp_path / "a.h5")] == [10**6, 10**6]
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["c"] = file["a"]
    with pytest.raises(ValueError, match=r"its texts take more than \d+ bytes, and the file has \d+: they share some"):
        hdf5_checks.check_hdf5(tmp_path / "a.h5")


def test_an_entry_holds_no_more_texts_than_a_table_has_columns(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", (2,), np.dtype([("a", TEXT, (1024,))]))
        assert len(layout_of(file["a"])[1]) == 1024
        file.create_dataset("b", (2,), np.dtype([("a", TEXT, (1025,))]))
        with pytest.raises(ValueError, match="an entry holds more than 1024 texts"):
            layout_of(file["b"])


def test_texts_in_texts_are_refused(tmp_path):
    inner = h5py.h5t.vlen_create(h5py.h5t.vlen_create(h5py.h5t.NATIVE_INT32))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        h5py.h5d.create(file.id, b"a", inner, h5py.h5s.create_simple((3,)))
    with pytest.raises(ValueError, match="of varying length hold entries of varying length"):
        measured(tmp_path / "a.h5")


def test_texts_in_the_head_of_an_array_are_measured(tmp_path):
    like = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    like.set_layout(h5py.h5d.COMPACT)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        h5py.h5d.create(file.id, b"a", h5py.h5t.py_create(TEXT, logical=True), h5py.h5s.create_simple((3,)), like)
        file["a"][:] = ["a", "bb", "ccc"]
        pair = h5py.h5t.py_create(np.dtype([("n", "i4"), ("t", TEXT), ("u", TEXT)]), logical=True)
        h5py.h5d.create(file.id, b"b", pair, h5py.h5s.create_simple((2,)), like)
        file["b"][0] = (1, "dd", "ee")
    assert measured(tmp_path / "a.h5") == {"a": 6, "b": 4}


def test_what_a_table_holds_beside_short_names_stays_legal(tmp_path):
    names = [f"cell{i}" for i in range(200)]
    obs = pd.DataFrame({"note": ["x" * 10_000] * 200}, index=names)
    for compression in (None, "gzip", "lzf"):
        ad.AnnData(np.ones((200, 3), dtype=np.float32), obs=obs).write_h5ad(
            tmp_path / "a.h5ad", compression=compression
        )
        assert open_anndata(tmp_path / "a.h5ad").n_obs == 200


def test_texts_count_as_memory(tmp_path, monkeypatch):
    import amici_eval.hdf5_checks as checks
    from amici_eval import files

    tissue = ad.AnnData(
        np.ones((200, 3), dtype=np.float32), uns={"notes": np.array(["x" * 10_000] * 200, dtype=object)}
    )
    tissue.write_h5ad(tmp_path / "a.h5ad")
    monkeypatch.setattr(checks, "_SMALL_BYTES", 0)
    monkeypatch.setattr(files, "available_memory", lambda: 1_000_000)
    with pytest.raises(DataError, match=r"its arrays would take 2\d{6} bytes, and 1000000 are free"):
        open_anndata(tmp_path / "a.h5ad", backed=False)
