"""The hooked engine: predictions of any set of heads by the model's own forward pass."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from amici_eval.common.errors import ModelFormatError
from amici_eval.common.memory import Shrinking
from amici_eval.data.matrices import sent
from amici_eval.data.tissue import Tissue, check_sections, keep_away_from_training
from amici_eval.model.engines.attention import FAINT

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from jaxtyping import Bool, Float, Float32, Float64, Int64
    from torch import Tensor

    from amici_eval.common.model_card import ModelCard
    from amici_eval.data.tissue import ExpressionBlock


def is_amici_module(module: Any) -> bool:
    """Return whether a module is of AMICI's own class, and not of a subclass."""
    from amici import AMICIModule

    return type(module) is AMICIModule


def why_not_factored(module: Any) -> str | None:
    """Return why a module needs its own forward pass; ``None`` if its parts are AMICI's own and without hooks."""
    from amici import AMICIModule
    from amici._components import AttentionBlock, ResNetMLP
    from torch import nn
    from transformer_lens.hook_points import HookPoint

    if not is_amici_module(module):
        return f"the module is a {type(module).__qualname__}, which may compute something else than AMICIModule"
    known = (
        AMICIModule, AttentionBlock, ResNetMLP, HookPoint, nn.Linear, nn.LayerNorm, nn.ReLU, nn.Sequential, nn.Dropout,
        nn.Embedding, nn.Identity,
    )  # fmt: skip
    for name, part in module.named_modules():
        if type(part) not in known:
            return f"its part {name} is a {type(part).__qualname__}, which AMICI itself does not use there"
        if any(method in vars(part) for method in ("forward", "inference", "generative")):
            return f"the forward pass of its part {name or 'module'} was replaced"
        if part._forward_hooks or part._forward_pre_hooks or getattr(part, "fwd_hooks", None):
            return f"it carries hooks of its own on {name or 'the module'}"
        if isinstance(part, nn.Sequential) and len(part) not in (2, 5):
            return f"its part {name} has {len(part)} layers"
    if any(parameter.dtype != torch.float32 for parameter in module.parameters()):
        return "its weights are not float32"
    return None


@contextmanager
def added_hook(point: Any, hook: Callable[..., Any]) -> Iterator[None]:
    """Add a forward hook to a TransformerLens ``HookPoint`` while the body runs.

    ``HookedRootModule.hooks`` and ``run_with_hooks`` clear the hooks of the caller as well; this removes its own only,
    also when the body raises.
    """
    point.add_hook(hook)
    handle = point.fwd_hooks[-1]
    try:
        yield
    finally:
        handle.hook.remove()
        point.fwd_hooks = [other for other in point.fwd_hooks if other is not handle]


@contextmanager
def keep_heads(module: Any, heads: Collection[int] | None) -> Iterator[None]:
    """Zero the attention pattern of all heads but some while the body runs.

    Zero attention to all neighbours and the dummy token equals full attention to the dummy token, whose value is 0. The
    layer norm behind the heads rescales, so one head kept alone is off the training distribution.
    """
    if heads is None:
        yield
        return
    ablated = sorted(set(range(module.n_heads)) - set(heads))

    # TransformerLens passes the hook by name
    def zero_ablated(
        pattern: Float[Tensor, "cells heads query keys"], hook: object
    ) -> Float[Tensor, "cells heads query keys"]:
        pattern = pattern.clone()
        pattern[:, ablated] = 0.0
        return pattern

    with added_hook(module.attention_layer.hook_pattern, zero_ablated):
        yield


@contextmanager
def ablations_side_by_side(module: Any, keeps: Sequence[Collection[int] | None]) -> Iterator[list[Tensor]]:
    """Compute several ablations in one forward pass while the body runs, each at its own query position.

    Everything before the attention pattern does not depend on the ablation, so that it runs once.
    """
    kept = torch.zeros((module.n_heads, len(keeps)))
    for position, heads in enumerate(keeps):
        kept[list(range(module.n_heads)) if heads is None else list(heads), position] = 1.0
    outputs: list[Tensor] = []

    def spread(
        pattern: Float[Tensor, "cells heads query keys"], hook: object
    ) -> Float[Tensor, "cells heads ablations keys"]:
        return pattern * kept.to(pattern.device)[None, :, :, None]

    def collect(
        output: Float[Tensor, "cells ablations embedding"], hook: object
    ) -> Float[Tensor, "cells one embedding"]:
        outputs.append(output)
        return output[:, :1]

    with added_hook(module.attention_layer.hook_pattern, spread):
        with added_hook(module.attention_layer.hook_output, collect):
            yield outputs


