"""A trained AMICI without pickle: weights as safetensors, set-up as JSON."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from amici_eval.common.errors import DataError, DeviceMemoryError, ModelFormatError, first_line
from amici_eval.common.files import check_names, load_json
from amici_eval.common.memory import memory_errors_explained
from amici_eval.data.checks import trained_on as trained_rows
from amici_eval.data.files import open_anndata
from amici_eval.data.membership import describe_training_data, prints_from, text_of
from amici_eval.data.tissue import cells_found, prepare
from amici_eval.model.cards import (
    card_from_registry,
    check_training_tissue,
    fingerprints_of,
    split_covers,
    split_size,
)
from amici_eval.model.engines.hooked import plain_profiles
from amici_eval.model.manifest import (
    CELLS,
    SETUP,
    WEIGHTS,
    card_from,
    check_card,
    check_manifest,
    check_registry,
    check_weights,
    damaged,
    plain_history,
    read_weights,
    to_plain,
    values_of,
    with_arrays,
    write_manifest,
)
from amici_eval.model.unpickling import SavedAMICI, history_of, read_saved_amici, saved_files
from amici_eval.settings.evaluation import DataSpec, TrainedOnSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from anndata import AnnData
    from jaxtyping import Float32, Int64
    from torch import Tensor

    from amici_eval.common.model_card import Fingerprints, ModelCard
    from amici_eval.data.tissue import Tissue

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
BUNDLED_ADATA = "adata.h5ad"
_SETUP_BYTES, _SETUP_VALUES = 2**26, 2**21
_CELLS_BYTES, _CELLS_VALUES = 2**30, 2**25
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OSError, RecursionError, SafetensorError)
_SPLITS = ("train", "validation", "test")


@contextmanager
def _weights_fit_setup() -> Iterator[None]:
    """Turn torch's errors about a module that cannot be built or take the weights into errors of this package."""
    try:
        with memory_errors_explained("building the model", "cpu"):
            yield
    except DeviceMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        message = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ModelFormatError(
            value=f"weights and set-up disagree ({message})",
            rule="they must come from one model",
            fix="register the model again",
        ) from error


