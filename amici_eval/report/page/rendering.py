"""Pages from templates: all foreign text is escaped and made printable, and figures become part of the page."""

from __future__ import annotations

import base64
import re
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from amici_eval.common.errors import DataError
from amici_eval.common.text import markup, printable
from amici_eval.report.numbers import blank, dash, effect, interval, p_text, rounded, two_decimals
from amici_eval.report.tables import made_folder, writing

if TYPE_CHECKING:
    from collections.abc import Callable

_SECTION = re.compile(r'<section id="([^"]+)"><h2>(.*?)</h2>')
_URL = re.compile(r"url\(\s*#")
_URL_ID = re.compile(r"url\(\s*#([^)\s]+)")
_MATPLOTLIB_STYLE = "stroke-linejoin:round;stroke-linecap:butt"
# drawing only: no script, link, metadata with addresses or foreign content; style sheets would leak into the page
_KEPT = frozenset(
    (
        "svg g defs symbol use path rect circle ellipse line polyline polygon text tspan image clipPath mask pattern "
        "marker linearGradient radialGradient stop title desc"
    ).split()
)
FORMATS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "words": str,
    "long": str,
    "count": "{:,}".format,
    "effect": effect,
    "p": p_text,
    "p_or_blank": lambda value: blank(p_text(value)),
    "similarity": lambda value: blank(two_decimals(value)),
    "rounded": rounded,
    "rounded_or_dash": lambda value: dash(rounded(value)),
}
"""How a template may ask for the values of a column."""


class Column(NamedTuple):
    """A column of a table in a template: its heading, the key of its values in each row, and their format."""

    heading: str
    key: str
    format: str = "text"
    shown: bool = True


def write_page(directory: str | Path, template: str, **values: Any) -> Path:
    """Write ``directory/report.html`` from a template and return it.

    The page allows only its own styles, pictures within it, and the one script whose SHA-256 it names, so that markup
    that slipped through runs nothing. Without scripts the tables cannot be sorted or filtered.
    """
    path = made_folder(directory) / "report.html"
    style, script = _asset("page.css"), f"\n{_asset('page.js')}"
    digest = base64.b64encode(sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    page = rendered(template, style=Markup(style), script=Markup(script), policy=policy, **values)
    with writing(path):
        path.write_text(page, encoding="utf-8", newline="\n")
    return path


def rendered(template: str, **values: Any) -> Markup:
    """Return a template filled with values; those that are text are escaped."""
    return Markup(_templates().get_template(template).render(**values))


@cache
def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("amici_eval.report.page"),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters.update(
        as_text=_as_text,
        effect=effect,
        effect_or_dash=lambda value: dash(effect(value)),
        first_sentence=_first_sentence,
        headings=_headings,
        interval=lambda bounds: interval(*bounds),
        one_line=_one_line,
        rounded=rounded,
    )
    templates.globals.update(column=Column, inline_figure=inline_figure)
    return templates


def _printable(value: object) -> object:
    """Return what a template writes: markup as it is, anything else as printable text, which is then escaped."""
    return value if isinstance(value, Markup) else printable(value)


def _as_text(value: Any, name: str) -> str:
    return "" if value is None else FORMATS[name](value)


def _one_line(text: str) -> str:
    """Return a text or markup without the line breaks and indents of its template."""
    return type(text)(re.sub(r"[ \n]+", " ", text).strip(" "))


def _first_sentence(caption: str) -> str:
    """Return the first sentence of a caption, because the name that is read out for a table should be short."""
    return caption.partition(". ")[0].rstrip(".") + "."


def _headings(sections: str) -> list[tuple[str, Markup]]:
    """Return the identifier and the heading of each section of a page."""
    return [(identifier, Markup(heading)) for identifier, heading in _SECTION.findall(sections)]


def _asset(name: str) -> str:
    return files("amici_eval.report").joinpath("assets", name).read_text(encoding="utf-8")


def inline_figure(path: str | Path, *, prefix: str, alt: str) -> Markup:
    """Return a figure file as markup to put into a page: nothing in it is fetched or run."""
    path = Path(path)
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".png":
            picture = base64.b64encode(content).decode("ascii")
            return Markup(f'<img alt="{markup(alt)}" src="data:image/png;base64,{picture}">')
        root = ElementTree.fromstring(content)
        if _bare(root.tag) != "svg":
            msg = "the outermost element is no svg"
            raise ElementTree.ParseError(msg)
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(
            value=f"figure {path} cannot be used ({error})",
            rule="figures of a report are PNG or SVG files",
            fix="draw it again with save_figures()",
        ) from error
    _clean(root, prefix, _referenced(root))
    view_box = root.get("viewBox")
    root.attrib.clear()
    if view_box is not None:
        root.set("viewBox", view_box)
        root.set("width", view_box.split()[2] + "pt")
    root.set("role", "img")
    root.set("aria-label", printable(alt))
    root.set("style", _MATPLOTLIB_STYLE)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _referenced(root: ElementTree.Element) -> frozenset[str]:
    """Return the ids that the drawing itself refers to; others serve nothing in a page, and may be there twice."""
    found: set[str] = set()
    for element in root.iter():
        for name, value in element.attrib.items():
            found.update(_URL_ID.findall(value))
            if _bare(name) == "href":
                found.add(value[1:])
    return frozenset(found)


def _clean(element: ElementTree.Element, prefix: str, referenced: frozenset[str]) -> None:
    # without namespaces: HTML knows the elements of SVG by their names
    element.tag = _bare(element.tag)
    attributes = {_bare(name): value for name, value in element.attrib.items()}
    element.attrib.clear()
    for name, value in attributes.items():
        if name.lower().startswith("on"):
            continue
        if name == "id":
            if value in referenced:
                element.set(name, prefix + value)
        elif name == "href":
            if value.startswith("#"):
                element.set(name, f"#{prefix}{value[1:]}")
            elif value.startswith("data:image/png"):
                element.set(name, value)
        else:
            element.set(name, _URL.sub(f"url(#{prefix}", value))
    for child in list(element):
        if not isinstance(child.tag, str) or _bare(child.tag) not in _KEPT:
            element.remove(child)
        else:
            _clean(child, prefix, referenced)


def _bare(name: str) -> str:
    return name.rpartition("}")[2]
