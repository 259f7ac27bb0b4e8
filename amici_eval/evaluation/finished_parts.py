"""Finished parts of an evaluation, kept in a folder so that an interruption does not lose them."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

from amici_eval.common.files import PARTIAL_SUFFIX, DamagedPackError, read_pack, write_durably, write_pack
from amici_eval.evaluation.one_type import FreeTest, TypeEvaluation
from amici_eval.evaluation.spatial_evaluation import TypeSpatial
from amici_eval.model.engines.factored import HeadOutputs
from amici_eval.results.analyses import Baselines, Senders
from amici_eval.stats.ablation.ablations import TypeAblations
from amici_eval.stats.explained_variance import TileSums
from amici_eval.stats.type_sums import TypeSums

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

_CLASSES = (TypeEvaluation, FreeTest, TypeSpatial, TypeAblations, TypeSums, TileSums, HeadOutputs, Senders, Baselines)
_SUFFIX = ".part"


class FinishedParts:
    """Finished parts of one evaluation, by name.

    ``key`` says what was evaluated, on what and how; parts with another key are not used. ``others`` are folders of the
    same evaluation that other processes left or still use. Parts are written atomically and read back bit for bit;
    damaged ones are computed again. A folder that cannot be written to is a warning: the work goes on without it.
    """

    def __init__(self, folder: Path, *, key: str, others: Sequence[Path] = ()) -> None:
        self._folder, self._key, self._others = folder, key, tuple(others)
        self._full = False
        self.taken: list[str] = []
        """Names of the parts that were found, in the order of the requests."""
        self.kept: list[str] = []
        """Names of the parts that were written."""

    @property
    def n_types(self) -> int:
        """Number of cell types that were found or written."""
        return sum(1 for name in {*self.taken, *self.kept} if name.startswith(("factored type ", "hooked type ")))

    @staticmethod
    def count_in(folder: Path) -> int:
        """Return the number of parts in a folder."""
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
        """Write a part."""
        if self._full:
            return
        path = self._folder / _file_name(name)
        try:
            if not self._folder.is_dir():
                self._folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, lambda partial: write_pack(partial, value, label={"name": name, "key": self._key}))
        except OSError as error:
            # warn once, not for each part
            self._full = True
            logger.warning(
                "results cannot be kept in %s as they finish (%s); the work goes on, an interruption would lose them",
                self._folder,
                error.strerror or error,
            )
            return
        self.kept.append(name)

    def sweep(self) -> None:
        """Remove partial files of writers that were killed."""
        for path in self._folder.glob(f"*{PARTIAL_SUFFIX}"):
            path.unlink(missing_ok=True)


def _file_name(name: str) -> str:
    # hashed because names of types may not be valid file names
    return hashlib.sha256(name.encode()).hexdigest()[:32] + _SUFFIX
