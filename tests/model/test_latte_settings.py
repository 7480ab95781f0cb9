"""The paper's sizes, the order of blocks, and the refusals."""

import re

import pytest
import torch

from latte_scale.model.latte import Latte
from latte_scale.model.latte_settings import LatteSettings, layout_of, preset

# Trainable parameters of the official class models, unconditional.
COUNTS = {
    "XL/2": 673_681_568,
    "XL/4": 673_847_552,
    "XL/8": 674_511_488,
    "L/2": 456_815_648,
    "L/4": 456_963_200,
    "L/8": 457_553_408,
    "B/2": 129_547_040,
    "B/4": 129_657_728,
    "B/8": 130_100_480,
    "S/2": 32_480_672,
    "S/4": 32_536_064,
    "S/8": 32_757_632,
}
# What the official files hold more: a table of 16 frames and one of 32 x 32 latents.
TABLES = {"XL/2": 673_994_912, "L/2": 457_094_176, "B/2": 129_755_936, "S/2": 32_585_120}


def num_parameters(settings: LatteSettings) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Latte(settings).parameters())


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_counts_are_the_papers(name, count) -> None:
    assert num_parameters(preset(name)) == count


@pytest.mark.parametrize(("name", "total"), TABLES.items())
def test_counts_with_the_fixed_tables_are_the_official_files(name, total) -> None:
    settings = preset(name)
    tables = (settings.num_frames + (settings.sample_size // settings.patch_size) ** 2) * settings.width
    assert num_parameters(settings) + tables == total


@pytest.mark.parametrize(
    ("name", "num_classes", "count"),
    [
        ("XL/2", 101, 673_799_072),
        ("L/2", 101, 457_198_624 - 272 * 1024),
        ("B/2", 101, 129_834_272 - 272 * 768),
        ("S/2", 101, 32_624_288 - 272 * 384),
        ("XL/2", 1000, 675_148_064 - 272 * 1152),
    ],
)
def test_classes_add_a_row_each_and_one(name, num_classes, count) -> None:
    """Published with the two tables, 16 + 256 rows, but for the first."""
    assert num_parameters(preset(name, num_classes=num_classes)) == count


@pytest.mark.parametrize("size", ["S/2", "B/4", "L/8", "XL/2"])
@pytest.mark.parametrize("variant", ["late_fusion", "sequential", "parallel"])
def test_variants_have_the_parameters_of_the_first_within_a_percent(size, variant) -> None:
    ratio = num_parameters(preset(size, variant)) / num_parameters(preset(size))
    assert ratio == pytest.approx(1, abs=1e-3)


def test_layouts() -> None:
    def layouts(variant, depth=4):
        return layout_of(LatteSettings(variant=variant, depth=depth, width=8, num_heads=2))

    assert layouts("interleaved") == ["space", "time"] * 2
    assert layouts("late_fusion") == ["space", "space", "time", "time"]
    assert layouts("sequential", 3) == ["sequential"] * 3
    assert layouts("parallel", 3) == ["parallel"] * 3


def test_presets_take_changes() -> None:
    settings = preset("B/4", "sequential", num_classes=7, depth=2)
    assert (settings.width, settings.num_heads, settings.patch_size, settings.depth) == (768, 12, 4, 2)
    assert (settings.variant, settings.mlp_ratio, settings.num_classes) == ("sequential", 3.5, 7)
    assert settings.mlp_hidden == 2688 and settings.head_dim == 64
    assert preset("XL/2") == LatteSettings()


@pytest.mark.parametrize("name", ["M/2", "XL", "XL/", "/2", "XL/two"])
def test_unknown_sizes_are_refused(name) -> None:
    with pytest.raises(ValueError, match="size: expected S, B, L, XL and a patch size"):
        preset(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "depth: variant interleaved.*got 3; use 4"),
        ({"depth": 5, "variant": "late_fusion"}, "depth: variant late_fusion.*use 6"),
        ({"depth": 0}, "depth: expected at least 1"),
        ({"num_heads": 5}, "num_heads: expected a divisor of width 24, got 5; set model.width=40"),
        ({"width": 18, "num_heads": 3}, "width: expected a multiple of 4.*got 18; set model.width=24"),
        ({"num_heads": 3, "variant": "parallel"}, "num_heads: variant parallel.*got 3; use an even number"),
        ({"num_heads": 8, "temporal_position": "rotary"}, "rotary turns channels of a head in pairs, got 3"),
        ({"mlp_ratio": 3.3}, "mlp_ratio: expected a whole number of MLP channels, got 3.3 x 24"),
        ({"mlp_ratio": -1.0}, "mlp_ratio.*got -1.0"),
        ({"tubelet_size": 3}, "num_frames: expected a multiple of tubelet_size 3, got 4; use 6"),
        ({"tubelet_size": 0}, "tubelet_size: expected at least 1"),
        ({"out_channels": 6}, "out_channels.*got 6"),
        ({"num_classes": -1}, "num_classes: expected 0 \\(none\\) or more, got -1"),
        ({"contrastive_width": 8}, "contrastive_width: expected 0 in an unconditional model"),
    ],
)
def test_refusals_say_what_to_do(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        LatteSettings(**({"depth": 2, "width": 24, "num_heads": 4, "num_frames": 4} | change))


@pytest.mark.parametrize(("width", "num_heads"), [(24, 5), (18, 3), (64, 12), (1152, 7), (1, 1)])
def test_the_width_that_a_refusal_names_is_one(width, num_heads) -> None:
    with pytest.raises(ValueError, match=r"set model.width=(\d+)") as refused:
        LatteSettings(width=width, num_heads=num_heads)
    wider = int(re.search(r"model.width=(\d+)", str(refused.value))[1])
    assert width < LatteSettings(width=wider, num_heads=num_heads).width < width + 4 * num_heads


def test_a_ratio_whose_product_rounds_is_a_whole_number_of_channels() -> None:
    """100 x 2.3 is 229.99999999999997 and means 230; so is any hidden / width that an import finds."""
    assert LatteSettings(width=100, num_heads=4, mlp_ratio=2.3).mlp_hidden == 230
    assert all(
        LatteSettings(width=w, num_heads=4, mlp_ratio=h / w).mlp_hidden == h for w in (196, 412) for h in range(1, 99)
    )
