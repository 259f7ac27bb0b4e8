"""Parts of an evaluation that are finished, kept in a folder as they finish, so that no interruption loses them."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

from amici_eval.common.files import PARTIAL_SUFFIX, DamagedPackError, read_pack, write_durably, write_pack
from amici_eval.evaluation.one_type import FreeTest, TypeEvaluation
from amici_eval.evaluation.spatial_evaluation import TypeSpatial
from amici_eval.model.engines.factored import HeadOutputs
from amici_eval.results.inference import Baselines
from amici_eval.results.senders import Senders
from amici_eval.stats.ablation.ablations import TypeAblations
from amici_eval.stats.tiles.sums import TypeMoments

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["FinishedParts"]

logger = logging.getLogger(__name__)

_CLASSES = (TypeEvaluation, FreeTest, TypeSpatial, TypeAblations, TypeMoments, HeadOutputs, Senders, Baselines)
_SUFFIX = ".part"


class FinishedParts:
    """Finished parts of one evaluation, by name.

    Parameters
    ----------
    folder
        Where parts are written; made when the first one is.
    key
        What was evaluated, on what and how: a part of anything else is not taken.
    others
        Folders with finished parts of the same evaluation, which others left or still work at.

    Notes
    -----
    A part is written whole or not at all, and read back bit for bit. One that is damaged is computed again. A folder
    that takes no more is a warning: the work goes on, and only an interruption would lose what could not be kept.
    """

    def __init__(self, folder: Path, *, key: str, others: Sequence[Path] = ()) -> None:
        self._folder, self._key, self._others = folder, key, tuple(others)
        self._full = False
        self.taken: list[str] = []
        """Names of the parts that were there, in the order in which they were asked for."""
        self.kept: list[str] = []
        """Names of the parts that were written."""

    @property
    def n_types(self) -> int:
        """How many cell types were there or were written."""
        return sum(1 for name in {*self.taken, *self.kept} if name.startswith(("factored type ", "hooked type ")))

    @staticmethod
    def count_in(folder: Path) -> int:
        """Return how many parts a folder holds."""
        return sum(1 for _ in folder.glob(f"*{_SUFFIX}"))

    def get(self, name: str) -> Any:
        """Return a part, or ``None`` if it is not there or damaged."""
        for folder in (self._folder, *self._others):
            path = folder / _file_name(name)
            try:
                found = read_pack(path, label={"name": name, "key": self._key}, classes=_CLASSES)
            except FileNotFoundError:
                continue
            except DamagedPackError as error:
                logger.warning("%s (%s) is damaged and is computed again: %s", path, name, error)
                continue
            self.taken.append(name)
            return found
        return None

    def put(self, name: str, value: Any) -> None:
        """Keep a part."""
        if self._full:
            return
        path = self._folder / _file_name(name)
        try:
            if not self._folder.is_dir():
                self._folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, lambda partial: write_pack(partial, value, label={"name": name, "key": self._key}))
        except OSError as error:
            # asked again for each part, this would be said for each
            self._full = True
            logger.warning(
                "results cannot be kept in %s as they finish (%s); the work goes on, an interruption would lose them",
                self._folder,
                error.strerror or error,
            )
            return
        self.kept.append(name)

    def sweep(self) -> None:
        """Remove what writers that were killed left half written."""
        for path in self._folder.glob(f"*{PARTIAL_SUFFIX}"):
            path.unlink(missing_ok=True)


def _file_name(name: str) -> str:
    # names of types are anything, names of files are not
    return hashlib.sha256(name.encode()).hexdigest()[:32] + _SUFFIX
