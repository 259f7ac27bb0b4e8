"""What a CI server is told."""

from __future__ import annotations

import logging

from amici_eval.terminal import append_for_ci


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
