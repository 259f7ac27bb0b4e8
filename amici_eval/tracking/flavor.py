"""The MLflow flavor ``amici``: a trained AMICI as a logged and registered model, without pickle."""

from __future__ import annotations

import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from amici_eval.errors import DataError, InvalidSpecError, ModelFormatError, ModelNotFoundError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from mlflow.models import Model
    from mlflow.models.model import ModelInfo

    from amici_eval.model.checkpoint import TrainedAMICI

__all__ = ["FLAVOR_NAME", "StoredModel", "load_model", "log_model", "open_stored_model", "save_model"]

FLAVOR_NAME = "amici"
_FOLDER = "amici"
_PINNED = (
    "amici-eval",
    "amici-st",
    "anndata",
    "mlflow",
    "numpy",
    "pyarrow",
    "safetensors",
    "scvi-tools",
    "torch",
    "transformers",
)


def save_model(
    model: Any,
    path: str | Path,
    *,
    adata: AnnData | str | None = None,
    training_adata: AnnData | None = None,
    metadata: Mapping[str, Any] | None = None,
    mlflow_model: Model | None = None,
) -> None:
    """Write a trained AMICI as an MLflow model into a new folder.

    Parameters
    ----------
    model
        A trained ``amici.AMICI``, or what :func:`load_model` returns.
    path
        Folder that does not exist yet.
    adata
        ``"bundle"`` stores the training AnnData with the model; another text is recorded as the URI where it is; an
        AnnData is bundled itself.
    training_adata
        The AnnData the model was trained on, if the model does not hold it.
    metadata
        Further entries for the metadata of the MLmodel file.
    mlflow_model
        Set by MLflow when logging.

    Raises
    ------
    ModelFormatError
        If the model is no trained ``amici.AMICI``.
    """
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    from amici_eval.model.checkpoint import BUNDLED_ADATA, TrainedAMICI
    from amici_eval.model.manifest import write_manifest

    source = training_adata if training_adata is not None else getattr(model, "adata", None)
    trained = model if isinstance(model, TrainedAMICI) else TrainedAMICI.from_amici(model, adata=training_adata)
    if isinstance(adata, str) and adata == "bundle":
        if source is None:
            raise DataError(
                value='adata="bundle"', rule="the training AnnData must be at hand", fix="pass it as training_adata"
            )
        adata = source
    card = trained.card
    mlflow_model = mlflow_model if mlflow_model is not None else Model()
    mlflow_model.metadata = {
        **(mlflow_model.metadata or {}),
        "amici_eval": {
            "n_heads": card.n_heads,
            "n_genes": len(card.genes),
            "n_neighbors": card.n_neighbors,
            "cell_types": list(card.cell_types),
            "versions": dict(card.versions),
        },
        **(metadata or {}),
    }
    # outputs only: a column signature for inputs would reject an AnnData
    mlflow_model.signature = ModelSignature(
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, len(card.genes)), name="expression")])
    )
    with tempfile.TemporaryDirectory(prefix="amici-eval-") as staging:
        folder = Path(staging) / _FOLDER
        trained.save(folder)
        if adata is not None and not isinstance(adata, str):
            # the default converts text columns of the AnnData that was handed in
            adata.write_h5ad(folder / BUNDLED_ADATA, convert_strings_to_categoricals=False)
            write_manifest(folder)
        mlflow_model.add_flavor(
            FLAVOR_NAME,
            data=f"data/{_FOLDER}",
            amici_version=card.versions.get("amici-st", "unknown"),
            scvi_version=card.versions.get("scvi-tools", "unknown"),
            bundled_adata=adata is not None and not isinstance(adata, str),
            adata_uri=adata if isinstance(adata, str) else None,
        )
        with warnings.catch_warnings():
            # there is no input example of an AnnData, and the signature has no inputs to check
            warnings.filterwarnings("ignore", message="(?s).*input example was not provided")
            mlflow.pyfunc.save_model(
                path=str(path),
                loader_module=__name__,
                data_path=str(folder),
                mlflow_model=mlflow_model,
                pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in _PINNED],
                # MLflow infers a signature from the type hints of a predict function; ours is set above
                signature=mlflow_model.signature,
            )


