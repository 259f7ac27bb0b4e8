"""A logged model opened by our own reader: nothing that it names or holds can run code."""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from amici_eval.errors import ModelFormatError, ModelNotFoundError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from amici_eval.model.checkpoint import TrainedAMICI

__all__ = ["FLAVOR_NAME", "StoredModel", "open_stored_model"]

FLAVOR_NAME = "amici"


@dataclass(frozen=True)
class StoredModel:
    """A model of flavor ``amici`` in a local folder.

    Parameters
    ----------
    trained
        The model.
    bundled_adata
        The AnnData stored with it, if any; it lives as long as the folder.
    adata_uri
        Where its AnnData was recorded to be, if so.
    model_id
        Id of the logged model, if it was logged.
    data_path
        Folder inside the model that holds its files.
    digest
        SHA-256 of the manifest, which holds those of the files.
    """

    trained: TrainedAMICI
    bundled_adata: Path | None
    adata_uri: str | None
    model_id: str | None
    data_path: str
    digest: str

    def bundle_uri(self, model_uri: str) -> str:
        """Return where the bundled AnnData stays, given the URI of the model."""
        from amici_eval.model.checkpoint import BUNDLED_ADATA

        return f"{model_uri.rstrip('/')}/{self.data_path}/{BUNDLED_ADATA}"


@contextmanager
def open_stored_model(model_uri: str) -> Iterator[StoredModel]:
    """Fetch a model and read it with amici_eval's own reader; the fetched copy is removed after the body.

    Only ``MLmodel`` (YAML, read without constructors), JSON and safetensors are read. The ``loader_module`` and code
    paths that an MLmodel file may name are never followed, so that opening a registered model runs no code of it.

    Parameters
    ----------
    model_uri
        ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, ``models:/m-...``, ``runs:/...`` or a local folder.

    Raises
    ------
    ModelNotFoundError
        If nothing is there.
    ModelFormatError
        If it is of another flavor or damaged.
    """
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    from amici_eval.model.checkpoint import BUNDLED_ADATA, TrainedAMICI
    from amici_eval.model.manifest import MANIFEST, damaged, listed_files

    with tempfile.TemporaryDirectory(prefix="amici-eval-model-") as staging:
        if Path(model_uri).is_dir():
            folder = Path(model_uri)
        else:
            try:
                folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri, dst_path=staging))
            except (MlflowException, OSError, ValueError) as error:
                raise ModelNotFoundError(
                    value=f"{model_uri} cannot be fetched ({first_line(error)})",
                    rule="it must name a model in the tracking store or a local folder",
                    fix="write models:/NAME/VERSION, models:/NAME@ALIAS or models:/m-ID, and check tracking.uri",
                ) from error
        settings = _flavor_settings(folder, model_uri)
        data = (folder / str(settings.get("data", ""))).resolve()
        if not data.is_relative_to(folder.resolve()) or not data.is_dir():
            raise ModelFormatError(
                value=f"{model_uri} names {settings.get('data')!r} as its data",
                rule="the data of a model must be a folder inside it",
                fix="register the model again",
            )
        trained = TrainedAMICI.load(data)
        bundled = data / BUNDLED_ADATA if settings.get("bundled_adata") else None
        if bundled is not None and bundled.name not in listed_files(data):
            raise damaged(data, f"the manifest lacks {bundled.name}")
        yield StoredModel(
            trained=trained,
            bundled_adata=bundled,
            adata_uri=settings.get("adata_uri"),
            model_id=settings.get("model_id"),
            data_path=str(settings["data"]),
            digest=hashlib.sha256((data / MANIFEST).read_bytes()).hexdigest(),
        )


def _flavor_settings(folder: Path, model_uri: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
        flavors = content["flavors"]
        names = sorted(flavors)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ModelFormatError(
            value=f"{model_uri} has no readable MLmodel file ({first_line(error)})",
            rule="it must be a model that MLflow logged",
            fix="check the URI, or register the model again",
        ) from error
    if FLAVOR_NAME not in flavors or not isinstance(flavors[FLAVOR_NAME], dict):
        raise ModelFormatError(
            value=f"{model_uri} is a model of flavor {', '.join(names) or 'none'}",
            rule=f"it must have the flavor {FLAVOR_NAME!r}",
            fix="register it with amici-eval register model_dir=... name=... data.uri=...",
        )
    return {**flavors[FLAVOR_NAME], "model_id": content.get("model_id")}
