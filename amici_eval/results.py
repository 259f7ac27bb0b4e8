"""Frozen results of an evaluation: they say everything, write themselves and read themselves back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amici_eval.errors import DataError
from amici_eval.specs import EvaluationSpec, spec_from_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from jaxtyping import Float64, Int64

__all__ = ["GENE_COLUMNS", "HEAD_COLUMNS", "SCHEMA_VERSION", "HeadEvaluation", "Undefined"]

SCHEMA_VERSION = 1
FILE_NAME = "evaluation.json"

GENE_COLUMNS = (
    "head",
    "ct_name",
    "gene",
    "expl_var_head_gene",
    "expl_var_head",
    "p_value_head",
    "p_value_adj_head",
    "p_value_gene",
    "p_value_adj_gene",
    "undefined_reason",
)
HEAD_COLUMNS = (
    "head",
    "ct_name",
    "n_cells",
    "expl_var_head",
    "ci_low",
    "ci_high",
    "best_gene",
    "expl_var_best_gene",
    "p_value_head",
    "p_value_adj_head",
    "p_ci_low",
    "p_ci_high",
    "p_value_spatial",
    "p_value_adj_spatial",
    "ess",
    "null",
    "method",
    "significant_free",
    "significant",
    "significant_by",
    "held_out",
    "undefined_reason",
)


@dataclass(frozen=True, kw_only=True)
class Undefined:
    """A number that does not exist, and why.

    Parameters
    ----------
    cell_type
        Receiver cell type.
    reason
        In words, with the count or value that decided it.
    head
        Attention head; ``None`` means all of them.
    gene
        ``None`` means that it is not about one gene.
    """

    cell_type: str
    reason: str
    head: int | None = None
    gene: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadEvaluation:
    """How much each attention head, kept alone, explains of each receiver cell type, and how sure that is.

    Parameters
    ----------
    n_heads
        Number of heads H; heads are numbered from 0 as in the model.
    cell_types
        The C types with evaluated cells, sorted.
    genes
        The G genes in the model's order.
    n_cells
        Evaluated cells per type, shape (C,).
    expl_var_gene
        Explained variance per head, type and gene, shape (H, C, G); NaN where undefined.
    expl_var
        The same aggregated over genes, shape (H, C).
    expl_var_full, expl_var_none
        Aggregated explained variance of the unablated model and of the model without any head, shape (C,).
    exceedances
        Permutations at least as extreme as the truth, shape (H, C); -1 where there is no test.
    n_permutations
        Random permutations per type.
    p_value, p_value_adj, p_ci_low, p_ci_high
        Shape (H, C), free null; NaN where undefined.
    held_out
        Per type: ``True`` if none of its evaluated cells was used to fit the model, ``False`` if some were, ``None``
        if that is not known.
    spec
        The settings that produced the numbers.
    undefined
        What has no value, and why.
    notes
        Warnings and remarks on model and data, to be shown with the numbers.
    model, data
        What was evaluated on what (names, versions, digests), as plain values.
    schema_version
        Of this record.
    """

    n_heads: int
    cell_types: tuple[str, ...]
    genes: tuple[str, ...]
    n_cells: Int64[np.ndarray, " types"]
    expl_var_gene: Float64[np.ndarray, "heads types genes"]
    expl_var: Float64[np.ndarray, "heads types"]
    expl_var_full: Float64[np.ndarray, " types"]
    expl_var_none: Float64[np.ndarray, " types"]
    exceedances: Int64[np.ndarray, "heads types"]
    n_permutations: int
    p_value: Float64[np.ndarray, "heads types"]
    p_value_adj: Float64[np.ndarray, "heads types"]
    p_ci_low: Float64[np.ndarray, "heads types"]
    p_ci_high: Float64[np.ndarray, "heads types"]
    held_out: tuple[bool | None, ...]
    spec: EvaluationSpec
    undefined: tuple[Undefined, ...] = ()
    notes: tuple[str, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __repr__(self) -> str:
        name = " ".join(str(self.model[key]) for key in ("name", "version") if self.model.get(key))
        return (
            f"HeadEvaluation({name + ': ' if name else ''}{self.n_heads} heads x {len(self.cell_types)} cell types x "
            f"{len(self.genes)} genes, {self.n_significant} of {self.n_tests} tests significant)"
        )

    @property
    def n_tests(self) -> int:
        """Number of defined tests: the family of the adjustment."""
        return int(np.count_nonzero(~np.isnan(self.p_value)))

    @property
    def n_significant(self) -> int:
        """Number of head x type pairs with an adjusted p-value of at most alpha (free null)."""
        return int(np.count_nonzero(self.p_value_adj <= self.spec.permutation.alpha))

    @property
    def n_undefined(self) -> int:
        """Number of head x type pairs that have no test."""
        return self.p_value.size - self.n_tests

    def type_index(self, cell_type: str) -> int:
        """Return the position of a cell type, or say which there are."""
        try:
            return self.cell_types.index(cell_type)
        except ValueError:
            raise DataError(
                value=f"cell type {cell_type!r}",
                rule=f"the evaluation holds {', '.join(self.cell_types)}",
                fix="choose one of these",
            ) from None

    def best_head(self, cell_type: str) -> int:
        """Return the head that explains one gene of a receiver type best.

        Parameters
        ----------
        cell_type
            One of ``cell_types``.

        Raises
        ------
        DataError
            If the type was not evaluated, or explained variance is undefined for all of its heads and genes.

        Notes
        -----
        The head with the largest explained variance of any gene, as AMICI defines it; the winner of many genes is
        optimistic, so read it beside ``heads()``.
        """
        best = _nan_max(self.expl_var_gene[:, self.type_index(cell_type)])
        if np.all(np.isnan(best)):
            raise DataError(
                value=f"cell type {cell_type!r} has no defined explained variance",
                rule="a best head needs at least one defined gene",
                fix="choose a type with more cells; heads() gives the reason",
            )
        return int(np.nanargmax(best))

    def to_frame(self) -> pd.DataFrame:
        """Return a row per head x type x gene: the reference's seven columns, then per-gene p-values and reasons."""
        import pandas as pd

        n_types, n_genes = len(self.cell_types), len(self.genes)
        rows = self.n_heads * n_types * n_genes

        def per_head(values: Float64[np.ndarray, "heads types"]) -> np.ndarray:
            return np.repeat(values.ravel(), n_genes)

        by_type = {u.cell_type: u.reason for u in self.undefined if u.gene is None and u.head is None}
        by_head = {(u.head, u.cell_type): u.reason for u in self.undefined if u.gene is None and u.head is not None}
        by_gene = {(u.cell_type, u.gene): u.reason for u in self.undefined if u.gene is not None}
        reasons = [
            "; ".join(filter(None, (by_gene.get((t, g)), by_type.get(t), by_head.get((h, t)))))
            for h in range(self.n_heads)
            for t in self.cell_types
            for g in self.genes
        ]
        return pd.DataFrame(
            {
                "head": np.repeat(np.arange(self.n_heads), n_types * n_genes),
                "ct_name": np.tile(np.repeat(np.array(self.cell_types, dtype=object), n_genes), self.n_heads),
                "gene": np.tile(np.array(self.genes, dtype=object), self.n_heads * n_types),
                "expl_var_head_gene": self.expl_var_gene.ravel(),
                "expl_var_head": per_head(self.expl_var),
                "p_value_head": per_head(self.p_value),
                "p_value_adj_head": per_head(self.p_value_adj),
                "p_value_gene": np.full(rows, np.nan),
                "p_value_adj_gene": np.full(rows, np.nan),
                "undefined_reason": reasons,
            },
            columns=list(GENE_COLUMNS),
        )

    def heads(self) -> pd.DataFrame:
        """Return a row per head x type: effect, best gene, p-values, decision, reasons."""
        import pandas as pd

        reasons: dict[tuple[int, str], list[str]] = {}
        for item in self.undefined:
            if item.gene is None:
                for head in range(self.n_heads) if item.head is None else (item.head,):
                    reasons.setdefault((head, item.cell_type), []).append(item.reason)
        alpha = self.spec.permutation.alpha
        rows = []
        for head in range(self.n_heads):
            for index, cell_type in enumerate(self.cell_types):
                genes = self.expl_var_gene[head, index]
                best = None if np.all(np.isnan(genes)) else int(np.nanargmax(genes))
                adjusted = float(self.p_value_adj[head, index])
                significant = None if math.isnan(adjusted) else adjusted <= alpha
                rows.append(
                    {
                        "head": head,
                        "ct_name": cell_type,
                        "n_cells": int(self.n_cells[index]),
                        "expl_var_head": float(self.expl_var[head, index]),
                        "best_gene": None if best is None else self.genes[best],
                        "expl_var_best_gene": math.nan if best is None else float(genes[best]),
                        "p_value_head": float(self.p_value[head, index]),
                        "p_value_adj_head": adjusted,
                        "p_ci_low": float(self.p_ci_low[head, index]),
                        "p_ci_high": float(self.p_ci_high[head, index]),
                        "null": self.spec.permutation.null,
                        "method": self.spec.permutation.method,
                        "significant_free": significant,
                        "significant": significant,
                        "significant_by": None if significant is None else self.spec.permutation.null,
                        "held_out": self.held_out[index],
                        "undefined_reason": "; ".join(reasons.get((head, cell_type), [])),
                    }
                )
        frame = pd.DataFrame(rows, columns=list(HEAD_COLUMNS))
        for name in ("significant_free", "significant", "held_out"):
            frame[name] = frame[name].astype("boolean")
        return frame

    def baselines(self) -> pd.DataFrame:
        """Return explained variance of the whole model and of the model without heads, a row per type and baseline."""
        import pandas as pd

        rows = [
            {"ct_name": cell_type, "baseline": baseline, "expl_var": float(values[index])}
            for index, cell_type in enumerate(self.cell_types)
            for baseline, values in (("full_model", self.expl_var_full), ("no_head", self.expl_var_none))
        ]
        return pd.DataFrame(rows, columns=["ct_name", "baseline", "expl_var"])

    def to_json(self) -> str:
        """Return the whole evaluation as JSON text; undefined numbers are ``null``."""
        record = {
            "schema_version": self.schema_version,
            "n_heads": self.n_heads,
            "cell_types": list(self.cell_types),
            "genes": list(self.genes),
            "n_permutations": self.n_permutations,
            "held_out": list(self.held_out),
            "spec": self.spec.to_dict(),
            "undefined": [vars(item) for item in self.undefined],
            "notes": list(self.notes),
            "model": dict(self.model),
            "data": dict(self.data),
            **{name: _to_lists(getattr(self, name)) for name in _ARRAYS},
        }
        return json.dumps(record, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> HeadEvaluation:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        DataError
            If the text is no evaluation, or of a newer schema than this version reads.
        """
        try:
            record = json.loads(text)
            version = record["schema_version"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                value=f"not an evaluation ({error})",
                rule=f"it must be the {FILE_NAME} of a run",
                fix="download it again",
            ) from error
        if version != SCHEMA_VERSION:
            raise DataError(
                value=f"evaluation of schema version {version!r}",
                rule=f"this version of amici_eval reads schema version {SCHEMA_VERSION}",
                fix="install the version of amici_eval that wrote it",
            )
        try:
            arrays: dict[str, Any] = {
                name: np.array(record[name], dtype=kind).reshape(_shape(record, dimensions))
                for name, (kind, dimensions) in _ARRAYS.items()
            }
            held_out = tuple(record["held_out"])
            if len(held_out) != len(record["cell_types"]):
                msg = f"held_out has {len(held_out)} entries for {len(record['cell_types'])} cell types"
                raise ValueError(msg)
            return cls(
                n_heads=record["n_heads"],
                cell_types=tuple(record["cell_types"]),
                genes=tuple(record["genes"]),
                n_permutations=record["n_permutations"],
                held_out=held_out,
                spec=spec_from_mapping(record["spec"]),
                undefined=tuple(Undefined(**item) for item in record["undefined"]),
                notes=tuple(record["notes"]),
                model=record["model"],
                data=record["data"],
                schema_version=version,
                **arrays,
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                value=f"damaged evaluation ({type(error).__name__}: {error})",
                rule="all fields of its schema version must be there, with matching sizes",
                fix="download it again or evaluate again",
            ) from error

    def save(self, directory: str | Path) -> Path:
        """Write the evaluation into a folder (made if missing) and return the file."""
        path = Path(directory) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, directory: str | Path) -> HeadEvaluation:
        """Read what :meth:`save` wrote.

        Raises
        ------
        DataError
            If the folder holds no evaluation or a damaged one.
        """
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            raise DataError(
                value=f"{directory} holds no {FILE_NAME}",
                rule="load() takes a folder that save() or a run wrote",
                fix="give the folder itself",
            )
        # not read_text: bytes that are no UTF-8 are damage, which from_json tells
        return cls.from_json(path.read_bytes())


_ARRAYS: dict[str, tuple[type, str]] = {
    "n_cells": (np.int64, "C"),
    "expl_var_gene": (np.float64, "HCG"),
    "expl_var": (np.float64, "HC"),
    "expl_var_full": (np.float64, "C"),
    "expl_var_none": (np.float64, "C"),
    "exceedances": (np.int64, "HC"),
    "p_value": (np.float64, "HC"),
    "p_value_adj": (np.float64, "HC"),
    "p_ci_low": (np.float64, "HC"),
    "p_ci_high": (np.float64, "HC"),
}


def _shape(record: Mapping[str, Any], dimensions: str) -> tuple[int, ...]:
    sizes = {"H": record["n_heads"], "C": len(record["cell_types"]), "G": len(record["genes"])}
    return tuple(sizes[name] for name in dimensions)


def _to_lists(array: np.ndarray) -> list[Any]:
    if np.issubdtype(array.dtype, np.floating):
        return np.where(np.isfinite(array), array, None).tolist()  # type: ignore[call-overload,no-any-return]
    return array.tolist()  # type: ignore[no-any-return]


def _nan_max(values: Float64[np.ndarray, "heads genes"]) -> Float64[np.ndarray, " heads"]:
    """Maximum over genes that is NaN, without a warning, where all are NaN."""
    filled = np.where(np.isnan(values), -np.inf, values).max(axis=1)
    return np.where(np.isinf(filled), np.nan, filled)
