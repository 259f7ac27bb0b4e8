"""The gate: what is undefined never passes, intervals decide, and each kind of rule says what it saw."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amici_eval.common.errors import DataError, InvalidSpecError
from amici_eval.comparison.gate import Element, decide, judge
from amici_eval.results.verdict import RuleResult, Verdict, overall_outcome
from amici_eval.settings.comparison import KINDS, TABLES, ComparisonSpec, GateSpec, Rule, gate_key, gate_spec_from
from amici_eval.settings.evaluation import EvaluationSpec
from amici_eval.tracking.runs.delivery import evaluation_metrics, metric_intervals
from tests.builders import AWKWARD_TYPES, make_comparison, make_evaluation

NAN, INF = math.nan, math.inf
TYPES = AWKWARD_TYPES[:4]


@pytest.mark.parametrize(
    ("value", "low", "high", "bounds", "expected"),
    [
        (0.3, 0.1, 0.5, {"at_least": 0.1}, "pass"),
        (0.3, 0.1, 0.5, {"at_least": 0.1, "strict": True}, "undecided"),
        (0.3, 0.1, 0.5, {"at_least": 0.2}, "undecided"),
        (0.3, 0.1, 0.5, {"at_least": 0.6}, "fail"),
        (0.3, 0.1, 0.5, {"at_least": 0.5}, "undecided"),
        (0.3, 0.1, 0.5, {"at_least": 0.5, "strict": True}, "fail"),
        (0.3, 0.1, 0.5, {"at_most": 0.5}, "pass"),
        (0.3, 0.1, 0.5, {"at_most": 0.4}, "undecided"),
        (0.3, 0.1, 0.5, {"at_most": 0.05}, "fail"),
        (0.3, 0.1, 0.5, {"at_least": 0.0, "at_most": 1.0}, "pass"),
        (0.3, 0.1, 0.5, {"at_least": 0.0, "at_most": 0.2}, "undecided"),
        (3, None, None, {"at_least": 3}, "pass"),
        (3, None, None, {"at_least": 4}, "fail"),
        (3, None, None, {}, "undecided"),
        (3, None, None, {"at_least": NAN}, "undecided"),
        (NAN, None, None, {"at_least": 0}, "undecided"),
        (None, None, None, {"at_least": 0}, "undecided"),
        ("many", None, None, {"at_least": 0}, "undecided"),
        (True, None, None, {"at_least": 0}, "undecided"),
        (INF, 0.0, INF, {"at_least": 0}, "undecided"),
        (0.3, NAN, 0.5, {"at_least": 0}, "undecided"),
        (0.3, 0.1, INF, {"at_least": 0}, "undecided"),
        (0.3, None, 0.5, {"at_least": 0}, "undecided"),
        # an empty interval, or one beside its value
        (0.3, 0.5, 0.1, {"at_least": 0}, "undecided"),
        (0.3, 0.4, 0.5, {"at_least": 0}, "undecided"),
        (np.float32(0.3), np.float32(0.1), np.float32(0.5), {"at_least": 0.05}, "pass"),
        (10**400, None, None, {"at_least": 0}, "undecided"),
    ],
)
def test_the_interval_decides_and_what_is_undefined_does_not_pass(value, low, high, bounds, expected):
    assert decide(Element(name="x", value=value, low=low, high=high), **bounds) == expected


def tables_of(evaluation):
    frames = {
        "heads": evaluation.heads,
        "explained_variance": evaluation.to_frame,
        "baselines": evaluation.baselines,
        "held_out": evaluation.held_out_frame,
        "scales": evaluation.scales_frame,
        "ablations": evaluation.ablations_frame,
        "head_interactions": evaluation.interactions_frame,
        "senders": evaluation.senders_frame,
    }
    assert set(frames) == set(TABLES)
    return lambda name: frames[name]()


def judged(evaluation, *rules, comparison=None, spec=None, metrics=None, **more):
    spec = spec or {}
    return judge(
        evaluation,
        GateSpec(rules=tuple(rules), **spec),
        comparison=comparison,
        metrics=evaluation_metrics(evaluation) if metrics is None else metrics,
        intervals=metric_intervals(evaluation),
        tables=tables_of(evaluation),
        **{"in_sample": False, **more},
    )


def one(evaluation, comparison=None, metrics=None, **rule):
    """Return what becomes of a single rule."""
    return judged(evaluation, Rule(name="it", **rule), comparison=comparison, metrics=metrics).results[0]


@pytest.fixture(scope="module")
def evaluation():
    return make_evaluation(inferred="lag", cell_types=TYPES)


@pytest.fixture(scope="module")
def comparison():
    return make_comparison(2)


def test_metrics_are_held_against_bounds(evaluation):
    metrics = evaluation_metrics(evaluation)
    value = metrics["summary/max_ev"]
    assert one(evaluation, kind="metric", metric="summary/max_ev", at_least=value).outcome == "pass"
    assert one(evaluation, kind="metric", metric="summary/max_ev", at_least=value + 0.1).outcome == "fail"
    assert one(evaluation, kind="metric", metric="summary/n_tests", at_most=10**6).outcome == "pass"
    missing = one(evaluation, kind="metric", metric="summary/max_evs", at_least=0)
    assert missing.outcome == "undecided"
    assert "has no metric summary/max_evs; near it: summary/max_ev" in missing.reason
    # explained variance of a head has an interval, which decides
    name = next(name for name in metrics if name.startswith("ev/") and f"ev_ci_low/{name[3:]}" in metrics)
    low, high = metrics[f"ev_ci_low/{name[3:]}"], metrics[f"ev_ci_high/{name[3:]}"]
    assert one(evaluation, kind="metric", metric=name, at_least=low).outcome == "pass"
    over = one(evaluation, kind="metric", metric=name, at_least=(low + metrics[name]) / 2)
    assert (over.outcome, over.low, over.high) == ("undecided", pytest.approx(low), pytest.approx(high))
    for known in metric_intervals(evaluation):
        # every interval is that of a metric, and holds it
        kind = one(evaluation, kind="metric", metric=known, at_least=-99.0)
        if known in metrics and kind.low is not None:
            assert kind.low <= kind.value <= kind.high
    bare = dataclasses.replace(evaluation, intervals=None)
    for known in (name, f"ev_full_model/{name.split('/')[1]}", f"gain/{name[3:]}"):
        assert known in metrics
        assert one(bare, kind="metric", metric=known, at_least=-99.0).outcome == "undecided", known


def test_cells_of_tables_are_held_against_bounds(evaluation):
    frame = evaluation.heads()
    row = frame[frame["ci_low"].notna()].iloc[0]
    where = {"head": str(row["head"]), "ct_name": row["ct_name"]}
    cell = {"kind": "cell", "table": "heads", "where": where}
    assert one(evaluation, **cell, column="expl_var_head", at_least=float(row["ci_low"])).outcome == "pass"
    assert one(evaluation, **cell, column="expl_var_head", at_least=float(row["ci_high"]) + 1e-6).outcome == "fail"
    assert one(evaluation, **cell, column="n_cells", at_least=int(row["n_cells"]) + 1).outcome == "fail"
    every = one(evaluation, kind="cell", table="heads", column="n_cells", at_least=2)
    # the type of one cell
    assert every.outcome == "fail"
    assert len(every.details) == len(frame)
    some = one(evaluation, kind="cell", table="heads", column="n_cells", at_least=2, need="any")
    assert some.outcome == "pass"
    held = evaluation.held_out_frame()
    row = held[held["ci_low_held_out"].notna()].iloc[0]
    cell = {"kind": "cell", "table": "held_out", "where": {"head": str(row["head"]), "ct_name": row["ct_name"]}}
    halfway = float(row["ci_low_held_out"] + row["expl_var_held_out"]) / 2
    assert one(evaluation, **cell, column="expl_var_held_out", at_least=halfway).outcome == "undecided"
    # yes and no count as 1 and 0
    tested = evaluation.heads()["significant"]
    marked = one(evaluation, kind="cell", table="heads", column="significant", at_least=1, need="any")
    assert marked.outcome == ("pass" if tested.any() else "fail")
    undefined = one(evaluation, kind="cell", table="heads", column="p_value_spatial", at_least=0.0)
    assert undefined.outcome == "undecided"
    assert one(evaluation, kind="cell", table="heads", column="nothing", at_least=0).outcome == "undecided"
    nowhere = one(evaluation, kind="cell", table="heads", column="n_cells", where={"ct_name": "no"}, at_least=0)
    assert (nowhere.outcome, "has no row with ct_name = no" in nowhere.reason) == ("undecided", True)
    words = one(evaluation, kind="cell", table="heads", column="ct_name", at_least=0)
    assert words.outcome == "undecided"


def test_significant_heads_are_counted(evaluation):
    n = evaluation.n_significant
    assert one(evaluation, kind="significant_heads", at_least=n).outcome == "pass"
    assert one(evaluation, kind="significant_heads", at_least=n + 1).outcome == "fail"
    counts = (evaluation.adjusted <= 0.05).sum(axis=0)
    found = one(evaluation, kind="significant_heads", types=TYPES[:2], at_least=1)
    expected = [int(counts[evaluation.cell_types.index(name)]) for name in TYPES[:2]]
    assert [detail[1] for detail in found.details] == expected
    # a head without a test may be one more
    n_untested = int(np.isnan(evaluation.adjusted).sum())
    assert n_untested
    assert one(evaluation, kind="significant_heads", at_most=n).outcome == "undecided"
    assert one(evaluation, kind="significant_heads", at_most=n + n_untested).outcome == "pass"
    # at the level itself it is significant
    at = tuple(np.argwhere(~np.isnan(evaluation.adjusted))[0])
    adjusted = evaluation.adjusted.copy()
    adjusted[at] = 0.05
    level = dataclasses.replace(evaluation, spatial=dataclasses.replace(evaluation.spatial, p_value_adj=adjusted))
    expected = n + int(evaluation.adjusted[at] > 0.05)
    assert one(level, kind="significant_heads", at_least=expected).outcome == "pass"
    # no test at all, and a type that is not there: nothing is known
    last = evaluation.cell_types[-1]
    assert np.isnan(evaluation.adjusted[:, -1]).all()
    assert one(evaluation, kind="significant_heads", types=(last,), at_least=0).outcome == "undecided"
    assert one(evaluation, kind="significant_heads", types=(TYPES[0], "none"), at_least=0).outcome == "undecided"


def test_explained_variance_and_gain_go_by_type(evaluation):
    at = int(np.nanargmax(np.where(np.isfinite(evaluation.intervals.full_low), evaluation.expl_var_full, np.nan)))
    name = evaluation.cell_types[at]
    low, high = evaluation.intervals.full_low[at], evaluation.intervals.full_high[at]
    rule = {"kind": "explained_variance", "types": (name,)}
    assert one(evaluation, **rule, at_least=float(low)).outcome == "pass"
    assert one(evaluation, **rule, at_least=float(high) + 1e-6).outcome == "fail"
    assert one(evaluation, **rule, at_least=float(high)).outcome == "undecided"
    gain = one(evaluation, kind="gain", types=(name,), at_least=-9.0)
    assert gain.value == pytest.approx(evaluation.trivial.full_gain[at])
    less = evaluation.expl_var_full[at] - evaluation.trivial.full_gain[at]
    assert (gain.low, gain.high) == (pytest.approx(low - less), pytest.approx(high - less))
    bare = dataclasses.replace(evaluation, trivial=None)
    assert "baselines were not computed" in one(bare, kind="gain", types=(name,), at_least=-9.0).reason
    # without names, types of enough cells are judged; with none of them nothing is
    enough = [name for name, n in zip(evaluation.cell_types, evaluation.n_cells, strict=True) if n >= 50]
    every = one(evaluation, kind="explained_variance", at_least=-9.0)
    assert [detail[0] for detail in every.details] == enough
    most = int(evaluation.n_cells.max())
    assert one(evaluation, kind="explained_variance", at_least=-9.0, min_cells=most).value is not None
    nobody = one(evaluation, kind="explained_variance", at_least=-9.0, min_cells=most + 1)
    assert nobody.outcome == "undecided"
    assert nobody.reason == f"nothing to judge: no cell type has {most + 1} evaluated cells"
    without = dataclasses.replace(evaluation, intervals=None)
    assert one(without, **rule, at_least=-9.0).outcome == "undecided"


def test_required_types_and_genes(evaluation):
    whole = evaluation.cell_types[1]
    assert one(evaluation, kind="required_types", types=(whole,)).outcome == "pass"
    assert one(evaluation, kind="required_types", types=(whole, "none")).outcome == "fail"
    last = evaluation.cell_types[-1]
    found = one(evaluation, kind="required_types", types=(last,))
    assert (found.outcome, found.reason) == ("undecided", f"{last} without explained variance")
    assert one(evaluation, kind="required_genes", genes=("ACTA2", "IL7R")).outcome == "pass"
    gone = one(evaluation, kind="required_genes", genes=("ACTA2", "MKI67"))
    assert (gone.outcome, gone.reason) == ("fail", "MKI67 not there")


def whole_differs(comparison, **values):
    return dataclasses.replace(comparison, overall=(dataclasses.replace(comparison.overall[0], **values),))


@pytest.mark.parametrize(
    ("difference", "low", "high", "not_worse", "better"),
    [
        (0.012, 0.004, 0.02, "pass", "pass"),
        (0.0, -0.009, 0.009, "pass", "undecided"),
        (0.0, -0.011, 0.009, "undecided", "undecided"),
        (-0.05, -0.06, -0.04, "fail", "fail"),
        (-0.005, -0.007, -0.003, "pass", "fail"),
        (0.5, 0.5, NAN, "undecided", "undecided"),
        (NAN, NAN, NAN, "undecided", "undecided"),
        (0.0, 0.0, 0.0, "pass", "fail"),
    ],
)
def test_against_the_baseline_the_interval_decides(evaluation, comparison, difference, low, high, not_worse, better):
    given_this = whole_differs(comparison, difference=difference, low=low, high=high)
    assert one(evaluation, given_this, kind="non_inferiority", margin=0.01).outcome == not_worse
    assert one(evaluation, given_this, kind="superiority", margin=0.0).outcome == better
    if math.isfinite(low):
        # at the margin itself it is not worse by less
        at_margin = one(evaluation, given_this, kind="non_inferiority", margin=-low if low else 0.0)
        assert at_margin.outcome != "pass"
        assert one(evaluation, given_this, kind="superiority", margin=max(low, 0.0)).outcome != "pass"
    # a negative margin asks for more than not to be worse
    asked = one(evaluation, given_this, kind="non_inferiority", margin=-0.003)
    assert (asked.outcome == "pass") == (math.isfinite(high) and low > 0.003)


def test_types_and_heads_are_compared_too(evaluation, comparison):
    found = comparison.differences[0]
    name = TYPES[0]
    column = found.cell_types.index(name)
    by_type = one(evaluation, comparison, kind="non_inferiority", of="types", types=(name,), margin=0.01)
    assert (by_type.value, by_type.low) == (found.difference[-1, column], found.low[-1, column])
    by_head = one(evaluation, comparison, kind="superiority", of="heads", types=(name,), margin=0.0, need="any")
    assert [detail[1] for detail in by_head.details] == [None, *found.difference[:-1, column].tolist()]
    assert by_head.details[1][0] == f"{name}, head 1 -> 1"
    assert [detail[0] for detail in by_head.details][:1] == [f"{name}, head 0"], "head 0 is gone"
    found_all = one(evaluation, comparison, kind="non_inferiority", of="heads", types=(name,), margin=9.0)
    assert (found_all.outcome, "head 0: undefined, it is gone" in found_all.reason) == ("undecided", True)
    match = comparison.matches[0]
    expected = np.nan_to_num(match.matched).mean()
    assert one(evaluation, comparison, kind="stability", at_least=float(expected) - 0.01).outcome == "pass"
    steady = one(evaluation, comparison, kind="stability", at_least=float(expected) + 0.01)
    assert (steady.outcome, steady.value) == ("fail", pytest.approx(expected))
    assert steady.reason.startswith("2 of 3 heads are there")


def test_without_a_baseline_the_setting_decides(evaluation):
    rules = [
        Rule(name="a", kind="non_inferiority", margin=0.01),
        Rule(name="b", kind="superiority"),
        Rule(name="c", kind="stability", at_least=0.3),
    ]
    for bootstrap, outcome in (("pass", "pass"), ("fail", "fail")):
        verdict = judged(evaluation, *rules, spec={"bootstrap": bootstrap})
        assert verdict.outcome == outcome
        assert {result.outcome for result in verdict.results} == {outcome}
        assert f"gate.bootstrap={bootstrap}" in verdict.results[0].reason
    lacking = judged(evaluation, *rules, comparison=make_comparison(2), missing_genes=("g1",))
    assert {result.outcome for result in lacking.results[:2]} <= {"undecided", "fail"}
    # a baseline that could not be compared is no missing one
    lost = judged(evaluation, *rules, no_comparison="it broke")
    assert (lost.outcome, lost.results[0].reason) == ("undecided", "it broke")


def test_nothing_is_decided_on_cells_that_may_have_been_fitted_on(evaluation):
    rule = Rule(name="a", kind="significant_heads", at_least=0)
    for in_sample in (True, None):
        verdict = judged(evaluation, rule, in_sample=in_sample)
        assert verdict.outcome == "undecided"
        assert verdict.results[-1].rule == "held_out_cells"
        assert judged(evaluation, rule, in_sample=in_sample, spec={"allow_in_sample": True}).outcome == "pass"
    # what fails fails there, too
    assert judged(evaluation, Rule(name="a", kind="significant_heads", at_least=99), in_sample=True).outcome == "fail"


NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(allow_nan=True, allow_infinity=True, width=32).map(np.float32),
    st.sampled_from([None, NAN, INF, -INF, 0.0, -0.0, 1e-300, 10**400, "text", True, np.float32("nan"), np.int64(3)]),
    st.integers(-5, 5),
)
FINITE = st.floats(-2, 2, allow_nan=False)


@settings(max_examples=1000, deadline=None)
@given(
    value=NUMBERS,
    low=NUMBERS,
    high=NUMBERS,
    at_least=st.none() | NUMBERS,
    at_most=st.none() | NUMBERS,
    strict=st.booleans(),
)
def test_no_number_however_odd_passes_unless_it_is_defined_and_within(value, low, high, at_least, at_most, strict):
    bounds = [
        bound if isinstance(bound, (float, int)) and not isinstance(bound, bool) and abs(bound) < 1e300 else None
        for bound in (at_least, at_most)
    ]
    outcome = decide(
        Element(name="x", value=value, low=low, high=high), at_least=bounds[0], at_most=bounds[1], strict=strict
    )
    assert outcome in ("pass", "fail", "undecided")
    if outcome == "undecided":
        return
    assert not isinstance(value, (str, bool))
    ends = [value if low is None and high is None else low, value if low is None and high is None else high]
    assert all(math.isfinite(float(number)) for number in (value, *ends))
    assert float(ends[0]) <= float(value) <= float(ends[1])
    assert bounds != (None, None)
    if outcome == "pass":
        assert bounds[0] is None or float(ends[0]) >= bounds[0]
        assert bounds[1] is None or float(ends[1]) <= bounds[1]


@st.composite
def rules(draw):
    kind = draw(st.sampled_from(sorted(KINDS)))
    takes = KINDS[kind]
    types = st.lists(st.sampled_from([*TYPES, "none"]), min_size=1, max_size=3, unique=True).map(tuple)
    given_values = {
        "at_least": FINITE,
        "metric": st.sampled_from(["summary/max_ev", "summary/n_tests", "nothing", f"ev/{TYPES[0]}/head_0"]),
        "table": st.sampled_from(TABLES),
        "column": st.sampled_from(["expl_var_head", "n_cells", "expl_var", "nothing", "ct_name", "p_value_spatial"]),
        "genes": st.lists(st.sampled_from(["ACTA2", "$g$", "none"]), min_size=1, unique=True).map(tuple),
        "types": types if kind == "required_types" else st.none() | types,
        "min_cells": st.integers(1, 1000),
        "need": st.sampled_from(["all", "any", "2"]),
        "of": st.sampled_from(["overall", "types", "heads"]),
        "margin": FINITE.map(abs) if kind == "superiority" else FINITE,
    }
    return Rule(name="it", kind=kind, **{name: draw(values) for name, values in given_values.items() if name in takes})


def spoilt(values, draw):
    """Return an array in which some numbers are none."""
    found = np.array(values, dtype=np.float64)
    flat = found.reshape(-1)
    for _ in range(draw(st.integers(0, 4))):
        if flat.size:
            flat[draw(st.integers(0, flat.size - 1))] = draw(st.sampled_from([NAN, INF, -INF, 0.0, 1e308]))
    return found


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_a_thousand_odd_inputs_raise_nothing_and_pass_nothing_undefined(evaluation, comparison, data):
    draw = data.draw
    bounds = evaluation.intervals
    odd = dataclasses.replace(
        evaluation,
        expl_var_full=spoilt(evaluation.expl_var_full, draw),
        intervals=draw(
            st.sampled_from(
                [
                    None,
                    dataclasses.replace(
                        bounds, full_low=spoilt(bounds.full_low, draw), full_high=spoilt(bounds.full_high, draw)
                    ),
                ]
            )
        ),
        trivial=draw(
            st.sampled_from(
                [None, dataclasses.replace(evaluation.trivial, full_gain=spoilt(evaluation.trivial.full_gain, draw))]
            )
        ),
        spatial=dataclasses.replace(evaluation.spatial, p_value_adj=spoilt(evaluation.spatial.p_value_adj, draw)),
    )
    found = comparison.differences[0]
    changed = dataclasses.replace(
        whole_differs(comparison, **{name: draw(st.floats(allow_nan=True)) for name in ("difference", "low", "high")}),
        differences=(
            dataclasses.replace(
                found,
                difference=spoilt(found.difference, draw),
                low=spoilt(found.low, draw),
                high=spoilt(found.high, draw),
            ),
        ),
        matches=(
            dataclasses.replace(comparison.matches[0], similarity=spoilt(comparison.matches[0].similarity, draw)),
        ),
    )
    metrics = {**evaluation_metrics(evaluation), "summary/max_ev": draw(st.floats(allow_nan=True))}
    against = draw(st.sampled_from([changed, None]))
    verdict = judged(
        odd,
        draw(rules()),
        comparison=against,
        metrics=metrics,
        no_comparison="none" if against is None else None,
        in_sample=draw(st.sampled_from([False, None, True])),
        spec={"allow_in_sample": draw(st.booleans())},
    )
    for result in verdict.results:
        if result.outcome == "pass":
            assert result.value is not None
            assert math.isfinite(result.value)
            assert (result.low is None) == (result.high is None)
        for _, value, low, high, outcome in result.details:
            if outcome == "pass":
                assert value is not None
                assert (low is None) == (high is None)
    assert Verdict.from_json(verdict.to_json()) == verdict


def test_as_many_must_pass_as_the_rule_says(evaluation):
    frame = evaluation.heads()
    counts = frame["n_cells"].to_numpy()
    least = int(np.sort(counts)[-4])
    n = int((counts >= least).sum())
    cell = {"kind": "cell", "table": "heads", "column": "n_cells", "at_least": least}
    assert one(evaluation, **cell, need=str(n)).outcome == "pass"
    short = one(evaluation, **cell, need=str(n + 1))
    assert short.outcome == "fail"
    assert f"{n} pass" in short.reason
    assert f"{n + 1} must pass" in short.reason
    # what is shown is the one that decided: the largest that fails, or the smallest that passes
    assert short.value == counts[counts < least].min()
    assert one(evaluation, **cell, need="any").value == least


@pytest.mark.parametrize(
    ("given_values", "message"),
    [
        ({"kind": "odd"}, "gate.rules.it.kind='odd': it must be one of metric, cell, sign"),
        ({"kind": "metric", "at_least": 1}, "gate.rules.it.metric=None: a rule of kind metric needs it"),
        ({"kind": "metric", "metric": "a"}, "a rule needs at_least, at_most or both"),
        ({"kind": "metric", "metric": "a", "at_least": NAN}, "at_least=nan: it must be a finite number"),
        ({"kind": "metric", "metric": "a", "at_least": 2, "at_most": 1}, "it must not be above at_most=1"),
        ({"kind": "metric", "metric": "a", "at_least": 2, "margin": 1}, "takes at_least, at_most, metric"),
        ({"kind": "superiority", "of": "cells"}, "of='cells': it must be one of overall, types, heads"),
        ({"kind": "superiority", "need": "most"}, "need='most': it must be all, any, or a whole number"),
        ({"kind": "superiority", "min_cells": 0}, "min_cells=0: it must be a whole number of at least 1"),
        ({"kind": "superiority", "margin": -0.1}, "margin=-0.1: better by more than a negative number may be worse"),
        ({"kind": "superiority", "margin": INF}, "margin=inf: it must be a finite number"),
        ({"kind": "cell", "table": "no", "column": "a", "at_least": 0}, "table='no': it must be one of heads, expl"),
        ({"kind": "metric", "metric": "a", "at_least": "1"}, "at_least='1': it must be a finite number"),
        ({"kind": "superiority", "min_cells": 1.5}, "min_cells=1.5: it must be a whole number of at least 1"),
        ({"kind": "required_types"}, "types=None: a rule of kind required_types needs it"),
    ],
)
def test_rules_that_make_no_sense_are_refused(given_values, message):
    with pytest.raises(InvalidSpecError) as caught:
        gate_spec_from({"rules": {"it": given_values}})
    assert message in str(caught.value)


def test_a_gate_without_rules_is_refused_and_a_rule_can_be_left_out():
    with pytest.raises(InvalidSpecError, match="a version that nothing is asked of cannot pass"):
        gate_spec_from({"rules": {"it": None}})
    with pytest.raises(InvalidSpecError, match=r"gate.bootstrap='maybe': it must be pass or fail"):
        gate_spec_from({"rules": {"it": {"kind": "superiority"}}, "bootstrap": "maybe"})
    for alias in ("v1", "latest", "a b", ""):
        with pytest.raises(InvalidSpecError, match=r"^gate.promote=.*an alias has letters"):
            gate_spec_from({"rules": {"it": {"kind": "superiority"}}, "promote": alias})
    made = gate_spec_from(
        {
            "rules": {
                "a": None,
                "b": {"kind": "cell", "table": "heads", "column": "c", "where": {"head": 1}, "at_least": 0},
            }
        }
    )
    assert [rule.name for rule in made.rules] == ["b"]
    assert made.rules[0].where == {"head": "1"}


def test_the_key_follows_the_configuration():
    def key(**changed):
        gate = gate_spec_from({"rules": {"a": {"kind": "superiority", "margin": changed.pop("margin", 0.0)}}})
        values = {"baseline": "@champion", "data_uri": "a", "spec": EvaluationSpec(), "comparison": ComparisonSpec()}
        return gate_key(**{**values, **changed}, gate=gate)

    assert key() == key()
    assert (
        len({key(), key(baseline="2"), key(data_uri=None), key(margin=0.1), key(comparison=ComparisonSpec(seed=1))})
        == 5
    )
    assert len(key()) == 12
    assert set(key()) <= set("0123456789abcdef")


def test_a_verdict_says_what_its_rules_say():
    assert overall_outcome(["pass", "undecided", "fail"]) == "fail"
    assert overall_outcome(["pass", "undecided"]) == "undecided"
    assert overall_outcome(["pass"]) == "pass"
    assert overall_outcome([]) == "undecided"
    result = RuleResult(
        rule="a", kind="metric", outcome="fail", value=NAN, low=None, high=INF, threshold="at least 1", reason="no"
    )
    assert (result.value, result.high) == (None, None)
    verdict = Verdict(outcome="fail", results=(result,), notes=("β",))
    record = json.loads(verdict.to_json())
    for changed in (
        {"outcome": "pass"},
        {"schema_version": 2},
        {"schema_version": True},
        {"results": [{**record["results"][0], "outcome": "pass"}]},
        {"results": [{}]},
        {"more": 1},
    ):
        with pytest.raises(DataError):
            Verdict.from_json(json.dumps({**record, **changed}))
    for text in ("", "[]", "{", "[" * 100_000):
        with pytest.raises(DataError, match="damaged verdict"):
            Verdict.from_json(text)


def test_a_verdict_is_read_from_its_file_or_folder(tmp_path):
    verdict = Verdict(outcome="undecided", results=())
    path = verdict.save(tmp_path / "new")
    assert Verdict.load(path) == Verdict.load(path.parent) == verdict
    with pytest.raises(DataError, match=r"verdict.json cannot be read \(No such file"):
        Verdict.load(tmp_path)


def test_rules_that_are_left_out_are_named(evaluation):
    spec = gate_spec_from({"rules": {"a": None, "b": {"kind": "significant_heads", "at_least": 0}}})
    assert spec.left_out == ("a",)
    found = judge(evaluation, spec, metrics={}, tables=tables_of(evaluation), in_sample=False)
    assert found.notes == ("the rule a is left out",)
