"""The stored form of a model: its files with their SHA-256, its set-up as JSON values, and checks of all of it.

A SHA-256 shows damage; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from safetensors.torch import load as load_safetensors

from amici_eval.common.errors import ModelFormatError
from amici_eval.common.files import check_is_plain_file, check_names, load_json, odd_character, read_plain_file
from amici_eval.common.model_card import ModelCard, TrainingData

if TYPE_CHECKING:
    from torch import Tensor


WEIGHTS = "weights.safetensors"
SETUP = "model.json"
CELLS = "cells.json"
MANIFEST = "manifest.json"
_MOST_BYTES = 2**20
_MOST_VALUES = 2_000_000
_DEEPEST = 64
_MOST_HEADS = 1024
_MOST_NEIGHBORS = 100_000
_WIDEST = 2**20
_MOST_CELLS = 2**40
_HEADER_BYTES = 2**22
# this tensor is minus infinity by design
_NOT_FINITE = frozenset({"attention_layer.IGNORE"})
_DTYPE = re.compile(r"object|bool|u?int\d{1,2}|float\d{1,3}|[<>|=]U\d{1,4}")
_NUMBERS = {
    "neighbor_dropout",
    "attention_dummy_score",
    "attention_penalty_coef",
    "value_l1_penalty_coef",
    "pos_coef_offset",
    "distance_kernel_unit_scale",
}
_SIZES = {
    "n_label_embed": ("ct_embed.weight", 1),
    "n_kv_dim": ("attention_layer.W_K", 2),
    "n_query_embed_hidden": ("query_embed.nn.0.weight", 0),
    "n_query_dim": ("attention_layer.W_Q", 2),
    "n_nn_embed": ("kv_embed.nn.0.weight", 1),
    "n_nn_embed_hidden": ("nn_embed.nn.0.weight", 0),
    "n_pos_coef_mlp_hidden": ("pos_coef_mlp.nn.0.weight", 0),
    "n_head_size": ("attention_layer.W_Q", 0),
    "n_heads": ("attention_layer.W_Q", 1),
}


def write_manifest(directory: Path) -> None:
    """Write the SHA-256 of every file of a saved model."""
    sums = {name: digest for name, digest in sums_of(directory).items() if name != MANIFEST}
    (directory / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def damaged(directory: Path, what: str) -> ModelFormatError:
    """Return the error for a model whose files changed since they were logged."""
    return ModelFormatError(
        value=f"the model in {directory} is damaged: {what}",
        rule="its files must be as they were logged (a SHA-256 tells damage; it is no signature)",
        fix="download it again or register the model again",
    )


def sums_of(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a saved model, including the manifest."""
    return {path.name: _sha256(path) for path in sorted(directory.iterdir()) if path.is_file()}


def listed_files(directory: Path) -> set[str]:
    """Return the names of the files in the manifest of a checked folder."""
    return set(_listed(directory))


def _listed(directory: Path) -> dict[str, str]:
    sums = load_json(directory / MANIFEST, limit=_MOST_BYTES, max_values=_MOST_BYTES)["sha256"]
    if not isinstance(sums, dict):
        msg = "sha256 is no mapping"
        raise ValueError(msg)
    return sums


def check_recorded(directory: Path, sums: Any) -> None:
    """Refuse a folder with a file whose SHA-256 differs from that in MLmodel."""
    if not isinstance(sums, dict) or not {WEIGHTS, SETUP, CELLS, MANIFEST} <= set(sums):
        raise damaged(directory, f"MLmodel does not record the SHA-256 of {MANIFEST} and the files it lists")
    _compare(directory, sums, "MLmodel", "is corrupted: it is not the file that was logged (SHA-256 differs)")


