"""A model on a tissue without AMICI: predictions are arrays that a test can look into."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.common.model_card import ModelCard

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence


def make_card(**changes) -> ModelCard:
    """Return the card of a small model; keyword arguments replace fields."""
    base = {
        "n_heads": 3,
        "n_neighbors": 4,
        "genes": tuple(f"g{i}" for i in range(6)),
        "cell_types": ("CD8+_T_Cells", "Microglia/PVM", "Stromal_&_T_Cell_Hybrid", "β cell"),
        "labels_key": "cell_type",
        "coord_obsm_key": "spatial",
    }
    return ModelCard(**{**base, **changes})


@dataclass
class FakeAccess:
    """Offers what evaluation needs of a model (``ModelAccess``) from plain arrays, one row per cell."""

    card: ModelCard
    names: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    heads: np.ndarray
    full: np.ndarray
    none: np.ndarray
    batch_size: int = 16
    statistics_device: str = "cpu"
    notes: tuple[str, ...] = ()
    last_type_first: bool = False
    asked: list[tuple[object, ...]] = field(default_factory=list)

    def receivers(self) -> dict[str, np.ndarray]:
        order = np.argsort(self.names, kind="stable")
        types = sorted(set(self.labels.tolist()), reverse=self.last_type_first)
        return {label: order[self.labels[order] == label] for label in types}

    @property
    def fitted(self) -> np.ndarray | None:
        trained = self.card.training_cells
        return None if trained is None else np.isin(self.names, list(trained))

    def cell_names(self, rows: np.ndarray) -> list[str]:
        return self.names[rows].tolist()

    def expression(self, rows: np.ndarray) -> np.ndarray:
        return self.targets[rows]

    def predict(
        self,
        rows: np.ndarray,
        *,
        keeps: Sequence[Collection[int] | None],
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        self.asked.append(tuple(keeps))
        predictions = np.empty((len(keeps), len(rows), len(self.card.genes)), dtype=np.float32)
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            for row, keep in enumerate(keeps):
                source = self.full if keep is None else self.none if len(keep) == 0 else self.heads[next(iter(keep))]
                predictions[row, start : start + len(batch)] = source[batch]
                if progress is not None:
                    progress(len(batch))
        return predictions

    def reordered(self, order: np.ndarray) -> FakeAccess:
        """Return the same tissue with its cells stored in another order."""
        return replace(
            self,
            names=self.names[order],
            labels=self.labels[order],
            targets=self.targets[order],
            heads=self.heads[:, order],
            full=self.full[order],
            none=self.none[order],
        )

    def rows_of(self, cell_type: str) -> np.ndarray:
        return np.flatnonzero(self.labels == cell_type)


def make_access(
    sizes: Mapping[str, int] | None = None,
    *,
    seed: int = 0,
    planted: Sequence[tuple[int, str]] = ((0, "CD8+_T_Cells"),),
    training_cells: frozenset[str] | None = None,
) -> FakeAccess:
    """Return a fake model whose ``planted`` (head, cell type) pairs predict half of the expression's variation.

    All other heads predict noise of the same size; the unablated model is the sum of the heads, and the model without
    heads predicts one profile.
    """
    sizes = {"CD8+_T_Cells": 60, "Microglia/PVM": 45, "β cell": 30} if sizes is None else sizes
    card = make_card(training_cells=training_cells)
    rng = np.random.default_rng(seed)
    labels = np.array([label for label, size in sizes.items() for _ in range(size)], dtype=object)
    n_cells, n_genes = len(labels), len(card.genes)
    names = np.array([f"cell{i:04d}" for i in rng.permutation(n_cells)], dtype=object)
    signal = rng.normal(size=(n_cells, n_genes))
    profile = rng.uniform(1.0, 3.0, size=n_genes)
    targets = profile + signal + rng.normal(size=signal.shape)
    heads = profile + rng.normal(size=(card.n_heads, n_cells, n_genes))
    for head, label in planted:
        rows = labels == label
        heads[head, rows] = profile + signal[rows]
    return FakeAccess(
        card=card,
        names=names,
        labels=labels,
        targets=targets.astype(np.float32),
        heads=heads.astype(np.float32),
        full=(heads.sum(axis=0) - (card.n_heads - 1) * profile).astype(np.float32),
        none=np.tile(profile, (n_cells, 1)).astype(np.float32),
    )
