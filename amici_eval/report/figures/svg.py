"""Figures as markup for a page: several SVG drawings in one document, nothing fetched, nothing run."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from xml.etree import ElementTree

from amici_eval.common.errors import DataError
from amici_eval.common.text import markup, printable

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


def inline_figure(path: str | Path, *, prefix: str, alt: str) -> str:
    """Return a figure file as markup to put into a page."""
    path = Path(path)
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".png":
            return f'<img alt="{markup(alt)}" src="data:image/png;base64,{base64.b64encode(content).decode("ascii")}">'
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
    return ElementTree.tostring(root, encoding="unicode")


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
