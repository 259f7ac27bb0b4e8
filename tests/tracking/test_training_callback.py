"""Head metrics while AMICI trains: what a run gets by step, and that training neither changes nor fails."""

from __future__ import annotations

import logging
import math
import os
import random
import socket
import warnings
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import amici_eval
from amici_eval import HeadEvaluationCallback
from amici_eval.common.errors import DataError, InvalidSpecError, ModelFormatError
from amici_eval.common.text import slugify
from amici_eval.settings.evaluation import (
    AblationSpec,
    DataSpec,
    EvaluationSpec,
    PermutationSpec,
    SubsetSpec,
    TrainedOnSpec,
)
from amici_eval.tracking import training as module
from amici_eval.tracking.runs.delivery import evaluation_metrics
from amici_eval.tracking.training import RunInTraining, cells_to_evaluate
from tests.conftest import small_sizes

N_EPOCHS = 5
NAME = "amici_eval.tracking.training"


@pytest.fixture
def store(tmp_path, monkeypatch, new_store):
    """A SQLite store of the test's own."""
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(new_store(tmp_path / "m.db"))
    mlflow.set_experiment("Default")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    try:
        yield mlflow.MlflowClient()
    finally:
        while mlflow.active_run() is not None:
            mlflow.end_run("FAILED")
        mlflow.set_tracking_uri(before)


def rows_of(adata):
    """Rows that are trained on and those that validate."""
    trained = (adata.obs["region"] == "rest").to_numpy()
    return np.flatnonzero(trained), np.flatnonzero(~trained)