@dataclass(frozen=True, eq=False, repr=False)
class TrainedAMICI:
    """A trained AMICI, apart from any AnnData.

    Parameters
    ----------
    card
        Heads, genes, cell types, neighbours, versions, training cells.
    init_params
        Keyword arguments of ``amici.AMICI``.
    registry
        The set-up of the training AnnData as scvi-tools records it.
    weights
        The module's state dict, on the CPU.
    cells
        Names of the cells of the ``train``, ``validation`` and ``test`` split, in the order of training; empty if not
        known.
    history
        Training curves by name.
    fingerprints
        Places and expression of the cells of each split; empty for models of older versions.
    """

    card: ModelCard
    init_params: Mapping[str, Any]
    registry: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    cells: Mapping[str, tuple[str, ...]]
    history: Mapping[str, tuple[float, ...]]
    fingerprints: Mapping[str, Fingerprints] = field(default_factory=dict)

    def __repr__(self) -> str:
        card = self.card
        return (
            f"TrainedAMICI({card.n_heads} heads, {card.n_neighbors} neighbours, {len(card.genes)} genes, "
            f"{len(card.cell_types)} cell types)"
        )

    @property
    def setup(self) -> str:
        """Hash of the training set-up: versions that share it differ in seed, split and the order of data only."""
        parts = {
            "init_params": self.init_params,
            "setup_args": self.registry.get("setup_args"),
            "genes": self.card.genes,
            "cell_types": self.card.cell_types,
            "cells": {split: len(names) for split, names in self.cells.items()},
            "epochs": max((len(values) for values in self.history.values()), default=0),
        }
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def from_amici(
        cls, model: Any, *, adata: AnnData | None = None, trained_on: TrainedOnSpec | None = None
    ) -> TrainedAMICI:
        """Take everything that is needed from a trained ``amici.AMICI``.

        Parameters
        ----------
        model
            The model; it is not changed.
        adata
            The AnnData it was trained on, if that is not ``model.adata``; or a tissue that holds it.
        trained_on
            Which cells of the tissue it was trained on, if not all.

        Raises
        ------
        ModelFormatError
            If it is no AMICI, a subclass of it, or not trained.
        DataError
            If the AnnData is not the one of training.
        """
        for part, name in ((model, "AMICI"), (model.module, "AMICIModule")):
            if type(part).__name__ != name or type(part).__module__.split(".")[0] != "amici":
                raise ModelFormatError(
                    value=f"the model is a {type(part).__module__}.{type(part).__name__}",
                    rule="only amici.AMICI itself can be saved: its weights are put back into that class",
                    fix="evaluate other classes directly with amici_eval.evaluate(model, adata)",
                )
        if not model.is_trained_:
            raise ModelFormatError(
                value="the model is not trained", rule="only trained models are saved", fix="call train()"
            )
        names = ("init_params_", "registry_", "history_", *(f"{split}_indices_" for split in _SPLITS))
        saved = SavedAMICI(
            attributes={name: getattr(model, name, None) for name in names}, weights=model.module.state_dict()
        )
        adata = model.adata if adata is None else adata
        if not trained_on and adata is model.adata and not split_covers(model, adata.n_obs):
            logger.warning(
                "the model is bound to %d cells and its split is one of other cells: which cells it was fitted on is "
                "not recorded; pass training_adata=, or trained_on=amici_eval.TrainedOnSpec(key=..., value=...)",
                adata.n_obs,
            )
            adata = None
        with _explained("the live model"):
            return cls._assemble(saved, adata, trained_on)

    @classmethod
    def _assemble(cls, saved: SavedAMICI, adata: AnnData | None, trained_on: TrainedOnSpec | None) -> TrainedAMICI:
        """Return a model from its parts, in a uniform form and with all of it checked."""
        attributes = saved.attributes
        registry = to_plain(attributes["registry_"], "registry_")
        if registry.get("model_name") != "AMICI":
            raise ModelFormatError(
                value=f"the model was saved by class {registry.get('model_name')!r}",
                rule="it must have been saved by amici.AMICI",
                fix="give the folder that AMICI.save(...) wrote",
            )
        init_params = {
            key: value
            for group in attributes["init_params_"]["kwargs"].values()
            for key, value in to_plain(group, "init_params_").items()
        }
        setup = registry["setup_args"]
        weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in saved.weights.items()}
        weights["ct_profiles"] = plain_profiles(weights["ct_profiles"])
        card = card_from_registry(
            registry, n_heads=int(weights["attention_layer.W_O"].shape[1]), n_neighbors=int(setup["n_neighbors"])
        )
        saved_by = str(registry.get("scvi_version", card.versions["scvi-tools"]))
        card = replace(card, versions={**card.versions, "scvi-tools": saved_by})
        check_card(card)
        cells: dict[str, Fingerprints] = {}
        if adata is not None:
            rows = trained_rows(adata, trained_on or TrainedOnSpec())
            n_bound = registry["field_registries"]["X"]["summary_stats"]["n_cells"]
            tissue = check_training_tissue(
                adata, card, weights["ct_profiles"], rows, n_split=split_size(attributes), n_bound=n_bound
            )
            splits = {split: attributes.get(f"{split}_indices_") for split in _SPLITS}
            cells = fingerprints_of(tissue, np.arange(adata.n_obs) if rows is None else rows, splits, card.genes)
            facts = describe_training_data(adata, coord_obsm_key=setup["coord_obsm_key"], layer=setup["layer"])
            card = replace(_with_cells(card, cells), training_data=facts)
        check_registry(registry, card)
        check_weights(weights, init_params, card)
        history = history_of(attributes.get("history_"))
        check_names(list(history), "history")
        return cls(
            card=card,
            init_params=init_params,
            registry=registry,
            weights=weights,
            cells={split: one.names for split, one in cells.items()},
            history=history,
            fingerprints=cells,
        )

    def save(self, directory: Path) -> None:
        """Write the model into a new folder: ``weights.safetensors``, ``model.json``, ``cells.json``, a manifest.

        None of the files is a pickle. The manifest holds the SHA-256 of the others, to tell a damaged file; it is no
        signature.
        """
        directory.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.weights), directory / WEIGHTS)
        card = asdict(replace(self.card, training_cells=None, fingerprints=None))
        del card["training_cells"], card["fingerprints"]
        setup = {
            "schema_version": SCHEMA_VERSION,
            "card": card,
            "init_params": dict(self.init_params),
            "registry": self.registry,
            "history": {name: list(values) for name, values in self.history.items()},
        }
        (directory / SETUP).write_text(json.dumps(setup, indent=1, ensure_ascii=False), encoding="utf-8")
        cells: dict[str, Any] = {split: list(names) for split, names in self.cells.items()}
        if self.fingerprints:
            cells["fingerprints"] = {split: text_of(prints) for split, prints in self.fingerprints.items()}
        (directory / CELLS).write_text(json.dumps(cells, ensure_ascii=False), encoding="utf-8")
        write_manifest(directory)

    @classmethod
    def load(cls, directory: Path) -> TrainedAMICI:
        """Read what :meth:`save` wrote. Nothing in the folder can run code: there is no pickle and no import.

        Raises
        ------
        ModelFormatError
            If a file is missing, altered, truncated or does not fit the others.
        """
        check_manifest(directory)
        try:
            setup = load_json(directory / SETUP, limit=_SETUP_BYTES, max_values=_SETUP_VALUES, allow_nan=True)
            cells = load_json(directory / CELLS, limit=_CELLS_BYTES, max_values=_CELLS_VALUES)
            if setup["schema_version"] != SCHEMA_VERSION:
                raise ModelFormatError(
                    value=f"the model in {directory} is of schema version {setup['schema_version']!a:.80}",
                    rule=f"this version of amici_eval reads schema version {SCHEMA_VERSION}",
                    fix="install the version of amici_eval that logged it",
                )
            texts = cells.pop("fingerprints", {})
            if not set(cells) <= set(_SPLITS) or (texts and set(texts) != set(cells)):
                raise damaged(directory, f"{CELLS} holds other splits than {', '.join(_SPLITS)}")
            for split, names in cells.items():
                check_names(names, f"cells of the {split} split")
            prints = {split: prints_from(text, tuple(cells[split])) for split, text in texts.items()}
            names_only = frozenset(cells["train"]) if cells.get("train") else None
            card = _with_cells(card_from(setup["card"], names_only), prints)
            check_registry(setup["registry"], card)
            weights = read_weights(directory / WEIGHTS)
            check_weights(weights, setup["init_params"], card)
            return cls(
                card=card,
                init_params=setup["init_params"],
                registry=setup["registry"],
                weights=weights,
                cells={split: tuple(names) for split, names in cells.items()},
                history=plain_history(setup["history"]),
                fingerprints=prints,
            )
        except ModelFormatError:
            raise
        except _DAMAGE as error:
            raise damaged(directory, first_line(error)) from error

    def build_module(self) -> Any:
        """Return a new ``amici.AMICIModule`` with these weights, in eval mode on the CPU.

        Raises
        ------
        ModelFormatError
            If weights and set-up do not fit each other.
        """
        from amici import AMICIModule

        # the constructor draws initial weights, which must not advance the caller's random state
        with torch.random.fork_rng(devices=[]):
            with _weights_fit_setup():
                module = AMICIModule(
                    n_genes=len(self.card.genes),
                    n_labels=len(self.card.cell_types),
                    empirical_ct_means=torch.zeros(len(self.card.cell_types), len(self.card.genes)),
                    **self.init_params,
                )
                module.load_state_dict(dict(self.weights))
        return module.eval()

    def bind(self, adata: AnnData) -> Any:
        """Return a native ``amici.AMICI`` on a tissue, ready for all of AMICI's own methods.

        Parameters
        ----------
        adata
            Any tissue with the model's genes and labels. It is not changed: the model gets a copy with dense
            expression, and neighbours are computed for it.

        Raises
        ------
        DataError
            If the tissue does not fit the model.
        ModelFormatError
            If weights and set-up do not fit each other.
        """
        from amici import AMICI
        from anndata import AnnData

        from amici_eval.model.training import data_loader_restored, give_own_data_splitter

        tissue, card = self._tissue(adata), self.card
        categories = values_of(self.registry["field_registries"]["labels"]["state_registry"]["categorical_mapping"])
        own = AnnData(X=tissue.expression(np.arange(tissue.n_cells)))
        own.obs_names, own.var_names = list(tissue.cell_names), list(card.genes)
        own.obs[card.labels_key] = [categories[code] for code in tissue.label_codes]
        own.obsm[card.coord_obsm_key] = tissue.coordinates
        if card.layer is not None:
            own.layers[card.layer] = own.X
        if card.cell_radius_key is not None:
            own.obs[card.cell_radius_key] = tissue.radii
        registry = with_arrays(self.registry)
        with data_loader_restored(), torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _weights_fit_setup():
            # types that this tissue lacks warn of empty means; the saved profiles replace all means
            warnings.simplefilter("ignore")
            AMICI.setup_anndata(own, source_registry=registry, **registry["setup_args"])
            model = AMICI(own, **self.init_params)
            model.module.load_state_dict(dict(self.weights))
        model.module.eval()
        give_own_data_splitter(model)
        model.is_trained_ = True
        model.history_ = {
            name: pd.DataFrame({name: values}, index=pd.RangeIndex(len(values), name="epoch"))
            for name, values in self.history.items()
        }
        for split, names in self.cells.items():
            setattr(model, f"{split}_indices_", self._rows_of(split, names, tissue))
        return model

    def _tissue(self, adata: AnnData) -> Tissue:
        """Return a tissue as the model sees it, ignoring which cells it was fitted on."""
        return prepare(adata, replace(self.card, training_cells=None, fingerprints=None), DataSpec())

    def _rows_of(self, split: str, names: tuple[str, ...], tissue: Tissue) -> Int64[np.ndarray, " rows"] | None:
        """Return the rows of a split's cells, in its order if the names match; ``None`` if not known."""
        rows = pd.Index(tissue.cell_names).get_indexer(pd.Index(names, dtype=object))
        rows = rows[rows >= 0].astype(np.int64)
        prints = self.fingerprints.get(split)
        if prints is None or not names:
            return rows
        own = replace(self.card, training_cells=frozenset(names), fingerprints=prints)
        try:
            found = cells_found(own, tissue)
        except DataError:
            return None
        members = np.flatnonzero(np.zeros(0) if found is None else found)
        return rows if np.array_equal(np.sort(rows), members) else members

    def predict(self, adata: AnnData) -> Float32[np.ndarray, "cells genes"]:
        """Return the unablated model's predicted expression of all cells, in the order of the AnnData.

        Raises
        ------
        DataError
            If the tissue does not fit the model.
        """
        from amici_eval.model.engines.opening import open_access
        from amici_eval.settings.evaluation import AblationSpec

        tissue = self._tissue(adata)
        with open_access(self, tissue, AblationSpec(device="cpu")) as access:
            return access.predict(np.arange(tissue.n_cells), keeps=[None])[0]


