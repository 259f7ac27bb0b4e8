"""The gate through a real store: verdicts, what a run and a version say of them, promotion, exit codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from uuid import uuid4
from xml.etree import ElementTree

import mlflow
import numpy as np
import pytest
import torch

from amici_eval.common.errors import DataError, InvalidSpecError, ModelNotFoundError
from amici_eval.model.checkpoint import untrained_like
from amici_eval.results.verdict import Verdict
from amici_eval.settings.comparison import GateSpec, Rule
from amici_eval.tracking.flavor import log_model
from amici_eval.tracking.jobs import comparing, gating
from amici_eval.tracking.jobs.gating import gate_job
from amici_eval.tracking.jobs.promotion import rollback
from tests.builders import job_options
from tests.cli.test_cli import call
from tests.model.test_comparison import relabelled
from tests.tracking.test_comparing import QUICK, SPEC

pytestmark = pytest.mark.amici

NOT_WORSE = Rule(name="not_worse", kind="non_inferiority", margin=0.01)
THERE = Rule(name="there", kind="stability", at_least=0.9)
COUNTED = Rule(name="counted", kind="metric", metric="summary/n_cells", at_least=1)


LOGGED: dict[str, list[str]] = {}
"""Models in a store, which are logged once: an evaluation of one serves all tests."""


@pytest.fixture
def model(registry, trained, adata, monkeypatch):
    """A registered model: version 1, version 2 with its heads in another order, version 3 untrained."""
    monkeypatch.setattr(comparing, "MIN_HELD_OUT", 10)
    name = f"gated-{uuid4().hex[:6]}"
    if registry.uri not in LOGGED:
        models = (trained, relabelled(trained, [1, 0]), untrained_like(trained, seed=1))
        LOGGED[registry.uri] = [log_model(one, "gated", training_adata=adata).model_uri for one in models]
    for uri in LOGGED[registry.uri]:
        mlflow.register_model(uri, name)
    yield Gated(name, registry.data)
    # the store serves other tests, too
    mlflow.MlflowClient().delete_registered_model(name)


class Gated:
    def __init__(self, name: str, data: Path) -> None:
        self.name, self.data = name, data

    @property
    def client(self):
        return mlflow.MlflowClient()

    def aliases(self):
        return {alias: str(version) for alias, version in self.client.get_registered_model(self.name).aliases.items()}

    def tags(self, version):
        return dict(self.client.get_model_version(self.name, version).tags)


def gated(model, version, *rules, promote="champion", baseline="@champion", bootstrap="pass", reuse=True, **more):
    gate = GateSpec(rules=rules or (COUNTED, NOT_WORSE, THERE), promote=promote, bootstrap=bootstrap)
    return gate_job(
        model_uri=more.pop("model_uri", f"models:/{model.name}/{version}"),
        baseline=baseline,
        data_uri=None if model.data is None else str(model.data),
        comparison=QUICK,
        gate=more.pop("gate", gate),
        options=job_options(SPEC, reuse=reuse),
        **more,
    )


def test_a_first_version_is_promoted_a_worse_one_refused_and_the_same_one_passes(model, tmp_path):
    first = gated(model, 1)
    assert (first.verdict.outcome, first.verdict.baseline, first.verdict.in_sample) == ("pass", None, False)
    assert (first.promotion.moved, first.promotion.replaced) == (True, None)
    assert model.aliases() == {"champion": "1"}
    key = first.verdict.key
    assert model.tags("1")[f"amici_eval.verdict.{key}"] == f"pass {first.run_id}"
    run = model.client.get_run(first.run_id)
    assert (run.info.status, run.data.tags["amici_eval.verdict"]) == ("FINISHED", "pass")
    assert run.data.metrics == {"gate/pass": 3.0, "gate/fail": 0.0, "gate/undecided": 0.0}
    folder = Path(mlflow.artifacts.download_artifacts(run_id=first.run_id, dst_path=str(tmp_path / "first")))
    assert Verdict.from_json((folder / "verdict.json").read_bytes()) == first.verdict
    assert "passes" in (folder / "report.html").read_text(encoding="utf-8")

    worse = gated(model, 3)
    assert worse.verdict.outcome == "fail"
    assert {result.rule: result.outcome for result in worse.verdict.results}["there"] == "fail"
    assert (worse.promotion, model.aliases()) == (None, {"champion": "1"})
    assert worse.verdict.baseline["version"] == "1"
    assert worse.verdict.key == key
    assert model.tags("3")["amici_eval.verdict"] == "fail"
    folder = Path(mlflow.artifacts.download_artifacts(run_id=worse.run_id, dst_path=str(tmp_path / "worse")))
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"verdict.json", "verdict.md", "verdict.xml", "comparison.json", "report.html"} <= files
    assert ElementTree.parse(folder / "verdict.xml").find("testsuite").get("failures") != "0"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.index('id="verdict"') < page.index('id="summary"')

    same = gated(model, 2)
    assert same.verdict.outcome == "pass"
    assert model.aliases() == {"champion": "2"}
    assert same.promotion.replaced == "1"
    # the one that is the champion already is judged against the one that it replaced
    again = gated(model, 2)
    assert (again.verdict.outcome, again.verdict.baseline["version"], again.outdated) == ("pass", "1", False)
    assert again.promotion.reason == "champion is version 2 already"
    assert model.tags("2")[f"amici_eval.verdict.{key}"] == f"pass {again.run_id}"
    # what it replaced is not on record: nothing is known
    model.client.set_registered_model_alias(model.name, "champion", "3")
    alone = gated(model, 3)
    assert {result.rule: result.outcome for result in alone.verdict.results}["not_worse"] == "undecided"
    assert "what it replaced is not on record" in alone.verdict.results[1].reason


def test_nothing_takes_the_place_of_a_champion_that_it_was_not_judged_against(model):
    gated(model, 1)
    n_runs = len(model.client.search_runs(["0"]))
    with pytest.raises(ModelNotFoundError, match="has no alias champoin: its aliases are champion; write base"):
        gated(model, 3, baseline="@champoin")
    for baseline in (None, "@best", "2"):
        with pytest.raises(InvalidSpecError, match=r"champion is version 1 of .*; only what was judged against"):
            gated(model, 3, baseline=baseline)
    assert len(model.client.search_runs(["0"])) == n_runs
    assert model.aliases() == {"champion": "1"}
    # against the same version by its number, or without promotion, it is judged
    assert gated(model, 2, baseline="1").promotion.moved
    assert gated(model, 3, COUNTED, baseline=None, promote=None).verdict.outcome == "pass"


def test_a_watcher_turns_back_no_decision(model):
    gated(model, 1)
    gated(model, 2)
    older = gated(model, 1, COUNTED, newer_only=True)
    assert (older.verdict.outcome, older.promotion.moved, older.outdated) == ("pass", False, False)
    assert older.promotion.reason == "version 1 is older than version 2, which is champion: not promoted"
    rollback(model.name, "champion")
    assert model.aliases() == {"champion": "1"}
    undone = gated(model, 2, COUNTED, newer_only=True)
    assert undone.promotion.reason == "the promotion of version 2 to champion was taken back: not promoted again"
    assert model.aliases() == {"champion": "1"}
    assert gated(model, 3, COUNTED, newer_only=True).promotion.moved
    # a person may
    assert gated(model, 2, COUNTED).promotion.moved


def test_a_dry_run_moves_nothing_and_bootstrap_may_refuse(model):
    dry = gated(model, 1, dry_run=True)
    assert (dry.verdict.outcome, dry.promotion.moved, model.aliases()) == ("pass", False, {})
    assert "dry run" in dry.promotion.reason
    assert not dry.outdated
    assert not [name for name in model.tags("1") if name.startswith("amici_eval.verdict")]
    refused = gated(model, 1, bootstrap="fail")
    assert (refused.verdict.outcome, model.aliases()) == ("fail", {})


def test_a_champion_that_was_replaced_meanwhile_is_not_replaced_again(model, monkeypatch):
    gated(model, 1)
    judge = gating.judge

    def slow(*arguments, **options):
        model.client.set_registered_model_alias(model.name, "champion", "3")
        return judge(*arguments, **options)

    monkeypatch.setattr(gating, "judge", slow)
    late = gated(model, 2)
    assert (late.verdict.outcome, late.outdated) == ("pass", True)
    assert "champion is now version 3, this version was judged against 1: judge it again" in late.promotion.reason
    assert model.aliases() == {"champion": "3"}
    assert model.tags("2")["amici_eval.verdict"] == "undecided"
    assert not [name for name in model.tags("2") if name.startswith("amici_eval.verdict.")]
    assert model.client.get_run(late.run_id).data.tags["amici_eval.promotion"] == late.promotion.reason


def test_a_baseline_that_cannot_be_evaluated_leaves_the_verdict_open(model, monkeypatch, trained):
    gated(model, 1)
    literal = comparing.evaluate_opened

    def broken(opened, options, **more):
        if opened.model.uri.endswith("/1"):
            raise DataError(value="version 1", rule="it breaks", fix="mend it")
        return literal(opened, options, **more)

    monkeypatch.setattr(comparing, "evaluate_opened", broken)
    monkeypatch.setattr(comparing, "find_evaluation", lambda *_, **__: None)
    found = gated(model, 2)
    assert found.verdict.outcome == "undecided"
    assert "the baseline could not be evaluated: version 1: it breaks" in found.verdict.results[1].reason
    assert found.verdict.baseline["evaluation_run_id"] is None
    assert model.aliases() == {"champion": "1"}
    with pytest.raises(DataError, match=r"could not be evaluated \(version 1: it breaks; mend it\)|gated-\w+ 1 could"):
        gated(model, 1, baseline=None)
    last = model.client.search_runs([model.client.get_run(found.run_id).info.experiment_id], max_results=1)[0]
    assert last.info.status == "FAILED"


def test_what_is_misspelt_is_refused_before_a_run_starts(model):
    n_runs = len(model.client.search_runs(["0"]))
    with pytest.raises(ModelNotFoundError, match="has no version '9'"):
        gated(model, 9)
    with pytest.raises(ModelNotFoundError, match="has no version '8'"):
        gated(model, 1, baseline="8")
    with pytest.raises(InvalidSpecError, match=r"gate.promote='v1': an alias has letters"):
        gated(model, 1, promote="v1")
    logged = model.client.get_model_version(model.name, "1").source.removeprefix("models:/")
    with pytest.raises(InvalidSpecError, match="an alias belongs to a registered version"):
        gated(model, 1, model_uri=f"models:/{logged}")
    with pytest.raises(InvalidSpecError, match="names a version of the same registered model"):
        gated(model, 1, model_uri=f"models:/{logged}", promote=None)
    assert len(model.client.search_runs(["0"])) == n_runs


def test_weights_that_are_no_numbers_never_pass(model, trained, adata):
    weights = {name: tensor.clone() for name, tensor in trained.weights.items()}
    weights["attention_layer.W_V"][:] = torch.nan
    with mlflow.start_run():
        log_model(replace(trained, weights=weights), model.name, registered_model_name=model.name, training_adata=adata)
    gated(model, 1)
    ruled = [
        Rule(name=kind, kind=kind, at_least=-1e9) for kind in ("explained_variance", "significant_heads", "stability")
    ]
    ruled += [Rule(name="near", kind="non_inferiority", margin=1e9)]
    # the reader refuses such a model, so there is nothing to judge
    with pytest.raises(
        DataError, match=r"could not be evaluated .*attention_layer.W_V holds values that are not finite"
    ):
        gated(model, 4, *ruled)


def test_the_command_says_it_all_and_its_exit_code_tells_outcomes_apart(model, capsys, tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    quick = ["permutation.n_permutations=19", "permutation.n_bootstrap=50", "ablation.modes=keep_one"]
    quick += ["ablation.baselines=false", "compare.n_flips=49", "compare.n_bootstrap=50", "report.figures=false"]
    quick += [f"data.uri={model.data}", "~gate.rules.some_signal", "~gate.rules.explains_something"]
    gate = ["gate", "gate.promote=champion", *quick]
    assert call(*gate, f"model_uri=models:/{model.name}/1") == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{model.name} 1 passes.\n")
    assert "\\" not in told
    assert "\n| " not in told
    assert f"## {model.name} 1: pass" in summary.read_text(encoding="utf-8").replace("\\", "")
    assert "champion from no version to version 1" in told
    assert (
        call(
            "project",
            "gate",
            "--model_uri",
            f"models:/{model.name}/3",
            "--gate",
            "strict",
            "--promote",
            "",
            *quick,
            "gate.rules.heads_are_there.at_least=0.99",
            "gate.rules.not_worse_in_any_type=null",
        )
        == 3
    )
    assert call(*gate, f"model_uri=models:/{model.name}/2", "compare.cells=all") == 4
    assert call(*gate, f"model_uri=models:/{model.name}/2", "gate.rules.not_worse.kind=odd") == 2
    assert call(*gate, f"model_uri=models:/{model.name}/2", "gate=stricter") == 2
    assert "gate is a group of settings, ready-made as better, default, strict" in capsys.readouterr().err
    assert call(*gate, f"model_uri=models:/{model.name}/2") == 0
    assert model.aliases() == {"champion": "2"}
    assert summary.read_text().replace("\\", "").count("| rule | outcome |") == 4
    watch = ["watch", f"model={model.name}", "gate.promote=champion", *quick, "--once"]
    assert call(*watch) == 0
    told = capsys.readouterr().out
    # versions 1 and 2 have a verdict for these settings, and version 3 was judged by stricter rules
    assert f"models:/{model.name}/3: " in told
    assert f"models:/{model.name}/2: " not in told
    assert call(*watch) == 0
    assert "nothing to judge" in capsys.readouterr().out
    assert call("rollback", f"model={model.name}") == 0
    assert model.aliases()["champion"] in ("1", "2")


def test_genes_that_the_version_lacks_are_not_passed_over(model, monkeypatch):
    gated(model, 1)
    monkeypatch.setattr(gating, "_missing_genes", lambda evaluation, baseline: ("g1", "g2"))
    found = gated(model, 2)
    assert found.verdict.outcome == "undecided"
    assert found.verdict.results[1].reason.startswith("2 genes of the baseline are not in the version (g1, g2)")
    assert found.verdict.results[2].outcome == "pass"


def test_versions_with_data_of_their_own_are_judged_on_one_file(registry, trained, adata, monkeypatch):
    monkeypatch.setattr(comparing, "MIN_HELD_OUT", 10)
    name = f"bundled-{uuid4().hex[:6]}"
    for data in (adata, adata[::-1].copy()):
        with mlflow.start_run():
            log_model(trained, name, registered_model_name=name, training_adata=data, adata=data)
    own = Gated(name, None)
    for version in ("1", "2"):
        found = gated(own, version, NOT_WORSE, COUNTED)
        assert found.verdict.outcome == "pass", found.verdict.results
    assert own.aliases() == {"champion": "2"}
    own.client.delete_registered_model(name)


@pytest.mark.slow
def test_the_exit_code_of_a_sweep_is_that_of_its_worst_job(model, capsys):
    quick = ["permutation.n_permutations=19", "permutation.n_bootstrap=50", "ablation.modes=[keep_one]"]
    quick += ["ablation.baselines=false", "compare.n_flips=49", "compare.n_bootstrap=50", "report.figures=false"]
    quick += [f"data.uri={model.data}", "gate.rules.some_signal=null", "gate.rules.explains_something=null"]
    gated(model, 1)
    sweep = ["gate", "-m", *quick, "gate.rules.not_worse.margin=1", "gate.rules.near={kind: stability, at_least: 0.9}"]
    uri = f"models:/{model.name}/"
    assert call(*sweep, f"model_uri={uri}2", "compare.cells=all,auto") == 4
    assert call(*sweep, f"model_uri={uri}3,{uri}2") == 3
    assert call(*sweep, f"model_uri={uri}9,{uri}3") == 2
    assert call(*sweep, f"model_uri={uri}2", "report.n_top_genes=5,6") == 0
    capsys.readouterr()


def test_a_gate_reads_what_it_wrote(model):
    run = gated(model, 1, COUNTED, reuse=False)
    record = json.loads(mlflow.artifacts.load_text(f"runs:/{run.run_id}/verdict.json"))
    assert (
        record["model"]["evaluation_run_id"]
        == model.client.search_runs(
            [model.client.get_run(run.run_id).info.experiment_id],
            f"tags.`mlflow.parentRunId` = '{run.run_id}'",
        )[0].info.run_id
    )
    assert np.isfinite(record["results"][0]["value"])


def test_an_alias_that_is_misspelt_is_not_made_and_what_is_left_out_is_told(model):
    gated(model, 1)
    with pytest.raises(
        InvalidSpecError, match=r"gate.promote=champoin: gated-\w+ has no such alias, but champion; write"
    ):
        gated(model, 2, promote="champoin")
    found = gated(model, 2, gate=GateSpec(rules=(COUNTED,), left_out=("not_worse",)))
    assert found.verdict.notes[-1] == "the rule not_worse is left out"


def test_a_promotion_takes_the_mark_of_a_rollback_away(model):
    gated(model, 1)
    gated(model, 2)
    rollback(model.name, "champion")
    assert "amici_eval.rolled_back.champion" in model.tags("2")
    assert gated(model, 2).promotion.moved
    assert "amici_eval.rolled_back.champion" not in model.tags("2")
    again = gated(model, 2, COUNTED, newer_only=True)
    assert again.promotion.reason == "champion is version 2 already"


def test_cells_that_the_baseline_was_fitted_on_decide_nothing(model, monkeypatch):
    gated(model, 1)
    compare = comparing.compare
    # the version itself has not seen them
    monkeypatch.setattr(comparing, "compare", lambda *given, **more: replace(compare(*given, **more), in_sample=True))
    found = gated(model, 2)
    assert (found.verdict.outcome, found.verdict.results[-1].rule) == ("undecided", "held_out_cells")


def test_an_alias_that_somebody_moves_on_at_once_is_no_promotion(model, monkeypatch):
    gated(model, 1)
    client = type(model.client)
    real = client.set_registered_model_alias

    def set_and_be_overtaken(self, name, alias, version):
        real(self, name, alias, version)
        real(self, name, alias, "3")

    monkeypatch.setattr(client, "set_registered_model_alias", set_and_be_overtaken)
    found = gated(model, 2)
    assert (found.verdict.outcome, found.promotion.moved, found.outdated) == ("pass", False, True)
    assert "somebody else moves it, too" in found.promotion.reason
    assert model.tags("2")["amici_eval.verdict"] == "undecided"
    assert not [name for name in model.tags("2") if name.startswith("amici_eval.verdict.")]
