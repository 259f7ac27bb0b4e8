"""Conversion of an evaluation to plain values for JSON, and back; HeadEvaluation checks and wraps both."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from amici_eval.common.untrusted import check_names
from amici_eval.results.ablations import HeadAblations, array_shapes
from amici_eval.results.inference import Baselines, HeldOutParts, Intervals, SpatialTests
from amici_eval.results.senders import Senders
from amici_eval.settings.evaluation import spec_from_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping

    from amici_eval.results.evaluation import HeadEvaluation

_MOST = 2**63
_MOST_HEADS = 2**16
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
# fields that schema version 1 lacks: all its evaluations were hooked, with independent permutations
_NEW_IN_2: dict[str, Any] = {
    "engine": "hooked",
    "parity": None,
    "parity_cells": 0,
    "n_permutations_by_type": None,
    "sampling": [],
    "ablations": None,
}
_PARTS: dict[str, Any] = {
    "spatial": SpatialTests,
    "intervals": Intervals,
    "parts": HeldOutParts,
    "trivial": Baselines,
    "senders": Senders,
}
_NEW_IN_4: dict[str, Any] = {"senders": None}
# today's default settings would claim that these were computed
_OLD_SETTINGS: dict[str, dict[str, Any]] = {
    "permutation": {"spatial_null": "none", "n_bootstrap": 0},
    "ablation": {"baselines": False, "without_nearest": False},
}


def record_of(evaluation: HeadEvaluation) -> dict[str, Any]:
    """Return all fields of an evaluation as plain values; undefined numbers are ``None``."""
    by_type, parity, found = evaluation.n_permutations_by_type, evaluation.parity, evaluation.ablations
    return {
        "schema_version": evaluation.schema_version,
        "n_heads": evaluation.n_heads,
        "cell_types": list(evaluation.cell_types),
        "genes": list(evaluation.genes),
        "n_permutations": evaluation.n_permutations,
        "held_out": list(evaluation.held_out),
        "spec": evaluation.spec.to_dict(),
        "undefined": [vars(item) for item in evaluation.undefined],
        "notes": list(evaluation.notes),
        "model": dict(evaluation.model),
        "data": dict(evaluation.data),
        "engine": evaluation.engine,
        # JSON has no NaN: a parity that is not finite is None although cells were compared
        "parity": None if parity is None or not math.isfinite(parity) else float(parity),
        "parity_cells": evaluation.parity_cells,
        "n_permutations_by_type": None if by_type is None else _to_lists(by_type),
        "sampling": list(evaluation.sampling),
        "ablations": None
        if found is None
        else {"modes": list(found.modes), **{name: _to_lists(getattr(found, name)) for name in array_shapes(0, 0, 0)}},
        **{name: None if (one := getattr(evaluation, name)) is None else one.to_record() for name in _PARTS},
        **{name: _to_lists(getattr(evaluation, name)) for name in _ARRAYS},
    }


def fields_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an evaluation from the plain values of any schema version; ``undefined`` stays plain."""
    if record["schema_version"] == 1:
        spec = record["spec"]
        # today's default settings would claim that all ablations were computed
        spec = {**spec, "ablation": {"modes": ["keep_one"], **spec["ablation"]}}
        record = {**_NEW_IN_2, **record, "spec": spec}
    if record["schema_version"] < 3:
        spec = {**record["spec"]}
        for group, settings in _OLD_SETTINGS.items():
            spec[group] = {**settings, **spec[group]}
        record = {**dict.fromkeys(_PARTS), **record, "spec": spec}
    if record["schema_version"] < 4:
        record = {**_NEW_IN_4, **record}
    _check_plain(record)
    n_heads, n_types, by_type = record["n_heads"], len(record["cell_types"]), record["n_permutations_by_type"]
    held_out = tuple(record["held_out"])
    if len(held_out) != n_types:
        msg = f"held_out has {len(held_out)} entries for {n_types} cell types"
        raise ValueError(msg)
    sizes = {"H": n_heads, "C": n_types, "G": len(record["genes"])}
    compared = record["parity"] is None and record["parity_cells"]
    return {
        "n_heads": n_heads,
        "cell_types": tuple(record["cell_types"]),
        "genes": tuple(record["genes"]),
        "n_permutations": record["n_permutations"],
        "held_out": held_out,
        "spec": spec_from_mapping(record["spec"]),
        "undefined": record["undefined"],
        "notes": tuple(record["notes"]),
        "model": record["model"],
        "data": record["data"],
        "engine": record["engine"],
        "parity": math.nan if compared else record["parity"],
        "parity_cells": record["parity_cells"],
        "n_permutations_by_type": None if by_type is None else np.array(by_type, dtype=np.int64),
        "sampling": tuple(record["sampling"]),
        "ablations": _ablations(record["ablations"], n_heads, n_types),
        **{
            name: None if record[name] is None else kind.from_record(record[name], sizes)
            for name, kind in _PARTS.items()
        },
        **{
            name: np.array(record[name], dtype=kind).reshape(_shape(record, dimensions))
            for name, (kind, dimensions) in _ARRAYS.items()
        },
    }


def _check_plain(record: Mapping[str, Any]) -> None:
    """Refuse entries of the wrong kind."""
    for name in ("cell_types", "genes"):
        # an AnnData in memory may have any names
        check_names(record[name], name, printable=False)
    for name in ("notes", "sampling"):
        if not isinstance(record[name], list) or not all(isinstance(one, str) for one in record[name]):
            _refuse(name)
    for name, least in (("n_heads", 0), ("n_permutations", 0), ("parity_cells", 0)):
        if type(record[name]) is not int or not least <= record[name] < _MOST:
            _refuse(name)
    if record["n_heads"] > _MOST_HEADS or not isinstance(record["engine"], str):
        _refuse("n_heads or engine")
    if not all(one is None or isinstance(one, bool) for one in record["held_out"]):
        _refuse("held_out")
    parity = record["parity"]
    if parity is not None and (isinstance(parity, bool) or not isinstance(parity, (int, float))):
        _refuse("parity")
    for name in ("model", "data"):
        if not isinstance(record[name], dict):
            _refuse(name)
    for item in record["undefined"]:
        texts = isinstance(item["cell_type"], str) and isinstance(item["reason"], str)
        head, gene = item.get("head"), item.get("gene")
        whole = head is None or (type(head) is int and 0 <= head < max(record["n_heads"], 1))
        if not texts or not whole or not (gene is None or isinstance(gene, str)):
            _refuse("undefined")


def _refuse(name: str) -> NoReturn:
    msg = f"{name} holds something else than it may"
    raise ValueError(msg)


def _ablations(record: Mapping[str, Any] | None, n_heads: int, n_types: int) -> HeadAblations | None:
    if record is None:
        return None
    modes = tuple(record["modes"])
    arrays = {
        name: np.array(record[name], dtype=np.float64).reshape(shape)
        for name, shape in array_shapes(len(modes), n_heads, n_types).items()
    }
    return HeadAblations(modes=modes, **arrays)


def _shape(record: Mapping[str, Any], dimensions: str) -> tuple[int, ...]:
    sizes = {"H": record["n_heads"], "C": len(record["cell_types"]), "G": len(record["genes"])}
    return tuple(sizes[name] for name in dimensions)


def _to_lists(array: np.ndarray) -> list[Any]:
    plain = array
    if np.issubdtype(array.dtype, np.floating):
        plain = np.where(np.isfinite(array), array, None)  # type: ignore[call-overload]
    values: list[Any] = plain.tolist()
    return values
