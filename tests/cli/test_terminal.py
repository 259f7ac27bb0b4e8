"""What a terminal, a log and a CI server are told."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import traceback
from contextlib import suppress

import pytest

from amici_eval.cli.terminal import Reporter, append_for_ci, cleaned, guard_logs, guarded_streams

SECRET = "wJalrXUtnFEMIK7MDENG"
SECRET_KEY = f"AWS_SECRET_ACCESS_KEY={SECRET}"


def test_text_is_appended_to_the_file_that_the_variable_names(tmp_path, monkeypatch):
    file = tmp_path / "outputs"
    file.write_text("a=1\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_OUTPUT", str(file))
    append_for_ci("GITHUB_OUTPUT", "type=β\n")
    append_for_ci("GITHUB_OUTPUT", "b=2\n")
    assert file.read_text(encoding="utf-8") == "a=1\ntype=β\nb=2\n"


def test_without_the_variable_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (None, ""):
        monkeypatch.delenv("GITHUB_OUTPUT", raising=False)
        if value is not None:
            monkeypatch.setenv("GITHUB_OUTPUT", value)
        append_for_ci("GITHUB_OUTPUT", "a=1\n")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "none" / "summary.md"))
    with caplog.at_level(logging.WARNING, logger="amici_eval"):
        append_for_ci("GITHUB_STEP_SUMMARY", "text")
    assert "nothing could be appended to the file of GITHUB_STEP_SUMMARY" in caplog.text


@pytest.fixture
def safe_logs():
    factory = logging.getLogRecordFactory()
    guard_logs()
    yield
    logging.setLogRecordFactory(factory)


@pytest.mark.parametrize("name", ["amici_eval.tracking", "mlflow.tracking", "urllib3.connectionpool"])
def test_log_messages_of_all_libraries_are_masked(safe_logs, caplog, name):
    with caplog.at_level(logging.DEBUG, logger=name):
        logging.getLogger(name).warning(
            "no answer from %s: %r", f"postgresql://u:{SECRET}@db/m", ValueError(SECRET_KEY)
        )
        try:
            raise ConnectionError(f"token={SECRET}")
        except ConnectionError:
            logging.getLogger(name).exception("it failed at \x1b[2J\u202e%d", 3)
    assert "no answer from postgresql://***@db/m" in caplog.text
    assert "ConnectionError: token=***" in caplog.text
    assert r"it failed at \x1b[2J\u202e3" in caplog.text
    assert SECRET not in caplog.text


def test_a_name_with_a_line_break_is_no_message_of_its_own(safe_logs, caplog):
    logging.getLogger("amici_eval.x").warning("undefined for %s", "B cell\nERROR amici_eval: all is lost")
    assert caplog.messages == [r"undefined for B cell\x0aERROR amici_eval: all is lost"]


def test_messages_with_a_mapping_are_formatted(safe_logs, caplog):
    logging.getLogger("mlflow").warning("%(a)s and %(b)s", {"a": 1, "b": "x"})
    logging.getLogger("amici_eval").warning("%(a)s and 100 %%", {"a": 1})
    assert caplog.messages == ["1 and x", "1 and 100 %"]


STOPPING = """
import os, signal, sys, time
from amici_eval.cli.terminal import TerminatedError, catch_signals
catch_signals()
{before}
try:
    print("ready", flush=True)
    time.sleep(60)
except TerminatedError:
    {after}
    sys.exit(143)
"""


def stopped(tmp_path, *, before="", after="pass", **streams) -> tuple[int, str]:
    """Return how a process ends that gets a SIGTERM, and what it says to its stream of errors."""
    code = STOPPING.format(before=before, after=after)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, **streams) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=50)
        return code, process.stderr.read() if process.stderr else ""


def test_a_signal_is_answered_at_once(tmp_path):
    assert stopped(tmp_path, stderr=subprocess.PIPE) == (143, "amici-eval: stopping (SIGTERM)\n")


def test_a_signal_does_not_wait_for_somebody_who_reads(tmp_path):
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writes, bytes(2**12))
    os.set_blocking(writes, True)
    assert stopped(tmp_path, stderr=writes)[0] == 143
    os.close(reads)
    os.close(writes)


def test_a_signal_writes_into_no_file_that_has_the_number_of_the_stream(tmp_path):
    before = "file = open('result.json', 'w'); assert file.fileno() == 2; file.write('{}')"
    code, _ = stopped(tmp_path, before=before, after="file.close()", preexec_fn=lambda: os.close(2))
    assert code == 143
    assert (tmp_path / "result.json").read_text() == "{}"


def test_what_is_written_to_the_streams_is_masked(capsys):
    before = sys.stdout, sys.stderr
    with guarded_streams():
        print(f"https://u:{SECRET}@h/x")
        try:
            raise ConnectionError(f"password={SECRET}")
        except ConnectionError:
            traceback.print_exc()
        assert sys.stderr.isatty() is before[1].isatty()
        assert sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before
    told = capsys.readouterr()
    assert told.out == "https://***@h/x\n"
    assert "ConnectionError: password=***" in told.err
    assert SECRET not in told.err


def test_a_runner_of_github_is_given_no_commands(monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert cleaned("::error::x\x07") == r"\x3a:error::x\x07"
    monkeypatch.delenv("GITHUB_ACTIONS")
    assert cleaned("::error::x") == "::error::x"


def test_progress_shows_names_and_obeys_none(capsys, monkeypatch):
    monkeypatch.setattr("amici_eval.cli.terminal._LOG_SECONDS", 0.0)
    with Reporter() as report:
        report(0, 10, "B cell")
        report(5, 10, "\x1b]0;title\x07")
    assert r"\x1b]0;title\x07" in capsys.readouterr().err
