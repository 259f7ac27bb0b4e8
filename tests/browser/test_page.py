"""The page of an evaluation as a browser shows it: sorted, filtered, by keyboard, on a phone, in a frame, on paper."""

from __future__ import annotations

from html import escape
from importlib.resources import files

import numpy as np
import pytest

from tests.browser.conftest import PAPER, PHONE

pytestmark = [pytest.mark.browser, pytest.mark.slow]

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></svg><svg onload=alert(1)>",
    '=HYPERLINK("http://x","y")',
    "javascript:alert(1)",
    "a|b `x` ]]> --> *b*",
    r"$\alpha",
)

ALL_HEADS = "#heads table"
COLUMN = """
const [selector, column] = arguments;
return [...document.querySelectorAll(`${selector} tbody tr:not([hidden])`)].map((row) => row.cells[column].innerText);
"""
OPEN_ALL = "for (const one of document.querySelectorAll('details')) one.open = true;"
VALUES = [
    "0.5",
    "0.001",
    "<0.001",
    "undefined",
    "1.0e-05",
    "12,345",
    "–",
    "-0.2",
    "-0.001",
    ">-0.001",
    "none found",
    "0.040*",
    "",
]


def sorting(browser, selector, column):
    """Return the header and the button that sort a column."""
    header = browser.driver.find_elements("css selector", f"{selector} thead th")[column]
    return header, header.find_element("css selector", "button")


def test_numbers_sort_as_numbers_and_what_is_undefined_is_last_both_ways(browser, small_page):
    browser.open(small_page(VALUES))
    header, button = sorting(browser, "#values table", 1)
    assert header.get_attribute("aria-sort") is None
    ascending = ["-0.2", "-0.001", ">-0.001", "1.0e-05", "<0.001", "0.001", "0.040*", "0.5", "12,345"]
    last = ["none found", "undefined", "–", ""]
    for expected, order in (([*ascending, *last], "ascending"), ([*ascending[::-1], *last], "descending")):
        button.click()
        assert browser.run(COLUMN, "#values table", 1) == expected
        assert header.get_attribute("aria-sort") == order
    button.click()
    assert browser.run(COLUMN, "#values table", 1) == VALUES, "a third time gives the order of the page"
    assert header.get_attribute("aria-sort") is None


def test_names_sort_as_words_with_their_numbers_in_order(browser, small_page):
    browser.open(small_page(["type 10", "5S_rRNA", "Type 9", "–", "7SK", "b"]))
    sorting(browser, "#values table", 1)[1].click()
    assert browser.run(COLUMN, "#values table", 1) == ["5S_rRNA", "7SK", "b", "Type 9", "type 10", "–"]


def test_the_matrix_sorts_by_effect_not_by_the_interval_below(browser, report, evaluation):
    browser.open(report)
    header, button = sorting(browser, "#matrix table", 3)
    assert button.accessible_name == "Sort by Head 1"
    button.click()
    button.click()
    effects = evaluation.expl_var[1]
    order = np.argsort(-np.round(np.nan_to_num(effects, nan=-9.0), 3), kind="stable")
    expected = [evaluation.cell_types[index] for index in order]
    shown = browser.run(COLUMN, "#matrix table", 0)
    assert shown[:5] == expected[:5]
    assert shown[-1] == expected[-1]
    assert header.get_attribute("aria-sort") == "descending"
    # one column at a time
    sorting(browser, "#matrix table", 0)[1].click()
    assert header.get_attribute("aria-sort") is None


def test_all_is_reached_and_worked_by_keyboard(browser, report):
    from selenium.webdriver.common.keys import Keys

    browser.open(report)
    field = browser.find("#matrix input")
    field.click()
    focused = browser.driver.switch_to.active_element
    focused.send_keys(Keys.TAB)
    region = browser.driver.switch_to.active_element
    assert region.get_attribute("class") == "scroll", "a table that scrolls can be scrolled by keys"
    region.send_keys(Keys.TAB)
    button = browser.driver.switch_to.active_element
    assert button.text.startswith("Receiver type")
    before = browser.run(COLUMN, "#matrix table", 0)
    button.send_keys(Keys.ENTER)
    ascending = browser.run(COLUMN, "#matrix table", 0)
    button.send_keys(Keys.SPACE)
    assert browser.run(COLUMN, "#matrix table", 0) == ascending[::-1]
    assert sorted(ascending) == sorted(before) != ascending
    assert browser.driver.switch_to.active_element == button, "focus stays where it was"


