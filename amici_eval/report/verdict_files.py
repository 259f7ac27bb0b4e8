"""A verdict as a section of the page, as Markdown for a summary, and as JUnit XML for a CI server."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

from amici_eval.common.text import markdown, printable, xml_text
from amici_eval.report.markup import cell, folded, row, section, table, text
from amici_eval.report.page.frame import write_page
from amici_eval.report.sentences import made_folder, unwritable

if TYPE_CHECKING:
    from pathlib import Path

    from amici_eval.results.verdict import RuleResult, Verdict

_WORDS = {"pass": "passes", "fail": "is refused", "undecided": "is undecided"}


def verdict_sentence(verdict: Verdict) -> str:
    """Return the verdict in a sentence, with what decided."""
    against = f", judged against {_named(verdict.baseline)}," if verdict.baseline else ""
    named = [result.rule for result in verdict.results if result.outcome == verdict.outcome]
    because = "" if verdict.passed else f": {', '.join(named)}" if named else ": no rule"
    return f"{_named(verdict.model)}{against} {_WORDS[verdict.outcome]}{because}."


def verdict_section(verdict: Verdict) -> str:
    """Return the section of a page: a sentence, and a row for each rule."""
    header = ["Rule", "Outcome", "Value", "Interval", "Asked", "Why"]
    rows = [
        row(
            result.rule,
            [
                cell(result.outcome, words=True),
                cell(_shown(result.value)),
                cell(_interval(result)),
                cell(result.threshold, words=True, long=True),
                cell(result.reason, words=True, long=True),
            ],
        )
        for result in verdict.results
    ]
    caption = (
        "The rules. A rule passes if the whole interval lies within what is asked, fails if the whole interval lies "
        f"beyond, and is undecided else; what is undefined never passes. Judged on {verdict.cells}."
    )
    parts = [f"<p>{text(verdict_sentence(verdict))}</p>", table(header, rows, caption)]
    for result in verdict.results:
        if result.details:
            lines = [
                row(name, [cell(outcome, words=True), cell(_shown(value)), cell(_between(low, high))])
                for name, value, low, high, outcome in result.details
            ]
            content = table(["What", "Outcome", "Value", "Interval"], lines, f"All that {result.rule} judged.")
            parts.append(folded(content, f"{result.rule}: {len(lines)} parts"))
    return section("verdict", "Verdict", "".join(parts))


def verdict_markdown(verdict: Verdict) -> str:
    """Return a heading, a sentence and a table in GitHub's Markdown; names are escaped."""
    lines = [
        f"## {markdown(_named(verdict.model))}: {verdict.outcome}",
        "",
        markdown(verdict_sentence(verdict)),
        "",
        "| rule | outcome | value | interval | asked | why |",
        "|---|---|---|---|---|---|",
    ]
    for result in verdict.results:
        shown = [result.rule, result.outcome, _shown(result.value), _interval(result), result.threshold, result.reason]
        lines.append(f"| {' | '.join(map(markdown, shown))} |")
    lines += ["", f"Judged on {markdown(verdict.cells)}."]
    lines += [f"- {markdown(note)}" for note in verdict.notes]
    return "\n".join(lines) + "\n"


def verdict_lines(verdict: Verdict) -> list[str]:
    """Return the verdict for a terminal: a sentence, and of each rule the outcome, its name and why."""
    width = max((len(result.outcome) for result in verdict.results), default=0)
    lines = [verdict_sentence(verdict), ""]
    for result in verdict.results:
        lines += [f"{result.outcome:{width}}  {result.rule}: asked {result.threshold}; {result.reason}"]
    lines += ["", f"Judged on {verdict.cells}.", *(f"Note: {note}" for note in verdict.notes)]
    return [printable(line) for line in lines]


def verdict_junit(verdict: Verdict) -> bytes:
    """Return JUnit XML: a rule is a test case; what is refused is a failure, what is undecided an error."""
    counts = {name: sum(result.outcome == name for result in verdict.results) for name in ("fail", "undecided")}
    numbers = {
        "tests": str(len(verdict.results)),
        "failures": str(counts["fail"]),
        "errors": str(counts["undecided"]),
        "skipped": "0",
    }
    suites = ElementTree.Element("testsuites", {"name": "amici-eval gate", **numbers})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": xml_text(_named(verdict.model)), **numbers})
    for result in verdict.results:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": f"gate.{xml_text(result.kind)}", "name": xml_text(result.rule)}
        )
        said = f"asked: {result.threshold}; {result.reason}"
        if result.outcome != "pass":
            tag = "failure" if result.outcome == "fail" else "error"
            ElementTree.SubElement(case, tag, {"type": result.outcome, "message": xml_text(said)}).text = xml_text(said)
        else:
            ElementTree.SubElement(case, "system-out").text = xml_text(said)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)


def write_verdict(verdict: Verdict, directory: str | Path) -> tuple[Path, ...]:
    """Write ``verdict.json``, ``verdict.md`` and ``verdict.xml`` into a folder and return the files."""
    folder = made_folder(directory)
    written = [folder / "verdict.json", folder / "verdict.md", folder / "verdict.xml"]
    contents = [verdict.to_json().encode(), verdict_markdown(verdict).encode(), verdict_junit(verdict)]
    for path, content in zip(written, contents, strict=True):
        try:
            path.write_bytes(content)
        except OSError as error:
            raise unwritable(path, error) from error
    return tuple(written)


def write_verdict_page(verdict: Verdict, directory: str | Path) -> Path:
    """Write ``directory/report.html`` of a verdict without a comparison, and return it."""
    title = f"Verdict on {printable(_named(verdict.model))}"
    run = verdict.model.get("evaluation_run_id")
    where = f"<p>Its evaluation is in run {text(run)}.</p>" if run else ""
    body = f"<h1>{text(title)}</h1>{verdict_section(verdict)}{where}"
    return write_page(made_folder(directory) / "report.html", title=title, body=body)


def _named(model: object) -> str:
    """Return a short name of a version."""
    values = dict(model) if isinstance(model, dict) else {}
    if values.get("name"):
        return f"{values['name']} {values.get('version') or ''}".strip()
    return str(values.get("model_id") or values.get("uri") or "the model")


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _interval(result: RuleResult) -> str:
    return _between(result.low, result.high)