def check_manifest(directory: Path) -> None:
    """Refuse a folder in which a file is missing or differs from the saved one."""
    try:
        sums = _listed(directory)
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise damaged(directory, f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    missing = sorted({WEIGHTS, SETUP, CELLS} - set(sums))
    if missing:
        raise damaged(directory, f"the manifest lacks {missing[0]}")
    _compare(directory, sums, "the manifest", "is not the file that was logged (SHA-256 differs)")


def _compare(directory: Path, sums: Mapping[str, Any], where: str, what: str) -> None:
    for name, expected in sums.items():
        if not isinstance(name, str) or Path(name).name != name or odd_character(name) is not None:
            raise damaged(directory, f"{where} names {name!a:.80}, which is no plain file name")
        path = directory / name
        try:
            if path.is_symlink():
                raise damaged(directory, f"{name} is a link")
            if not path.exists():
                raise damaged(directory, f"{name} is missing")
            check_is_plain_file(path)
            found = _sha256(path)
        except (OSError, ValueError) as error:
            if isinstance(error, ModelFormatError):
                raise
            raise damaged(directory, f"{name[:200]} cannot be read ({error})") from error
        if found != expected:
            raise damaged(directory, f"{name} {what}")


def to_plain(value: Any, where: str) -> Any:
    """Return a registry as JSON values, with arrays as ``{"array": [...], "dtype": ...}`` for the way back."""
    return _plain(value, where, _ValueBudget(left=_MOST_VALUES), 0)


@dataclass
class _ValueBudget:
    left: int

    def take(self, n: int, where: str) -> None:
        self.left -= n
        if self.left < 0:
            raise ModelFormatError(
                value=f"{where} holds more than {_MOST_VALUES} values",
                rule="set-up must be small enough to be stored",
                fix="train the model with plain arguments",
            )


def _plain(value: Any, where: str, count: _ValueBudget, depth: int) -> Any:
    count.take(1, where)
    if depth > _DEEPEST:
        count.take(_MOST_VALUES + 1, f"{where[:80]}, nested more than {_DEEPEST} deep,")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}", count, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, count, depth + 1) for item in value]
    if isinstance(value, np.ndarray):
        count.take(value.size, where)
        return {
            "array": [_plain(item, where, count, depth + 1) for item in value.tolist()],
            "dtype": str(value.dtype),
        }
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ModelFormatError(
        value=f"{where} holds a {type(value).__name__}",
        rule="set-up must consist of plain values and arrays, so that it can be stored without pickle",
        fix="train the model with plain arguments",
    )


def with_arrays(value: Any) -> Any:
    """Undo :func:`to_plain`."""
    if isinstance(value, Mapping):
        if set(value) == {"array", "dtype"}:
            return np.array(value["array"], dtype=value["dtype"])
        return {key: with_arrays(item) for key, item in value.items()}
    return value


def values_of(stored: Any) -> list[Any]:
    """Return the values of an array, as stored or live."""
    return list(stored["array"]) if isinstance(stored, Mapping) else list(stored)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _other_class(what: str) -> NoReturn:
    raise ModelFormatError(
        value=f"the model is of another class or version of AMICI: {what}",
        rule="weights are put back into the AMICIModule of the installed amici-st",
        fix="evaluate the live model with amici_eval.evaluate(model, adata), which goes through its own forward pass",
    )


def _refuse(what: str) -> NoReturn:
    raise ValueError(what)


def card_from(record: Mapping[str, Any], training_cells: frozenset[str] | None) -> ModelCard:
    """Return a card from plain values."""
    card = dict(record)
    training = card.pop("training_data")
    for key in ("genes", "cell_types"):
        check_names(card[key], key)
        card[key] = tuple(card[key])
    made = ModelCard(
        **card,
        training_data=None if training is None else TrainingData(**training),
        training_cells=training_cells,
    )
    check_card(made)
    return made


