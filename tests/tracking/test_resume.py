"""What an interrupted evaluation finished is kept, and taken up by the same command."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from contextlib import nullcontext
from inspect import signature
from pathlib import Path

import mlflow
import pytest

from amici_eval.common.errors import OutputError, TrackingError
from amici_eval.evaluation.all_types import FinishedParts
from amici_eval.evaluation.one_type import evaluate_task
from amici_eval.settings.evaluation import (
    AblationSpec,
    EvaluationSpec,
    LaunchSpec,
    PermutationSpec,
    ReportSpec,
    TrackingSpec,
)
from amici_eval.tracking.jobs.evaluating import evaluate_job, upload
from amici_eval.tracking.runs import delivery
from amici_eval.tracking.runs.local_results import ARTIFACTS, RECORD_FILE
from amici_eval.tracking.runs.tracked import HEARTBEAT_TAG, PARENT_RUN_VARIABLE, PARTIAL_TAG, tracked_run
from amici_eval.tracking.runs.unfinished import PARTS_FOLDER, RESUME_FILE, UnfinishedWork
from tests.builders import job_options

pytestmark = pytest.mark.amici

SENDERS = EvaluationSpec(ablation=AblationSpec(senders=True), permutation=PermutationSpec(n_permutations=19))
HOOKED = EvaluationSpec(ablation=AblationSpec(engine="hooked"), permutation=PermutationSpec(n_permutations=19))
QUICK = EvaluationSpec(permutation=PermutationSpec(n_permutations=19))


def run(*, spec=QUICK, experiment="resume", data_uri=None, figures=False, launch=None, **tracking):
    report = ReportSpec(figures=figures, formats=("svg",))
    tracking = {"experiment": experiment, "output_dir": "out", "retry_s": 0.0, **tracking}
    options = job_options(spec, report=report, launch=launch, **tracking)
    return evaluate_job("models:/tiny/1", data_uri=data_uri, options=options)


class OneByOne:
    """Stands in for worker processes, of one thread each."""

    def prepare(self, n_tasks):
        pass

    def run(self, access, tasks, settings, *, heartbeat):
        for task in tasks:
            heartbeat()
            quiet = {"on_cells": lambda n: None, "on_permutations": lambda n: None}
            yield task.cell_type, evaluate_task(access, task, settings, n_threads=1, **quiet)


def gone(folder, record):
    """Stand in for the sending of results to a store that is away."""
    raise ConnectionError("gone")


def digests(run_id: str, folder: Path) -> dict[str, str]:
    got = Path(mlflow.artifacts.download_artifacts(run_id=run_id, dst_path=str(folder / run_id)))
    return {
        path.relative_to(got).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in got.rglob("*")
        if path.suffix in (".csv", ".parquet", ".json", ".npz")
    }


def runs_of(experiment: str) -> list:
    client = mlflow.MlflowClient()
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


@pytest.fixture
def stop(monkeypatch):
    """Interrupt the next evaluation once it has kept so many parts; later ones are left alone, and watched."""
    seen = {"taken": [], "kept": []}
    put, get = FinishedParts.put, FinishedParts.get

    def after(n_parts: int, error: BaseException | None = None) -> dict[str, list[str]]:
        left = [n_parts]

        def counted(self, name, value):
            put(self, name, value)
            seen["kept"].append(name)
            left[0] -= 1
            if left[0] == 0:
                raise error or KeyboardInterrupt

        def noted(self, name):
            found = get(self, name)
            if found is not None:
                seen["taken"].append(name)
            return found

        monkeypatch.setattr(FinishedParts, "put", counted)
        monkeypatch.setattr(FinishedParts, "get", noted)
        return seen

    return after


def interrupted(stop, n_parts: int, **options) -> dict[str, list[str]]:
    """Run a command that is interrupted once it has kept so many parts, and return what it and later ones keep."""
    seen = stop(n_parts)
    with pytest.raises(KeyboardInterrupt):
        run(**options)
    return seen


def unsent(tmp_path: Path, monkeypatch, **options) -> Path:
    """Return the folder of an evaluation whose results the store did not take."""
    with monkeypatch.context() as patch:
        patch.setattr(delivery, "_send", gone)
        with pytest.raises(TrackingError):
            run(**options)
    (folder,) = (tmp_path / "out").iterdir()
    return folder


@pytest.mark.parametrize(("spec", "n_parts"), [(QUICK, 1), (QUICK, 3), (SENDERS, 4), (HOOKED, 2)])
def test_the_same_command_goes_on_in_the_same_run(registry, tmp_path, stop, spec, n_parts):
    experiment = f"goes on {n_parts} {spec.ablation.engine}"
    whole = run(spec=spec, experiment=f"whole {experiment}")
    seen = interrupted(stop, n_parts, spec=spec, experiment=experiment)
    (killed,) = runs_of(experiment)
    assert killed.info.status == "KILLED"
    assert "cell types are finished" in killed.data.tags[PARTIAL_TAG]
    assert "Partial" in killed.data.tags["mlflow.note.content"]
    assert not killed.data.metrics
    kept = list(seen["kept"])
    assert len(kept) == n_parts
    seen["kept"].clear()
    result = run(spec=spec, experiment=experiment)
    assert sorted(seen["taken"]) == sorted(kept)
    assert not set(seen["kept"]) & set(kept)
    (finished,) = runs_of(experiment)
    assert finished.info.run_id == killed.info.run_id == result.run_id
    assert finished.info.status == "FINISHED"
    assert PARTIAL_TAG not in finished.data.tags
    assert HEARTBEAT_TAG in finished.data.tags
    assert "Partial" not in finished.data.tags["mlflow.note.content"]
    assert digests(result.run_id, tmp_path) == digests(whole.run_id, tmp_path)
    assert finished.data.metrics == mlflow.get_run(whole.run_id).data.metrics
    client = mlflow.MlflowClient()
    assert all(len(client.get_metric_history(result.run_id, name)) == 1 for name in finished.data.metrics)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"spec": EvaluationSpec(permutation=PermutationSpec(n_permutations=29))},
        {"resume": "never"},
        {"data_uri": "other"},
        {"launch": LaunchSpec(kind="ray")},
    ],
    ids=["settings", "never", "data", "launch"],
)
def test_what_is_not_the_same_is_computed_anew(registry, adata, tmp_path, stop, changed, monkeypatch):
    seen = interrupted(stop, 3, experiment="anew")
    kept = list(seen["kept"])
    seen["kept"].clear()
    if "data_uri" in changed:
        adata.X[0, 0] += 1
        adata.write_h5ad(tmp_path / "other.h5ad")
        changed = {"data_uri": str(tmp_path / "other.h5ad")}
    if "launch" in changed:
        monkeypatch.setattr("amici_eval.evaluation.launching.open_launcher", lambda spec: nullcontext(OneByOne()))
    run(experiment="anew", **changed)
    assert seen["taken"] == []
    assert set(kept) < set(seen["kept"])
    # and what is not taken up stays where it is
    assert len(list((tmp_path / "out").glob(f"*/{RESUME_FILE}"))) == 1


def test_another_experiment_takes_the_parts_into_a_run_of_its_own(registry, tmp_path, stop):
    seen = interrupted(stop, 3, experiment="first home")
    result = run(experiment="second home")
    assert len(seen["taken"]) == 3
    (old,) = runs_of("first home")
    assert old.data.tags["amici_eval.continued_by"] == result.run_id
    assert [one.info.run_id for one in runs_of("second home")] == [result.run_id]
    assert [one.info.status for one in runs_of("first home")] == ["KILLED"]
    assert not (tmp_path / "out").exists()


def test_damaged_parts_are_computed_again(registry, tmp_path, stop, caplog):
    whole = run(experiment="undamaged")
    seen = interrupted(stop, 4, experiment="damaged")
    parts = sorted((tmp_path / "out").glob(f"*/{PARTS_FOLDER}/*"))
    parts[0].write_bytes(parts[0].read_bytes()[:-7])
    parts[1].write_bytes(b"")
    (parts[2].parent / "left.partial").write_bytes(b"half")
    parts[2].replace(parts[3])
    result = run(experiment="damaged")
    assert seen["taken"] == []
    assert sum("is damaged and is computed again" in one.message for one in caplog.records) == 3
    assert digests(result.run_id, tmp_path) == digests(whole.run_id, tmp_path)


def test_a_damaged_state_is_no_obstacle(registry, tmp_path, stop, caplog):
    interrupted(stop, 3, experiment="state")
    (state,) = (tmp_path / "out").glob(f"*/{RESUME_FILE}")
    for text in ("", "[]", '{"schema_version": 1}', "[" * 100_000, '{"schema_version": 9, "key": 1}'):
        state.write_text(text)
        caplog.clear()
        assert mlflow.get_run(run(experiment="state").run_id).info.status == "FINISHED"
        # of another version it may be whole
        assert (f"{state} is damaged" in caplog.text) == ('"key"' not in text)


def test_a_run_in_which_nothing_was_finished_goes_on_too(registry, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("amici_eval.evaluation.pipeline.evaluate_access", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(experiment="nothing")
    (killed,) = runs_of("nothing")
    assert "0 of 5 cell types are finished" in killed.data.tags[PARTIAL_TAG]
    assert run(experiment="nothing").run_id == killed.info.run_id
    assert [one.info.status for one in runs_of("nothing")] == ["FINISHED"]
    assert not (tmp_path / "out").exists()


def test_a_folder_whose_removal_was_cut_short_is_removed_by_the_next(registry, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        # as if killed once the folder was to go
        patch.setattr("amici_eval.tracking.runs.unfinished.shutil.rmtree", lambda *_, **__: None)
        first = run(experiment="cut short")
    assert mlflow.get_run(first.run_id).info.status == "FINISHED"
    (left,) = (tmp_path / "out").iterdir()
    assert left.name == f"{first.run_id}.done"
    second = run(experiment="cut short")
    # what was whole is not taken up, and nothing of it stays
    assert second.run_id != first.run_id
    assert not left.exists()
    assert [one.info.status for one in runs_of("cut short")] == ["FINISHED"] * 2


def test_nobody_takes_up_what_is_just_being_completed(registry, tmp_path, monkeypatch):
    done, there = UnfinishedWork.done, []

    def watched(self):
        (folder,) = (tmp_path / "out").iterdir()
        assert mlflow.get_run(folder.name).info.status == "FINISHED"
        tracking = TrackingSpec(experiment="completed", output_dir="out")
        with UnfinishedWork(tracking, key=self._key, tracking_uri=registry.uri, n_types=5) as other:
            there.append((folder.name, other.run_id))
        return done(self)

    monkeypatch.setattr(UnfinishedWork, "done", watched)
    result = run(experiment="completed")
    assert there == [(result.run_id, None)]
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_deleted_meanwhile_is_not_taken_up(registry, stop):
    seen = interrupted(stop, 3, experiment="deleted")
    (gone,) = runs_of("deleted")
    mlflow.MlflowClient().delete_run(gone.info.run_id)
    assert run(experiment="deleted").run_id != gone.info.run_id
    assert len(seen["taken"]) == 3


def test_an_error_keeps_what_is_finished(registry, tmp_path, stop, caplog):
    stop(2, RuntimeError("boom"))
    with pytest.raises(RuntimeError, match="boom"):
        run(experiment="error")
    (failed,) = runs_of("error")
    assert failed.info.status == "FAILED"
    assert failed.data.tags[PARTIAL_TAG].startswith("FAILED (RuntimeError), 1 of ")
    assert any("the same command again goes on from there" in one.message for one in caplog.records)
    assert len(list((tmp_path / "out").glob(f"*/{PARTS_FOLDER}/*"))) == 2


def test_partial_results_are_not_sent_as_whole_ones(registry, tmp_path, stop):
    interrupted(stop, 2, experiment="partial upload")
    (folder,) = (tmp_path / "out").iterdir()
    with pytest.raises(OutputError, match="holds partial results"):
        upload(folder)


def test_what_could_not_be_sent_is_sent_by_the_same_command_too(registry, tmp_path, stop, monkeypatch):
    seen = stop(99)
    send = delivery._send

    monkeypatch.setattr(delivery, "_send", gone)
    with pytest.raises(TrackingError, match="amici-eval upload"):
        run(experiment="unsent")
    kept = list(seen["kept"])
    monkeypatch.setattr(delivery, "_send", send)
    result = run(experiment="unsent")
    assert sorted(seen["taken"]) == sorted(kept)
    assert [(one.info.run_id, one.info.status) for one in runs_of("unsent")] == [(result.run_id, "FINISHED")]
    assert not (tmp_path / "out").exists()


def test_artifacts_that_were_being_written_are_not_sent(registry, tmp_path, monkeypatch):
    def killed(*_: object, **__: object):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(delivery, "write_artifacts", killed)
        with pytest.raises(KeyboardInterrupt):
            run(experiment="half written")
    (folder,) = (tmp_path / "out").iterdir()
    assert (folder / RECORD_FILE).exists()
    with pytest.raises(OutputError, match="holds partial results: they were being written"):
        upload(folder)
    (killed_run,) = runs_of("half written")
    assert killed_run.info.status == "KILLED"
    assert not killed_run.data.metrics
    assert run(experiment="half written").run_id == killed_run.info.run_id


def test_two_that_make_the_same_data_set_known_at_once_both_get_through(registry, monkeypatch, caplog):
    from mlflow.store.tracking.dbmodels.models import SqlDataset

    log_inputs, collided = mlflow.MlflowClient.log_inputs, []

    def at_once(self, run_id, models=None, datasets=None):
        if not collided:
            collided.append(run_id)
            experiment = int(self.get_run(run_id).info.experiment_id)
            row = {"experiment_id": experiment, "name": "same", "digest": "1", "dataset_source_type": "a"}
            # as the store meets a row that another process has just made
            # old versions of MLflow have no sessions that only read
            opened = self._tracking_client.store.ManagedSessionMaker
            told = {"read_only": False} if "read_only" in signature(opened).parameters else {}
            with opened(**told) as session:
                for number in "12":
                    session.add(SqlDataset(dataset_uuid=number, dataset_source="b", **row))
        return log_inputs(self, run_id, models=models, datasets=datasets)

    monkeypatch.setattr(mlflow.MlflowClient, "log_inputs", at_once)
    result = run(experiment="at once", retry_s=5.0)
    assert collided == [result.run_id]
    assert "UNIQUE constraint failed" in caplog.text
    (whole,) = runs_of("at once")
    assert whole.info.status == "FINISHED"
    assert len(whole.inputs.dataset_inputs) == 1


def test_what_could_be_written_is_sent_and_said_to_be_partial(registry, tmp_path, monkeypatch, caplog):
    write = delivery.write_artifacts

    def half(evaluation, folder, **options):
        write(evaluation, folder, **options)
        raise RuntimeError("a figure could not be drawn")

    with monkeypatch.context() as patch:
        patch.setattr(delivery, "write_artifacts", half)
        with pytest.raises(RuntimeError, match="could not be drawn"):
            run(experiment="partly")
    (folder,) = (tmp_path / "out").iterdir()
    run_id = upload(folder)
    assert run_id == folder.name
    assert f"run {run_id} is FAILED and marked as partial" in caplog.text
    sent = mlflow.get_run(run_id)
    assert sent.info.status == "FAILED"
    assert sent.data.tags[PARTIAL_TAG] == "not all artifacts could be written"
    assert "summary/n_significant" in sent.data.metrics
    # the same command draws the rest
    assert run(experiment="partly").run_id == run_id
    assert mlflow.get_run(run_id).info.status == "FINISHED"
    assert PARTIAL_TAG not in mlflow.get_run(run_id).data.tags


def test_a_run_whose_last_answer_was_lost_is_the_one_that_is_completed(registry, tmp_path, monkeypatch):
    send = delivery._send

    def lost(folder, record):
        send(folder, record)
        raise ConnectionError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(delivery, "_send", lost)
        with pytest.raises(TrackingError):
            run(experiment="lost answer")
    (sent,) = runs_of("lost answer")
    assert PARTIAL_TAG not in sent.data.tags
    # as the next command closes it
    mlflow.MlflowClient().set_terminated(sent.info.run_id, "FINISHED")
    assert run(experiment="lost answer").run_id == sent.info.run_id
    assert [one.info.status for one in runs_of("lost answer")] == ["FINISHED"]
    assert not (tmp_path / "out").exists()
    client = mlflow.MlflowClient()
    assert all(len(client.get_metric_history(sent.info.run_id, name)) == 1 for name in sent.data.metrics)


def test_damaged_results_are_not_sent(registry, tmp_path, monkeypatch):
    folder = unsent(tmp_path, monkeypatch, experiment="altered")
    table = folder / ARTIFACTS / "tables" / "heads.csv"
    text = table.read_text()
    table.write_text(text.replace("0", "1", 1))
    with pytest.raises(OutputError, match=r"heads\.csv is not as it was written"):
        upload(folder)
    table.unlink()
    with pytest.raises(OutputError, match=r"heads\.csv is missing"):
        upload(folder)
    table.write_text(text)
    run_id = upload(folder)
    assert mlflow.get_run(run_id).info.status == "FINISHED"
    assert PARTIAL_TAG not in mlflow.get_run(run_id).data.tags
    # what was sent is not taken up again, and stays
    assert not (folder / RESUME_FILE).exists()
    assert (folder / RECORD_FILE).exists()
    assert upload(folder) == run_id


def test_a_folder_that_takes_no_more_costs_no_result(registry, tmp_path, monkeypatch, caplog):
    import errno

    whole = run(experiment="room")

    write_bytes = Path.write_bytes

    def full(path, content):
        if path.is_relative_to(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    save = delivery.RunRecord.save

    def only_elsewhere(self, folder):
        if folder.is_relative_to(tmp_path / "out"):
            full(folder, None)
        save(self, folder)

    monkeypatch.setattr(delivery.RunRecord, "save", only_elsewhere)
    result = run(experiment="no room")
    assert mlflow.get_run(result.run_id).info.status == "FINISHED"
    assert digests(result.run_id, tmp_path) == digests(whole.run_id, tmp_path)
    said = [one.message for one in caplog.records]
    assert sum("results cannot be kept in" in one and "No space left" in one for one in said) == 1
    assert any("takes no more" in one for one in said)


def test_no_room_anywhere_says_so(registry, tmp_path, monkeypatch):
    import errno

    def full(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(delivery.RunRecord, "save", full)
        with pytest.raises(OutputError, match="make room and run the same command again"):
            run(experiment="nowhere")
    # the finished types could be kept
    assert list((tmp_path / "out").glob(f"*/{PARTS_FOLDER}/*"))
    assert mlflow.get_run(run(experiment="nowhere").run_id).info.status == "FINISHED"
    assert [one.info.status for one in runs_of("nowhere")] == ["FINISHED"]


def test_refused_input_leaves_no_folder(registry, tmp_path):
    with pytest.raises(Exception, match="no version"):
        evaluate_job("models:/tiny/99", data_uri=None, options=job_options(QUICK, output_dir="out"))
    assert not (tmp_path / "out").exists()


def test_the_local_copy_is_without_parts(registry, tmp_path):
    result = run(experiment="kept", keep_local=True)
    assert sorted(path.name for path in result.folder.iterdir()) == [ARTIFACTS, RECORD_FILE]
    assert set(json.loads((result.folder / RECORD_FILE).read_text())["files"]) >= {"evaluation.json", "report.html"}


LOCKER = """
import sys, time
from pathlib import Path
from amici_eval.common.files import FolderLock
lock = FolderLock.take(Path(sys.argv[1]))
print("locked" if lock else "not locked", flush=True)
time.sleep(120)
"""


def test_what_another_process_works_at_is_read_and_left_alone(registry, tmp_path, stop):
    seen = interrupted(stop, 3, experiment="alive")
    (folder,) = (tmp_path / "out").iterdir()
    other = subprocess.Popen([sys.executable, "-c", LOCKER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline().strip() == "locked"
        before = sorted(path.name for path in folder.rglob("*"))
        result = run(experiment="alive")
        # its parts are taken, its run and its folder are its own
        assert len(seen["taken"]) == 3
        assert result.run_id != folder.name
        assert sorted(path.name for path in folder.rglob("*")) == before
        assert mlflow.get_run(folder.name).info.status == "KILLED"
        assert "amici_eval.continued_by" not in mlflow.get_run(folder.name).data.tags
        (folder / RECORD_FILE).write_text(
            json.dumps({"tracking_uri": registry.uri, "run_id": folder.name, "files": {}})
        )
        with pytest.raises(OutputError, match="an evaluation is at work"):
            upload(folder)
    finally:
        other.kill()
        other.communicate()


def test_results_that_were_not_sent_outlive_the_same_evaluation_elsewhere(registry, tmp_path, monkeypatch):
    folder = unsent(tmp_path, monkeypatch, experiment="unsent here")
    run(experiment="done there")
    assert upload(folder) == folder.name
    assert mlflow.get_run(folder.name).info.status == "FINISHED"


def test_an_upload_that_failed_can_be_tried_again(registry, tmp_path, monkeypatch):
    folder = unsent(tmp_path, monkeypatch, experiment="twice")
    with monkeypatch.context() as patch:
        patch.setattr(delivery, "_send", gone)
        for _ in range(2):
            with pytest.raises(TrackingError, match="could not be completed"):
                upload(folder)
    assert upload(folder) == folder.name


def test_an_interrupted_comparison_takes_up_the_types_of_its_evaluations(registry, tmp_path, stop):
    from amici_eval.settings.comparison import ComparisonSpec
    from amici_eval.tracking.jobs.comparing import compare_job

    def compare():
        return compare_job(
            models=["tiny"],
            versions=["1", "2"],
            data_uri=None,
            comparison=ComparisonSpec(floor=False, n_permutations=19, n_flips=19, n_bootstrap=50),
            options=job_options(QUICK, experiment="compared", output_dir="out", retry_s=0.0, reuse=False),
        )

    seen = stop(3)
    with pytest.raises(KeyboardInterrupt):
        compare()
    kept = list(seen["kept"])
    assert len(list((tmp_path / "out").glob(f"*/{PARTS_FOLDER}/*"))) == len(kept) == 3
    compare()
    assert sorted(seen["taken"]) == sorted(kept)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_close_that_is_asked_again_closes_this_run_and_no_other(registry, monkeypatch):
    client = mlflow.MlflowClient
    real, fail = client.set_terminated, [True]

    def once(self, run_id, status=None, end_time=None):
        if fail and run_id == inner_id[0]:
            fail.clear()
            raise ConnectionError("gone")
        return real(self, run_id, status, end_time)

    inner_id = [""]
    monkeypatch.setattr(client, "set_terminated", once)
    monkeypatch.setattr("amici_eval.tracking.store.time.sleep", lambda seconds: None)
    tracking = TrackingSpec(experiment="nested", retry_s=30.0)
    with tracked_run(tracking, name="outer", tags={}) as outer:
        monkeypatch.setenv(PARENT_RUN_VARIABLE, outer.info.run_id)
        with tracked_run(tracking, name="inner", tags={}) as inner:
            inner_id[0] = inner.info.run_id
        monkeypatch.delenv(PARENT_RUN_VARIABLE)
        assert not fail
        assert mlflow.get_run(inner.info.run_id).info.status == "FINISHED"
        assert mlflow.get_run(outer.info.run_id).info.status == "RUNNING"
    assert mlflow.get_run(outer.info.run_id).info.status == "FINISHED"


def test_a_start_that_is_asked_again_keeps_the_run_of_mlflow_run(registry, monkeypatch):
    opened = mlflow.MlflowClient().create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", opened)
    real, fail = mlflow.start_run, [True]

    def once(**options):
        if fail:
            fail.clear()
            raise ConnectionError("gone")
        return real(**options)

    monkeypatch.setattr(mlflow, "start_run", once)
    monkeypatch.setattr("amici_eval.tracking.store.time.sleep", lambda seconds: None)
    with tracked_run(TrackingSpec(retry_s=30.0), name="x", tags={}) as run:
        assert run.info.run_id == opened


def test_a_series_that_was_sent_in_part_is_completed(registry, tmp_path):
    client = mlflow.MlflowClient()
    run_id = client.create_run("0").info.run_id
    record = delivery.RunRecord(
        tracking_uri=registry.uri, run_id=run_id, series={"a": [(step, 0.5) for step in range(5)]}
    )
    (tmp_path / ARTIFACTS).mkdir()
    for step in (0, 1, 3):
        client.log_metric(run_id, "a", 0.5, step=step)
    delivery.send(tmp_path, record)
    assert sorted(point.step for point in client.get_metric_history(run_id, "a")) == list(range(5))
    client.set_terminated(run_id)
