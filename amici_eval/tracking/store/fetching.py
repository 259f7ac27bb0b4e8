"""Fetch AnnData from artifacts, web servers and object stores into a folder, and write nowhere else."""

from __future__ import annotations

import itertools
import json
import re
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlparse

from amici_eval.common.errors import DataError, first_line
from amici_eval.common.untrusted import load_json
from amici_eval.tracking.store.errors import patiently, store_errors, understood

NAMED = re.compile(r"[^/\\]*\.(h5ad|zarr(/tables?/[^/]+)?)/*$", re.IGNORECASE)
"""The end of a path or URI that names an AnnData, or a table of a SpatialData store."""
_MLFLOW_SCHEMES = ("runs", "models", "mlflow-artifacts", "dbfs")
_INDIRECT_SCHEMES = ("reference", "simplecache", "filecache", "blockcache", "zip", "tar", "libarchive", "dir")
_TIMEOUT_S = 30
_CHUNK_BYTES = 2**20
_MOST_CHUNKS = 10**6
_METADATA_BYTES = 2**26
_METADATA_VALUES = 2**21


def fetch(uri: str, folder: Path) -> Path:
    """Fetch an AnnData that is not on this machine into a folder."""
    parsed = urlparse(uri)
    if "::" in uri or parsed.scheme in _INDIRECT_SCHEMES:
        raise DataError(
            value=f"data.uri={uri}",
            rule="data must be named directly: chained file systems could write outside their folder",
            fix="give the URI of the .h5ad or .zarr itself",
        )
    named = NAMED.search(unquote(parsed.path))
    if named is None:
        raise DataError(
            value=f"data.uri={uri}",
            rule="data must be an AnnData written as .h5ad or .zarr",
            fix="correct the URI",
        )
    target = folder / named[0].rstrip("/")
    try:
        if parsed.scheme in _MLFLOW_SCHEMES:
            import mlflow.artifacts

            fetched = partial(mlflow.artifacts.download_artifacts, artifact_uri=uri, dst_path=str(folder))
            return Path(_again(fetched))
        if parsed.scheme not in ("http", "https"):
            _copy_from_store(uri, target)
        elif target.suffix.lower() == ".h5ad":
            _download(uri, target)
        else:
            _download_zarr(uri, target)
    except DataError:
        raise
    except Exception as error:
        fault = understood(error) if isinstance(error, store_errors()) else None
        check = "check the URI, your credentials, and that the fsspec package of its scheme is installed"
        raise DataError(
            value=f"{uri} cannot be fetched ({first_line(error) if fault is None else fault.said})",
            rule="data.uri must name a readable .h5ad or .zarr",
            fix=f"check the URI; if it is right, {fault.fix}" if fault is not None and fault.passing else check,
        ) from error
    return target


_again = partial(patiently, what="fetching the data")


def as_local_path(uri: str) -> Path | None:
    """Return the path that a URI names on this machine, ``None`` if it is elsewhere."""
    parsed = urlparse(uri)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path))
    # a one-letter scheme is a Windows drive
    return Path(uri).expanduser() if len(parsed.scheme) <= 1 else None


def _inside(folder: Path, key: str) -> Path:
    """Return the path in a folder for a store's key, or refuse a key that leads out of the folder."""
    if key.startswith("/") or "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise DataError(
            value=f"the store holds the key {key!r}",
            rule="keys must lie inside the .zarr",
            fix="do not use this store; somebody may want to write to your disk",
        )
    return folder.joinpath(*key.split("/"))


def _copy_from_store(uri: str, target: Path) -> None:
    """Copy a file, or a folder key by key, from a store that fsspec opens."""
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(uri)
    if target.suffix.lower() == ".h5ad":
        _again(partial(filesystem.get_file, path, str(target)))
        return
    root = path.rstrip("/") + "/"
    found = _again(partial(filesystem.find, path))
    if not found:
        raise FileNotFoundError(uri)
    for remote in found:
        local = _inside(target, remote.removeprefix(root))
        local.parent.mkdir(parents=True, exist_ok=True)
        _again(partial(filesystem.get_file, remote, str(local)))


def _download_zarr(url: str, target: Path) -> Path:
    """Fetch a .zarr from a web server, which cannot list it: its consolidated metadata name the arrays and chunks."""
    import requests

    base, _, query = url.partition("?")
    metadata = _download(_join(base, ".zmetadata", query), target / ".zmetadata", limit=_METADATA_BYTES)
    entries = load_json(metadata, limit=_METADATA_BYTES, max_values=_METADATA_VALUES, allow_nan=True)["metadata"]
    grids = {}
    for key, content in entries.items():
        if key.endswith(".zarray"):
            grids[key] = _chunk_grid(content["shape"], content["chunks"], ascii(key[:200]))
    if (asked := sum(map(prod, grids.values()))) > _MOST_CHUNKS:
        raise DataError(
            value=f"the arrays of {url} have {asked} chunks",
            rule=f"each would be asked for, and at most {_MOST_CHUNKS} are",
            fix="copy the .zarr to this machine, and give its folder",
        )
    for key, content in entries.items():
        place = _inside(target, key)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(content), encoding="utf-8")
        if key not in grids:
            continue
        separator = content.get("dimension_separator", ".")
        for chunk in itertools.product(*map(range, grids[key])):
            name = key.removesuffix(".zarray") + (separator.join(map(str, chunk)) or "0")
            try:
                _download(_join(base, name, query), _inside(target, name))
            except requests.HTTPError as error:
                # a chunk of fill values need not be stored
                if error.response.status_code != requests.codes.not_found:
                    raise
    return target


def _chunk_grid(shape: Any, chunks: Any, shown: str) -> list[int]:
    """Return how many chunks an array has along each axis, by what a web server says of it."""
    for sizes, least in ((shape, 0), (chunks, 1)):
        if not isinstance(sizes, list) or not all(type(size) is int and size >= least for size in sizes):
            msg = f"{shown} has sizes that are no whole numbers"
            raise ValueError(msg)
    if len(shape) != len(chunks):
        msg = f"{shown} of shape {shape} has chunks of shape {chunks}"
        raise ValueError(msg)
    return [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]


def _join(base: str, key: str, query: str) -> str:
    return f"{base.rstrip('/')}/{quote(key)}" + (f"?{query}" if query else "")


def _download(url: str, target: Path, *, limit: int | None = None) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    _again(partial(_get, url, target, limit))
    return target


def _get(url: str, target: Path, limit: int | None) -> None:
    import requests

    with requests.get(url, stream=True, timeout=_TIMEOUT_S) as answer:
        answer.raise_for_status()
        with target.open("wb") as file:
            for chunk in answer.iter_content(_CHUNK_BYTES):
                file.write(chunk)
                if limit is not None and file.tell() > limit:
                    msg = f"{target.name} has more than {limit} bytes"
                    raise ValueError(msg)
