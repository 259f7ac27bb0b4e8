"""AnnData as an MLflow dataset: constructor, source and what ``mlflow.models.evaluate`` hands to the evaluator."""

# MLflow reads the return annotation of a constructor as an object: no `from __future__ import annotations` here

import json
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from mlflow.data.dataset import Dataset
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.evaluation_dataset import EvaluationDataset
from mlflow.data.pyfunc_dataset_mixin import PyFuncConvertibleDatasetMixin, PyFuncInputsOutputs

from amici_eval.common.text import mask_secrets
from amici_eval.tracking.store.fetching import NAMED, as_local_path, fetch

if TYPE_CHECKING:
    from anndata import AnnData


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
