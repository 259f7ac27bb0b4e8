"""What Hydra may set, and how it becomes the frozen settings that everything else takes.

Names, types and defaults come from the dataclasses of ``amici_eval.settings``; their checks come when these are made.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import field, fields, is_dataclass, make_dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Dict, List, Optional, Union, get_args, get_origin, get_type_hints

import yaml
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from amici_eval.common.errors import InvalidSpecError
from amici_eval.common.text import masked
from amici_eval.settings.commands import COMMANDS, settings_of
from amici_eval.settings.comparison import ComparisonSpec, GateSpec, Rule, gate_spec_from
from amici_eval.settings.evaluation import LaunchSpec, ReportSpec, TrackingSpec, spec_from_mapping, spec_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hydra.plugins.config_source import ConfigResult

    from amici_eval.tracking.jobs import JobOptions

# Hydra knows Optional, List and Dict only
# ruff: noqa: UP006, UP035, UP045


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


def _group(spec: Any) -> type[Any]:
    """Return a class from which Hydra takes names, types and defaults of the settings in ``spec``."""
    made = []
    for name, kind, default, *_ in settings_of(spec):
        # rules by name: a mapping of what a rule holds, which gate_spec checks, or nothing
        known = Dict[str, Any] if name == "rules" else _known_to_hydra(kind)
        factory: Any = next(
            (one for one in (get_origin(known), known) if one in (list, dict) or is_dataclass(one)), None
        )
        if factory is not None:
            made.append((name, known, field(default_factory=partial(list, default) if factory is list else factory)))
        else:
            made.append((name, known, field(default=MISSING if default is dataclasses.MISSING else default)))
    return make_dataclass(spec.__name__, made)


SCHEMAS: dict[str, type[Any]] = {command: _group(spec) for command, spec in COMMANDS.items()}


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


def job_options(config: DictConfig) -> JobOptions:
    """Return how a job evaluates, reports and tracks."""
    values = _plain(config)
    data = {name: value for name, value in values["data"].items() if name not in ("uri", "table")}
    spec = spec_from_mapping({"data": data, "ablation": values["ablation"], "permutation": values["permutation"]})
    report = spec_of(ReportSpec, values["report"], "report.")
    launch = LaunchSpec(**values.get("launch", {}))
    tracking = tracking_spec(config)
    # imports MLflow, which takes seconds
    from amici_eval.tracking.jobs import JobOptions

    return JobOptions(
        spec=spec,
        report=report,
        tracking=tracking,
        config_yaml=resolved_yaml(config),
        launch=launch,
    )


def judged_by(config: DictConfig) -> dict[str, Any]:
    """Return what a verdict depends on besides the version and the settings of its evaluation."""
    return {
        "baseline": config.baseline,
        "data_uri": data_uri(config),
        "comparison": comparison_spec(config),
        "gate": gate_spec(config),
    }


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
    values: Any = OmegaConf.to_container(config, resolve=True)
    return {str(key): value for key, value in values.items()}


_FLAGS_WITH_VALUE = {
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"),
    *("--cfg", "-c", "--package", "-p", "--experimental-rerun"),
}
_QUOTED = re.compile(r"""(['"])(?:\\.|(?!\1).)*\1""", re.DOTALL)
_TRUTH = {bool: "it must be true or false", Optional[bool]: "it must be true, false or null"}  # noqa: UP045, RUF100
_CALL = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag)\((.*)\)", re.DOTALL)


def check_override(command: str, text: str, *, configs: Path | None, sweep: bool = False) -> None:
    """Refuse a setting that does not exist or takes no such value, before Hydra does in words of its own."""
    key, _, value = text.partition("=")
    schema, path = SCHEMAS[command], key.split(".")
    for depth, name in enumerate(path):
        if not is_dataclass(schema):  # below tags, or a setting that has no parts
            break
        known = [entry.name for entry in fields(schema)]
        if name not in known:
            group = ".".join(path[:depth])
            near = [
                ".".join([*path[:depth], one, *path[depth + 1 :]])
                for one in get_close_matches(name, known, n=3, cutoff=0.5)
            ]
            if depth == 0:  # its group may be left out
                whole = [one for one in _paths(SCHEMAS[command]) if one.endswith(f".{name}")]
                near = [".".join([one, *path[1:]]) for one in whole] or near
            raise InvalidSpecError(
                value=f"setting {key!r}",
                rule=f"{group or command} has {', '.join(known)}",
                fix=f"write {' or '.join(near)}"
                if near
                else f"choose one of these; amici-eval {command} --help shows all settings",
            )
        schema = get_type_hints(schema)[name]
    if is_dataclass(schema):
        names = [entry.name for entry in fields(schema)]
        options = None if configs is None else sorted(file.stem for file in (configs / path[0]).glob("*.yaml"))
        for option in value.split(",") if sweep else [value]:
            if len(path) == 1 and options is not None and option.strip("'\"") not in options:
                raise InvalidSpecError(
                    value=f"{key}={option}",
                    rule=f"{key} is a group of settings, ready-made as {', '.join(options) or 'none'}",
                    fix=f"choose one of these, or set what it holds one by one, as {key}.{names[0]}=...: "
                    f"{', '.join(names)}",
                )
        return
    if sweep:
        return
    try:
        parsed = OverridesParser.create().parse_override(text).value()
        OmegaConf.update(OmegaConf.structured(SCHEMAS[command]), key, parsed)
    except OmegaConfBaseException as error:
        raise InvalidSpecError(
            value=text,
            rule=_TRUTH.get(schema) or str(error.msg or error).splitlines()[0],
            fix=f"amici-eval {command} --help shows all settings with their defaults",
        ) from error
    except HydraException:
        return


def _paths(schema: Any, group: str = "") -> Iterator[str]:
    """Yield each setting below a group of settings, from the root."""
    for name, kind in get_type_hints(schema).items():
        yield group + name
        parts = [one for one in (kind, *get_args(kind)) if is_dataclass(one)]
        if parts and get_origin(kind) not in (list, tuple, dict):
            yield from _paths(parts[0], f"{group}{name}.")


def hydra_arguments(command: str, arguments: list[str], *, configs: Path, sweep: bool) -> list[str]:
    """Return arguments as Hydra reads them, flags first: its parser takes settings from one place only."""
    own_configs = any(argument.startswith("--config-") or argument in ("-cd", "-cn", "-cp") for argument in arguments)
    flags, overrides, takes_value = [], [], False
    for argument in arguments:
        is_flag = takes_value or argument.startswith("-")
        takes_value = argument in _FLAGS_WITH_VALUE
        if is_flag:
            flags.append(argument)
        elif argument.startswith(("~", "hydra/", "hydra.")) or ("=" in argument and "/" in argument.split("=")[0]):
            overrides.append(argument)
        else:
            override = hydra_override(written_out(argument, command), sweep=sweep, command=command)
            if not own_configs and not override.startswith("+"):
                check_override(command, override, configs=configs, sweep=sweep)
            overrides.append(override)
    return [*flags, *overrides]


def hydra_override(text: str, *, command: str = "evaluate", sweep: bool = False) -> str:
    """Return an override that Hydra reads as the user meant it."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InvalidSpecError(
            value=f"argument {text!r}", rule="settings are written key=value", fix="see amici-eval --help"
        )
    *groups, name = key.lstrip("+").split(".")
    kind: Any = SCHEMAS[command]
    for group in groups:
        kind = _part_of(kind, group)
    if _part_of(kind, name) is not None:
        text = f"{key}={_swept(value, kind, name) if sweep else _held(value, kind, name)}"
    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        if value.startswith("[") and value.endswith("]"):
            return f"{key}=[{','.join(map(_quoted, _split(value[1:-1])))}]"
        return f"{key}={','.join(map(_quoted, _split(value) if sweep else [value]))}"
    return text


def _part_of(kind: Any, name: str) -> Any:
    """Return the type of a part of a setting, ``None`` if the schema does not say."""
    if is_dataclass(kind):
        # Hydra's schema leaves rules open
        kind = dict[str, Rule] if name == "rules" else get_type_hints(kind).get(name)
    else:
        kind = get_args(kind)[1] if get_origin(kind) in (dict, Mapping) else None
    known = [one for one in get_args(kind) if one is not type(None)]
    return known[0] if len(known) < len(get_args(kind)) else kind


def _held(value: str, group: Any, name: str) -> str:
    """Quote what is text in a value that a group holds; ``null`` unsets a setting, but is text in tags and lists."""
    value = value.strip()
    return value if value == "null" and is_dataclass(group) else _written(value, _part_of(group, name))


def _written(value: str, kind: Any) -> str:
    """Quote what is text in a value, and make a list of one where the schema has a list."""
    origin = get_origin(kind)
    if value.startswith("${") or _QUOTED.fullmatch(value):
        return value
    if origin in (list, tuple):
        inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
        return f"[{','.join(_written(part, get_args(kind)[0]) for part in _split(inner))}]"
    if value.startswith("{") and value.endswith("}") and (origin or is_dataclass(kind)):
        entries = [part.partition(":") for part in _split(value[1:-1])]
        return f"{{{','.join(f'{name}:{_held(one, kind, name.strip())}' for name, _, one in entries)}}}"
    # a group's option needs quotes only where it may look like a number
    is_text = kind is str or (is_dataclass(kind) and kind is not Rule and not value.isidentifier())
    return _quoted(value) if is_text and value[:1] not in ("", "[", "{") else value


def _swept(values: str, group: Any, name: str) -> str:
    """Quote what is text in the values of a sweep; Hydra forgets quotation marks within ``choice(...)``."""
    written = []
    for value in _split(values):
        call = _CALL.fullmatch(value)
        if call is None:
            written.append(_held(value, group, name))
        elif call[1] == "choice":
            written.append(_swept(call[2], group, name))
        elif call[1] in ("range", "interval", "glob") or _part_of(group, name) in (int, float, bool):
            written.append(value)
        else:
            raise InvalidSpecError(
                value=value, rule="Hydra would read numbers in text here", fix="write the values as a,b or choice(a,b)"
            )
    return ",".join(written)


def _split(values: str) -> list[str]:
    """Split at commas outside quotation marks and brackets."""
    parts, depth, at = [""], 0, 0
    while at < len(values):
        quoted = _QUOTED.match(values, at) if parts[-1].rstrip()[-1:] in ("", *"[{(:,") else None
        token = quoted[0] if quoted else values[at]
        depth += (token in "[{(") - (token in "]})")
        if token == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += token
        at += len(token)
    return [part.strip() for part in parts] if values.strip() else []


def _quoted(value: str) -> str:
    # a backslash is special to Hydra only before a quote or at the end
    value = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", value)
    return "'" + re.sub(r"(\\+)$", lambda match: match[1] * 2, value) + "'"


def keep_texts_of_files(command: str) -> None:
    """Let Hydra read the files of settings of a command with values as they are written."""
    FileConfigSource.command = command
    SourcesRegistry.instance().types["file"] = FileConfigSource


class FileConfigSource(file_config_source.FileConfigSource):  # Hydra replaces a source by one of its name only
    """Files whose values stay text until the schema says what they are; Hydra's own have the types of YAML."""

    command: ClassVar[str] = "evaluate"

    def load_config(self, config_path: str) -> ConfigResult:
        """Return what Hydra reads, with values as they are written."""
        found = super().load_config(config_path)
        if isinstance(found.config, DictConfig) and not config_path.startswith("hydra/"):
            path = Path(self.path, self._normalize_file_name(config_path))
            values = yaml.load(path.read_text(encoding="utf-8"), Loader=_texts_loader()) or {}  # noqa: S506, RUF100 - safe
            config = OmegaConf.create(values)
            for key, value in (OmegaConf.select(config, "hydra.sweeper.params") or {}).items():
                written = hydra_override(f"{key}={value}", command=self.command, sweep=True)
                OmegaConf.update(found.config.hydra.sweeper, "params", {key: written.partition("=")[2]})
            found.config = OmegaConf.create({**values, "hydra": found.config.hydra} if "hydra" in values else values)
        return found


def _texts_loader() -> Any:
    loader = get_yaml_loader()
    for name, kind in (("int", int), ("float", float), ("bool", str)):
        loader.add_constructor(f"tag:yaml.org,2002:{name}", partial(_as_written, kind))
    return loader


def _as_written(kind: type, _: yaml.Loader, node: yaml.ScalarNode) -> Any:
    """Return a number if Python writes it just so, else the text."""
    try:
        value = kind(node.value)
    except ValueError:
        return node.value
    return value if str(value) == node.value else node.value


_PROJECT_KEYS = {
    "data": "data.uri",
    "device": "ablation.device",
    "n_permutations": "permutation.n_permutations",
    "promote": "gate.promote",
}
_SEED_KEY = {
    "evaluate": "permutation.seed",
    "compare": "permutation.seed",
    "gate": "permutation.seed",
    "watch": "permutation.seed",
    "demo": "seed",
}


def project_overrides(arguments: list[str], command: str = "evaluate") -> list[str]:
    """Turn what MLflow Projects passes (``--key value``) into Hydra overrides.

    An empty value means the default; ``overrides`` is split at spaces as a shell would; names that are short for a
    setting are written out; anything else is passed on as ``key=value``.
    """
    import shlex

    overrides: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--"):
            overrides.append(argument)
            continue
        key = argument[2:]
        if "=" in key:
            key, _, value = key.partition("=")
        elif position < len(arguments):
            value = arguments[position]
            position += 1
        else:
            raise InvalidSpecError(value=f"parameter {argument}", rule="it needs a value", fix=f"pass -P {key}=VALUE")
        if value == "":
            continue
        if key == "overrides":
            try:
                overrides += shlex.split(value)
            except ValueError as error:
                raise InvalidSpecError(
                    value=f"parameter --overrides {value!a:.200}",
                    rule=f"it is split as a shell would ({error})",
                    fix="close the quotation mark, or put a backslash before it",
                ) from error
        elif key == "seed":
            overrides.append(f"{_SEED_KEY.get(command, 'seed')}={value}")
        else:
            overrides.append(f"{_PROJECT_KEYS.get(key, key)}={value}")
    return overrides


def written_out(argument: str, command: str) -> str:
    """Write out the short names that ``mlflow run -P`` takes too, and let users add tags and rules of their own."""
    key, equals, value = argument.partition("=")
    if command in ("evaluate", "compare", "gate", "watch") and key in ("device", "n_permutations", "promote", "seed"):
        key = {**_PROJECT_KEYS, "seed": _SEED_KEY["evaluate"]}[key]
    if key.startswith(("tracking.tags.", "gate.rules.")):
        key = f"++{key}"
    return f"{key}{equals}{value}"
