"""A browser for tests that open pages, and the pages."""

from __future__ import annotations

import importlib.util
import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.builders import AWKWARD_TYPES, make_evaluation
from tests.report.test_evaluation_page import EVIL, WRITTEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
PHONE = (360, 740)
# A4, landscape, without margins
PAPER = (1031, 700)
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)


class Browser:
    """A Chromium with what tests ask of it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path: Path, *, fragment: str = "") -> None:
        """Open a file anew, and forget what was logged before."""
        self.driver.get("about:blank")
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(path.as_uri() + fragment)

    def run(self, script: str, *arguments):
        """Return what a function body returns in the page."""
        return self.driver.execute_script(script, *arguments)

    def waited(self, script: str, *, seconds: float = 5.0):
        """Return what a function body returns once it is true: styles change with the next frame."""
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(lambda _: self.run(script))

    def find(self, selector: str):
        """Return the first element."""
        return self.driver.find_element("css selector", selector)

    def requests(self) -> list[str]:
        """Return the addresses that were asked for since the page was opened."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Return what the console has from the page, errors and warnings."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    @contextmanager
    def media(self, *, scheme: str = "light", kind: str = "") -> Iterator[None]:
        """Prefer a colour scheme, or print."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": kind, "features": features})
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})

    @contextmanager
    def screen(self, width: int, height: int) -> Iterator[None]:
        """Have a screen of a size in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    @contextmanager
    def without_scripts(self) -> Iterator[None]:
        """Run no script of a page."""
        self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all tests, with a profile of its own."""
    missing = [str(path) for path in (CHROMIUM, DRIVER) if not path.exists()]
    missing += [name for name in ("selenium", "axe_core_python") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: make browser installs what opens pages")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for one in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(one)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="session")
def evaluation():
    """An evaluation with everything that a page can show, awkward names, and more than ten types."""
    return make_evaluation(
        cell_types=(*AWKWARD_TYPES, *(f"type {number}" for number in range(6))),
        genes=(EVIL, "HLA-DRA", "$g$", "<b>", "IL7R", "5S_rRNA"),
        inferred="lag",
        n_widths=3,
        modes=("leave_one_out", "shapley"),
        engine="factored",
        parity=2e-7,
        parity_cells=99,
    )


@pytest.fixture(scope="session")
def report(evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its page, with figures."""
    from amici_eval.report.figures.evaluation_figures import save_figures
    from amici_eval.report.page.evaluation_page import write_html

    folder = tmp_path_factory.mktemp("page")
    shown = AWKWARD_TYPES[:2]
    figures = save_figures(evaluation, folder / "figures", cell_types=shown, formats=["svg"])
    return write_html(evaluation, folder, figures={path.stem: path for path in figures}, written=WRITTEN)


@pytest.fixture(scope="session")
def comparison_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a comparison: the same frame, script and styles."""
    from amici_eval.report.page.comparison_page import write_comparison_html
    from tests.builders import make_comparison

    return write_comparison_html(make_comparison(), tmp_path_factory.mktemp("comparison"))


@pytest.fixture(scope="session")
def small_page(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a page with one table of a column of values."""
    from markupsafe import Markup

    from amici_eval.report.page.rendering import write_page

    def write(values: list[str]) -> Path:
        row = Markup('<tr><th scope="row">row {}</th><td>{}</td></tr>')
        rows = Markup().join(row.format(number, value) for number, value in enumerate(values))
        head = Markup('<thead><tr><th scope="col">Name</th><th scope="col">Value</th></tr></thead>')
        table = Markup("<table>{}<tbody>{}</tbody></table>").format(head, rows)
        section = Markup('<section id="values"><h2>Values</h2><div class="scroll">{}</div></section>').format(table)
        folder = tmp_path_factory.mktemp("small")
        return write_page(folder, "verdict.html.jinja", title="Values", section=section, run_id=None)

    return write