def test_a_filter_says_how_many_rows_are_left(browser, report, evaluation):
    browser.open(report)
    n_rows = 3 * len(evaluation.cell_types)
    browser.run(OPEN_ALL)
    field = browser.find("#heads input")
    live = browser.find("#heads .filter output")
    assert field.accessible_name == "Filter rows: All heads"
    assert live.get_attribute("aria-live") == "polite"
    assert live.text == f"{n_rows} rows"
    field.send_keys("TYPE  3")
    assert browser.run(COLUMN, ALL_HEADS, 0) == ["type 3"] * 3
    assert live.text == f"3 of {n_rows} rows"
    field.clear()
    field.send_keys("<script>alert(1)")
    assert set(browser.run(COLUMN, ALL_HEADS, 0)) == {"<script>alert(1)</script>"}
    # sorting keeps what is hidden hidden
    sorting(browser, ALL_HEADS, 1)[1].click()
    assert set(browser.run(COLUMN, ALL_HEADS, 0)) == {"<script>alert(1)</script>"}
    field.clear()
    field.send_keys("no such type")
    assert live.text == f"0 of {n_rows} rows"


@pytest.mark.parametrize(("n_rows", "n_boxes"), [(10, 0), (11, 1)])
def test_only_tables_of_more_than_ten_rows_have_a_filter(browser, small_page, n_rows, n_boxes):
    browser.open(small_page([str(number) for number in range(n_rows)]))
    assert len(browser.driver.find_elements("css selector", ".filter")) == n_boxes


def test_a_head_is_reached_from_the_matrix_and_from_an_address(browser, report):
    browser.open(report)
    browser.run("for (const one of document.querySelectorAll('#head-2 details')) one.open = false;")
    link = browser.find("#matrix thead th:nth-child(5) a")
    link.click()
    assert browser.run("return location.hash") == "#head-2"
    assert browser.run("return document.querySelector('#head-2 details').open")
    assert 0 <= browser.run("return document.querySelector('#head-2').getBoundingClientRect().top") < 200
    browser.open(report, fragment="#heads")
    assert browser.run("return document.querySelector('#heads details').open")


def test_nothing_leaves_the_page_and_nothing_is_complained_about(browser, report):
    browser.open(report)
    browser.run(OPEN_ALL)
    sorting(browser, "#matrix table", 1)[1].click()
    assert browser.complaints() == []
    # what is in the page itself is asked for, too
    assert {url for url in browser.requests() if not url.startswith("data:")} == {report.as_uri()}


def test_a_request_and_a_script_that_slip_into_a_page_are_refused(browser, report, tmp_path):
    """Else the test before could pass on anything."""
    slipped = (
        '<img src="http://127.0.0.1:9/pixel"><script>document.title = "run"</script>'
        '<button id="slipped" onclick="document.title = \'run\'">press</button>'
    )
    changed = tmp_path / "report.html"
    changed.write_text(report.read_text(encoding="utf-8").replace("<main>", f"<main>{slipped}"), encoding="utf-8")
    browser.open(changed)
    browser.find("#slipped").click()
    complaints = browser.complaints()
    assert [sum(word in one for one in complaints) for word in ("pixel", "script-src")] == [1, 2]
    assert browser.driver.title.startswith("Attention heads of")
    assert browser.find("#matrix .sort").is_displayed(), "the script of the page still runs"
    open_page = tmp_path / "open.html"
    open_page.write_text('<img src="http://127.0.0.1:9/pixel">', encoding="utf-8")
    browser.open(open_page)
    assert "http://127.0.0.1:9/pixel" in browser.requests()


