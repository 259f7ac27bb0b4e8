"""What Hydra may set, and how it becomes the frozen settings that everything else takes.

Names, types and defaults come from the dataclasses of ``amici_eval.settings``; their checks come when these are made.
"""

# Hydra knows Optional, List and Dict only
# ruff: noqa: UP006, UP035, UP045
from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import field, fields, is_dataclass, make_dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Union, get_args, get_origin, get_type_hints

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from amici_eval.common.errors import InvalidSpecError
from amici_eval.common.masking import masked
from amici_eval.settings.comparison import ComparisonSpec
from amici_eval.settings.evaluation import (
    AblationSpec,
    DataSpec,
    EvaluationSpec,
    PermutationSpec,
    ReportSpec,
    TrackingSpec,
    TrainedOnSpec,
    spec_from_mapping,
    spec_of,
)
from amici_eval.settings.gate import GateSpec, gate_spec_from
from amici_eval.settings.launch import LaunchSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

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

_TEXT: tuple[Any, Any] = (Optional[str], None)
_NEEDED: tuple[Any, Any] = (str, MISSING)


def _known_to_hydra(kind: Any) -> Any:
    """Return the nearest type that Hydra knows: what may be text or a number is text, and all of a list are alike."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    known = [one for one in options if one is not type(None)]
    found, parts = known[0], get_args(known[0])
    if is_dataclass(found):
        found = _group(found)
    elif get_origin(found) is tuple:
        found = List[_known_to_hydra(parts[0])]  # type: ignore[misc]
    elif parts:
        found = Dict[parts[0], parts[1]]  # type: ignore[valid-type]
    return Optional[found] if len(known) < len(options) else found


def _group(spec: Any, *, without: Sequence[str] = (), **further: tuple[Any, Any]) -> type[Any]:
    """Return a class from which Hydra takes names, types and defaults of the settings in ``spec``, and further ones."""
    kinds, known = get_type_hints(spec), {}
    for one in fields(spec):
        if one.name not in without:
            default = one.default if one.default_factory is dataclasses.MISSING else None
            known[one.name] = (
                _known_to_hydra(kinds[one.name]),
                list(default) if isinstance(default, tuple) else default,
            )
    return _schema(spec.__name__, **further, **known)


def _schema(called: str, **settings: Any) -> type[Any]:
    """Return a class of settings: groups, or pairs of type and default (``None`` where a new one is made each time)."""
    made = []
    for name, setting in settings.items():
        kind, default = setting if isinstance(setting, tuple) else (setting, None)
        factory: Any = next((one for one in (get_origin(kind), kind) if one in (list, dict) or is_dataclass(one)), None)
        if factory is None or default is MISSING:
            made.append((name, kind, field(default=default)))
        else:
            made.append((name, kind, field(default_factory=factory if not default else default.copy)))
    return make_dataclass(called, made)


_DATA = _group(DataSpec, uri=_TEXT, table=_TEXT)
_COMPUTED = {"data": _DATA, "ablation": _group(AblationSpec), "permutation": _group(PermutationSpec)}
_REPORT, _TRACKING = _group(ReportSpec), _group(TrackingSpec, without=["resume"])
_COMPARED = {**_COMPUTED, "compare": _group(ComparisonSpec)}
# rules by name: a mapping of what a rule holds, which gate_spec checks, or nothing
_GATED = {**_COMPARED, "gate": _group(GateSpec, without=["rules", "left_out"], rules=(Dict[str, Any], {}))}
_BASELINE = (Optional[str], "@champion")
_WATCH = _schema("Watch", interval=(float, 60.0), max_interval=(float, 900.0), lease=(float, 900.0))
_REGISTER = _schema("Register", adata=_TEXT, trust=(bool, False), alias=_TEXT, trained_on=_group(TrainedOnSpec))
_RESUME = (str, "auto")

SCHEMAS: dict[str, type[Any]] = {
    "evaluate": _schema(
        "Evaluate",
        model_uri=_NEEDED,
        **_COMPUTED,
        launch=_group(LaunchSpec),
        report=_REPORT,
        tracking=_TRACKING,
        resume=_RESUME,
    ),
    "compare": _schema(
        "Compare",
        **dict.fromkeys(("model", "versions", "runs", "datasets"), (List[str], [])),
        **_COMPARED,
        report=_REPORT,
        tracking=_TRACKING,
        resume=_RESUME,
    ),
    "gate": _schema(
        "Gate",
        model_uri=_NEEDED,
        baseline=_BASELINE,
        **_GATED,
        report=_REPORT,
        tracking=_TRACKING,
        resume=_RESUME,
    ),
    "watch": _schema(
        "WatchCommand",
        model=_NEEDED,
        baseline=_BASELINE,
        **_GATED,
        report=_REPORT,
        watch=_WATCH,
        tracking=_TRACKING,
        resume=_RESUME,
    ),
    "rollback": _schema("Rollback", model=_NEEDED, alias=(str, "champion"), tracking=_TRACKING),
    "register": _schema(
        "RegisterCommand", model_dir=_NEEDED, name=_NEEDED, data=_DATA, register=_REGISTER, tracking=_TRACKING
    ),
    "demo": _schema(
        "Demo",
        seed=(int, 0),
        output_dir=(str, "demo-output"),
        n_permutations=(Optional[int], None),
        tracking=_TRACKING,
    ),
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