@contextmanager
def faint_attention_is_zero(module: Any) -> Iterator[None]:
    """Set attention to neighbours with a score far below the strongest to zero while the body runs.

    Weights below ``exp(-80)`` would be denormal floats or close to it, with which processors compute 7 to 14 times
    slower (coordinates in pixels make nearly all weights so small). The processor's flag that flushes them belongs to
    the whole process; this changes no flag, and no weight by more than 2e-35.
    """

    def cut(scores: Float[Tensor, "cells heads query keys"], hook: object) -> Float[Tensor, "cells heads query keys"]:
        strongest = scores.amax(dim=-1, keepdim=True)
        return scores.masked_fill(scores < strongest - FAINT, -torch.inf)

    with added_hook(module.attention_layer.hook_attn_scores, cut):
        yield


def plain_profiles(profiles: Tensor) -> Float[Tensor, "types genes"]:
    """Return mean profiles of cell types as float32, in the shape for dense expression."""
    return profiles.reshape(len(profiles), -1).float()


@contextmanager
def eval_mode_on(module: torch.nn.Module, device: str) -> Iterator[None]:
    """Run a body with the module in eval mode on a device and without autograd, and restore its state."""
    flags = [(part, part.training) for part in module.modules()]
    profiles = getattr(module, "ct_profiles", None)
    if profiles is not None:
        module.ct_profiles = plain_profiles(profiles)
    home = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    try:
        module.eval()
        if torch.device(device) != home:
            module.to(device)
        with torch.no_grad():
            yield
    finally:
        if torch.device(device) != home:
            module.to(home)
        if profiles is not None:
            module.ct_profiles = profiles
        for part, flag in flags:
            part.training = flag


class ModelAccess(Protocol):
    """Protocol of a model on a tissue that can be evaluated."""

    card: ModelCard
    statistics_device: str
    """A torch device that has float64."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on model and data."""
        ...

    @property
    def fitted(self) -> Bool[np.ndarray, " all_cells"] | None:
        """Which cells of the tissue the model was fitted on; ``None`` if that is not known."""
        ...

    def receivers(self) -> dict[str, Int64[np.ndarray, " cells"]]:
        """Return the evaluated rows by cell type, in canonical order."""
        ...

    def cell_names(self, rows: Int64[np.ndarray, " cells"]) -> list[str]:
        """Return the names of some cells."""
        ...

    def expression(self, rows: Int64[np.ndarray, " cells"]) -> Float32[np.ndarray, "cells genes"]:
        """Return the measured expression of some cells."""
        ...

    def predict(
        self,
        rows: Int64[np.ndarray, " cells"],
        *,
        keeps: Sequence[Collection[int] | None],
        progress: Callable[[int], None] | None = None,
    ) -> Float32[np.ndarray, "keeps cells genes"]:
        """Return predicted expression under each ablation; ``None`` keeps all heads, ``()`` keeps none."""
        ...


def neighbours(
    tissue: Tissue, card: ModelCard
) -> tuple[Int64[np.ndarray, "cells neighbours"], Float64[np.ndarray, "cells neighbours"]]:
    """Return rows and distances of each cell's neighbours, as AMICI itself finds them (nearest of other types).

    Cells are sorted by name first, because AMICI breaks ties in distance by the order of rows.
    """
    import pandas as pd
    from amici import AMICI
    from anndata import AnnData

    index, order = pd.RangeIndex(tissue.n_cells).astype(str), tissue.order
    shell = AnnData(obs=pd.DataFrame({"label": tissue.labels[order].astype(str)}, index=index))
    shell.obsm["coordinates"] = tissue.coordinates[order]
    if tissue.radii is not None:
        shell.obs["radius"] = tissue.radii[order]
    AMICI._compute_nn(
        shell,
        coord_obsm_key="coordinates",
        index_key="index",
        dist_key="distance",
        n_neighbors=card.n_neighbors,
        labels_obs_key="label",
        cell_radius_key=None if tissue.radii is None else "radius",
    )
    place = np.argsort(order)
    return order[shell.obsm["index"][place]], np.asarray(shell.obsm["distance"], dtype=np.float64)[place]


