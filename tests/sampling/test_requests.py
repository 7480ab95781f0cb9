"""Prompts from files, and what a model can be asked."""

import math

import pytest

from latte_scale.encoders import TextEncoder
from latte_scale.model.latte_settings import LatteSettings
from latte_scale.model.latte_t2v import LatteT2VSettings
from latte_scale.sampling.requests import (
    check_guidance,
    check_records,
    default_guidance,
    read_prompts,
    requests_of,
)

TEXT = LatteT2VSettings(num_layers=1, num_heads=2, head_dim=8, caption_channels=12, sample_size=8, num_frames=3)
CLASSES = LatteSettings(depth=2, width=16, num_heads=2, num_frames=4, num_classes=3)
PLAIN = LatteSettings(depth=2, width=16, num_heads=2, num_frames=4, num_classes=0)


def test_prompts_of_both_kinds_of_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('a red circle \n\n{"text": "a cat", "seed": 4, "negative": "dog", "mine": 1}\n', encoding="utf-8")
    records = read_prompts(["first"], file)
    assert records[:2] == [{"text": "first"}, {"text": "a red circle"}]
    assert records[2] == {"text": "a cat", "seed": 4, "negative": "dog", "mine": 1}


def test_files_as_other_programs_write_them(tmp_path):
    """A byte order mark, carriage returns, and a line separator inside a prompt; bytes that are no UTF-8 are named."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red\u2028circle\r\nnaïve 青い 🎬\r\n".encode())
    assert read_prompts([], file) == [{"text": "a red\u2028circle"}, {"text": "naïve 青い 🎬"}]
    file.write_bytes("\ufeff".encode() + b'{"text": "a"}\n')
    assert read_prompts([], file) == [{"text": "a"}]
    file.write_bytes(b"[a] circle\n[1990s]\n")
    assert read_prompts([], file) == [{"text": "[a] circle"}, {"text": "[1990s]"}]
    file.write_bytes("été".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt: expected a text file in UTF-8"):
        read_prompts([], file)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("\n \n", "is empty"), ("a\n{b\n", "line 2"), ('[\n "a",\n "b"\n]\n', "got a JSON array")],
)
def test_files_that_hold_no_prompts(tmp_path, content, message):
    (tmp_path / "prompts.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts([], tmp_path / "prompts.txt")


@pytest.mark.parametrize(
    ("architecture", "records", "message"),
    [
        (TEXT, [], "nothing to sample: pass --prompt"),
        (TEXT, [{"label": 1}], "expected text in every record"),
        (TEXT, [{"text": "a", "seed": "3"}], "expected seed of type int"),
        (TEXT, [{"text": "a", "negative": 3}], "expected negative of type str"),
        (TEXT, [{"text": "a", "seed": 2**64}], "expected a seed of -9223372036854775808 to 18446744073709551615"),
        (CLASSES, [{"text": "a"}], "expected label in every record"),
        (CLASSES, [{"label": 3}], "the model has 3 classes"),
        (PLAIN, [{"label": 0}], "expected no condition in every record"),
    ],
)
def test_what_a_model_cannot_be_asked(architecture, records, message):
    with pytest.raises(ValueError, match=message):
        check_records(records, architecture)


def test_what_a_model_can_be_asked():
    check_records([{"text": "a", "seed": 1, "negative": "b"}], TEXT)
    check_records([{"text": "a", "seed": seed} for seed in (-(2**63), 2**64 - 1)], TEXT)
    check_records([{"label": 2}], CLASSES)
    check_records([{}], PLAIN)


def test_guidance():
    assert [default_guidance(model) for model in (TEXT, CLASSES, PLAIN)] == [7.5, 7.0, 1.0]
    check_guidance(1.0, PLAIN)
    for endless in (math.nan, math.inf):
        with pytest.raises(ValueError, match="expected a finite number"):
            check_guidance(endless, TEXT)
    with pytest.raises(ValueError, match="nothing to be guided by"):
        check_guidance(3.0, PLAIN)
    check_guidance(2.0, TEXT, "blurred")
    with pytest.raises(ValueError, match="nothing reads it at guidance 1"):
        check_guidance(1.0, TEXT, "blurred")
    with pytest.raises(ValueError, match="negative prompt 'blurred': nothing reads it at guidance 1"):
        check_guidance(1.0, TEXT, None, "", "blurred")  # of one prompt among several
    with pytest.raises(ValueError, match="the model reads no text"):
        check_guidance(2.0, CLASSES, "blurred")


def test_prompts_that_are_cut_are_told(caplog) -> None:
    text, prompts = TextEncoder("tiny", 6), ["a red circle moves left", "a red circle moves left and back"]
    records = [{"text": prompt, "seed": 0} for prompt in prompts]
    requests_of(records[:1], text)
    assert not caplog.records
    requests_of(records, text, negative="a grey square that does not move at all, or hardly")
    (record,) = caplog.records
    assert "2 captions are cut to text_max_length=6 tokens" in record.getMessage()
    assert "'a grey square" in record.getMessage() and "raise encoders.text_max_length" in record.getMessage()
