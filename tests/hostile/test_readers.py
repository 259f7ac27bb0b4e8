"""Every reader, given any bytes or any JSON value, gives a sound object or an error of ours; nothing else."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amici_eval.cli.config import check_override, hydra_override, project_overrides, written_out
from amici_eval.common.errors import AmiciEvalError
from amici_eval.results.comparison import HeadComparison
from amici_eval.results.evaluation import HeadEvaluation
from amici_eval.results.moments import Moments
from amici_eval.results.verdict import RuleResult, Verdict
from amici_eval.settings.comparison import gate_spec_from
from amici_eval.settings.evaluation import spec_from_mapping
from tests.builders import make_comparison, make_evaluation, make_moments
from tests.hostile.stored_models import sign

if TYPE_CHECKING:
    from collections.abc import Callable

seeded = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
VERDICT = Verdict(
    outcome="fail",
    results=(
        RuleResult(
            rule="β",
            kind="metric",
            outcome="fail",
            value=0.1,
            low=None,
            high=0.3,
            threshold="at least 1",
            reason="no",
            details=(("a", 0.1, None, None, "fail"),),
        ),
    ),
    notes=("n",),
)
EVALUATION = make_evaluation(n_heads=2).to_json()
COMPARISON = make_comparison().to_json()
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.sampled_from([10**12, -1, 0, 2**63])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def taken(read: Callable[[], Any]) -> Any:
    """Return what a reader makes of its input, or nothing if it refuses it in words of ours."""
    try:
        return read()
    except AmiciEvalError as error:
        assert all(part.strip() for part in (error.value, error.rule, error.fix))  # noqa: PT017, RUF100
        return None


@st.composite
def mutated(draw: Any, content: bytes) -> bytes:
    """Bytes with some replaced, left out or put in."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        how = draw(st.sampled_from(["flip", "cut", "drop", "insert", "end"]))
        if how == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del changed[at:]
        elif how == "drop":
            del changed[at : at + draw(st.integers(1, 20))]
        elif how == "insert":
            changed[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(changed)


@st.composite
def altered(draw: Any, text: str) -> str:
    """A JSON text with something else somewhere in it."""
    record = json.loads(text)
    for _ in range(draw(st.integers(1, 2))):
        where = record
        while True:
            keys = sorted(where) if isinstance(where, dict) else list(range(len(where)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(where[key], (dict, list)) or draw(st.integers(0, 2)) == 0:
                how = draw(st.sampled_from(["put", "put", "drop", "add"]))
                if how == "drop":
                    del where[key]
                elif how == "add" and isinstance(where, dict):
                    where[draw(st.text(max_size=5))] = draw(values)
                else:
                    where[key] = draw(values)
                break
            where = where[key]
    return json.dumps(record)


# --- results ----------------------------------------------------------------------------------------------------------


def use_evaluation(found: HeadEvaluation | None) -> None:
    if found is not None:
        assert HeadEvaluation.from_json(found.to_json()).to_json() == found.to_json()
        repr(found)
        found.heads()


@seeded
@given(mutated(EVALUATION.encode()))
def test_an_evaluation_of_any_bytes(content):
    use_evaluation(taken(lambda: HeadEvaluation.from_json(content)))


@seeded
@given(altered(EVALUATION))
def test_an_evaluation_of_any_values(text):
    use_evaluation(taken(lambda: HeadEvaluation.from_json(text)))


@seeded
@given(values)
def test_any_value_in_place_of_a_result(value):
    for record in (value, {"schema_version": value}, {"schema_version": 1, "spec": value}):
        text = json.dumps(record)
        for kind in (HeadEvaluation, HeadComparison, Verdict):
            assert taken(lambda kind=kind, text=text: kind.from_json(text)) is None


@seeded
@given(mutated(COMPARISON.encode()) | altered(COMPARISON).map(str.encode))
def test_a_comparison_of_anything(content):
    found = taken(lambda: HeadComparison.from_json(content))
    if found is not None:
        assert HeadComparison.from_json(found.to_json()).to_json() == found.to_json()
        repr(found)


@seeded
@given(mutated(VERDICT.to_json().encode()) | altered(VERDICT.to_json()).map(str.encode))
def test_a_verdict_of_anything(tmp_path, content):
    (tmp_path / "verdict.json").write_bytes(content)
    found = taken(lambda: Verdict.load(tmp_path))
    if found is not None:
        assert Verdict.from_json(found.to_json()) == found


@pytest.fixture(scope="module")
def moments(tmp_path_factory) -> bytes:
    return make_moments().save(tmp_path_factory.mktemp("moments") / "moments.npz").read_bytes()


@seeded
@given(st.data())
def test_moments_of_any_bytes(tmp_path, moments, data):
    (tmp_path / "moments.npz").write_bytes(data.draw(mutated(moments)))
    found = taken(lambda: Moments.load(tmp_path / "moments.npz"))
    if found is not None:
        assert found.explained_variance().shape == (found.n_heads, len(found.cell_types))


@pytest.mark.parametrize("name", ["evaluation.json", "moments.npz"])
@seeded
@given(st.data())
def test_an_evaluation_in_a_folder(tmp_path, moments, name, data):
    (tmp_path / "evaluation.json").write_text(EVALUATION, encoding="utf-8")
    (tmp_path / "moments.npz").write_bytes(moments)
    (tmp_path / name).write_bytes(data.draw(mutated((tmp_path / name).read_bytes())))
    taken(lambda: HeadEvaluation.load(tmp_path))


# --- settings ---------------------------------------------------------------------------------------------------------

RULES: dict[str, Any] = {
    "better": {"kind": "superiority", "margin": 0.01, "of": "types", "need": "any"},
    "floor": {"kind": "metric", "metric": "summary/n", "at_least": 1},
    "cell": {"kind": "cell", "table": "heads", "column": "p", "where": {"a": "b"}, "at_most": 2},
    "types": {"kind": "required_types", "types": ["a"]},
    "none": None,
}
GATE = json.dumps({"bootstrap": "pass", "allow_in_sample": False, "promote": "champion", "rules": RULES})
SPEC = json.dumps(
    {
        "data": {"labels_key": "a", "backed": None, "subset": {"key": None, "indices": [1, 2], "held_out": True}},
        "ablation": {"engine": "factored", "batch_size": 4, "memory_budget": "4GB", "modes": ["keep_one"]},
        "permutation": {"alpha": 0.05, "seed": 0, "tile_widths": [1.0], "reach": 3.0, "n_bootstrap": 10},
    }
)


@seeded
@given(altered(GATE).map(json.loads) | values)
def test_rules_of_any_values(record):
    found = taken(lambda: gate_spec_from(record))
    if found is not None:
        json.dumps(found.to_dict())


@seeded
@given(altered(SPEC).map(json.loads) | values)
def test_settings_of_any_values(record):
    found = taken(lambda: spec_from_mapping(record))
    if found is not None:
        assert spec_from_mapping(json.loads(json.dumps(found.to_dict()))) == found


KEYS = (
    "model_uri",
    "model",
    "data.subset.indices",
    "data",
    "permutation.alpha",
    "report.formats",
    "gate.rules.a",
    "++tracking.tags.a",
    "",
)
typed = st.builds(
    lambda key, sign, value: key + sign + value,
    st.sampled_from(KEYS) | st.text(max_size=6),
    st.sampled_from(["=", ""]),
    st.text(max_size=12) | st.text(alphabet="[]{}'\"\\,:$() a1\n", max_size=12),
)


@pytest.mark.parametrize("command", ["evaluate", "compare", "gate", "watch", "register"])
@seeded
@given(typed, st.booleans())
def test_overrides_of_any_text(command, text, sweep):
    made = taken(lambda: hydra_override(text, sweep=sweep, command=command))
    if made is not None:
        taken(lambda: check_override(command, made, configs=None, sweep=sweep))
        written_out(made, command)


@seeded
@given(st.lists(typed | st.builds("--{}".format, typed) | st.just("--overrides"), max_size=4))
def test_arguments_of_any_text(arguments):
    taken(lambda: project_overrides(arguments))


# --- stored models ----------------------------------------------------------------------------------------------------


@pytest.mark.amici
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", ["MLmodel", "weights.safetensors", "model.json", "cells.json", "manifest.json"])
@settings(seeded, max_examples=25)
@given(st.data())
def test_a_stored_model_of_any_bytes(base, tmp_path, name, signed, data):
    from amici_eval.tracking.flavor import open_stored_model

    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    model = base.copy("model", tmp_path)
    path = model / name if name == "MLmodel" else model / "data" / "amici" / name
    path.write_bytes(data.draw(mutated(path.read_bytes())))
    if signed and name not in ("MLmodel", "manifest.json"):
        sign(model)

    def read() -> Any:
        with open_stored_model(str(model)) as stored:
            return stored.trained

    found = taken(read)
    if found is not None:
        assert found.card.n_heads == found.weights["attention_layer.W_Q"].shape[1]


@pytest.mark.amici
@settings(seeded, max_examples=60)
@given(st.data())
def test_a_stored_set_up_of_any_values(base, tmp_path, data):
    from amici_eval.model.checkpoint import TrainedAMICI
    from amici_eval.model.manifest import write_manifest

    folder = tmp_path / "amici"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base.folder / "model" / "data" / "amici", folder)
    text = (folder / "model.json").read_text(encoding="utf-8")
    (folder / "model.json").write_text(data.draw(altered(text)), encoding="utf-8")
    write_manifest(folder)
    taken(lambda: TrainedAMICI.load(folder))
