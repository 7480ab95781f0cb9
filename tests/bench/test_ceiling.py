"""The timed products are those of a step, by their FLOPs."""

import pytest

from latte_scale.bench.ceiling import copy_bandwidth, gemm_rates, linear_shapes, num_tokens
from latte_scale.config import load_config
from latte_scale.model.flops import flops_by_part
from tests.bench.test_subjects import CLASSES, CONFIGS, CPU, tiny


@pytest.mark.parametrize(("name", "scores"), [("t2v_512.yaml", 0.30), ("ffs.yaml", 0.05)])
def test_the_products_are_the_work_of_the_blocks_but_for_the_scores(name, scores) -> None:
    config = load_config(CONFIGS / name, ["train.micro_batch=1"])
    counted = sum(2 * num_tokens(config) * a * b * n for (a, b), n in linear_shapes(config).items())
    side = config.video.height // 8
    flops = flops_by_part(config.model, 16, side, side, 120)
    assert (1 - scores) * (flops.attention + flops.mlp) < counted < flops.attention + flops.mlp


def test_images_count_as_tokens() -> None:
    assert num_tokens(tiny(*CLASSES)) == 2 * (4 + 2) * 16


def test_rates() -> None:
    rates = gemm_rates(tiny("train.micro_batch=2"), CPU, seconds=0.01)
    products = rates["products"]
    assert [(p["in"], p["out"], p["layers"]) for p in products] == [(32, 32, 20), (32, 128, 4), (128, 32, 4)]
    all_rates = [p[kind] for p in products for kind in ("forward", "grad_input", "grad_weight")]
    assert min(all_rates) <= rates["tflops_per_s"] <= max(all_rates)
    assert copy_bandwidth(CPU, seconds=0.01) > 1e8