def untrained(adata):
    """Return an AMICI with random weights, always the same."""
    from amici import AMICI

    from amici_eval.model.training import data_loader_restored, give_own_data_splitter

    with data_loader_restored(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        AMICI.setup_anndata(adata, labels_key="cell_type", coord_obsm_key="spatial", n_neighbors=6)
        model = AMICI(adata, **small_sizes(8))
    give_own_data_splitter(model)
    return model


def train(model, *callbacks, n_epochs=N_EPOCHS):
    train_rows, validation = rows_of(model.adata)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # Lightning's on small data and few workers
        warnings.simplefilter("ignore")
        torch.manual_seed(11)
        model.train(
            max_epochs=n_epochs,
            accelerator="cpu",
            external_indexing=[train_rows, validation, np.array([], dtype=int)],
            callbacks=list(callbacks),
            enable_progress_bar=False,
            enable_checkpointing=False,
            log_every_n_steps=1000,
        )


def weights(model):
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def history(client, run_id, name):
    return {metric.step: metric.value for metric in client.get_metric_history(run_id, name)}


class Witness(Callback):
    """Writes down, at the end of each epoch, all that the next callback must leave as it is."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def on_train_epoch_end(self, trainer, pl_module):
        module = self.model.module
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global state is what is looked at
        self.seen.append(
            {
                "generators": (random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()),
                "gradients": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in module.parameters()],
                "flags": [part.training for part in module.modules()],
                "hooks": [(len(part._forward_hooks), len(getattr(part, "fwd_hooks", []))) for part in module.modules()],
                "weights": [(p.data_ptr(), p.device, p.requires_grad) for p in module.parameters()],
                "model": (
                    self.model.is_trained_,
                    self.model.train_indices_,
                    self.model.history_,
                    sorted(vars(self.model)),
                ),
                "autograd": torch.is_grad_enabled(),
                "threads": torch.get_num_threads(),
                "environment": dict(os.environ),
                "adata": (sorted(self.model.adata.obs), sorted(self.model.adata.obsm), sorted(self.model.adata.uns)),
            }
        )


@pytest.fixture(scope="module")
def plain(_tissue):
    """Weights of a training without the callback."""
    model = untrained(_tissue.copy())
    train(model)
    return weights(model)


@pytest.mark.amici
def test_a_run_gets_the_metrics_of_each_evaluated_epoch_and_training_stays_the_same(store, adata, plain, caplog):
    caplog.set_level(logging.INFO, NAME)
    model = untrained(adata)
    before, after = Witness(model), Witness(model)
    callback = HeadEvaluationCallback(model, every_n_epochs=2, n_cells=60, max_share=math.inf)
    with mlflow.start_run() as run:
        train(model, before, callback, after)

    assert same(weights(model), plain)
    assert len(before.seen) == N_EPOCHS
    assert before.seen == after.seen
    assert any(gradient is not None for gradient in before.seen[1]["gradients"]), "there are gradients to disturb"
    assert all(before.seen[1]["flags"]), "the module is in train mode"

    run_id = run.info.run_id
    found = store.get_run(run_id).data
    assert set(history(store, run_id, "train_heads/summary/n_significant")) == {1, 3, 4}
    types = sorted(adata.obs["cell_type"].unique())
    slugs = [slugify(cell_type) for cell_type in types]
    expected = {f"train_heads/ev_full_model/{slug}" for slug in slugs}
    for name in ("ev", "p_adj", "p_adj_spatial"):
        expected |= {f"train_heads/{name}/{slug}/head_{head}" for slug in slugs for head in (0, 1)}
    assert expected <= set(found.metrics)
    assert all(math.isfinite(value) for value in found.metrics.values())
    assert set(history(store, run_id, "train_heads/seconds")) == {1, 3, 4}
    curve = history(store, run_id, f"train_heads/ev_full_model/{slugs[0]}")
    assert len(set(curve.values())) == 3, "another model each time"

    rows = callback._chosen.rows
    validation = rows_of(adata)[1]
    assert len(rows) == 60
    assert set(rows) <= set(validation.tolist())
    assert found.tags["amici_eval.train_heads.cells"] == f"60 of {len(validation)} validation cells"
    spec = EvaluationSpec(
        data=DataSpec(subset=SubsetSpec(indices=rows)),
        ablation=AblationSpec(modes=("keep_one",), baselines=False, without_nearest=False, device="cpu"),
        permutation=PermutationSpec(n_bootstrap=0),
    )
    last = evaluation_metrics(amici_eval.evaluate(model, spec=spec))
    for name in sorted(expected):
        own = last[name.removeprefix("train_heads/")]
        assert history(store, run_id, name)[4] == pytest.approx(own, abs=1e-12)
    times = [record for record in caplog.records if "heads evaluated in" in record.getMessage()]
    assert [record.args[0] for record in times] == [1, 3, 4]


@pytest.mark.amici
def test_an_evaluation_that_draws_random_numbers_changes_no_weight(store, adata, plain, monkeypatch):
    drawn = []

    def draws(*_, **__):
        drawn.append((random.random(), np.random.rand(), torch.rand(3)))  # noqa: NPY002 - as other libraries do
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        msg = "after the draw"
        raise ArithmeticError(msg)

    monkeypatch.setattr(module, "evaluate", draws)
    model = untrained(adata)
    with mlflow.start_run():
        train(model, HeadEvaluationCallback(model, every_n_epochs=1, max_share=math.inf))
    assert len(drawn) == 3
    assert same(weights(model), plain)


@pytest.mark.amici
def test_without_an_active_run_nothing_is_done_and_it_is_said_once(store, adata, plain, caplog, monkeypatch):
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: pytest.fail("evaluated"))
    model = untrained(adata)
    train(model, HeadEvaluationCallback(model, every_n_epochs=1))
    said = [record.getMessage() for record in caplog.records if record.name == NAME]
    assert said == ["no MLflow run is active: heads are not evaluated while the model trains"]
    assert same(weights(model), plain)


@pytest.mark.amici
def test_in_another_tissue_cells_of_the_split_are_told_by_name_place_and_expression(store, adata):
    order = np.random.default_rng(2).permutation(adata.n_obs)
    renamed, taken = adata[order].copy(), adata[order].copy()
    renamed.obs_names = [f"other {name}" for name in renamed.obs_names]
    # the names of other cells
    taken.obs_names = adata.obs_names
    for other in (adata[order].copy(), renamed):
        model = untrained(adata)
        callback = HeadEvaluationCallback(model, adata=other, every_n_epochs=1, n_cells=10_000, max_share=math.inf)
        with mlflow.start_run():
            train(model, callback, n_epochs=1)
        assert set(order[list(callback._chosen.rows)]) == set(rows_of(adata)[1])
    adata.obs["mine"] = "yes"
    spec = EvaluationSpec(data=DataSpec(trained_on=TrainedOnSpec(key="mine", value="yes")))
    for other, options in ((taken, {}), (adata.copy(), {"spec": spec})):
        model = untrained(adata)
        callback = HeadEvaluationCallback(
            model, adata=other, every_n_epochs=1, n_cells=10_000, max_share=math.inf, **options
        )
        with mlflow.start_run():
            train(model, callback, n_epochs=1)
        rows = np.array(callback._chosen.rows)
        assert set(order[rows] if other is taken else rows) == set(rows_of(adata)[1])


@pytest.mark.amici
def test_another_model_than_the_trained_one_is_not_evaluated(store, adata, caplog):
    model, other = untrained(adata), untrained(adata.copy())
    with mlflow.start_run() as run:
        train(model, HeadEvaluationCallback(other, every_n_epochs=1), n_epochs=1)
    assert model.is_trained_
    assert "given another model than the one that is trained" in caplog.text
    assert store.get_run(run.info.run_id).data.metrics == {}


# a trainer and a model by hand: what follows is about the callback alone


class FakeModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_layer = torch.nn.Linear(2, 2)


@pytest.fixture
def model(adata):
    registry = {"setup_args": {"labels_key": "cell_type"}}
    return SimpleNamespace(module=FakeModule(), adata=adata, registry_=registry, n_neighbors=6)


@pytest.fixture
def evaluations(monkeypatch):
    """Calls of ``evaluate``, whose results are the metrics of the list."""
    calls = []

    def fake(model, adata, spec):
        calls.append(SimpleNamespace(model=model, adata=adata, spec=spec))
        return {"ev/Tumor/head_0": float(len(calls)), "summary/n_cells": 3.0}

    monkeypatch.setattr(module, "evaluate", fake)
    monkeypatch.setattr(module, "evaluation_metrics", dict)
    return calls


def fake_trainer(adata):
    train_rows, validation = rows_of(adata)
    split = SimpleNamespace(train_idx=train_rows, val_idx=validation)
    return SimpleNamespace(current_epoch=0, is_global_zero=True, datamodule=split)


def fit(callback, model, n_epochs, *, trainer=None, each=lambda _: None):
    trainer = trainer or fake_trainer(model.adata)
    callback.on_train_start(trainer, model.module)
    for epoch in range(n_epochs):
        trainer.current_epoch = epoch
        each(epoch)
        callback.on_train_epoch_end(trainer, model.module)
    callback.on_train_end(trainer, model.module)


def test_only_named_metrics_are_logged_to_a_run_of_choice(store, model, evaluations):
    run = store.create_run("0")
    fit(HeadEvaluationCallback(model, every_n_epochs=3, run_id=run.info.run_id, max_share=math.inf), model, 6)
    assert history(store, run.info.run_id, "train_heads/ev/Tumor/head_0") == {2: 1.0, 5: 2.0}
    names = set(store.get_run(run.info.run_id).data.metrics)
    assert names == {"train_heads/ev/Tumor/head_0", "train_heads/seconds"}


def test_more_metrics_than_a_batch_holds_all_arrive(store, model, monkeypatch):
    monkeypatch.setattr(module, "evaluate", lambda *_: None)
    many = {f"ev/Tumor/head_{head}": float(head) for head in range(1500)}
    monkeypatch.setattr(module, "evaluation_metrics", lambda _: dict(many))
    with mlflow.start_run() as run:
        fit(HeadEvaluationCallback(model, every_n_epochs=1), model, 1)
    assert len(store.get_run(run.info.run_id).data.metrics) == 1501


def test_the_split_of_this_training_is_told_and_the_model_is_evaluated_where_it_is(store, model, evaluations, adata):
    spec = EvaluationSpec(ablation=AblationSpec(device="auto"), permutation=PermutationSpec(seed=5))
    model.train_indices_ = np.arange(3)
    with mlflow.start_run():
        fit(HeadEvaluationCallback(model, every_n_epochs=1, cells="train", n_cells=40, spec=spec), model, 1)
    (call,) = evaluations
    train_rows = rows_of(adata)[0]
    np.testing.assert_array_equal(call.model.train_indices_, train_rows)
    assert call.adata is adata
    assert call.spec.ablation.device == "cpu"
    assert call.spec.permutation == spec.permutation
    assert len(call.spec.data.subset.indices) == 40
    assert set(call.spec.data.subset.indices) <= set(train_rows.tolist())
    np.testing.assert_array_equal(model.train_indices_, np.arange(3))


def test_after_three_failures_in_a_row_no_more_is_tried_and_each_kind_is_told_once(store, model, monkeypatch, caplog):
    errors = [ValueError("first"), None, ValueError("second"), KeyError("third"), ValueError("fourth")]
    tried = []

    def fails(*_):
        tried.append(len(tried))
        if errors[tried[-1]] is not None:
            raise errors[tried[-1]]

    monkeypatch.setattr(module, "evaluate", fails)
    monkeypatch.setattr(module, "evaluation_metrics", lambda _: {})
    with mlflow.start_run() as run:
        fit(HeadEvaluationCallback(model, every_n_epochs=1, max_share=math.inf), model, 9)
    assert len(tried) == 5
    assert set(history(store, run.info.run_id, "train_heads/seconds")) == {1}
    told = [record for record in caplog.records if record.name == NAME and record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in told] == [
        "epoch 0: no metrics of heads: ValueError: first",
        "epoch 3: no metrics of heads: KeyError: 'third'",
        "that failed 3 times in a row: heads are evaluated no more in this training",
    ]


def test_an_interrupt_is_passed_on(store, model, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "evaluate", interrupted)
    state = torch.get_rng_state()
    with mlflow.start_run(), pytest.raises(KeyboardInterrupt):
        fit(HeadEvaluationCallback(model, every_n_epochs=1), model, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_could_not_be_sent_goes_along_with_the_next(store, model, evaluations, monkeypatch):
    send, tried = RunInTraining.send, []

    def flaky(self, metrics, tags):
        tried.append(len(metrics))
        if len(tried) == 1:
            msg = "gone for a moment"
            raise ConnectionError(msg)
        send(self, metrics, tags)

    monkeypatch.setattr(RunInTraining, "send", flaky)
    with mlflow.start_run() as run:
        fit(HeadEvaluationCallback(model, every_n_epochs=1, max_share=math.inf), model, 3)
    assert tried == [2, 4, 2]
    assert history(store, run.info.run_id, "train_heads/ev/Tumor/head_0") == {0: 1.0, 1: 2.0, 2: 3.0}
    assert "amici_eval.train_heads.cells" in store.get_run(run.info.run_id).data.tags


def test_a_server_that_is_gone_is_not_waited_for_long(store, model, evaluations, monkeypatch, caplog):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asked = []

    def request(*arguments, **options):
        asked.append((os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"], os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]))
        return real(*arguments, **options)

    from mlflow.utils import rest_utils

    real = rest_utils._get_http_response_with_retries
    monkeypatch.setattr(rest_utils, "_get_http_response_with_retries", request)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "40")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    mlflow.set_tracking_uri(f"http://user:secret@127.0.0.1:{port}")
    fit(HeadEvaluationCallback(model, every_n_epochs=1, run_id="1" * 32, max_share=math.inf), model, 5)
    assert set(asked) == {("1", "40")}
    assert len(evaluations) == 3
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "40"
    assert "no metrics of heads" in caplog.text
    assert "secret" not in caplog.text


def test_evaluations_that_take_too_large_a_share_are_skipped_until_they_do_not(
    store, model, evaluations, monkeypatch, caplog
):
    now = [0.0]
    monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    monkeypatch.setattr(RunInTraining, "send", lambda *_: now.__setitem__(0, now[0] + 30.0))

    def epoch_of_ten_seconds(_):
        now[0] += 10.0

    with mlflow.start_run():
        callback = HeadEvaluationCallback(model, every_n_epochs=1, max_share=0.5)
        done = []

        def each(epoch):
            done.append(len(evaluations))
            epoch_of_ten_seconds(epoch)

        fit(callback, model, 8, each=each)
    # 30 s are half of 60 s: the first and the sixth; the last one always
    assert done == [0, 1, 1, 1, 1, 1, 2, 2]
    assert len(evaluations) == 3
    skipped = [record.getMessage() for record in caplog.records if "max_share" in record.getMessage()]
    assert len(skipped) == 1
    assert skipped[0].startswith("epoch 1: heads are not evaluated, for that took 30 s of 20 s of training")


def test_other_processes_of_one_training_evaluate_nothing(store, model, evaluations, adata, caplog):
    trainer = fake_trainer(adata)
    trainer.is_global_zero = False
    with mlflow.start_run():
        fit(HeadEvaluationCallback(model, every_n_epochs=1), model, 2, trainer=trainer)
    assert evaluations == []
    assert caplog.text == ""


def test_a_trainer_that_tells_no_split_has_all_cells_evaluated_with_a_warning(store, model, evaluations, adata, caplog):
    trainer = SimpleNamespace(current_epoch=0, is_global_zero=True, datamodule=None)
    with mlflow.start_run() as run:
        fit(HeadEvaluationCallback(model, every_n_epochs=1), model, 1, trainer=trainer)
    assert evaluations[0].spec.data.subset.indices == tuple(range(adata.n_obs))
    assert evaluations[0].model.train_indices_ is None
    described = store.get_run(run.info.run_id).data.tags["amici_eval.train_heads.cells"]
    assert described == ("500 of 500 cells of both training and validation, for no validation cell is known or there")
    assert f"heads are evaluated on {described}" in caplog.text


def test_what_is_said_at_each_evaluation_is_heard_once(store, model, monkeypatch, caplog):
    inner = logging.getLogger("amici_eval.evaluation.pipeline")

    def talks(*_):
        inner.warning("undefined for %s", "B")

    monkeypatch.setattr(module, "evaluate", talks)
    monkeypatch.setattr(module, "evaluation_metrics", lambda _: {})
    with mlflow.start_run():
        fit(HeadEvaluationCallback(model, every_n_epochs=1, max_share=math.inf), model, 4)
    assert caplog.text.count("undefined for B") == 1
    assert inner.filters == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_n_epochs": 0}, InvalidSpecError, "every_n_epochs=0: it must be a whole number of at least 1"),
        ({"every_n_epochs": 2.0}, InvalidSpecError, "every_n_epochs=2.0: it must be a whole number"),
        ({"n_cells": 1}, InvalidSpecError, "n_cells=1: it must be a whole number of at least 2; set n_cells=2"),
        (
            {"cells": "valid"},
            InvalidSpecError,
            "cells='valid': it must be one of validation, train, all; set cells=val",
        ),
        ({"max_share": 0}, InvalidSpecError, "max_share=0: it must be a number above 0"),
        ({"max_share": math.nan}, InvalidSpecError, "max_share=nan: it must be a number above 0"),
        ({"max_share": "0.2"}, InvalidSpecError, "max_share='0.2': it must be a number above 0"),
        ({"spec": {"data": {}}}, InvalidSpecError, "spec is a dict: it must be an EvaluationSpec; build one with"),
        ({"run_id": ""}, InvalidSpecError, "run_id='': it must be the id of an MLflow run; give run.info.run_id"),
        ({"adata": "tissue.h5ad"}, DataError, "data is a str: data must be an AnnData"),
    ],
)
def test_options_that_cannot_work_are_refused(model, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        HeadEvaluationCallback(model, **options)


def test_what_is_no_live_amici_is_refused():
    with pytest.raises(
        ModelFormatError, match=r"the model is a torch\.nn\.modules\.linear\.Linear: it must be the live"
    ):
        HeadEvaluationCallback(torch.nn.Linear(1, 1))


# which cells


def choose(adata, **changes):
    settings = {
        "part": (adata.obs["region"] != "rest").to_numpy(),
        "cells": "validation",
        "subset": SubsetSpec(),
        "labels_key": "cell_type",
        "n_cells": 30,
        "seed": 0,
        **changes,
    }
    return cells_to_evaluate(adata, **settings)


def test_types_get_equal_shares_as_far_as_they_have_cells(adata):
    everyone = adata.obs["cell_type"].value_counts()
    rarest = int(everyone.min())
    n_types, n_cells = len(everyone), 3 * (rarest + 10)
    found = choose(adata, cells="all", part=None, n_cells=n_cells)
    kept = adata.obs["cell_type"].iloc[list(found.rows)].value_counts()
    assert n_types >= 3
    assert len(found.rows) == n_cells
    assert kept.max() - kept.min() <= max(1, kept.max() - rarest)
    for name, count in kept.items():
        assert count == everyone[name] or count >= n_cells // n_types


def test_the_same_cells_are_chosen_whatever_the_order_of_rows_and_others_by_another_seed(adata):
    first = set(adata.obs_names[list(choose(adata).rows)])
    order = np.random.default_rng(1).permutation(adata.n_obs)
    shuffled = adata[order].copy()
    assert set(shuffled.obs_names[list(choose(shuffled).rows)]) == first
    assert set(adata.obs_names[list(choose(adata, seed=1).rows)]) != first


def test_without_a_known_part_all_cells_are_evaluated_and_it_is_said(adata):
    for part in (None, np.zeros(adata.n_obs, dtype=bool)):
        found = choose(adata, part=part, n_cells=10_000)
        assert len(found.rows) == adata.n_obs
        assert not found.as_asked


def test_cells_are_drawn_from_the_subset_of_the_settings(adata):
    validation = rows_of(adata)[1]
    allowed = tuple(int(row) for row in validation[:7])
    found = choose(adata, subset=SubsetSpec(indices=allowed), n_cells=100)
    assert found.rows == allowed
    assert found.described == "7 of 7 validation cells"
    with pytest.raises(DataError, match=r"none of \d+ validation cells is among the cells that"):
        choose(adata, subset=SubsetSpec(key="region", value="rest"))


def test_the_package_offers_the_callback():
    assert amici_eval.HeadEvaluationCallback is module.HeadEvaluationCallback
