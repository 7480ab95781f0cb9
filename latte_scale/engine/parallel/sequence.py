"""Sequence parallelism for long clips: the ranks of a group split each clip and share samples and noise.

DSP, dynamic sequence parallelism (Zhao et al. 2024, arXiv 2403.10266): where a block attends within a frame, a rank
holds some of the frames with all their tokens; where it attends over time, it holds some of the tokens in all frames;
one all-to-all switches between the two layouts. In: a model that calls `reshard(x, "space" or "time")` before each
block, and whole noisy clips, identical on the ranks of a group. Out: the whole prediction, identical on them too.

The decision worth knowing is where gradients are summed. Every rank of a group computes the same loss from the same
joined prediction, but only the part that went through its own frames and tokens reaches its weights. The backward of
`join` returns the gradient of this rank's frames alone, and that of each all-to-all the gradients of the tokens that it
sent. The gradient of a clip is therefore the sum over its group, with each part counted once, and the sum over all
ranks, which every engine computes anyway, is the gradient of the global batch. No averaging or weighting is needed,
however unevenly a clip is split.

Shape legend: B batch, C channels, O output channels, F frames, H W latent height and width, T tokens of a frame,
D width.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from latte_scale.engine.dist import Ranks

FRAMES, TOKENS = 1, 2
"""Axes of x_BFTD."""


class SequenceGroup:
    """The ranks that hold each clip together. In a group of one rank nothing is split or moved."""

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self.group = rank, size, group

    def clip(self, num_frames: int, frames_per_token: int = 1) -> "ClipShare":
        """This rank's share of clips of `num_frames` in one forward pass; `frames_per_token` frames make a token.

        Raises ValueError if the frame axis has fewer rows of tokens than there are ranks.
        """
        return ClipShare(self, num_frames, frames_per_token)

    def exchange(
        self, received: Tensor, sent: Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int]
    ) -> None:
        """One all-to-all of flat tensors, part r to and from rank r of the group. A collective of the group."""
        dist.all_to_all_single(received, sent, list(received_sizes), list(sent_sizes), group=self.group)

    def sum_(self, tensor: Tensor) -> None:
        """Add a tensor over the group in place. A collective of the group."""
        dist.all_reduce(tensor, group=self.group)


def make_sequence_group(ranks: Ranks, size: int, timeout_s: float) -> SequenceGroup:
    """Groups of `size` consecutive ranks, which launchers place on one machine. A collective.

    Raises ValueError if the ranks do not divide into whole groups.
    """
    if size == 1:
        return SequenceGroup()
    if ranks.size % size:
        raise ValueError(
            f"engine.sequence_parallel is {size}, but {ranks.size} ranks were started, which are no whole groups of "
            f"{size}; start a multiple of {size} or set engine.sequence_parallel to a divisor of {ranks.size}"
        )
    group, _ = dist.new_subgroups(size, timeout=timedelta(seconds=timeout_s))
    return SequenceGroup(ranks.rank % size, size, group)


class ClipShare:
    """One rank's part of a micro-batch of clips for one forward pass and its backward."""

    def __init__(self, group: SequenceGroup, num_frames: int, frames_per_token: int) -> None:
        rows = num_frames // frames_per_token
        if rows < group.size:
            raise ValueError(
                f"a clip of {num_frames} frames has {rows} rows of tokens, fewer than the {group.size} ranks of "
                f"engine.sequence_parallel; set engine.sequence_parallel to {rows} or less"
            )
        self._group, self._num_rows = group, rows
        self._rows = even_split(rows, group.size)
        self._frames = [count * frames_per_token for count in self._rows]
        self._tokens: list[int] = []  # per rank, in the layout with all frames; known once the model has made tokens

    def cut(self, x_BCFHW: Tensor) -> Tensor:
        """This rank's frames of whole clips."""
        return _part(x_BCFHW, 2, self._frames, self._group.rank)

    @property
    def reshard(self) -> Callable[[Tensor, Literal["space", "time"]], Tensor] | None:
        """The model's `reshard` argument; None for a single rank, because the model's default does nothing."""
        return None if self._group.size == 1 else self._reshard

    def join(self, out_BOFHW: Tensor) -> Tensor:
        """Whole clips of every rank's frames, the same on all ranks of the group."""
        return out_BOFHW if self._group.size == 1 else _Join.apply(out_BOFHW, self._group, self._frames)

    def _reshard(self, x_BFTD: Tensor, whole: Literal["space", "time"]) -> Tensor:
        time_is_whole = x_BFTD.shape[FRAMES] == self._num_rows  # else fewer: there are two ranks or more
        if whole == "time" and not time_is_whole:
            self._tokens = self._split_tokens(x_BFTD.shape[TOKENS])
            return _Switch.apply(x_BFTD, self._group, TOKENS, self._tokens, FRAMES, self._rows)
        if whole == "space" and time_is_whole:
            return _Switch.apply(x_BFTD, self._group, FRAMES, self._rows, TOKENS, self._tokens)
        return x_BFTD

    def _split_tokens(self, num_tokens: int) -> list[int]:
        if num_tokens < self._group.size:
            raise ValueError(
                f"a frame of {num_tokens} tokens cannot be cut for the {self._group.size} ranks of "
                f"engine.sequence_parallel; set it to {num_tokens} or less"
            )
        return even_split(num_tokens, self._group.size)


