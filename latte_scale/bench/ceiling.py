"""The best rates of the device: matrix products at the model's own shapes, and copies.

In: a Config and a device. Out: rates. The decision worth knowing: a step spends most of its FLOPs in a few matrix
products of which one side is the number of tokens and the others are multiples of the width. Their measured rate over
the device's peak is an upper bound of the MFU.
"""

from collections import Counter

import torch

from latte_scale.choices.record import dtype_of
from latte_scale.config import Config, latent_sides
from latte_scale.model.build import build_model
from latte_scale.model.fp8 import token_linears
from latte_scale.timing import call_time

SECONDS = 0.2  # per measurement, after one uncounted call
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}


def gemm_rates(config: Config, device: torch.device, seconds: float = SECONDS) -> dict:
    """TFLOP/s of every product of the blocks' linear layers over video tokens: forward, and both of backward.

    Returns {"products": [{tokens, in, out, layers, forward, grad_input, grad_weight}], "tflops_per_s": of all of them
    as often as a step runs them}.
    """
    tokens, dtype = num_tokens(config), dtype_of(config)
    products, flops, spent_s = [], 0.0, 0.0
    for (inner, outer), layers in sorted(linear_shapes(config).items()):
        x = torch.randn(tokens, inner, device=device, dtype=dtype)
        weight = torch.randn(outer, inner, device=device, dtype=dtype)
        grad = torch.randn(tokens, outer, device=device, dtype=dtype)
        calls = {
            "forward": lambda x=x, weight=weight: torch.mm(x, weight.T),
            "grad_input": lambda grad=grad, weight=weight: torch.mm(grad, weight),
            "grad_weight": lambda grad=grad, x=x: torch.mm(grad.T, x),
        }
        once = 2.0 * tokens * inner * outer
        times_s = {name: call_time(call, device, seconds) for name, call in calls.items()}
        flops += 3 * once * layers
        spent_s += sum(times_s.values()) * layers
        rates = {name: once / value / 1e12 for name, value in times_s.items()}
        products.append({"tokens": tokens, "in": inner, "out": outer, "layers": layers, **rates})
    return {"products": products, "tflops_per_s": flops / spent_s / 1e12}


def linear_shapes(config: Config) -> Counter[tuple[int, int]]:
    """(in, out) of the blocks' linear layers over all tokens, and how many of each: no modulation, no captions."""
    with torch.device("meta"):
        blocks = build_model(config.model).repeated_blocks()
    return Counter((layer.in_features, layer.out_features) for block in blocks for layer in token_linears(block))


def num_tokens(config: Config) -> int:
    """Video and image tokens of a micro-batch."""
    height, width = latent_sides(config)
    patches = height * width // config.model.patch_size**2
    frames = config.video.frames // config.model.frames_per_token + config.train.joint_images
    return config.train.micro_batch * frames * patches


def copy_bandwidth(device: torch.device, seconds: float = SECONDS) -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / call_time(lambda: target.copy_(source), device, seconds)