def check_card(card: ModelCard) -> None:
    """Refuse a card with invalid sizes, names or facts."""
    check_names(card.genes, "genes")
    check_names(card.cell_types, "cell types")
    if not card.genes or not card.cell_types:
        _refuse("it has no genes or no cell types")
    if not _is_whole(card.n_heads, 1, _MOST_HEADS):
        _refuse(f"n_heads={card.n_heads!a:.80} is no number of heads")
    if not _is_whole(card.n_neighbors, 1, _MOST_NEIGHBORS):
        _refuse(f"n_neighbors={card.n_neighbors!a:.80} is no number of neighbours")
    for name in ("labels_key", "coord_obsm_key", "layer", "cell_radius_key"):
        value = getattr(card, name)
        if value is None and name in ("layer", "cell_radius_key"):
            continue
        if not isinstance(value, str) or odd_character(value) is not None:
            _refuse(f"{name}={value!a:.80} is no name")
    versions = card.versions
    texts = isinstance(versions, dict) and all(isinstance(one, str) for pair in versions.items() for one in pair)
    if not texts or odd_character("".join([*versions, *versions.values()])) is not None:
        _refuse("versions are no texts by name")
    facts = card.training_data
    if facts is None:
        return
    distance = facts.nn_distance
    if (
        not _is_whole(facts.n_cells, 0, _MOST_CELLS)
        or not isinstance(facts.digest, (str, type(None)))
        or not isinstance(facts.places, str)
        or isinstance(distance, bool)
        or not isinstance(distance, (int, float))
        or not 0 <= distance < math.inf
        or not isinstance(facts.integer_valued, bool)
    ):
        _refuse("training_data holds other values than those of a tissue")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file after a check of its header."""
    size = check_is_plain_file(path)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 8 or header > min(size - 8, _HEADER_BYTES):
        _refuse(f"{path.name} has {size} bytes and says that its header has {header}")
    return load_safetensors(read_plain_file(path, limit=size))


def check_weights(weights: Mapping[str, Tensor], init_params: Mapping[str, Any], card: ModelCard) -> None:
    """Refuse weights that are not finite, or of other sizes than card and set-up say.

    This bounds the sizes that the model's constructor is given by what is stored.
    """
    for name, tensor in weights.items():
        if odd_character(name) is not None:
            _refuse(f"a tensor has the name {name[:80]!a}")
        if not tensor.is_floating_point():
            _refuse(f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, and weights are floating-point numbers")
        if name not in _NOT_FINITE and not bool(torch.isfinite(tensor).all()):
            _refuse(f"{name} holds values that are not finite")
    n_types, n_genes = len(card.cell_types), len(card.genes)
    for name, place, expected in (
        ("ct_profiles", 0, n_types),
        ("ct_profiles", 1, n_genes),
        ("ct_embed.weight", 0, n_types),
        ("nn_embed.nn.0.weight", 1, n_genes),
        ("linear_head.weight", 0, n_genes),
        ("attention_layer.W_O", 1, card.n_heads),
        ("attention_layer.W_Q", 1, card.n_heads),
    ):
        if _size(weights, name, place) != expected:
            _refuse(f"{name} is of shape {tuple(weights[name].shape)}, which does not fit the card ({expected})")
    for name, value in init_params.items():
        if name in _SIZES:
            where, place = _SIZES[name]
            if not _is_whole(value, 1, _WIDEST) or _size(weights, where, place) != value:
                _refuse(f"{name}={value!a:.80} is not the size of the weights")
        elif name not in _NUMBERS:
            _other_class(f"it was built with {name[:80]!a}")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            _refuse(f"{name[:80]!a}={value!a:.80} is no finite number")
    known = {"ct_profiles", "ct_embed.weight", *_shapes(weights)}
    # tensors whose existence does not depend on sizes
    needed = {name for name in known if "project_nn" not in name and not name.startswith("pos_coef_mlp.nn.4")}
    for name in sorted((set(weights) - known) | (needed - set(weights))):
        _other_class(f"it {'has' if name in weights else 'lacks'} the tensor {name}")
    for name, expected_shape in _shapes(weights).items():
        found = tuple(weights[name].shape) if name in weights else None
        if found is not None and found != expected_shape:
            _refuse(f"{name} is of shape {found}, and the others ask for {expected_shape}")


def _size(weights: Mapping[str, Tensor], name: str, place: int) -> int:
    if name not in weights:
        _refuse(f"the weights lack {name}")
    shape = weights[name].shape
    return int(shape[place]) if place < len(shape) else 0


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's tensors that follow from its first one, and those of the attention."""
    size, n_heads = _size(weights, "attention_layer.W_Q", 0), _size(weights, "attention_layer.W_Q", 1)
    query, key = _size(weights, "attention_layer.W_Q", 2), _size(weights, "attention_layer.W_K", 2)
    shapes: dict[str, tuple[int, ...]] = {
        "attention_layer.W_Q": (size, n_heads, query),
        "attention_layer.W_O": (n_heads * size, n_heads, size),
        "linear_head.weight": (_size(weights, "linear_head.weight", 0), n_heads * size),
        "attention_layer.norm_o.weight": (n_heads * size,),
        "attention_layer.norm_o.bias": (n_heads * size,),
        "attention_layer.IGNORE": (),
    }
    for one in "KV":
        shapes[f"attention_layer.W_{one}"] = (size, n_heads, key)
    for one in "QKV":
        shapes[f"attention_layer.b_{one}"] = (n_heads, size)
    for block in ("query_embed", "nn_embed", "pos_coef_mlp", "kv_embed"):
        hidden, inner = (_size(weights, f"{block}.nn.0.weight", place) for place in (0, 1))
        shapes |= {f"{block}.nn.0.weight": (hidden, inner), f"{block}.nn.3.weight": (inner, hidden)}
        shapes |= {f"{block}.nn.{one}": (hidden,) for one in ("0.bias", "1.weight", "1.bias")}
        shapes |= {f"{block}.nn.{one}": (inner,) for one in ("3.bias", "4.weight", "4.bias")}
        if f"{block}.project_nn.0.weight" in weights:
            outer = _size(weights, f"{block}.project_nn.0.weight", 0)
            shapes[f"{block}.project_nn.0.weight"] = (outer, inner)
            shapes |= {f"{block}.project_nn.{one}": (outer,) for one in ("0.bias", "1.weight", "1.bias")}
    return shapes


