"""What Hydra may set, and how it becomes the frozen settings that everything else takes.

The schema classes are plain dataclasses because Hydra needs that to refuse unknown keys and wrong types; they go no
further than this module.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Optional

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from amici_eval.common.errors import InvalidSpecError
from amici_eval.common.masking import masked
from amici_eval.settings.comparison_spec import ComparisonSpec
from amici_eval.settings.gate_spec import GateSpec, gate_spec_from
from amici_eval.settings.launch_spec import LaunchSpec
from amici_eval.settings.specs import EvaluationSpec, ReportSpec, TrackingSpec, spec_from_mapping, spec_of

__all__ = [
    "SCHEMAS",
    "comparison_spec",
    "data_uri",
    "evaluation_spec",
    "gate_spec",
    "launch_spec",
    "register_schemas",
    "report_spec",
    "resolved_yaml",
    "tracking_spec",
]

# Hydra resolves these annotations at run time and knows Optional, List and Dict only
# ruff: noqa: UP006, UP035, UP045
from typing import Dict, List


@dataclass
class SubsetConfig:
    """Group ``data.subset``."""

    key: Optional[str] = None
    value: Optional[str] = None
    indices: Optional[List[int]] = None
    held_out: Optional[bool] = None
    buffer: bool = False


@dataclass
class TrainedOnConfig:
    """Groups ``data.trained_on`` and ``register.trained_on``."""

    key: Optional[str] = None
    value: Optional[str] = None
    names: Optional[str] = None


@dataclass
class DataConfig:
    """Group ``data``."""

    uri: Optional[str] = None
    table: Optional[str] = None
    labels_key: Optional[str] = None
    coord_obsm_key: Optional[str] = None
    layer: Optional[str] = None
    sample_key: Optional[str] = None
    backed: Optional[bool] = None
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    trained_on: TrainedOnConfig = field(default_factory=TrainedOnConfig)


@dataclass
class AblationConfig:
    """Group ``ablation``."""

    engine: str = "factored"
    device: str = "auto"
    batch_size: int = 512
    memory_budget: Optional[str] = None
    modes: Optional[List[str]] = None
    baselines: bool = True
    without_nearest: bool = True
    senders: bool = False


@dataclass
class PermutationConfig:
    """Group ``permutation``."""

    n_permutations: Optional[int] = None
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
    reach: Optional[float] = None
    tile_width: Optional[float] = None
    tile_widths: Optional[List[float]] = None
    n_shifts: int = 999
    confidence: float = 0.95
    n_bootstrap: int = 1000


@dataclass
class ReportConfig:
    """Group ``report``."""

    figures: bool = True
    formats: List[str] = field(default_factory=lambda: ["png", "svg"])
    n_top_genes: int = 20
    cell_types: Optional[List[str]] = None
    palette: Optional[str] = None


@dataclass
class TrackingConfig:
    """Group ``tracking``."""

    uri: Optional[str] = None
    experiment: Optional[str] = None
    run_name: Optional[str] = None
    output_dir: str = "amici-eval-results"
    keep_local: bool = False
    tags: Dict[str, str] = field(default_factory=dict)
    reuse: bool = True
    retry_s: float = 60.0


@dataclass
class LaunchConfig:
    """Group ``launch``."""

    kind: str = "local"
    address: Optional[str] = None
    n_workers: Optional[int] = None
    retries: int = 2


@dataclass
class EvaluateConfig:
    """Command ``evaluate``."""

    model_uri: str = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    permutation: PermutationConfig = field(default_factory=PermutationConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    resume: str = "auto"


@dataclass
class CompareGroupConfig:
    """Group ``compare``."""

    cells: str = "auto"
    unmatched: float = 0.2
    margin: float = 0.01
    n_permutations: int = 999
    n_flips: int = 9999
    n_bootstrap: int = 1000
    confidence: float = 0.95
    alpha: float = 0.05
    adjustment: str = "bh"
    genes: bool = True
    floor: bool = True
    seed: int = 0


@dataclass
class CompareConfig:
    """Command ``compare``."""

    model: List[str] = field(default_factory=list)
    versions: List[str] = field(default_factory=list)
    runs: List[str] = field(default_factory=list)
    datasets: List[str] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    permutation: PermutationConfig = field(default_factory=PermutationConfig)
    compare: CompareGroupConfig = field(default_factory=CompareGroupConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    resume: str = "auto"


@dataclass
class GateGroupConfig:
    """Group ``gate``."""

    bootstrap: str = "pass"
    allow_in_sample: bool = False
    allow_missing_genes: bool = False
    promote: Optional[str] = None
    # by name: a mapping of what a rule holds, which gate_spec checks, or nothing
    rules: Dict[str, Any] = field(default_factory=dict)


@dataclass
class GateConfig:
    """Command ``gate``."""

    model_uri: str = MISSING
    baseline: Optional[str] = "@champion"
    data: DataConfig = field(default_factory=DataConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    permutation: PermutationConfig = field(default_factory=PermutationConfig)
    compare: CompareGroupConfig = field(default_factory=CompareGroupConfig)
    gate: GateGroupConfig = field(default_factory=GateGroupConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    resume: str = "auto"


@dataclass
class WatchGroupConfig:
    """Group ``watch``."""

    interval: float = 60.0
    max_interval: float = 900.0
    lease: float = 900.0


@dataclass
class WatchConfig:
    """Command ``watch``."""

    model: str = MISSING
    baseline: Optional[str] = "@champion"
    data: DataConfig = field(default_factory=DataConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    permutation: PermutationConfig = field(default_factory=PermutationConfig)
    compare: CompareGroupConfig = field(default_factory=CompareGroupConfig)
    gate: GateGroupConfig = field(default_factory=GateGroupConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    watch: WatchGroupConfig = field(default_factory=WatchGroupConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    resume: str = "auto"


@dataclass
class RollbackConfig:
    """Command ``rollback``."""

    model: str = MISSING
    alias: str = "champion"
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class RegisterGroupConfig:
    """Group ``register``."""

    adata: Optional[str] = None
    trust: bool = False
    alias: Optional[str] = None
    trained_on: TrainedOnConfig = field(default_factory=TrainedOnConfig)


@dataclass
class RegisterConfig:
    """Command ``register``."""

    model_dir: str = MISSING
    name: str = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    register: RegisterGroupConfig = field(default_factory=RegisterGroupConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class DemoConfig:
    """Command ``demo``."""

    seed: int = 0
    output_dir: str = "demo-output"
    n_permutations: Optional[int] = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


SCHEMAS: dict[str, type[Any]] = {
    "evaluate": EvaluateConfig,
    "compare": CompareConfig,
    "gate": GateConfig,
    "watch": WatchConfig,
    "rollback": RollbackConfig,
    "register": RegisterConfig,
    "demo": DemoConfig,
}


def register_schemas() -> None:
    """Make the schemas known to Hydra, by command."""
    store = ConfigStore.instance()
    for command, schema in SCHEMAS.items():
        store.store(name=f"{command}_schema", node=schema)


def data_uri(config: DictConfig) -> str | None:
    """Return where the data lie: ``data.uri``, with the table of a SpatialData store if one is named."""
    from amici_eval.data.files import with_table

    data = _plain(config)["data"]
    if data["uri"] is None and data["table"] is not None:
        raise InvalidSpecError(
            value=f"data.table={data['table']}", rule="it names a table of data.uri", fix="pass data.uri=...zarr too"
        )
    return None if data["uri"] is None else with_table(data["uri"], data["table"])


def evaluation_spec(config: DictConfig) -> EvaluationSpec:
    """Return the settings of an evaluation."""
    values = _plain(config)
    data = {name: value for name, value in values["data"].items() if name not in ("uri", "table")}
    return spec_from_mapping({"data": data, "ablation": values["ablation"], "permutation": values["permutation"]})


def comparison_spec(config: DictConfig) -> ComparisonSpec:
    """Return the settings of a comparison."""
    return ComparisonSpec(**_plain(config)["compare"])


def gate_spec(config: DictConfig) -> GateSpec:
    """Return the rules of a gate."""
    values = _plain(config)["gate"]
    for rule in values["rules"].values():
        for name in ("at_least", "at_most", "margin", "min_cells"):
            if isinstance(rule, dict) and isinstance(rule.get(name), str):  # a file has 1e-3 as text
                with suppress(ValueError):
                    rule[name] = int(rule[name]) if name == "min_cells" else float(rule[name])
    return gate_spec_from(values)


def launch_spec(config: DictConfig) -> LaunchSpec:
    """Return the settings of where types are evaluated."""
    return LaunchSpec(**_plain(config)["launch"])


def report_spec(config: DictConfig) -> ReportSpec:
    """Return the settings of the report."""
    return spec_of(ReportSpec, _plain(config)["report"], "report.")


def tracking_spec(config: DictConfig) -> TrackingSpec:
    """Return the settings of tracking."""
    values = _plain(config)
    return TrackingSpec(**values["tracking"], resume=values.get("resume", "auto"))


def resolved_yaml(config: DictConfig) -> str:
    """Return the whole configuration, interpolations resolved and credentials masked, as YAML."""
    plain = masked(OmegaConf.to_container(config, resolve=True))
    # not with OmegaConf's own writer: it would take a masked text that holds "${" for an interpolation
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _plain(config: DictConfig) -> dict[str, Any]:
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise InvalidSpecError(value=f"{missing[0]} is not set", rule="it has no default", fix=f"pass {missing[0]}=...")
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)  # noqa: S101, RUF100 - for the type checker
    return {str(key): value for key, value in values.items()}
