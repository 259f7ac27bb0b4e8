"""Frozen, validated settings: what to evaluate, on which cells, with which test.

Everything below the command line takes these and nothing else. Each ``__post_init__`` refuses what it cannot use and
says why, so that a wrong setting stops a job before the model is opened.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from amici_eval.common.errors import DeviceError, InvalidSpecError
from amici_eval.settings.checks import bytes_of, require_int, require_one_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SAMPLINGS = ("independent", "cyclic")
NULLS = ("free",)
SPATIAL_NULLS = ("lag", "tile", "sample", "torus", "none")
METHODS = ("monte_carlo", "sequential", "moments")
SPATIAL_METHODS = ("moments", "monte_carlo")
TAILS = ("none", "gpd")
CONVENTIONS = ("add_one", "reference")
ADJUSTMENTS = ("bh", "by", "maxt")


@dataclass(frozen=True, kw_only=True)
class PermutationSpec:
    """The permutation test of a head.

    Parameters
    ----------
    n_permutations
        Permutations per cell type; ``None`` takes ``ceil(n_heads * n_types / alpha)``.
    alpha
        Significance level of marks, counts and detectable effects, and for the default number of permutations.
    seed
        With the cell type and the permutation's number it determines each permutation; also resamples and flips.
    sampling
        Of the free null. ``independent``: each permutation is drawn on its own. ``cyclic``: all shifts of the cells
        along one random order, which form a group, so that the test is exact and costs next to nothing; a type needs
        more cells than ``n_permutations``, else its permutations are independent.
    convention
        Of the free null. ``add_one``: p = (b+1)/(m+1), valid and never 0 (Phipson & Smyth 2010). ``reference``: p = b/m
        as amici-st.
    null
        ``free``: cells of a type are exchangeable. In spatially autocorrelated tissue this is anticonservative. It
        fills the columns that amici-st has; ``spatial_null`` fills the others.
    method
        Of the free null. ``monte_carlo``: count random permutations. ``sequential``: stop a head at ``stop_at``
        exceedances (Besag & Clifford 1991). ``moments``: exact mean, variance and skewness of the
        statistic over all permutations, none drawn (Pearson III); types of fewer than 50 cells, whose law three moments
        do not tell, are counted over 100,000 permutations.
    stop_at
        Exceedances at which ``sequential`` stops.
    tail
        Of the free null. ``gpd``: p-values with fewer than 10 exceedances come from a generalised Pareto tail
        (Knijnenburg et al. 2009); ``none``: from counts alone.
    adjustment
        Over all defined heads x types. ``bh``: Benjamini-Hochberg; ``by``: Benjamini-Yekutieli (any dependence);
        ``maxt``: family-wise, step-down maxT on the shared permutations of the free null (Westfall & Young 1993), and
        Holm for the spatial null and the genes.
    spatial_null
        The test that decides what is significant. ``lag``: analytic, prediction and expression keep the smoothness they
        have; ``tile``: shuffled within tiles of ``tile_width``; ``sample``: within sections; ``torus``: random shifts
        of whole sections; ``none``: the free null decides.
    spatial_method
        Of ``tile`` and ``sample``: ``moments`` (exact; where fewer than 50 cells change places, 100,000 permutations
        are counted instead) or ``monte_carlo``.
    reach
        Of ``lag``: largest distance of pairs of cells, in coordinate units; ``None``: the window's longer
        side.
    tile_width
        Of ``tile``, in coordinate units; ``None``: half the correlation length of the type.
    tile_widths
        Widths for p against scale, ascending, beside any spatial null; ``None``: half to four times the correlation
        length with ``spatial_null=tile``, none otherwise.
    n_shifts
        Of ``torus``: number of random shifts.
    confidence
        Level of the intervals of explained variance.
    n_bootstrap
        Resamples of tiles behind these intervals; 0: no intervals.
    """

    n_permutations: int | None = None
    alpha: float = 0.05
    seed: int = 0
    sampling: str = "independent"
    convention: str = "add_one"
    null: str = "free"
    method: str = "monte_carlo"
    stop_at: int = 20
    tail: str = "none"
    adjustment: str = "bh"
    spatial_null: str = "lag"
    spatial_method: str = "moments"
    reach: float | None = None
    tile_width: float | None = None
    tile_widths: tuple[float, ...] | None = None
    n_shifts: int = 999
    confidence: float = 0.95
    n_bootstrap: int = 1000

    def __post_init__(self) -> None:
        if self.n_permutations is not None:
            require_int("permutation.n_permutations", self.n_permutations, 1)
        require_int("permutation.seed", self.seed, 0)
        require_int("permutation.stop_at", self.stop_at, 1)
        require_int("permutation.n_shifts", self.n_shifts, 1)
        require_int("permutation.n_bootstrap", self.n_bootstrap, 0)
        for name, meaning, usual in (("alpha", "a significance level", 0.05), ("confidence", "a level", 0.95)):
            value = getattr(self, name)
            if not isinstance(value, float) or not 0.0 < value < 1.0:
                raise InvalidSpecError(
                    value=f"permutation.{name}={value!r}",
                    rule=f"{meaning} lies strictly between 0 and 1",
                    fix=f"set permutation.{name}={usual}",
                )
        require_one_of("permutation.sampling", self.sampling, SAMPLINGS)
        require_one_of("permutation.convention", self.convention, CONVENTIONS)
        require_one_of("permutation.null", self.null, NULLS)
        require_one_of("permutation.method", self.method, METHODS)
        require_one_of("permutation.tail", self.tail, TAILS)
        require_one_of("permutation.adjustment", self.adjustment, ADJUSTMENTS)
        require_one_of("permutation.spatial_null", self.spatial_null, SPATIAL_NULLS)
        require_one_of("permutation.spatial_method", self.spatial_method, SPATIAL_METHODS)
        if self.tile_widths is not None:
            widths = self.tile_widths if isinstance(self.tile_widths, (list, tuple)) else (self.tile_widths,)
            distinct = {_distance("tile_widths", width) for width in widths}
            object.__setattr__(self, "tile_widths", tuple(sorted(distinct)))
        for name in ("reach", "tile_width"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _distance(name, getattr(self, name)))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.tile_widths and self.spatial_null == "none":
            raise InvalidSpecError(
                value="permutation.tile_widths with permutation.spatial_null=none",
                rule="p against scale stands beside a spatial test",
                fix="set permutation.spatial_null=lag, or leave permutation.tile_widths out",
            )
        if self.tile_width is not None and self.spatial_null != "tile":
            raise InvalidSpecError(
                value=f"permutation.tile_width={self.tile_width:g} with permutation.spatial_null={self.spatial_null}",
                rule="it is the side of the squares within which the tile null shuffles cells",
                fix="set permutation.spatial_null=tile, or permutation.tile_widths for p against scale",
            )
        drawn = "independent permutations that are counted"
        for name, value, other, needed, rule in (
            ("adjustment", "maxt", "method", "monte_carlo", f"maxT compares {drawn}"),
            ("adjustment", "maxt", "sampling", "independent", f"maxT compares {drawn}"),
            ("tail", "gpd", "method", "monte_carlo", f"a tail is fitted to {drawn}"),
            ("tail", "gpd", "sampling", "independent", f"a tail is fitted to {drawn}"),
            ("method", "sequential", "sampling", "independent", "shifts of one order cannot be stopped early"),
            ("method", "sequential", "convention", "add_one", "amici-st stops nothing early"),
            ("method", "moments", "convention", "add_one", "without permutations there is no b/m"),
        ):
            if getattr(self, name) == value and getattr(self, other) != needed:
                raise InvalidSpecError(
                    value=f"permutation.{name}={value} with permutation.{other}={getattr(self, other)}",
                    rule=rule,
                    fix=f"set permutation.{other}={needed}, or leave permutation.{name} out for the default, "
                    f"{getattr(type(self), name)}",
                )


def _distance(name: str, value: object) -> float:
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not 0.0 < number < math.inf:
        raise InvalidSpecError(
            value=f"permutation.{name}={value!r}",
            rule="a distance is a number above 0, in the unit of the coordinates",
            fix="leave it out: the default follows from the data",
        )
    return number


def default_n_permutations(n_heads: int, n_types: int, alpha: float) -> int:
    """Return a number of permutations at which one lone test of the family reaches ``alpha`` if nothing exceeds it.

    Notes
    -----
    The same rule as amici-st: ``ceil(n_heads * n_types / alpha)``, types counted among the evaluated cells.
    """
    return math.ceil(n_heads * n_types / alpha)


ENGINES = ("factored", "hooked")
MODES = ("keep_one", "leave_one_out", "mean_z", "resampled_z", "frozen_norm", "shapley", "frozen_shapley")
HOOKED_MODES = ("keep_one", "leave_one_out")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True, kw_only=True)
class SubsetSpec:
    """Which cells are evaluated; all cells stay in the tissue as neighbours.

    Parameters
    ----------
    key
        Column of ``adata.obs``; together with ``value``.
    value
        The cells whose ``obs[key]``, written as text, equals this are chosen; whole numbers may end in ``.0``.
    indices
        Row numbers of the chosen cells in the AnnData; instead of ``key`` and ``value``.
    held_out
        Which of the chosen cells (without ``key`` and ``indices``: of all cells) are evaluated: ``True`` those that the
        model was not fitted on, ``False`` those that it was fitted on, ``None`` all. Needs the names of the training
        cells, which the model recorded if it was read together with its AnnData.
    buffer
        Whether evaluated cells that have a training cell among their neighbours (the model's own) are dropped, so that
        nothing of what a cell attends to was fitted. Needs the names, too, and a split by region or section: after a
        random split nearly every cell has a training cell near it. Most useful with ``held_out=True``.

    Notes
    -----
    If a column of the AnnData holds the split, neither the names nor ``held_out`` are needed: with
    ``key="split", value="test"`` its test cells are evaluated.
    """

    key: str | None = None
    value: str | None = None
    indices: tuple[int, ...] | None = None
    held_out: bool | None = None
    buffer: bool = False

    def __post_init__(self) -> None:
        if self.held_out is not None and not isinstance(self.held_out, bool):
            raise InvalidSpecError(
                value=f"data.subset.held_out={self.held_out!r}",
                rule="it must be true, false or null",
                fix="set data.subset.held_out=true for the cells that the model was not fitted on",
            )
        if not isinstance(self.buffer, bool):
            raise InvalidSpecError(
                value=f"data.subset.buffer={self.buffer!r}",
                rule="it must be true or false",
                fix="set data.subset.buffer=true to drop cells with a training cell among their neighbours",
            )
        if self.value is not None:
            object.__setattr__(self, "value", str(self.value))
        if (self.key is None) != (self.value is None):
            missing = "value" if self.value is None else "key"
            raise InvalidSpecError(
                value=f"data.subset.key={self.key!r}, data.subset.value={self.value!r}",
                rule="a subset by column needs both",
                fix=f"give data.subset.{missing} too",
            )
        if self.indices is not None:
            # NumPy's whole numbers are welcome, but JSON holds plain ones only
            rows = list(self.indices) if isinstance(self.indices, Iterable) else [self.indices]
            whole = all(isinstance(row, Integral) and not isinstance(row, bool) for row in rows)
            if not whole or not rows or min(rows) < 0 or len(set(rows)) < len(rows):
                raise InvalidSpecError(
                    value=f"data.subset.indices={rows[:5]}... ({len(rows)} rows)",
                    rule="row numbers must be distinct whole numbers, not negative, and at least one",
                    fix="give each row once, counted from 0",
                )
            object.__setattr__(self, "indices", tuple(int(row) for row in rows))
            if self.key is not None:
                raise InvalidSpecError(
                    value=f"data.subset.key={self.key!r} and data.subset.indices with {len(rows)} rows",
                    rule="cells are chosen by column or by index, not by both",
                    fix="drop one of the two",
                )


@dataclass(frozen=True, kw_only=True)
class TrainedOnSpec:
    """Which cells of the tissue were in the AnnData that the model was trained on, if that was a part of the tissue.

    Parameters
    ----------
    key
        Column of ``adata.obs`` that tells the cells of training from the others, such as in_test.
    value
        Value of that column in the cells of training, written as text, such as ``"false"``.
    names
        Text file with the name of a cell in each line; instead of ``key`` and ``value``.
    """

    key: str | None = None
    value: str | None = None
    names: str | None = None

    def __post_init__(self) -> None:
        if self.value is not None:
            # False is how Python writes it
            object.__setattr__(self, "value", str(self.value))
        if (self.key is None) != (self.value is None) or (self.key is not None and self.names is not None):
            raise InvalidSpecError(
                value=f"trained_on.key={self.key!r}, trained_on.value={self.value!r}, trained_on.names={self.names!r}",
                rule="training cells are named by a column and its value, or by a file with their names",
                fix="give trained_on.key and trained_on.value, or trained_on.names alone",
            )

    def __bool__(self) -> bool:
        return self.key is not None or self.names is not None


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """How the AnnData is read; ``None`` takes what the model was trained with.

    Parameters
    ----------
    labels_key
        Column of ``adata.obs`` with the cell type.
    coord_obsm_key
        Key of ``adata.obsm`` with the coordinates, in the unit the model was trained in.
    layer
        Layer with the expression; ``None`` takes the model's, ``"X"`` forces ``adata.X``.
    sample_key
        Column of ``adata.obs`` that names the slide or section of a cell. Given, neighbours must not cross sections,
        unless these are stacked in z.
    backed
        Whether expression stays on disk and is read in blocks; ``None``: if it would take more than 256 MiB and more
        than a quarter of the free memory, and is not stored by genes (CSC). Changes memory and speed, not results;
        without meaning for an AnnData that is open already.
    subset
        The cells to evaluate.
    trained_on
        Which cells the model was trained on, if that was a part of the tissue. All of them count as fitted, unless the
        split that the model recorded lies within them.
    """

    labels_key: str | None = None
    coord_obsm_key: str | None = None
    layer: str | None = None
    sample_key: str | None = None
    backed: bool | None = None
    subset: SubsetSpec = field(default_factory=SubsetSpec)
    trained_on: TrainedOnSpec = field(default_factory=TrainedOnSpec)

    def __post_init__(self) -> None:
        if self.backed is not None and not isinstance(self.backed, bool):
            raise InvalidSpecError(
                value=f"data.backed={self.backed!r}",
                rule="it must be true or false, or left out",
                fix="leave it out: large files stay on disk by themselves",
            )


@dataclass(frozen=True, kw_only=True)
class AblationSpec:
    """How head ablations are computed.

    Parameters
    ----------
    engine
        ``"factored"``: senders are embedded once and all heads follow from one pass; checked against the other on some
        cells of each type. ``"hooked"``: hooks on the attention pattern through the model's own forward pass.
    device
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; ``auto`` takes CUDA where there is one, else the CPU.
    batch_size
        Receiver cells per forward pass of the hooked engine. Changes speed and memory, not results.
    memory_budget
        What tables and chunks of the factored engine may take, as ``"4GB"``, ``"500MB"`` or a number of bytes; ``None``
        takes a quarter of the device's free memory. At least 1 MB; changes results by rounding only.
    modes
        What is computed of each head besides its explained variance when kept alone (``keep_one``, always there):
        ``leave_one_out``, ``mean_z`` (its output replaced by the mean of the type), ``resampled_z`` (by that of other
        cells of the type), ``frozen_norm`` (kept alone, divided by the whole model's scale), ``shapley`` and
        ``frozen_shapley`` (its share of the whole model's explained variance, and pair interactions). ``None`` takes
        all with the factored engine and ``keep_one`` with the hooked one, which offers ``leave_one_out`` besides.
    baselines
        Whether predictors that know no head (types and mean expression of the neighbours, position) are fitted and
        scored on the same cells.
    without_nearest
        Whether the evaluation is repeated with the nearest neighbour of each cell masked out, against expression that
        segmentation put into the wrong cell; with baselines and the factored engine.
    senders
        Whether the evaluation of each head is repeated with each type of sender masked out, which tells who talks to
        whom; with the factored engine. Takes time and memory in proportion to the number of cell types.
    """

    engine: str = "factored"
    device: str = "auto"
    batch_size: int = 512
    memory_budget: str | int | None = None
    modes: tuple[str, ...] | None = None
    baselines: bool = True
    without_nearest: bool = True
    senders: bool = False

    def __post_init__(self) -> None:
        for name in ("baselines", "without_nearest", "senders"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidSpecError(
                    value=f"ablation.{name}={getattr(self, name)!r}",
                    rule="it must be true or false",
                    fix=f"set ablation.{name}=false to leave it out",
                )
        require_one_of("ablation.engine", self.engine, ENGINES)
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise InvalidSpecError(
                value=f"ablation.device={self.device!r}",
                rule="it must be auto, cpu, cuda, cuda:N or mps",
                fix="set ablation.device=auto",
            )
        require_int("ablation.batch_size", self.batch_size, 1)
        if self.memory_budget is not None:
            bytes_of("ablation.memory_budget", self.memory_budget)
        if self.modes is None:
            return
        if not isinstance(self.modes, (str, list, tuple)):
            raise InvalidSpecError(
                value=f"ablation.modes={self.modes!r}",
                rule="it must be a list of modes",
                fix=f"choose among {', '.join(MODES)}",
            )
        modes = (self.modes,) if isinstance(self.modes, str) else tuple(self.modes)
        for mode in modes:
            require_one_of("ablation.modes", mode, MODES)
        object.__setattr__(self, "modes", tuple(mode for mode in MODES if mode in {*modes, "keep_one"}))
        beyond = [mode for mode in self.modes or () if mode not in HOOKED_MODES]
        if self.engine == "hooked" and beyond:
            raise InvalidSpecError(
                value=f"ablation.modes names {beyond[0]} with ablation.engine=hooked",
                rule=f"the hooked engine offers {', '.join(HOOKED_MODES)}",
                fix="set ablation.engine=factored, or leave the mode out",
            )

    def modes_of(self, engine: str) -> tuple[str, ...]:
        """Return the modes that are computed if an engine does the work."""
        if engine == "factored":
            return MODES if self.modes is None else self.modes
        return ("keep_one",) if self.modes is None else tuple(mode for mode in self.modes if mode in HOOKED_MODES)

    @property
    def memory_bytes(self) -> int | None:
        """The memory budget in bytes."""
        return None if self.memory_budget is None else bytes_of("ablation.memory_budget", self.memory_budget)


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """Everything that determines the numbers of one evaluation."""

    data: DataSpec = field(default_factory=DataSpec)
    ablation: AblationSpec = field(default_factory=AblationSpec)
    permutation: PermutationSpec = field(default_factory=PermutationSpec)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as nested plain values, ready for JSON and YAML."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ReportSpec:
    """What is drawn of an evaluation; changes no number.

    Parameters
    ----------
    figures
        Whether figures are drawn.
    formats
        File formats of the figures.
    n_top_genes
        Genes per heat map.
    cell_types
        Types to draw; ``None`` draws all.
    palette
        Seaborn palette of the bar plot; ``None`` chooses one with enough colours.
    """

    figures: bool = True
    formats: tuple[str, ...] = ("png", "svg")
    n_top_genes: int = 20
    cell_types: tuple[str, ...] | None = None
    palette: str | None = None

    def __post_init__(self) -> None:
        require_int("report.n_top_genes", self.n_top_genes, 1)
        if self.cell_types is not None:
            object.__setattr__(self, "cell_types", tuple(map(str, self.cell_types)))
        for name in self.formats:
            require_one_of("report.formats", name, ("png", "svg"))
        for name in ("formats", "cell_types"):
            if getattr(self, name) == ():
                raise InvalidSpecError(
                    value=f"report.{name}=[]",
                    rule="it must not be empty",
                    fix="set report.figures=false to draw nothing",
                )


@dataclass(frozen=True, kw_only=True)
class TrackingSpec:
    """Where a run is tracked and kept.

    Parameters
    ----------
    uri
        Tracking URI; ``None`` takes MLflow's own setting (``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db``).
    experiment
        Name of the experiment; ``None`` takes MLflow's own setting.
    run_name
        Name of the run; ``None`` makes one from model and version.
    output_dir
        Local folder in which results are written before they are sent.
    keep_local
        Whether that copy stays after everything was sent.
    tags
        Further tags of the run.
    reuse
        Whether a comparison takes evaluations that the store holds already instead of making them again.
    retry_s
        Seconds for which a store that does not answer is asked again before results are left in ``output_dir``.
    resume
        ``auto``: cell types that an interrupted evaluation of the same model, data and settings finished, and left in
        ``output_dir``, are not computed again; ``never``: everything is.
    """

    uri: str | None = None
    experiment: str | None = None
    run_name: str | None = None
    output_dir: str = "amici-eval-results"
    keep_local: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)
    reuse: bool = True
    retry_s: float = 60.0
    resume: str = "auto"

    def __post_init__(self) -> None:
        require_one_of("resume", self.resume, ("auto", "never"))
        if not 0.0 <= self.retry_s < math.inf:
            raise InvalidSpecError(
                value=f"tracking.retry_s={self.retry_s}",
                rule="it must be a number of seconds, 0 or more",
                fix="leave it out for 60 s",
            )


def spec_from_mapping(values: Mapping[str, Any]) -> EvaluationSpec:
    """Build an :class:`EvaluationSpec` from nested plain values, refusing unknown keys."""
    return spec_of(EvaluationSpec, values, "")


_Spec = TypeVar("_Spec", bound="DataclassInstance")
_NESTED = {
    "data": DataSpec,
    "ablation": AblationSpec,
    "permutation": PermutationSpec,
    "subset": SubsetSpec,
    "trained_on": TrainedOnSpec,
}


def spec_of(cls: type[_Spec], values: Mapping[str, Any], prefix: str) -> _Spec:
    """Build settings of one kind, whose names begin with ``prefix`` in messages."""
    if not isinstance(values, Mapping):
        raise InvalidSpecError(
            value=f"{prefix.rstrip('.')}={values!r}", rule="it must be a group of settings", fix="give a mapping"
        )
    names = [f.name for f in fields(cls)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise InvalidSpecError(
            value=f"unknown setting {prefix}{unknown[0]}",
            rule=f"known here are {', '.join(prefix + name for name in names)}",
            fix="correct the name or drop it",
        )
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name in _NESTED:
            arguments[name] = spec_of(_NESTED[name], value, f"{prefix}{name}.")
        elif name in ("modes", "tile_widths", "formats", "cell_types") and isinstance(value, list):
            arguments[name] = tuple(value)
        elif name in ("alpha", "confidence") and isinstance(value, int) and not isinstance(value, bool):
            arguments[name] = float(value)
        else:
            arguments[name] = value
    return cls(**arguments)


_NO_MATTER = ("device", "batch_size", "memory_budget")
"""Settings of the ablation that change numbers by rounding only."""


def settings_that_matter(spec: EvaluationSpec) -> dict[str, Any]:
    """Return what two evaluations of one model on one data set share that give the same numbers."""
    settings = spec.to_dict()
    settings["ablation"] = {name: value for name, value in settings["ablation"].items() if name not in _NO_MATTER}
    settings["data"] = {name: value for name, value in settings["data"].items() if name != "backed"}
    said = spec.data.trained_on
    if not said:
        # as evaluations before there was this setting
        del settings["data"]["trained_on"]
    elif said.names is not None:
        path = Path(said.names).expanduser()
        settings["data"]["trained_on"] = {
            "names": hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()
        }
    return settings


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """Where receiver types are evaluated; the numbers are the same everywhere, so they do not belong to an evaluation.

    Parameters
    ----------
    kind
        ``local``: in this process, on its threads. ``ray``: in worker processes of Ray, one type at a time each.
    address
        Of a running Ray cluster, as ``host:port``; ``None`` starts one on this machine, on loopback, and stops it
        behind the work.
    n_workers
        Worker processes, of one thread each; ``None``: as many as there are processors. Never more than types.
    retries
        How often a type is evaluated again whose worker was lost.
    """

    kind: str = "local"
    address: str | None = None
    n_workers: int | None = None
    retries: int = 2

    def __post_init__(self) -> None:
        require_one_of("launch.kind", self.kind, ("local", "ray"))
        require_int("launch.retries", self.retries, 0)
        if self.n_workers is not None:
            require_int("launch.n_workers", self.n_workers, 1)
        if self.address is not None and not re.fullmatch(r"[^/\s]+:\d+", self.address):
            raise InvalidSpecError(
                value=f"launch.address={self.address!r}",
                rule="it must be the host:port at which `ray start --head` says that the cluster is",
                fix="write it as 10.0.0.5:6379, or leave it out to start a cluster on this machine",
            )
        if self.kind == "local" and (self.address is not None or self.n_workers is not None):
            raise InvalidSpecError(
                value="launch.address or launch.n_workers with launch=local",
                rule="one process has neither",
                fix="set launch=ray",
            )

    def check_device(self, device: str) -> None:
        """Refuse worker processes for an evaluation that does not compute on processors.

        Parameters
        ----------
        device
            Torch device of the evaluation.

        Raises
        ------
        DeviceError
            If the two do not go together.
        """
        if self.kind != "local" and device != "cpu":
            raise DeviceError(
                value=f"launch={self.kind} on the device {device}",
                rule="workers compute on processors, which round otherwise than that device",
                fix=f"set ablation.device=cpu, or leave out launch={self.kind}",
            )
