"""A registry without AMICI: models that are only names and versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@dataclass(frozen=True)
class BareModel:
    uri: str
    name: str
    client: Any

    def aliases(self) -> dict[str, str]:
        return {alias: str(version) for alias, version in self.client.get_registered_model(self.name).aliases.items()}

    def tags(self, version: str | None = None) -> dict[str, str]:
        if version is None:
            return dict(self.client.get_registered_model(self.name).tags)
        return dict(self.client.get_model_version(self.name, version).tags)


@pytest.fixture(scope="session")
def _bare_store(new_store: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_store(tmp_path_factory.mktemp("bare") / "mlflow.db")


@pytest.fixture
def bare_model(_bare_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BareModel]:
    """A new registered model with versions 1, 2 and 3 and no alias, in MLflow's tracking store."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(_bare_store)
    client = mlflow.MlflowClient()
    model = BareModel(uri=_bare_store, name=f"bare-{uuid4().hex[:8]}", client=client)
    client.create_registered_model(model.name)
    for number in (1, 2, 3):
        client.create_model_version(model.name, source=f"s3://nowhere/{number}")
    try:
        yield model
    finally:
        mlflow.set_tracking_uri(before)
