"""A verdict as a section of the page, as Markdown for a summary, and as JUnit XML for a CI server."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

from amici_eval.common.text import markdown, printable, xml_text
from amici_eval.report.page.rendering import rendered, write_page
from amici_eval.report.tables import made_folder, writing

if TYPE_CHECKING:
    from pathlib import Path

    from markupsafe import Markup

    from amici_eval.results.verdict import Verdict

_WORDS = {"pass": "passes", "fail": "is refused", "undecided": "is undecided"}


def verdict_sentence(verdict: Verdict) -> str:
    """Return the verdict in a sentence, with what decided."""
    against = f", judged against {_named(verdict.baseline)}," if verdict.baseline else ""
    named = [result.rule for result in verdict.results if result.outcome == verdict.outcome]
    because = "" if verdict.passed else f": {', '.join(named)}" if named else ": no rule"
    return f"{_named(verdict.model)}{against} {_WORDS[verdict.outcome]}{because}."


def verdict_section(verdict: Verdict) -> Markup:
    """Return the section of a page: a sentence, and a row for each rule."""
    rules = [
        {
            "rule": result.rule,
            "outcome": result.outcome,
            "value": _shown(result.value),
            "interval": _between(result.low, result.high),
            "asked": result.threshold,
            "reason": result.reason,
            "parts": [
                {"name": name, "outcome": outcome, "value": _shown(value), "interval": _between(low, high)}
                for name, value, low, high, outcome in result.details
            ],
        }
        for result in verdict.results
    ]
    return rendered("verdict_section.html.jinja", verdict=verdict, sentence=verdict_sentence(verdict), rules=rules)


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
        shown = [
            result.rule,
            result.outcome,
            _shown(result.value),
            _between(result.low, result.high),
            result.threshold,
            result.reason,
        ]
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
        with writing(path):
            path.write_bytes(content)
    return tuple(written)


def write_verdict_page(verdict: Verdict, directory: str | Path) -> Path:
    """Write ``directory/report.html`` of a verdict without a comparison, and return it."""
    return write_page(
        directory,
        "verdict.html.jinja",
        title=f"Verdict on {printable(_named(verdict.model))}",
        section=verdict_section(verdict),
        run_id=verdict.model.get("evaluation_run_id"),
    )


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