def _with_cells(card: ModelCard, cells: Mapping[str, Fingerprints]) -> ModelCard:
    """Return the card with the fitted cells, if they are known."""
    fitted = cells.get("train")
    if fitted is None or not fitted.names:
        return card
    return replace(card, training_cells=frozenset(fitted.names), fingerprints=fitted)


def read_amici_directory(
    directory: Path, *, adata: AnnData | None, trust: bool, trained_on: TrainedOnSpec | None = None
) -> TrainedAMICI:
    """Read what ``AMICI.save`` wrote; this unpickles ``model.pt``."""
    files = saved_files(directory)
    saved = read_saved_amici(files.model, trust=trust)
    if adata is None and files.adata is not None:
        adata = open_anndata(files.adata)
    with _explained(files.model):
        return TrainedAMICI._assemble(saved, adata, trained_on)


@contextmanager
def _explained(source: object) -> Iterator[None]:
    """Turn errors about a model that cannot be read into errors that name its source and the problem."""
    try:
        yield
    except DataError:
        raise
    except ModelFormatError as error:
        raise ModelFormatError(value=f"{source}: {error.value}", rule=error.rule, fix=error.fix) from error
    except Exception as error:
        raise ModelFormatError(
            value=f"{source} holds no AMICI ({first_line(error)})",
            rule="it must be what AMICI.save(...) wrote",
            fix="copy or save it again",
        ) from error


def untrained_like(trained: TrainedAMICI, *, seed: int) -> TrainedAMICI:
    """Return a model of the same architecture with newly drawn initial weights."""
    module = trained.build_module()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in module.modules():
            reset = getattr(part, "reset_parameters", None)
            if reset is not None:
                reset()
    weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    return replace(trained, weights=weights, history={})
