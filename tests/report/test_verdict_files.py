"""Verdicts as files: JUnit that parses, Markdown that stays one table, and a section that escapes names."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from amici_eval.report.verdict_files import (
    verdict_junit,
    verdict_markdown,
    verdict_section,
    write_verdict,
    write_verdict_page,
)
from amici_eval.results.verdict import RuleResult, Verdict
from tests.report.test_evaluation_page import Page

ODD = "<script>|`x`\x07\n]]>&\ud800\ufffe\U0001f9ec"


def result(rule, outcome, **more):
    values = {
        "kind": "metric",
        "value": 0.25,
        "low": 0.1,
        "high": 0.4,
        "threshold": "at least 0.2",
        "reason": f"{ODD} why",
    }
    return RuleResult(rule=rule, outcome=outcome, **{**values, **more})


@pytest.fixture
def verdict():
    parts = ((ODD, 0.25, 0.1, 0.4, "pass"), ("b", None, None, None, "undecided"))
    return Verdict(
        outcome="fail",
        results=(
            result("signal", "pass"),
            result(ODD, "fail", value=None, low=None, high=None),
            result("open", "undecided", details=parts),
        ),
        model={"name": f"m{ODD}", "version": "3", "evaluation_run_id": "r1"},
        baseline={"name": "m", "version": "2"},
        cells="429 cells that no compared version was fitted on",
        notes=(f"note {ODD}",),
    )


def test_junit_has_a_case_for_each_rule(verdict):
    root = ElementTree.fromstring(verdict_junit(verdict))
    suite = root.find("testsuite")
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["3", "1", "1", "0"]
    cases = suite.findall("testcase")
    assert [[child.tag for child in case] for case in cases] == [["system-out"], ["failure"], ["error"]]
    assert "asked: at least 0.2; <script>" in cases[1][0].get("message")
    assert cases[0].get("classname") == "gate.metric"


def test_markdown_is_one_table_whatever_names_hold(verdict):
    lines = verdict_markdown(verdict).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 3
    for row in rows[2:]:
        bare = row.replace("\\|", "")
        assert bare.count("|") == 7
    text = "\n".join(lines)
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert lines[0].endswith("3: fail")
    assert r"is refused: " in lines[2]
    assert "429 cells" in text


def test_the_section_holds_rules_and_parts(verdict, tmp_path):
    page = Page(write_verdict_page(verdict, tmp_path).read_text(encoding="utf-8"))
    assert [row[1] for row in page.rows if row[0] in ("signal", "open")] == ["pass", "undecided"]
    assert "open: 2 parts" in page.text
    assert "Its evaluation is in run r1." in page.text
    assert "<script>|" not in verdict_section(verdict)


def test_all_three_files_are_written(verdict, tmp_path):
    paths = write_verdict(verdict, tmp_path / "new")
    assert [path.name for path in paths] == ["verdict.json", "verdict.md", "verdict.xml"]
    # what no text file can hold is gone
    again = Verdict.from_json(paths[0].read_bytes())
    assert again.outcome == "fail"
    assert ElementTree.parse(paths[2]).getroot().tag == "testsuites"
