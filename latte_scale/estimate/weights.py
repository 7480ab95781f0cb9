"""The weights of a model by block, and the part that a rank holds, without building them.

In: the model's settings. Out: `Weights`: shapes, and bytes in fp32, whole and as fsdp2 shards them.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from latte_scale.estimate.recording import MODEL
from latte_scale.model.build import build_model

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Weights:
    """Shapes of the parameters: of every block in the order of forward, and of those outside the blocks."""

    blocks: tuple[Shapes, ...]
    rest: Shapes
    order: tuple[tuple[int, int], ...]  # (block, number) of every parameter, in the order of named_parameters

    @property
    def size_bytes(self) -> int:
        """fp32."""
        return sum(whole_bytes(shapes) for shapes in (*self.blocks, self.rest))

    def shape(self, block: int, number: int) -> tuple[int, ...]:
        """Shape of parameter `number` of a block; block MODEL: of the model's own parameters."""
        return (self.rest if block == MODEL else self.blocks[block])[number]

    def units(self, blocks_per_unit: int) -> list[Shapes]:
        """Shapes of each group of blocks that fsdp2 gathers together; last those outside the blocks."""
        starts = range(0, len(self.blocks), blocks_per_unit)
        return [sum(self.blocks[first : first + blocks_per_unit], ()) for first in starts] + [self.rest]

    def rows_on_rank_0(self, size: int) -> int:
        """Bytes of rank 0's rows under fsdp2."""
        return sum(rows_bytes(shapes, size) for shapes in (*self.blocks, self.rest))


@functools.lru_cache
def weights_of(settings: object) -> Weights:
    """The parameters of a model of these settings, which is built without memory."""
    with torch.device("meta"):
        model = build_model(settings)
    places, blocks = {}, model.repeated_blocks()
    for index, block in enumerate(blocks):
        places |= {parameter: (index, number) for number, parameter in enumerate(block.parameters())}
    rest = [parameter for parameter in model.parameters() if parameter not in places]
    places |= {parameter: (MODEL, number) for number, parameter in enumerate(rest)}
    return Weights(
        blocks=tuple(tuple(tuple(parameter.shape) for parameter in block.parameters()) for block in blocks),
        rest=tuple(tuple(parameter.shape) for parameter in rest),
        order=tuple(places[parameter] for parameter in model.parameters()),
    )


def whole_bytes(shapes: Sequence[Sequence[int]]) -> int:
    """fp32."""
    return sum(4 * math.prod(shape) for shape in shapes)


def rows_bytes(shapes: Sequence[Sequence[int]], size: int) -> int:
    """fp32 bytes of rank 0's rows under fsdp2, which shards every tensor by rows and rounds up."""
    return sum(4 * -(-shape[0] // size) * math.prod(shape[1:]) for shape in shapes)


def padded_bytes(shapes: Sequence[Sequence[int]], size: int) -> int:
    """Bytes that fsdp2 moves to gather these tensors: each is padded to a multiple of `size` rows."""
    return size * rows_bytes(shapes, size)
