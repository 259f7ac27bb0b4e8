"""Tags of a registered model or of one of its versions: all that the registry offers for notes between processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from amici_eval.tracking.store.errors import patiently, tracking_errors

__all__ = ["RegistryTags"]


def _client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient()


@dataclass(frozen=True, kw_only=True)
class RegistryTags:
    """Tags of a registered model, or of one of its versions.

    Parameters
    ----------
    name
        Registered model.
    version
        One of its versions; ``None``: the tags of the model itself.
    client
        ``MlflowClient``; by default one for the tracking store of this process.
    """

    name: str
    version: str | None = None
    client: Any = field(default_factory=_client, repr=False, compare=False)

    @property
    def where(self) -> str:
        """What the tags are of, for messages."""
        return self.name if self.version is None else f"{self.name} version {self.version}"

    def ask(self, call: str, *more: str) -> Any:
        """Call a method of the client for this model or version: ``get_{}``, ``set_{}_tag``, ``set_{}_alias``, ..."""
        of, where = (
            ("registered_model", [self.name]) if self.version is None else ("model_version", [self.name, self.version])
        )
        with tracking_errors(self.where):
            return patiently(partial(getattr(self.client, call.format(of)), *where, *more), what="asking the registry")

    def read(self) -> dict[str, str]:
        """Return all tags."""
        return dict(self.ask("get_{}").tags)

    def write(self, key: str, value: str) -> None:
        """Set a tag."""
        self.ask("set_{}_tag", key, value)

    def remove(self, key: str) -> None:
        """Delete a tag; one that is gone already is no error."""
        self.ask("delete_{}_tag", key)
