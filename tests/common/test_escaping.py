"""Each format gets exactly the text that a name is, and nothing else comes of it."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from amici_eval.common.text import (
    code_block,
    csv_text,
    from_csv_text,
    literal,
    markdown,
    markup,
    printable,
    terminal_text,
    xml_text,
)
from amici_eval.report.tables import read_csv, write_csv

seeded = settings(max_examples=200, deadline=None, derandomize=True)
SIGNS = "a1 =+-@'\"<>&|`*_[]()!#~:/.$\\{}^\t\r\n\x00\x1b\u202e\u2028\ud800é"
MARKS = set("html_inline html_block link_open image code_inline fence code_block em_open strong_open s_open".split())
hostile = st.text(alphabet=st.sampled_from(SIGNS), max_size=12)
anything = hostile | st.text(max_size=30)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("a\u202eb\u2066c\u200f", r"a\u202eb\u2066c\u200f"),
        ("a\r\nb\tc\u2028d", r"a\x0d\x0ab\x09c\u2028d"),
        ("\ud800\ufffe\U000e0041", r"\ud800\ufffe\U000e0041"),
        ("β cell 細胞 👩‍🔬", "β cell 細胞 👩‍🔬"),
    ],
)
def test_what_cannot_be_seen_is_shown(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    "codes",
    [
        *(range(0x20), range(0x7F, 0xA0), range(0x2028, 0x202F), range(0x2060, 0x2070), range(0xFFF9, 0xFFFC)),
        *((0x61C, 0x200B, 0x200E, 0x200F, 0xFEFF, 0xFFFE, 0xFFFF), range(0xD800, 0xE000), range(0xE0000, 0xE0080)),
    ],
    ids=lambda codes: f"{codes[0]:x}",
)
def test_nothing_that_cannot_be_seen_is_left_out(codes):
    for code in codes:
        shown = printable(f"a{chr(code)}b")
        assert shown.isascii()
        assert int(re.fullmatch(r"a\\[xuU]([0-9a-f]+)b", shown)[1], 16) == code


@seeded
@given(text=anything)
def test_html_holds_the_text_and_no_element(text):
    seen: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.extend([tag, *(value for _, value in attrs)])

        def handle_data(self, data):
            seen.append(data)

    reader = Reader()
    reader.feed(f'<p title="{markup(text)}">{markup(text)}.')
    reader.close()
    assert seen[0] == "p"
    assert seen[1] == printable(text)
    assert "".join(seen[2:]) == f"{printable(text)}."


@seeded
@given(text=anything)
@example("]]>\x00\x1f\ufffe\ud800")
def test_xml_holds_the_text(text):
    element = ElementTree.Element("a", {"b": xml_text(text)})
    element.text = xml_text(text)
    again = ElementTree.fromstring(ElementTree.tostring(element, encoding="utf-8"))
    assert (again.text or "") == printable(text)
    assert again.get("b") == printable(text)


def tokens_of(source: str) -> list:
    found = []
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(source):
        found += [token, *(token.children or [])]
    return found


@seeded
@given(text=anything)
@example("![x](http://example.org/p.png)")
@example("[x](javascript:alert(1))")
@example("<img src=x onerror=alert(1)>")
@example("```")
@example("- x")
@example("1. x")
@example("+")
@example("===")
@example("a\n\n# b")
def test_markdown_holds_the_text_in_a_heading_a_paragraph_an_item_and_a_cell(text):
    safe = markdown(text)
    source = f"## {safe}\n\n{safe}\n\n- {safe}\n\n| a | b |\n|---|---|\n| {safe} | c |\n"
    tokens = tokens_of(source)
    kinds = {token.type for token in tokens}
    assert not kinds & MARKS
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h2"]
    assert sum(token.type in ("bullet_list_open", "ordered_list_open") for token in tokens) == 1
    assert sum(token.type == "td_open" for token in tokens) == 2


def test_addresses_do_not_become_links():
    assert markdown("http://example.org www.example.org") == r"http\://example.org www\.example.org"


@seeded
@given(lines=st.lists(anything, min_size=1, max_size=4))
@example(["```", "# a", "~~~~", "``````"])
def test_a_code_block_stays_one_block(lines):
    (token,) = MarkdownIt().parse(code_block(lines))
    assert token.type == "fence"
    assert token.content.splitlines() == [printable(line) for line in lines]


@seeded
@given(text=anything)
@example("'=x")
@example("''-1")
def test_cells_are_guarded_and_come_back(text):
    assert not csv_text(text).startswith(tuple("=+-@\t\r\n"))
    assert from_csv_text(csv_text(text)) == text


@seeded
@given(text=anything)
def test_the_documentation_says_how_to_undo_it(text):
    told = Path(__file__).parents[2] / "docs" / "tables.md"
    (pattern,) = re.findall(r'str\.replace\(r"(.*?)", "", regex=True\)', told.read_text(encoding="utf-8"))
    assert pd.Series([csv_text(text)]).str.replace(pattern, "", regex=True)[0] == text


@pytest.mark.parametrize("name", ["T cell", "HLA-DRA", "5'-UTR", "'quoted'", "CD8+", "a=b"])
def test_ordinary_names_stay_as_they_are_in_a_table(name):
    assert csv_text(name) == name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("csv")


texts_of_tables = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1)


@seeded
@given(names=st.lists(texts_of_tables, min_size=1, max_size=5))
@example(names=["a\r=1+1", 'b"\n', '=HYPERLINK("http://x","y")', "＝1"])
def test_a_table_comes_back_and_its_numbers_are_numbers(names, folder):
    path, values = folder / "t.csv", [-1.5] * len(names)
    frame = pd.DataFrame({"name": names, "kind": pd.Categorical(names), "value": values, "n": [-2] * len(names)})
    before = frame.copy(deep=True)
    write_csv(frame, path)
    pd.testing.assert_frame_equal(frame, before)
    again = read_csv(path, keep_default_na=False, dtype={"name": str, "kind": str})
    assert again["name"].tolist() == names == again["kind"].tolist()
    assert again["value"].tolist() == [-1.5] * len(names)
    assert again["n"].tolist() == [-2] * len(names)
    raw = pd.read_csv(path, keep_default_na=False, dtype=str)
    assert raw["name"].tolist() == [csv_text(name) for name in names]


def test_numbers_among_texts_are_not_touched(tmp_path):
    frame = pd.DataFrame({"head": [-1, "full", "-1"]}, dtype=object)
    write_csv(frame, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "head\n-1\nfull\n'-1\n"


@pytest.mark.parametrize("text", [r"$\frac", "a$b$c", r"\$a$", "$$", "$^$", r"$\alpha$ & <b> ]]>", "_x", "{"])
def test_a_figure_draws_the_text_and_no_formula(text):
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure = Figure()
        ax = figure.add_subplot()
        ax.set_title(literal(text))
        ax.set_yticks([0.5], [literal(text)])
        file = io.BytesIO()
        figure.savefig(file, format="svg")
        figure.savefig(io.BytesIO(), format="png")
    root = ElementTree.fromstring(file.getvalue())
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]
    assert texts.count(text) == 2


def test_a_runner_is_given_no_commands():
    told = terminal_text("::error::x\n  ::stop-commands::y\na::b ##[add-path]/tmp\x1b[0m", commands=True)
    assert told.splitlines() == [r"\x3a:error::x", r"  \x3a:stop-commands::y", r"a::b #\x23[add-path]/tmp\x1b[0m"]
    assert terminal_text("::error::x\ty") == "::error::x\ty"
