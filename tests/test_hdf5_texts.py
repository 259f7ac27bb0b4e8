"""How long texts are is told without reading them."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amici_eval.errors import DataError
from amici_eval.files import open_anndata
from amici_eval.hdf5_texts import text_bytes

TEXT = h5py.string_dtype()
LETTERS = st.characters(exclude_characters="\0", codec="utf-8")


def measured(path):
    with h5py.File(path, "r") as file:
        return {name: text_bytes(path, file[name]) for name in file}


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


def test_texts_in_texts_are_refused(tmp_path):
    inner = h5py.h5t.vlen_create(h5py.h5t.vlen_create(h5py.h5t.NATIVE_INT32))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        h5py.h5d.create(file.id, b"a", inner, h5py.h5s.create_simple((3,)))
    with pytest.raises(ValueError, match="of varying length hold entries of varying length"):
        measured(tmp_path / "a.h5")


def test_texts_in_the_head_of_an_array_count_as_the_file(tmp_path):
    like = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    like.set_layout(h5py.h5d.COMPACT)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        h5py.h5d.create(file.id, b"a", h5py.h5t.py_create(TEXT, logical=True), h5py.h5s.create_simple((3,)), like)
        file["a"][:] = ["a", "b", "c"]
    assert measured(tmp_path / "a.h5") == {"a": 3 * (tmp_path / "a.h5").stat().st_size}


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