def log_model(
    model: Any,
    name: str = "model",
    *,
    registered_model_name: str | None = None,
    adata: AnnData | str | None = None,
    training_adata: AnnData | None = None,
    metadata: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
) -> ModelInfo:
    """Log a trained AMICI, to the active MLflow run if there is one, and register it if named.

    Parameters
    ----------
    model
        A trained ``amici.AMICI``, or what :func:`load_model` returns.
    name
        Name of the logged model.
    registered_model_name
        Registers it as a new version of this model.
    adata, training_adata, metadata
        As in :func:`save_model`.
    tags
        Tags of the logged model.

    Returns
    -------
    ModelInfo
        MLflow's record, with ``model_uri``, ``model_id`` and ``registered_model_version``.
    """
    import mlflow
    from mlflow.models import Model

    import amici_eval.tracking.flavor as flavor

    return Model.log(
        artifact_path=None,
        name=name,
        flavor=flavor,
        flavor_name=FLAVOR_NAME,
        model_type=FLAVOR_NAME,
        registered_model_name=registered_model_name,
        run_id=run.info.run_id if (run := mlflow.active_run()) else None,
        metadata=metadata,
        tags=None if tags is None else dict(tags),
        model=model,
        adata=adata,
        training_adata=training_adata,
    )


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
    """

    trained: TrainedAMICI
    bundled_adata: Path | None
    adata_uri: str | None
    model_id: str | None
    data_path: str

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
    from amici_eval.model.manifest import damaged, listed_files

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


def load_model(model_uri: str) -> TrainedAMICI:
    """Load a model of flavor ``amici``; nothing in it can run code.

    Parameters
    ----------
    model_uri
        As for :func:`open_stored_model`.

    Returns
    -------
    TrainedAMICI
        The trained model apart from any tissue: pass it to :func:`amici_eval.evaluate`, call ``predict(adata)``, or
        ``bind(adata)`` for a native ``amici.AMICI``.
    """
    with open_stored_model(model_uri) as stored:
        return stored.trained


class _PyFuncAMICI:
    """What MLflow's generic loader hands out; ``predict`` returns the expression the unablated model predicts."""

    def __init__(self, trained: TrainedAMICI) -> None:
        self._trained = trained

    def get_raw_model(self) -> TrainedAMICI:
        return self._trained

    def predict(self, model_input: AnnData | str | Path | pd.DataFrame, params: object = None) -> np.ndarray:
        """Return predictions, shape (cells, genes), for an AnnData, a path or URI, or a one-column frame of them."""
        import numpy as np
        import pandas as pd

        from amici_eval.data import open_anndata
        from amici_eval.tracking.dataset import AnnDataSource

        if params:
            raise InvalidSpecError(value=f"params={params!r}", rule="predict takes no parameters", fix="drop them")
        if isinstance(model_input, pd.DataFrame):
            if model_input.shape[1] != 1 or model_input.empty:
                raise DataError(
                    value=f"a frame of shape {model_input.shape}",
                    rule="a frame must have one column with the path of an AnnData in each row",
                    fix="pass pandas.DataFrame({'path': [...]})",
                )
            return np.concatenate([self.predict(path) for path in model_input.iloc[:, 0]])
        if isinstance(model_input, (str, Path)):
            with AnnDataSource(str(model_input)).local_copy() as path:
                return self._trained.predict(open_anndata(path))
        return self._trained.predict(model_input)


def _load_pyfunc(path: str) -> _PyFuncAMICI:
    """Entry point of ``mlflow.pyfunc.load_model``; its name is MLflow's."""
    from amici_eval.model.checkpoint import TrainedAMICI

    return _PyFuncAMICI(TrainedAMICI.load(Path(path)))
