"""The MLflow flavor ``amici``: a trained AMICI as a logged and registered model, without pickle."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import yaml

from amici_eval.common.errors import (
    DataError,
    InvalidSpecError,
    ModelFormatError,
    ModelNotFoundError,
    OutputError,
    first_line,
)
from amici_eval.common.files import odd_character, read_plain_file
from amici_eval.common.text import mask_secrets
from amici_eval.tracking.store import patiently, tracking_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from mlflow.models import Model
    from mlflow.models.model import ModelInfo

    from amici_eval.model.checkpoint import TrainedAMICI
    from amici_eval.settings.evaluation import TrainedOnSpec

__all__ = ["FLAVOR_NAME", "load_model", "log_model", "refuse_credentials_in_uri", "save_model"]

FLAVOR_NAME = "amici"
_MOST_BYTES = 2**20
_DEEPEST = 64


@dataclass(frozen=True)
class StoredModel:
    """A model of flavor ``amici`` in a local folder.

    ``bundled_adata``: the AnnData stored with it, there as long as the folder; ``adata_uri``: recorded location of its
    AnnData; ``data_path``: folder inside the model that holds its files; ``digest``: SHA-256 of the manifest, which
    holds those of the files.
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
    """
    from amici_eval.model.checkpoint import BUNDLED_ADATA, TrainedAMICI
    from amici_eval.model.manifest import MANIFEST, check_recorded, damaged, listed_files

    with tempfile.TemporaryDirectory(prefix="amici-eval-model-") as staging:
        if Path(model_uri).is_dir():
            folder = Path(model_uri)
        else:
            folder = _fetched(model_uri, staging)
        settings = _flavor_settings(folder, model_uri)
        data = (folder / settings["data"]).resolve() if settings["data"] else folder
        if not settings["data"] or not data.is_relative_to(folder.resolve()) or not data.is_dir():
            raise ModelFormatError(
                value=f"{model_uri} names {settings['data']!a:.200} as its data",
                rule="the data of a model must be a folder inside it",
                fix="register the model again",
            )
        if "sha256" in settings:
            check_recorded(data, settings["sha256"])
        trained = TrainedAMICI.load(data)
        bundled = data / BUNDLED_ADATA if settings.get("bundled_adata") else None
        if bundled is not None and bundled.name not in listed_files(data):
            raise damaged(data, f"the manifest lacks {bundled.name}")
        yield StoredModel(
            trained=trained,
            bundled_adata=bundled,
            adata_uri=settings.get("adata_uri"),
            model_id=settings.get("model_id"),
            data_path=settings["data"],
            digest=hashlib.sha256((data / MANIFEST).read_bytes()).hexdigest(),
        )


def _fetched(model_uri: str, staging: str) -> Path:
    from mlflow.artifacts import download_artifacts

    fetch = partial(download_artifacts, artifact_uri=model_uri, dst_path=staging)
    try:
        with tracking_errors():
            return Path(patiently(fetch, what="fetching the model"))
    except (ModelNotFoundError, InvalidSpecError, OutputError, ValueError) as error:
        raise ModelNotFoundError(
            value=f"{model_uri} cannot be fetched ({getattr(error, 'value', None) or first_line(error)})",
            rule="it must name a model in the tracking store or a local folder",
            fix="write models:/NAME/VERSION, models:/NAME@ALIAS or models:/m-ID, and check tracking.uri",
        ) from error


def _flavor_settings(folder: Path, model_uri: str) -> dict[str, Any]:
    try:
        text = read_plain_file(folder / "MLmodel", limit=_MOST_BYTES).decode("utf-8")
        content = yaml.load(text, Loader=_PlainLoader)  # noqa: S506, RUF100 - a safe loader that takes less
        flavors = content["flavors"]
        names = sorted(map(str, flavors))
        settings = flavors[FLAVOR_NAME] if isinstance(flavors, dict) and FLAVOR_NAME in flavors else None
        if isinstance(settings, dict):
            settings = {"data": "", "adata_uri": None, **settings, "model_id": content.get("model_id")}
            _check_texts(settings)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ModelFormatError(
            value=f"{model_uri} has no readable MLmodel file ({first_line(error)})",
            rule="it must be a model that MLflow logged",
            fix="check the URI, or register the model again",
        ) from error
    if not isinstance(settings, dict):
        raise ModelFormatError(
            value=f"{model_uri} is a model of flavor {', '.join(names)[:200] or 'none'}",
            rule=f"it must have the flavor {FLAVOR_NAME!r}",
            fix="register it with amici-eval register model_dir=... name=... data.uri=...",
        )
    return settings


def _check_texts(settings: Mapping[str, Any]) -> None:
    for name in ("data", "adata_uri", "model_id"):
        value = settings[name]
        if value is not None and (not isinstance(value, str) or odd_character(value) is not None):
            msg = f"{name} is {value!a:.80}, which is no plain text"
            raise ValueError(msg)
    if "\\" in (settings["data"] or ""):
        msg = f"data is {settings['data']!a:.80}; folders are written with /"
        raise ValueError(msg)


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without constructors, anchors and aliases, at most 64 deep, so that small files stay small."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            msg = "it holds an alias or an anchor"
            raise yaml.YAMLError(msg)
        if self._depth > _DEEPEST:
            msg = f"it is nested more than {_DEEPEST} deep"
            raise yaml.YAMLError(msg)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


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
        As for :func:`~amici_eval.tracking.flavor.open_stored_model`.

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
