"""Which size a clip gets: the rules in their order, and that only the clip decides."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latte_scale.data.buckets import sizes_of
from latte_scale.data.schema import ClipSize, VideoSettings
from latte_scale.data.sizes import TOO_SHORT, best_fit

SQUARE, WIDE, TALL, LARGE, LONG, STILL = (
    ClipSize(16, 256, 256),
    ClipSize(16, 192, 336),
    ClipSize(16, 336, 192),
    ClipSize(16, 512, 512),
    ClipSize(64, 128, 128),
    ClipSize(1, 1024, 1024),
)


def policies(*sizes: ClipSize) -> tuple[VideoSettings, ...]:
    first, *more = sizes
    return VideoSettings(first.frames, first.height, first.width, 1, more_sizes=tuple(more)).policies()


@pytest.mark.parametrize(
    ("sizes", "num_frames", "height", "width", "wanted", "enlarged"),
    [
        ((SQUARE, WIDE, TALL), 20, 720, 1280, WIDE, False),
        ((SQUARE, WIDE, TALL), 20, 1280, 720, TALL, False),
        ((SQUARE, WIDE, TALL), 20, 480, 500, SQUARE, False),
        ((SQUARE, LARGE), 20, 600, 600, LARGE, False),  # the most pixels of one shape
        ((SQUARE, LARGE), 20, 400, 400, SQUARE, False),  # without enlarging
        ((LARGE, SQUARE), 20, 100, 100, SQUARE, True),  # if it must be, then the least
        ((SQUARE, LONG, STILL), 70, 2000, 2000, LONG, False),  # the most frames come first
        ((SQUARE, LONG, STILL), 63, 2000, 2000, SQUARE, False),
        ((SQUARE, LONG, STILL), 15, 2000, 2000, STILL, False),
        ((SQUARE, LONG, STILL), 1, 64, 64, STILL, True),
        ((ClipSize(16, 288, 512), ClipSize(16, 144, 252)), 16, 1080, 1920, ClipSize(16, 288, 512), False),
        (
            (ClipSize(16, 144, 256), ClipSize(16, 288, 504)),
            16,
            1080,
            1920,
            ClipSize(16, 288, 504),
            False,
        ),  # 1.75 is 16:9
    ],
)
def test_the_rules_in_their_order(sizes, num_frames, height, width, wanted, enlarged):
    fit = best_fit(policies(*sizes), num_frames, height, width)
    assert (fit.policy.size, fit.enlarged) == (wanted, enlarged)


def test_what_the_crop_keeps_is_exact():
    assert best_fit(policies(SQUARE), 16, 720, 1280).kept == Fraction(9, 16)
    assert best_fit(policies(SQUARE), 16, 720, 720).kept == 1
    assert best_fit(policies(SQUARE, WIDE), 16, 720, Fraction(2560, 2)).policy.size == WIDE


def test_a_clip_too_short_for_every_size_is_refused():
    with pytest.raises(ValueError, match="too short: expected 16 frames, the least of all sizes, got 15"):
        best_fit(policies(SQUARE, LONG), 15, 512, 512)


sides = st.integers(1, 40).map(lambda number: 16 * number)
several = st.lists(st.builds(ClipSize, st.sampled_from([1, 4, 16]), sides, sides), min_size=1, max_size=6, unique=True)


@settings(max_examples=200, deadline=None)
@given(several, st.integers(1, 40), st.integers(1, 2000), st.integers(1, 2000))
def test_the_best_is_among_those_that_fit_and_no_other_beats_it(sizes, num_frames, height, width):
    choice = policies(*sizes)
    if all(size.frames > num_frames for size in sizes):
        return
    fit = best_fit(choice, num_frames, height, width)
    assert fit.policy in choice and 0 < fit.kept <= 1
    assert fit.policy.frames == max(size.frames for size in sizes if size.frames <= num_frames)
    same = [size for size in sizes if size.frames == fit.policy.frames]
    assert fit.enlarged == (fit.policy.height > height or fit.policy.width > width)
    assert not fit.enlarged or all(size.height > height or size.width > width for size in same)
    alone = best_fit(policies(fit.policy.size), num_frames, height, width)
    assert (alone.kept, alone.enlarged) == (fit.kept, fit.enlarged)


clips = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 2000), st.integers(1, 2000)), max_size=12)


@settings(max_examples=100, deadline=None)
@given(several, clips, st.sampled_from([None, 20]))
def test_a_whole_index_is_sorted_as_each_clip_alone_would_be(sizes, clips, window):
    first, *more = sizes
    video = VideoSettings(first.frames, first.height, first.width, 2, window, "linspace", more_sizes=tuple(more))
    sorted_into = sizes_of(video, 8)
    if not more:
        assert sorted_into is None
        return
    assert list(sorted_into.policies.values()) == list(video.policies())
    assert sorted_into.main == f"{first.frames}x{first.height // 8}x{first.width // 8}"
    numbers = sorted_into.numbers(np.array(clips, np.int32).reshape(-1, 3))
    for number, (frames, height, width) in zip(numbers, clips, strict=True):
        name = sorted_into.names[number]
        if name == TOO_SHORT:
            assert frames < min(policy.min_frames for policy in video.policies())
        else:
            assert sorted_into.policies[name] == best_fit(video.policies(), frames, height, width).policy
