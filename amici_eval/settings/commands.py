"""What each command may be told: names, defaults and meanings, from which Hydra's schema and ``--help`` follow."""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from inspect import cleandoc, get_annotations
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from amici_eval.settings.comparison import ComparisonSpec, GateSpec
from amici_eval.settings.evaluation import (
    AblationSpec,
    DataSpec,
    LaunchSpec,
    PermutationSpec,
    ReportSpec,
    TrackingSpec,
    TrainedOnSpec,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_TYPED = {"None": "null", "True": "true", "False": "false"}
_LEFT_OUT = {GateSpec: {"left_out"}, TrackingSpec: {"resume"}}


@dataclass(frozen=True, kw_only=True)
class DataSettings(DataSpec):
    """Which tissue, which of its cells are evaluated; null takes what the model was trained with.

    Parameters
    ----------
    uri
        Path or URI of a .h5ad or .zarr; null: bundled with the model, or logged by its training run.
    table
        Table of a SpatialData store; or ``data.uri=store.zarr/tables/NAME``.
    """

    uri: str | None = None
    table: str | None = None


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """How often versions without a verdict are looked for.

    Parameters
    ----------
    interval, max_interval
        Seconds between rounds: after one with something to do, and at most; doubled after each with nothing to do.
    lease
        Seconds without a sign of life after which the version of a watcher is taken over by another.
    """

    interval: float = 60.0
    max_interval: float = 900.0
    lease: float = 900.0


@dataclass(frozen=True, kw_only=True)
class RegisterSettings:
    """How a trained model is registered.

    Parameters
    ----------
    adata
        ``bundle``: store the training AnnData with the model; a URI: record where it is.
    trust
        Unpickle model.pt without the allow-list, which runs whatever code the file holds.
    alias
        Alias to set on the new version.
    trained_on
        If the model was trained on a part of ``data.uri``: its cells; the whole tissue is registered.
    """

    adata: str | None = None
    trust: bool = False
    alias: str | None = None
    trained_on: TrainedOnSpec = field(default_factory=TrainedOnSpec)


@dataclass(frozen=True, kw_only=True)
class _Resumed:
    """What commands that evaluate share.

    Parameters
    ----------
    resume
        ``auto``: take up what an interrupted evaluation of the same left; ``never``: compute all anew.
    """

    data: DataSettings = field(default_factory=DataSettings)
    ablation: AblationSpec = field(default_factory=AblationSpec)
    permutation: PermutationSpec = field(default_factory=PermutationSpec)
    report: ReportSpec = field(default_factory=ReportSpec)
    tracking: TrackingSpec = field(default_factory=TrackingSpec)
    resume: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Evaluate(_Resumed):
    """Evaluate the heads of a registered model, and log tables, figures and a page to MLflow.

    Parameters
    ----------
    model_uri
        The model: ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, ``models:/ID`` or ``runs:/RUN/PATH``.
    """

    model_uri: str
    launch: LaunchSpec = field(default_factory=LaunchSpec)


@dataclass(frozen=True, kw_only=True)
class _Compared(_Resumed):
    compare: ComparisonSpec = field(default_factory=ComparisonSpec)


@dataclass(frozen=True, kw_only=True)
class Compare(_Compared):
    """Say which heads are which across versions, and what got better.

    Parameters
    ----------
    model
        Names of registered models, as ``model=NAME`` or ``model=[A,B]``.
    versions
        Their versions or aliases, as ``versions=[1,2]``.
    runs
        Runs of earlier evaluations, instead of models.
    datasets
        Data of each version, where these differ.
    """

    model: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Judged(_Compared):
    """What commands that judge share.

    Parameters
    ----------
    baseline
        Version or alias to judge against; null: rules that need none.
    """

    gate: GateSpec
    baseline: str | None = "@champion"


@dataclass(frozen=True, kw_only=True)
class Gate(_Judged):
    """Judge a version by rules and against the champion, and promote it if asked to.

    Parameters
    ----------
    model_uri
        The version: ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
    """

    model_uri: str


@dataclass(frozen=True, kw_only=True)
class Watch(_Judged):
    """Judge each new version, as gate does, and share the work with other watchers.

    Parameters
    ----------
    model
        Name of the registered model.
    """

    model: str
    watch: WatchSettings = field(default_factory=WatchSettings)


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Take the last promotion back.

    Parameters
    ----------
    model
        Name of the registered model.
    alias
        The alias that moves back.
    """

    model: str
    alias: str = "champion"
    tracking: TrackingSpec = field(
        default_factory=TrackingSpec,
        metadata={"reads": ("uri", "retry_s")},
    )


@dataclass(frozen=True, kw_only=True)
class Register:
    """Register what ``AMICI.save(...)`` wrote (reads model.pt, a pickle, through an allow-list).

    Parameters
    ----------
    model_dir
        The folder that ``AMICI.save`` wrote, or the path of its model.pt.
    name
        Name of the registered model.
    """

    model_dir: str
    name: str
    data: DataSettings = field(
        default_factory=DataSettings,
        metadata={"reads": ("uri", "table", "trained_on")},
    )
    register: RegisterSettings = field(default_factory=RegisterSettings)
    tracking: TrackingSpec = field(
        default_factory=TrackingSpec,
        metadata={"reads": ("uri", "experiment", "run_name", "tags", "retry_s")},
    )


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Simulate a tissue with planted effects, train two models, register, evaluate and compare them.

    Parameters
    ----------
    seed
        Of the tissue and of training.
    output_dir
        Folder of everything that the demo writes; without ``tracking.uri`` also of its tracking store.
    n_permutations
        Permutations per cell type; null: ceil(heads x types / alpha).
    """

    seed: int = 0
    output_dir: str = "demo-output"
    n_permutations: int | None = None
    tracking: TrackingSpec = field(default_factory=TrackingSpec, metadata={"reads": ("uri",)})


COMMANDS: Mapping[str, type[Any]] = {
    "evaluate": Evaluate,
    "compare": Compare,
    "gate": Gate,
    "watch": Watch,
    "rollback": Rollback,
    "register": Register,
    "demo": Demo,
}


class Setting(NamedTuple):
    """One setting: name, type, default (``MISSING``: it must be given), meaning; of a group also what is read of it."""

    name: str
    kind: Any
    default: Any
    meaning: str
    reads: tuple[str, ...] | None


def settings_of(spec: Any) -> list[Setting]:
    """Return the settings that a command or a group holds, its own before those it shares with others."""
    kinds, meanings = get_type_hints(spec), {}
    for one in reversed(spec.__mro__):
        meanings.update(_parameters(one.__doc__ or "" if is_dataclass(one) else ""))
    own = [one for one in fields(spec) if one.name in get_annotations(spec)]
    ordered = [*own, *(one for one in fields(spec) if one not in own)]
    # single settings before groups
    ordered.sort(key=lambda one: is_dataclass(kinds[one.name]))
    return [
        Setting(one.name, kinds[one.name], _default(one), meanings.get(one.name, ""), one.metadata.get("reads"))
        for one in ordered
        if one.name not in _LEFT_OUT.get(spec, ())
    ]


def _default(one: Field[Any]) -> Any:
    made = one.default_factory
    return one.default if made is MISSING or is_dataclass(made) else made()


def _parameters(docstring: str) -> dict[str, str]:
    """Return what a numpydoc docstring says of each parameter, as plain text in one line."""
    found: dict[str, str] = {}
    _, _, section = cleandoc(docstring).partition("Parameters\n----------\n")
    section = re.split(r"^\w.*\n-{3,}$", section, maxsplit=1, flags=re.MULTILINE)[0]
    for names, text in re.findall(r"^(\w.*)\n((?:^ +.*\n?|^\n)+)", section, re.MULTILINE):
        found.update(dict.fromkeys(names.split(", "), _plain(text)))
    return found


def sentence_of(spec: Any) -> str:
    """Return what a command or a group of settings is for."""
    return _plain(cleandoc(spec.__doc__ or "").split("\n\n")[0])


def _plain(text: str) -> str:
    """Return a docstring's text without markup, and values as they are typed."""
    text = re.sub(r":\w+:|`+", "", " ".join(text.split()))
    return re.sub(r"\b(None|True|False)\b", lambda found: _TYPED[found[1]], text)