def plain_history(record: Any) -> dict[str, tuple[float, ...]]:
    """Return training curves from plain values; NaN is allowed."""
    if not isinstance(record, dict) or not all(isinstance(values, list) for values in record.values()):
        _refuse("history is no list of numbers by name")
    numbers = [value for values in record.values() for value in values]
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in numbers):
        _refuse("history holds something else than numbers")
    check_names(list(record), "history")
    return {name: tuple(map(float, values)) for name, values in record.items()}


def check_registry(registry: Any, card: ModelCard) -> None:
    """Refuse a scvi-tools registry with other genes, types or keys than the card."""
    if not isinstance(registry, dict) or registry.get("model_name") != "AMICI":
        _refuse("registry is not that of an AMICI")
    setup, fields = registry["setup_args"], registry["field_registries"]
    for name in ("n_neighbors", "labels_key", "coord_obsm_key", "layer", "cell_radius_key"):
        if name in setup and setup[name] != getattr(card, name) and not (name == "n_neighbors" and setup[name] is None):
            _refuse(f"{name} of registry and card differ")
    n_cells = fields["X"]["summary_stats"]["n_cells"]
    if not _is_whole(n_cells, 1, _MOST_CELLS) or card.n_neighbors > n_cells:
        _refuse(f"n_neighbors={card.n_neighbors} of {n_cells!a:.80} cells")
    theirs = fields["X"]["state_registry"]["column_names"], fields["labels"]["state_registry"]["categorical_mapping"]
    for what, stored, ours in zip(("genes", "cell types"), theirs, (card.genes, card.cell_types), strict=True):
        if len(values_of(stored)) != len(ours):
            _refuse(f"{what} of registry and card differ in number")
    _check_types(registry)


def _check_types(value: Any) -> None:
    """Refuse stored arrays of dtypes that no registry has, because their names are passed to NumPy."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if set(one) == {"array", "dtype"}:
                if not isinstance(one["array"], list) or not _DTYPE.fullmatch(str(one["dtype"])):
                    _refuse(f"an array of registry is of type {str(one['dtype'])[:80]!a}")
                continue
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