class EngineAccess:
    """What both engines tell of the model and its tissue; ``notes`` come after those of the tissue."""

    def __init__(self, card: ModelCard, tissue: Tissue, *, device: str, notes: tuple[str, ...]) -> None:
        self.card, self.tissue, self.device, self.notes = card, tissue, device, notes
        self.statistics_device = "cpu" if device == "mps" else device

    @property
    def fitted(self) -> Bool[np.ndarray, " all_cells"] | None:
        """Which cells of the tissue the model was fitted on; ``None`` if that is not known."""
        return self.tissue.fitted

    @property
    def label_codes(self) -> Int64[np.ndarray, " all_cells"]:
        """The model's code of each cell's type."""
        return self.tissue.label_codes

    def receivers(self) -> dict[str, Int64[np.ndarray, " cells"]]:
        """Return the evaluated rows by cell type, in canonical order."""
        return self.tissue.receivers()

    def cell_names(self, rows: Int64[np.ndarray, " cells"]) -> list[str]:
        """Return the names of some cells."""
        return [str(name) for name in self.tissue.cell_names[rows]]

    def expression(self, rows: Int64[np.ndarray, " cells"]) -> Float32[np.ndarray, "cells genes"]:
        """Return the measured expression of some cells."""
        return self.tissue.expression(rows)

    def expression_blocks(self, rows: Int64[np.ndarray, " cells"]) -> Iterator[ExpressionBlock]:
        """Yield the measured expression of some cells, block by block, in the order of storage."""
        return self.tissue.expression_blocks(rows)

    def coordinates(self, rows: Int64[np.ndarray, " cells"]) -> Float64[np.ndarray, "cells dimensions"]:
        """Return the coordinates of some cells."""
        return self.tissue.coordinates[rows]

    def samples(self, rows: Int64[np.ndarray, " cells"]) -> np.ndarray | None:
        """Return the section of some cells, if a sample column was named."""
        return None if self.tissue.samples is None else self.tissue.samples[rows]


