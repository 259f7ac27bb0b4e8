"""AMICI's data loader, kept from other scvi-tools models in the process."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["give_own_data_splitter", "own_data_loader"]


@contextmanager
def own_data_loader() -> Iterator[None]:
    """Restore scvi-tools' data loader after the body.

    ``AMICI.__init__`` sets ``DataSplitter.data_loader_cls`` for the whole process, so that any other scvi-tools model
    would then train with AMICI's loader.
    """
    from scvi.dataloaders import DataSplitter

    before = DataSplitter.data_loader_cls
    try:
        yield
    finally:
        DataSplitter.data_loader_cls = before


def give_own_data_splitter(model: Any) -> None:
    """Let one model train with AMICI's loader without touching the class that all scvi-tools models share."""
    base = type(model)._data_splitter_cls
    model._data_splitter_cls = type(base.__name__, (base,), {"data_loader_cls": type(model)._data_loader_cls})
