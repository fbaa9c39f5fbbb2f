"""Plain-text tables."""

from lojax.report.table import html_table, table


def test_numbers_to_the_right_words_to_the_left_and_no_trailing_space():
    rows = [("a", "1,000", "x", "1.5%"), ("bbbb", "2", "yy", ""), ("c", "", "z", "10.0%")]
    assert table(("name", "size", "word", "share"), rows) == (
        "name   size  word  share\n"
        "------------------------\n"
        "a     1,000  x      1.5%\n"
        "bbbb      2  yy\n"
        "c            z     10.0%"
    )


def test_a_table_without_rows_is_its_header():
    assert table(("a", "bc"), []) == "a  bc\n-----"


def test_html_escapes_and_aligns_as_the_text_does():
    assert html_table(("<a>", "n"), [("x & y", "1,000")]).splitlines() == [
        "<table>",
        '<tr><th style="text-align: left">&lt;a&gt;</th><th style="text-align: right">n</th></tr>',
        '<tr><td style="text-align: left">x &amp; y</td><td style="text-align: right">1,000</td></tr>',
        "</table>",
    ]
