"""Tags of a registered model or of one of its versions: all that the registry offers for notes between processes."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from amici_eval.errors import ModelNotFoundError, TrackingError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RegistryTags", "registry_errors"]


@contextmanager
def registry_errors(what: str) -> Iterator[None]:
    """Turn errors of MLflow's registry into ours.

    Parameters
    ----------
    what
        The model or version that is asked about, for the message.

    Raises
    ------
    ModelNotFoundError
        If it is not there.
    TrackingError
        If the registry does not answer or refuses.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise ModelNotFoundError(
                value=f"{what}: {first_line(error)}",
                rule="it must be in the registry",
                fix="check the name, the version and tracking.uri",
            ) from error
        raise _no_answer(what, error) from error
    except (RequestException, OSError) as error:
        raise _no_answer(what, error) from error


def _no_answer(what: str, error: Exception) -> TrackingError:
    return TrackingError(
        value=f"the registry does not answer for {what} ({first_line(error)})",
        rule="it must be an MLflow server that you may read and write",
        fix="check the server, tracking.uri and your credentials",
    )


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

    def read(self) -> dict[str, str]:
        """Return all tags.

        Raises
        ------
        AmiciEvalError
            If the model is not there or the registry does not answer; so do the other methods.
        """
        with registry_errors(self.where):
            if self.version is None:
                return dict(self.client.get_registered_model(self.name).tags)
            return dict(self.client.get_model_version(self.name, self.version).tags)

    def write(self, key: str, value: str) -> None:
        """Set a tag."""
        with registry_errors(self.where):
            if self.version is None:
                self.client.set_registered_model_tag(self.name, key, value)
            else:
                self.client.set_model_version_tag(self.name, self.version, key, value)

    def remove(self, key: str) -> None:
        """Delete a tag; one that is gone already is no error."""
        with registry_errors(self.where):
            if self.version is None:
                self.client.delete_registered_model_tag(self.name, key)
            else:
                self.client.delete_model_version_tag(self.name, self.version, key)