def even_split(count: int, size: int) -> list[int]:
    """`count` over `size` ranks: the first ranks get one more where it does not divide evenly."""
    return [count // size + (rank < count % size) for rank in range(size)]


def _part(x: Tensor, axis: int, counts: Sequence[int], rank: int) -> Tensor:
    return x.narrow(axis, sum(counts[:rank]), counts[rank])


class _Switch(torch.autograd.Function):
    """The all-to-all of DSP: split one axis over the ranks and gather the other; backward does the reverse."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BFTD: Tensor,
        group: SequenceGroup,
        cut_axis: int,
        cut_counts: Sequence[int],
        join_axis: int,
        join_counts: Sequence[int],
    ) -> Tensor:
        ctx.way_back = group, join_axis, join_counts, cut_axis, cut_counts
        return switch(x_BFTD, group, cut_axis, cut_counts, join_axis, join_counts)

    @staticmethod
    def backward(ctx: Any, grad_BFTD: Tensor) -> tuple[Tensor | None, ...]:
        return switch(grad_BFTD, *ctx.way_back), None, None, None, None, None


def switch(
    x_BFTD: Tensor,
    group: SequenceGroup,
    cut_axis: int,
    cut_counts: Sequence[int],
    join_axis: int,
    join_counts: Sequence[int],
) -> Tensor:
    """Rank r of the group gets its part of `cut_axis` from all ranks, concatenated on `join_axis` in rank order.

    A collective of the group: one all-to-all with parts of any size.
    """
    parts = x_BFTD.split(list(cut_counts), dim=cut_axis)
    sent = torch.cat([part.reshape(-1) for part in parts])
    shapes = []
    for count in join_counts:
        shape = list(x_BFTD.shape)
        shape[cut_axis], shape[join_axis] = cut_counts[group.rank], count
        shapes.append(shape)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    received = sent.new_empty(sum(sizes))
    group.exchange(received, sent, sizes, [part.numel() for part in parts])
    pieces = [piece.view(shape) for piece, shape in zip(received.split(sizes), shapes, strict=True)]
    return torch.cat(pieces, dim=join_axis)


class _Join(torch.autograd.Function):
    """All ranks' frames concatenated; backward keeps this rank's part, because all ranks have the same loss."""

    @staticmethod
    def forward(ctx: Any, out_BOFHW: Tensor, group: SequenceGroup, frames: Sequence[int]) -> Tensor:
        ctx.own = frames, group.rank
        batch, channels, _, height, width = out_BOFHW.shape
        whole_BOFHW = out_BOFHW.new_zeros(batch, channels, sum(frames), height, width)
        _part(whole_BOFHW, 2, frames, group.rank).copy_(out_BOFHW)
        group.sum_(whole_BOFHW)  # exact: every element is a number on one rank and 0 on the others
        return whole_BOFHW

    @staticmethod
    def backward(ctx: Any, grad_BOFHW: Tensor) -> tuple[Tensor | None, ...]:
        frames, rank = ctx.own
        return _part(grad_BOFHW, 2, frames, rank).contiguous(), None, None
