"""The MLflow flavor ``amici``: a trained AMICI as a logged and registered model, without pickle."""

from __future__ import annotations

import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from amici_eval.common.errors import DataError, InvalidSpecError
from amici_eval.common.text import mask_secrets
from amici_eval.tracking.stored_model import FLAVOR_NAME, open_stored_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from mlflow.models import Model
    from mlflow.models.model import ModelInfo

    from amici_eval.model.checkpoint import TrainedAMICI
    from amici_eval.settings.evaluation import TrainedOnSpec

__all__ = ["FLAVOR_NAME", "load_model", "log_model", "refuse_credentials_in_uri", "save_model"]

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
    trained_on: TrainedOnSpec | None = None,
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
        The AnnData the model was trained on, or a tissue that holds its cells, if the model does not hold it.
    trained_on
        Which of its cells the model was trained on, if not all: ``TrainedOnSpec(key="in_test", value="false")``.
    metadata
        Further entries for the metadata of the MLmodel file.
    mlflow_model
        Set by MLflow when logging.

    Raises
    ------
    InvalidSpecError
        If the URI holds credentials.
    ModelFormatError
        If the model is no trained ``amici.AMICI``.
    """
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    from amici_eval.data.files import write_plain
    from amici_eval.model.checkpoint import BUNDLED_ADATA, TrainedAMICI
    from amici_eval.model.manifest import sums_of, write_manifest

    if isinstance(adata, str):
        refuse_credentials_in_uri(adata)
    source = training_adata if training_adata is not None else getattr(model, "adata", None)
    trained = (
        model
        if isinstance(model, TrainedAMICI)
        else TrainedAMICI.from_amici(model, adata=training_adata, trained_on=trained_on)
    )
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
        **_unshared(dict(metadata or {})),
    }
    # outputs only: a column signature for inputs would reject an AnnData
    mlflow_model.signature = ModelSignature(
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, len(card.genes)), name="expression")])
    )
    with tempfile.TemporaryDirectory(prefix="amici-eval-") as staging:
        folder = Path(staging) / _FOLDER
        trained.save(folder)
        if adata is not None and not isinstance(adata, str):
            write_plain(adata, folder / BUNDLED_ADATA)
            write_manifest(folder)
        mlflow_model.add_flavor(
            FLAVOR_NAME,
            data=f"data/{_FOLDER}",
            amici_version=card.versions.get("amici-st", "unknown"),
            scvi_version=card.versions.get("scvi-tools", "unknown"),
            bundled_adata=adata is not None and not isinstance(adata, str),
            adata_uri=adata if isinstance(adata, str) else None,
            sha256=sums_of(folder),
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


def refuse_credentials_in_uri(adata: str) -> None:
    """Refuse a URI with credentials: everybody who may read the model could read them."""
    if mask_secrets(adata) != adata:
        raise InvalidSpecError(
            value=f"adata={adata!r} holds credentials",
            rule="everybody who may read the model would be given them",
            fix="name the data without, and give credentials by the environment of whoever reads it",
        )


def _unshared(value: Any) -> Any:
    """Return a copy of plain values without shared parts: YAML writes those as aliases, which our reader refuses."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def log_model(
    model: Any,
    name: str = "model",
    *,
    registered_model_name: str | None = None,
    adata: AnnData | str | None = None,
    training_adata: AnnData | None = None,
    trained_on: TrainedOnSpec | None = None,
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
    adata, training_adata, trained_on, metadata
        As in :func:`save_model`.
    tags
        Tags of the logged model.

    Returns
    -------
    ModelInfo
        MLflow's record, with ``model_uri``, ``model_id`` and ``registered_model_version``.

    Raises
    ------
    InvalidSpecError
        If MLflow would refuse a name; before anything is written.
    """
    import mlflow
    from mlflow.models import Model

    from amici_eval.tracking.registry import check_model_name

    check_model_name("name", name, kind="logged")
    if registered_model_name is not None:
        check_model_name("registered_model_name", registered_model_name)

    return Model.log(
        artifact_path=None,
        name=name,
        # older releases of MLflow take no flavor_name
        flavor=SimpleNamespace(__name__=FLAVOR_NAME, save_model=save_model),
        model_type=FLAVOR_NAME,
        registered_model_name=registered_model_name,
        run_id=run.info.run_id if (run := mlflow.active_run()) else None,
        metadata=metadata,
        tags=None if tags is None else dict(tags),
        model=model,
        adata=adata,
        training_adata=training_adata,
        trained_on=trained_on,
    )


def load_model(model_uri: str) -> TrainedAMICI:
    """Load a model of flavor ``amici``; nothing in it can run code.

    Parameters
    ----------
    model_uri
        As for :func:`~amici_eval.tracking.stored_model.open_stored_model`.

    Returns
    -------
    TrainedAMICI
        The trained model apart from any tissue: pass it to :func:`amici_eval.evaluate`, call ``predict(adata)``, or
        ``bind(adata)`` for a native ``amici.AMICI``.
    """
    with open_stored_model(model_uri) as stored:
        return stored.trained


class _PyFuncAMICI:
    """The model that MLflow's generic loader returns; ``predict`` gives the unablated model's expression."""

    def __init__(self, trained: TrainedAMICI) -> None:
        self._trained = trained

    def get_raw_model(self) -> TrainedAMICI:
        return self._trained

    def predict(self, model_input: AnnData | str | Path | pd.DataFrame, params: object = None) -> np.ndarray:
        """Return predictions, shape (cells, genes), for an AnnData, a path or URI, or a one-column frame of them."""
        import numpy as np
        import pandas as pd

        from amici_eval.data.files import open_anndata
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
