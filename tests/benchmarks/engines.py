"""Our side of each measurement: open a model on a tissue with an engine, evaluate, and say what it cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.clock import SLOW_S, Cost, cost_of
from tests.benchmarks.tissues import few_of_each

if TYPE_CHECKING:
    from anndata import AnnData

    from amici_eval.data.tissue import Tissue
    from amici_eval.model.checkpoint import TrainedAMICI
    from amici_eval.settings.evaluation import EvaluationSpec

_WARM_UP_CELLS = 40


SIDES = {
    "everything": "factored",
    "inference": "factored",
    "catalogue": "factored",
    "factored": "factored",
    "hooked": "hooked",
}
"""Our sides and their engines. `factored` and `hooked`: what amici-st does; `catalogue`: with all ablation modes;
`inference`: with the spatial test of heads and genes and the intervals; `everything`: as by default, baselines and the
nearest neighbour masked out, too."""
SAMPLINGS = ("independent", "cyclic")
FEW = 16
"""Asked of the cyclic test: it takes all shifts of a type's cells, but only where these are more than was asked."""


def settings(side: str, *, n_permutations: int | None, sampling: str = "independent") -> EvaluationSpec:
    """Return the settings of a measurement, on the CPU."""
    from amici_eval.settings.evaluation import AblationSpec, EvaluationSpec, PermutationSpec

    modes = None if side in ("catalogue", "everything") else ("keep_one",)
    inference = {} if side in ("inference", "everything") else {"spatial_null": "none", "n_bootstrap": 0}
    return EvaluationSpec(
        ablation=AblationSpec(engine=SIDES[side], device="cpu", modes=modes, baselines=side == "everything"),
        permutation=PermutationSpec(n_permutations=n_permutations, sampling=sampling, **inference),
    )


@dataclass(frozen=True)
class Source:
    """A model and its tissue on disk.

    Parameters
    ----------
    model
        Folder that ``AMICI.save`` or ``TrainedAMICI.save`` wrote.
    data
        The ``.h5ad``.
    """

    model: str
    data: str

    def load(self) -> tuple[TrainedAMICI, AnnData]:
        """Return model and tissue in memory, the tissue as it is stored."""
        import anndata

        from amici_eval.model.checkpoint import TrainedAMICI, read_amici_directory

        adata = anndata.read_h5ad(self.data)
        if not self.is_amici:
            return TrainedAMICI.load(Path(self.model)), adata
        return read_amici_directory(Path(self.model), adata=adata, trust=False), adata

    def load_native(self) -> Any:
        """Return an ``amici.AMICI`` on the tissue, with dense expression as amici-st wants it."""
        import amici
        import anndata
        from scipy import sparse

        from amici_eval.model.checkpoint import TrainedAMICI
        from amici_eval.model.training import data_loader_restored

        adata = anndata.read_h5ad(self.data)
        if not self.is_amici:
            return TrainedAMICI.load(Path(self.model)).bind(adata)
        if sparse.issparse(adata.X):
            adata.X = adata.X.toarray()
        with data_loader_restored():
            return amici.AMICI.load(self.model, adata=adata)

    @property
    def is_amici(self) -> bool:
        return (Path(self.model) / "model.pt").is_file()


@dataclass(frozen=True, kw_only=True)
class Timing:
    """An evaluation and what it cost.

    Parameters
    ----------
    open_s
        Opening the model on the tissue, search of neighbours included; amici-st does that when it loads.
    cost
        Of ``evaluate_access``: from there to all numbers.
    attention_s
        Until attention had been computed for all receivers (``nan`` with the hooked engine): the check against the
        hooked engine, the encoder pass, attention.
    """

    open_s: float
    cost: Cost
    attention_s: float

    @property
    def wall_s(self) -> float:
        return self.cost.wall_s


def time_evaluation(model: TrainedAMICI, tissue: Tissue, spec: EvaluationSpec, *, repeats: int = 1) -> Timing:
    """Evaluate some times, each time from a freshly opened model, so that nothing is left from the run before."""
    from amici_eval.evaluation.pipeline import evaluate_access
    from amici_eval.model.engines.opening import open_access

    opening, costs, attending = [], [], []
    while len(costs) < repeats and (not costs or costs[0].wall_s < SLOW_S):
        stages = StageClock()
        with open_access(model, tissue, spec.ablation) as access:
            opening.append(stages.elapsed())
            stages = StageClock()
            costs.append(
                cost_of(lambda access=access, stages=stages: evaluate_access(access, spec, progress=stages.progress))
            )
            attending.append(stages.attention_s)
    used = costs[0].value.engine
    if used != spec.ablation.engine:
        msg = f"the {spec.ablation.engine} engine was asked for, the {used} engine did the work: {costs[0].value.notes}"
        raise RuntimeError(msg)
    by_wall = sorted(costs, key=lambda cost: cost.wall_s)
    middle = by_wall[len(by_wall) // 2]
    highest = max(costs, key=lambda cost: cost.peak_mb)
    cost = replace(
        middle,
        peak_mb=highest.peak_mb,
        above_mb=max(cost.above_mb for cost in costs),
        repeats=len(costs),
    )
    return Timing(
        open_s=sorted(opening)[len(opening) // 2], cost=cost, attention_s=sorted(attending)[len(attending) // 2]
    )


class StageClock:
    """Notes, through the evaluation's own reports of progress, when attention was done."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.attention_s = float("nan")

    def elapsed(self) -> float:
        return time.perf_counter() - self._started

    def progress(self, done: int, total: int, what: str) -> None:  # noqa: ARG002, RUF100 - the signature is the API's
        if what.startswith("attention"):
            self.attention_s = self.elapsed()


def warm_up(model: TrainedAMICI, adata: AnnData, side: str) -> float:
    """Evaluate a tiny part of a tissue in all ways, so that everything is compiled; return the seconds it took."""
    from amici_eval.data.tissue import prepare
    from amici_eval.settings.evaluation import DataSpec

    started = time.perf_counter()
    small = few_of_each(adata, max(_WARM_UP_CELLS, model.card.n_neighbors + 1), labels_key=model.card.labels_key)
    tissue = prepare(small, model.card, DataSpec())
    for sampling in SAMPLINGS:
        # few and many permutations in relation to cells: both forms of the test
        for n_permutations in (FEW, 8 * _WARM_UP_CELLS) if sampling == "independent" else (FEW,):
            time_evaluation(model, tissue, settings(side, n_permutations=n_permutations, sampling=sampling))
    return time.perf_counter() - started
