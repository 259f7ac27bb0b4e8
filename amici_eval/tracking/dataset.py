"""AnnData as an MLflow dataset: its source, from which it is fetched, and what ``mlflow.models.evaluate`` hands on."""

# MLflow reads the return annotation of a constructor as an object: no `from __future__ import annotations` here

import itertools
import json
import re
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlparse

from mlflow.data.dataset import Dataset
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.evaluation_dataset import EvaluationDataset
from mlflow.data.pyfunc_dataset_mixin import PyFuncConvertibleDatasetMixin, PyFuncInputsOutputs

from amici_eval.common.errors import DataError, first_line
from amici_eval.common.files import load_json
from amici_eval.common.text import mask_secrets
from amici_eval.tracking.store import patiently, store_errors, understood

if TYPE_CHECKING:
    from anndata import AnnData

NAMED = re.compile(r"[^/\\]*\.(h5ad|zarr(/tables?/[^/]+)?)/*$", re.IGNORECASE)
"""The end of a path or URI that names an AnnData, or a table of a SpatialData store."""
_MLFLOW_SCHEMES = ("runs", "models", "mlflow-artifacts", "dbfs")
_INDIRECT_SCHEMES = ("reference", "simplecache", "filecache", "blockcache", "zip", "tar", "libarchive", "dir")
_TIMEOUT_S = 30
_CHUNK_BYTES = 2**20
_MOST_CHUNKS = 10**6
_METADATA_BYTES = 2**26
_METADATA_VALUES = 2**21


class AnnDataSource(DatasetSource):
    """Where an AnnData lies: a local path, which is made absolute, or a URI.

    A URI is ``file:``, ``runs:/``, ``models:/``, ``mlflow-artifacts:/``, ``http(s)`` or any that fsspec opens (``s3:``,
    ``gs:``, ``az:``, ``memory:`` with their packages). It ends in ``.h5ad`` or ``.zarr``, or in ``.zarr/tables/NAME``
    for a table of a SpatialData store.
    """

    def __init__(self, uri: str) -> None:
        path = as_local_path(uri)
        self._uri = uri if path is None else str(path.absolute())

    @property
    def uri(self) -> str:
        """The URI or absolute path."""
        return self._uri

    @staticmethod
    def _get_source_type() -> str:
        return "anndata"

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        # claim only names of AnnData files: MLflow asks every class of sources about every dataset
        return isinstance(raw_source, (str, Path)) and NAMED.search(str(raw_source)) is not None

    @classmethod
    def _resolve(cls, raw_source: Any) -> "AnnDataSource":
        return cls(str(raw_source))

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"uri": ...}`` without credentials: a tracking store keeps this."""
        return {"uri": mask_secrets(self._uri)}

    @classmethod
    def from_dict(cls, source_dict: dict[Any, Any]) -> "AnnDataSource":
        """Rebuild a source from :meth:`to_dict`."""
        return cls(source_dict["uri"])

    def load(self) -> str:
        """Fetch the AnnData if it is remote and return a local path, which the caller owns."""
        local = as_local_path(self._uri)
        if local is None:
            local = fetch(self._uri, Path(tempfile.mkdtemp(prefix="amici-eval-data-")))
        return str(local)

    @contextmanager
    def local_copy(self) -> Iterator[Path]:
        """Yield a local path to the AnnData; a fetched copy is removed after the body."""
        local = as_local_path(self._uri)
        if local is not None:
            yield local
            return
        with tempfile.TemporaryDirectory(prefix="amici-eval-data-") as folder:
            yield fetch(self._uri, Path(folder))

    def open(self, *, backed: bool | None = None) -> "AnnData":
        """Read the AnnData; a fetched copy is removed as soon as nothing is read from it any more."""
        from amici_eval.data.files import is_on_disk, open_anndata

        with ExitStack() as stack:
            adata = open_anndata(stack.enter_context(self.local_copy()), backed=backed)
            if is_on_disk(adata):
                weakref.finalize(adata, stack.pop_all().close)
        return adata


class AnnDataEvaluationDataset(EvaluationDataset):
    """The dataset that ``mlflow.models.evaluate`` hands to the evaluator: it holds the AnnData itself."""

    def __init__(self, adata: "AnnData", *, name: str | None, digest: str, path: str | None = None) -> None:
        import numpy as np

        # the base class requires a table of features: give it the row numbers
        super().__init__(np.arange(adata.n_obs)[:, None], name=name, path=path, digest=digest)
        self._hash = digest
        self.adata = adata


class AnnDataDataset(Dataset, PyFuncConvertibleDatasetMixin):
    """A spatial AnnData as an MLflow dataset, with a digest of its content.

    Use :func:`from_anndata` (also ``mlflow.data.from_anndata``).
    """

    def __init__(
        self, adata: "AnnData", source: DatasetSource, name: str | None = None, digest: str | None = None
    ) -> None:
        self._adata = adata
        super().__init__(source=source, name=name, digest=digest)

    @property
    def adata(self) -> "AnnData":
        """The AnnData."""
        return self._adata

    def _compute_digest(self) -> str:
        from amici_eval.data.files import content_digest

        return content_digest(self._adata)

    @property
    def schema(self) -> None:
        """None: an AnnData has no column schema in MLflow's sense."""
        return None

    @property
    def profile(self) -> dict[str, int]:
        """Numbers of cells and genes."""
        return {"n_cells": int(self._adata.n_obs), "n_genes": int(self._adata.n_vars)}

    def to_dict(self) -> dict[str, str]:
        """Return name, digest, source and profile as text, for the tracking store."""
        return {**super().to_dict(), "profile": json.dumps(self.profile)}

    def to_pyfunc(self) -> PyFuncInputsOutputs:
        """Return the AnnData as the input of the model."""
        return PyFuncInputsOutputs(inputs=[self._adata])

    def to_evaluation_dataset(
        self,
        path: str | None = None,
        feature_names: list[str] | None = None,  # noqa: ARG002, RUF100 - MLflow's signature
    ) -> AnnDataEvaluationDataset:
        """Return the AnnData for ``mlflow.models.evaluate``."""
        return AnnDataEvaluationDataset(self._adata, name=self._name, digest=self.digest, path=path)


