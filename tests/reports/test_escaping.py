"""Text from runs and users in every output format: shown unchanged, never interpreted."""

import csv
import html
import io
import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from linflab.reports.plain import escape_invisible, escape_unencodable, one_line, shorten
from linflab.reports.rendering import csv_cell, print_table, to_csv, to_html, to_latex, to_markdown
from linflab.reports.tables import CERTIFIED, METHOD, SETTING, Cell, Row, Table
from linflab.reports.terminal import PlainConsole

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "\\input{/etc/passwd}",
    "=cmd|' /C calc'!A0",
    "\x1b]0;owned\x07\x1b[31mRED\x1b[2J\x9b1m",
    "x`\n\n<img src=x onerror=alert(3)>\n\n`\n\\write18{id}\n",
    "[x](javascript:alert(1))![i](http://127.0.0.1:1/x)[a]: b",
    "[/red] [bold]ours[/bold] :smile:",
    "$x^2$ #{} ~~a~~ &lt; **v** _u_ | \\",
    "\u202egnp.exe \u2066a\u2069 \udc80 \u0105\u00ef\u0107 \u662f \u2028b",
    "+1+1",
    "@SUM(A1)",
    "\t=1",
    "-5",
)
NASTY = st.one_of(
    st.sampled_from(HOSTILE), st.text(max_size=12), st.text(st.sampled_from("[]`<>=\\$|_*~&;#\x1b\n"), max_size=8)
)
CONTROL_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")


def find_control_characters(text: str, keep: str = "") -> list[str]:
    """Return the characters that an output would interpret instead of showing them."""
    return [
        char for char in text if unicodedata.category(char) in CONTROL_CATEGORIES and char not in keep + "\u200c\u200d"
    ]


def make_table(text: str) -> Table:
    """Return a table with the text in every place that can contain text."""
    cells = {METHOD: Cell(text), SETTING: Cell(text or "-"), CERTIFIED: Cell("77.00", 77.0)}
    row = Row(cells, text, "measured", "a", text, reproduce_commands=((text, f"{text}-{text}"),))
    other = Row(
        {METHOD: Cell("other"), CERTIFIED: Cell("-1.00", -1.0)},
        text,
        "measured",
        "b",
        "n",
        reproduce_commands=(("c", "d"),),
    )
    return Table(text, (METHOD, SETTING, CERTIFIED), (row, other), (text, "note"), {text: "figure.png"})


PLAIN = make_table("x")


@given(NASTY, st.integers(4, 40))
@example("9" * 5000, 10)
def test_shortened_text_is_one_line_with_the_same_start(text: str, max_length: int) -> None:
    short = shorten(text, max_length)
    assert len(short) <= max_length and not find_control_characters(short)
    assert short == one_line(text) or (len(one_line(text)) > max_length and one_line(text).startswith(short[:-3]))
    assert len(shorten(10**5000)) <= 80  # more digits than Python converts to text


@given(NASTY)
@example("")
def test_visible_text_has_no_control_characters(text: str) -> None:
    assert not find_control_characters(escape_invisible(text)) and not find_control_characters(one_line(text))
    assert escape_invisible(escape_invisible(text)) == escape_invisible(text)
    assert find_control_characters(text) or escape_invisible(text) == text
    for encoding in ("ascii", "latin-1", "utf-8", "no-such-encoding"):
        shown = escape_unencodable(escape_invisible(text), encoding)
        shown.encode("ascii" if encoding.startswith("no") else encoding)


@given(NASTY)
def test_csv_has_the_text_and_no_formula(text: str) -> None:
    content = to_csv(make_table(text))
    rows = list(csv.reader(io.StringIO(content, newline="")))
    assert (
        {len(row) for row in rows} == {len(rows[0])} and len(rows) == 3 and not find_control_characters(content, "\n")
    )
    assert rows[1][0].removeprefix("'") == (one_line(text) or "").removeprefix("'")
    for cell in (cell for row in rows for cell in row):
        assert not cell.lstrip().startswith(tuple("=+-@")) or float(cell) == float(cell)
    assert [row[2] for row in rows[1:]] == ["77.0", "-1.0"]


@pytest.mark.parametrize("value", [-1.5, 0, None, "-1.5", "+2", "-5e-3", "abc", "a=b"])
def test_csv_keeps_numbers_and_words_unchanged(value: object) -> None:
    assert csv_cell(value) == value


@given(NASTY)
@example("[x](y) `z` _u_ **v** <b> &lt;")
def test_markdown_shows_the_text(text: str) -> None:
    markdown = to_markdown(make_table(text))
    assert not find_control_characters(markdown, "\n")
    if not one_line(text):  # the group has no heading
        return
    assert markdown.count("\n") == to_markdown(PLAIN).count("\n")
    rendered = MarkdownIt("commonmark").enable("table").render(markdown)
    expected = MarkdownIt("commonmark").enable("table").render(to_markdown(PLAIN))
    for tag in ("td", "tr", "li", "ul", "h2", "img", "code", "a", "script", "strong", "em", "p"):
        assert len(re.findall(rf"<{tag}[ >]", rendered)) == len(re.findall(rf"<{tag}[ >]", expected)), tag
    names = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", rendered)]
    assert f"{one_line(text)} <sup>a</sup>".strip() in names
    assert one_line(text) in map(html.unescape, re.findall(r"<code>(.*?)</code>", rendered))


@given(NASTY)
def test_html_shows_the_text(text: str) -> None:
    page = to_html(make_table(text))
    assert not find_control_characters(page, "\n")
    tags = [tag.split("alt=")[0] for tag in re.findall(r"<[^>]*>", page)]
    expected = [tag.split("alt=")[0] for tag in re.findall(r"<[^>]*>", to_html(PLAIN))]
    if text:
        assert tags == expected
    shown = html.unescape(re.sub(r"<[^>]*>", "", page))
    if not set(text) & set("l_infeps"):
        assert escape_invisible(text, keep="\n") in shown


@given(NASTY)
def test_latex_contains_no_command_of_the_text(text: str) -> None:
    latex = to_latex(make_table(text))
    assert not find_control_characters(latex, "\n")
    lines = [line for line in latex.splitlines() if not line.startswith("%")]
    if one_line(text):  # otherwise the group has no heading
        assert len(lines) == len([line for line in to_latex(PLAIN).splitlines() if not line.startswith("%")])
    typeset = "\n".join(lines)
    assert not re.search(r"\\(input|write|immediate|openout|csname [^@el])", typeset)
    body = [re.sub(r"\\[&%$#_{}\\]", "", line) for line in lines if line.endswith(r" \\")]
    assert {line.count("&") for line in body if "multicolumn" not in line} == {2}
    assert not [char for char in typeset if not char.isascii()]
    plain = re.sub(r"\\[{}\\]", "", typeset)
    assert plain.count("{") == plain.count("}")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@given(text=NASTY)
def test_terminal_shows_the_text(encoding: str, text: str) -> None:
    raw = io.BytesIO()
    console = PlainConsole(io.TextIOWrapper(raw, encoding=encoding), width=400)
    print_table(make_table(text), console)
    console.print(text)
    console.file.flush()
    written = raw.getvalue().decode(encoding)
    assert not find_control_characters(written, "\n")
    if not set(text) & set("\n\t±"):
        assert escape_unencodable(escape_invisible(text), encoding) in written
    if len(text) > 1 and text.isascii() and text.isprintable():
        assert written.count(text) >= 6