class HookedAccess(EngineAccess):
    """The literal engine: each ablation is a forward pass of the model with hooks on its attention pattern.

    The tissue loses evaluated cells here if a buffer was asked for. ``batch_size``: receivers per forward pass;
    ``notes``: besides those of the tissue.
    """

    engine = "hooked"

    def __init__(
        self,
        module: Any,
        card: ModelCard,
        tissue: Tissue,
        *,
        device: str,
        batch_size: int,
        notes: tuple[str, ...] = (),
    ) -> None:
        rows, distances = neighbours(tissue, card)
        if tissue.sections is not None:
            check_sections(tissue.sections, rows, tissue.coordinates)
        tissue = keep_away_from_training(tissue, rows)
        super().__init__(card, tissue, device=device, notes=(*tissue.notes, *notes))
        self.module = module
        self.neighbour_rows, self.distances = rows.astype(np.int32), distances.astype(np.float32)
        self._batch = Shrinking(batch_size, what="the model's forward pass", unit="receivers", device=device)
        self.own_tensors: Callable[[Int64[np.ndarray, " cells"]], dict[str, torch.Tensor]] | None = None

    def predict(
        self,
        rows: Int64[np.ndarray, " cells"],
        *,
        keeps: Sequence[Collection[int] | None],
        progress: Callable[[int], None] | None = None,
    ) -> Float32[np.ndarray, "keeps cells genes"]:
        """Return predicted expression under each ablation; ``None`` keeps all heads, ``()`` keeps none."""
        predictions = np.empty((len(keeps), len(rows), len(self.card.genes)), dtype=np.float32)
        start = 0
        while start < len(rows):
            tensors = self._batch.run(partial(self._tensors, rows, start))
            n_own = len(tensors["labels"])
            for row, heads in enumerate(keeps):
                done = 0
                while done < n_own:
                    # smaller batches if memory runs out in one of the passes
                    predicted = self._batch.run(partial(self._forward, tensors, heads, done))
                    predictions[row, start + done : start + done + len(predicted)] = predicted
                    done += len(predicted)
                if progress is not None:
                    progress(n_own)
            start += n_own
        return predictions

    def _forward(
        self, tensors: dict[str, torch.Tensor], heads: Collection[int] | None, start: int, size: int
    ) -> Float32[np.ndarray, "cells genes"]:
        part = {name: tensor[start : start + size] for name, tensor in tensors.items()}
        # other classes may use their scores otherwise than in a softmax
        cut = faint_attention_is_zero(self.module) if is_amici_module(self.module) else nullcontext()
        try:
            with cut, keep_heads(self.module, heads):
                _, outputs = self.module(part, compute_loss=False)
        except KeyError as error:
            raise ModelFormatError(
                value=f"the forward pass of {type(self.module).__qualname__} asks for {error}",
                rule=f"on other data than the model's own it is given {', '.join(part)}",
                fix="evaluate the live model on its own AnnData: amici_eval.evaluate(model, model.adata)",
            ) from error
        predicted = outputs["prediction"]
        if len(self.card.genes) == 1:
            # AMICI squeezes the profile of a single gene, so that column j has the profile of cell j
            predicted = predicted.diagonal()[:, None]
        found: Float32[np.ndarray, "cells genes"] = predicted.cpu().numpy()
        return found

    def predict_side_by_side(
        self, rows: Int64[np.ndarray, " cells"], *, keeps: Sequence[Collection[int] | None]
    ) -> Float32[np.ndarray, "keeps cells genes"]:
        """Return the same as :meth:`predict`, in one forward pass for all ablations; for checks on a few cells."""
        predictions = np.empty((len(keeps), len(rows), len(self.card.genes)), dtype=np.float32)
        start = 0
        while start < len(rows):
            predicted = self._batch.run(partial(self._forward_side_by_side, rows, keeps, start))
            predictions[:, start : start + predicted.shape[1]] = predicted
            start += predicted.shape[1]
        return predictions

    def _forward_side_by_side(
        self, rows: Int64[np.ndarray, " cells"], keeps: Sequence[Collection[int] | None], start: int, size: int
    ) -> Float32[np.ndarray, "keeps cells genes"]:
        tensors = self._tensors(rows, start, size)
        with faint_attention_is_zero(self.module), ablations_side_by_side(self.module, keeps) as outputs:
            self.module(tensors, compute_loss=False)
        profile = self.module.ct_profiles[tensors["labels"].squeeze(-1)][:, None]
        predicted = profile + self.module.linear_head(outputs[0])
        found: Float32[np.ndarray, "keeps cells genes"] = predicted.transpose(0, 1).cpu().numpy()
        return found

    def to_send(self) -> HookedAccess:
        """Return a copy without the AnnData and without the names of training cells."""
        other = copy(self)
        other.card = replace(self.card, training_cells=None, fingerprints=None)
        other.tissue = replace(self.tissue, matrix=sent(self.tissue.matrix), adata=None)
        return other

    def _tensors(
        self, rows: Int64[np.ndarray, " cells"], start: int = 0, size: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the tensors that AMICI's own loader would give the module for some of these receivers."""
        rows = rows[start:][:size]
        if self.own_tensors is not None:
            return {name: tensor.to(self.device) for name, tensor in self.own_tensors(rows).items()}
        # nearby receivers share neighbours: fetch each once
        cells, position = np.unique(self.neighbour_rows[rows], return_inverse=True)
        around = self.tissue.expression(cells)[position.reshape(len(rows), -1)]
        tensors = {
            "X": torch.from_numpy(self.tissue.expression(rows)),
            "labels": torch.from_numpy(self.tissue.label_codes[rows][:, None]),
            "nn_x": torch.from_numpy(around),
            "nn_dist": torch.from_numpy(self.distances[rows]),
        }
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}
