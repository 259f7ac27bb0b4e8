"""A logged model opened by our own reader: nothing that it names or holds can run code."""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from amici_eval.common.errors import InvalidSpecError, ModelFormatError, ModelNotFoundError, OutputError, first_line
from amici_eval.common.untrusted import odd_character, read_plain_file
from amici_eval.tracking.store.errors import patiently, tracking_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from amici_eval.model.checkpoint import TrainedAMICI

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
