"""Pages: what is on them, escaped."""

import pytest

from data_tools.cli import main
from data_tools.page import histogram, number, page, section, table


def test_what_comes_from_a_data_set_is_escaped():
    text = page("<b>", "a & b", [section("<i>", table(("<u>",), [("<script>",)]))])
    assert "&lt;script&gt;" in text and "&lt;b&gt;" in text and "&lt;i&gt;" in text and "&lt;u&gt;" in text
    assert "<script>" not in text and "<b>" not in text


def test_a_histogram_counts_every_value_once():
    text = histogram("size", [0.0, 0.0, 10.0, 5.0])
    assert text.count("<rect") == 32 and "0 and above: 2<" in text and "size: 4 values from 0 to 10" in text
    assert histogram("size", [3.0, 3.0]).count("<rect") == 1


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234, "1,234"), (0.01234, "0.0123"), (3.14159, "3.14"), (12.34, "12.3")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_where_a_page_cannot_be_put_is_told(data_sets, tmp_path, capsys):
    """It was an error number of the system, after all the work; a folder that is missing is made."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.html").mkdir()
    for verb in ("stats", "preview"):
        for out, reason in [
            ("file/x.html", "a part of this path is a file"),
            ("folder.html", "this is a folder, a file"),
        ]:
            assert main([verb, str(data_sets.shards), "--out", str(tmp_path / out)]) == 2
            assert reason in capsys.readouterr().err
        assert main([verb, str(data_sets.shards), "--out", str(tmp_path / "new" / "x.html")]) == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder.html", "new", "x.html"]