def from_anndata(
    adata: "AnnData | str | Path",
    source: "str | Path | DatasetSource | None" = None,
    name: str | None = None,
    digest: str | None = None,
    *,
    backed: bool | None = None,
    table: str | None = None,
) -> AnnDataDataset:
    """Make an MLflow dataset of an AnnData, for ``mlflow.log_input`` and ``mlflow.models.evaluate``.

    Parameters
    ----------
    adata
        The AnnData, or a path or URI of one (see :class:`AnnDataSource`), which is then read and is the source.
    source
        Where the AnnData came from; it lets later runs find it again.
    name
        Name of the dataset; by default the file's name without suffix, or ``anndata``.
    digest
        Fingerprint of at most 36 characters; by default computed from the content.
    backed
        Whether the expression of a path or URI stays on disk; by default if it is large. See
        :func:`amici_eval.open_anndata`.
    table
        Which table of a SpatialData store that a path or URI names.

    Raises
    ------
    DataError
        If a path or URI cannot be read.
    """
    if isinstance(adata, (str, Path)):
        from amici_eval.data.files import with_table

        origin = AnnDataSource(with_table(adata, table))
        source = source if source is not None else origin
        adata = origin.open(backed=backed)
    if isinstance(source, (str, Path)):
        source = AnnDataSource(str(source))
    if source is None:
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.tracking.context import registry

        source = CodeDatasetSource(tags=registry.resolve_tags())
    if name is None:
        name = Path(urlparse(source.uri).path).stem if isinstance(source, AnnDataSource) else "anndata"
    return AnnDataDataset(adata, source=source, name=name, digest=digest)


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