def test_names_that_attack_run_nothing_and_ask_for_nothing(browser, tmp_path):
    from amici_eval.report.figures.evaluation_figures import save_figures
    from amici_eval.report.page.evaluation_page import write_html
    from amici_eval.report.verdict_files import write_verdict_page
    from amici_eval.results.verdict import RuleResult, Verdict
    from tests.builders import make_evaluation

    evaluation = make_evaluation(
        cell_types=HOSTILE,
        genes=HOSTILE,
        inferred="lag",
        modes=("shapley",),
        senders=HOSTILE,
        notes=HOSTILE,
        model={"name": HOSTILE[0], "version": HOSTILE[3]},
        data={"uri": HOSTILE[3]},
    )
    figures = save_figures(evaluation, tmp_path / "figures", formats=["svg"])
    page = write_html(evaluation, tmp_path, figures={path.stem: path for path in figures}, run={HOSTILE[0]: HOSTILE[3]})
    nothing = {"value": None, "low": None, "high": None}
    results = [
        RuleResult(rule=name, kind="metric", outcome="fail", threshold=name, reason=name, **nothing) for name in HOSTILE
    ]
    verdict = Verdict(outcome="fail", results=tuple(results), model={"name": HOSTILE[3]}, cells=HOSTILE[0])
    for path in (page, write_verdict_page(verdict, tmp_path / "verdict")):
        browser.open(path)
        browser.run(OPEN_ALL)
        sorting(browser, "section table", 0)[1].click()
        # an alert that is open would make each call of the driver fail
        assert browser.run("return document.scripts.length") == 1
        assert browser.run("return document.querySelectorAll('main img, main iframe, main form').length") == 0
        shown = browser.run("return document.body.textContent")
        assert all(name in shown for name in HOSTILE)
        assert browser.complaints() == []
        assert {url for url in browser.requests() if not url.startswith("data:")} == {path.as_uri()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", ["report", "comparison_report"])
def test_axe_finds_no_violation(browser, request, page, scheme):
    import axe_core_python

    axe = files(axe_core_python).joinpath("axe.min.js").read_text(encoding="utf-8")
    path = request.getfixturevalue(page)
    with browser.media(scheme=scheme):
        browser.open(path)
        browser.run(OPEN_ALL)
        dark = browser.run("return getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark")
        browser.run(axe)
        found = browser.driver.execute_async_script(
            "const [rules, done] = arguments; axe.run({runOnly: rules}).then(done, (error) => done(String(error)));",
            ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"],
        )
    assert isinstance(found, dict), found
    violations = [
        (one["id"], one["nodes"][0]["html"][:200], one["nodes"][0]["failureSummary"]) for one in found["violations"]
    ]
    assert violations == []
    passed = {one["id"] for one in found["passes"]}
    assert {"color-contrast", "scrollable-region-focusable", "button-name", "label", "link-name"} - passed <= (
        {"label"} if page == "comparison_report" else set()
    )


@pytest.mark.parametrize("page", ["report", "comparison_report"])
def test_on_a_phone_tables_scroll_and_the_page_does_not(browser, request, page):
    with browser.screen(*PHONE):
        browser.open(request.getfixturevalue(page))
        browser.run(OPEN_ALL)
        assert browser.run("return innerWidth") == PHONE[0]
        assert browser.run("return document.documentElement.scrollWidth") <= PHONE[0]
        wide = "return [...document.querySelectorAll('.scroll')].some((box) => box.scrollWidth > box.clientWidth + 50)"
        assert browser.run(wide), "else it says less"


@pytest.mark.parametrize("by", ["srcdoc", "src"])
def test_it_works_in_a_frame_that_may_run_scripts_and_nothing_else(browser, report, tmp_path, by):
    content = escape(report.read_text(encoding="utf-8")) if by == "srcdoc" else report.as_uri()
    viewer = tmp_path / "viewer.html"
    viewer.write_text(
        f'<!DOCTYPE html><iframe sandbox="allow-scripts" width="1000" height="700" {by}="{content}"></iframe>',
        encoding="utf-8",
    )
    browser.open(viewer)
    browser.driver.switch_to.frame(0)
    try:
        header, button = sorting(browser, "#matrix table", 1)
        button.click()
        assert header.get_attribute("aria-sort") == "ascending"
        browser.find("#matrix input").send_keys("type 3")
        assert browser.run(COLUMN, "#matrix table", 0) == ["type 3"]
        browser.find("#matrix thead th:nth-child(4) a").click()
        assert browser.run("return document.activeElement.id") == "head-1"
        assert 0 <= browser.run("return document.activeElement.getBoundingClientRect().top") < 200
    finally:
        browser.driver.switch_to.default_content()
    assert browser.complaints() == []


def test_on_paper_all_is_open_and_nothing_is_hidden(browser, report):
    browser.open(report)
    closed = "return document.querySelectorAll('details:not([open])').length"
    before = browser.run(closed)
    assert before > 3, "else it says less"
    browser.find("#matrix input").send_keys("type 3")
    with browser.media(kind="print", scheme="dark"):
        # without its script, too
        assert browser.waited(
            "return document.querySelector('#heads td').checkVisibility({contentVisibilityAuto: true})"
        )
        assert len(browser.run(COLUMN.replace(":not([hidden])", ""), "#matrix table", 0)) == 13
        assert (
            browser.run("return getComputedStyle(document.querySelector('#matrix tr[hidden]')).display") == "table-row"
        )
        assert not browser.find("#matrix input").is_displayed()
        assert browser.run("return getComputedStyle(document.querySelector('h1')).color") == "rgb(29, 32, 36)"
        browser.run("dispatchEvent(new Event('beforeprint'))")
        assert browser.run(closed) == 0
        with browser.screen(*PAPER):
            assert browser.run("return document.documentElement.scrollWidth") <= PAPER[0], "or it is printed tiny"
        browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run(closed) == before


def test_without_scripts_the_tables_are_plain(browser, report, evaluation):
    with browser.without_scripts():
        browser.open(report)
        assert browser.driver.find_elements("css selector", ".sort, .filter") == []
        assert len(browser.run(COLUMN, "#matrix table", 0)) == len(evaluation.cell_types)


def test_each_figure_has_a_text_alternative(browser, report):
    browser.open(report)
    drawings = browser.driver.find_elements("css selector", "figure svg")
    assert len(drawings) == 6
    assert all(one.aria_role in ("img", "image") and len(one.accessible_name) > 20 for one in drawings)
