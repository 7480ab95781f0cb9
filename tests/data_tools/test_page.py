"""Pages: what is on them, escaped."""

import pytest

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
