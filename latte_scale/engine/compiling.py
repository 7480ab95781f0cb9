"""torch.compile for the repeated blocks, and a count of what it compiled for which bucket.

In: a model's blocks, and the bucket of each step that ran. Out: the blocks, compiled when they are first called, and
the number of graphs by bucket. The decision worth knowing: shapes are static, with one graph per kind of block and
bucket, because kernels for dynamic shapes are slower. Only the bucket may change a shape (captions are padded to one
length, conditioning.py). A graph compiled after a bucket's first step is a fault and is logged with torch's reason.
"""

import logging
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

logger = logging.getLogger("latte_scale")

MOST_GRAPHS = 128
"""Limit of graphs for one function. torch's own limit is 8, beyond which the function runs uncompiled: three sizes of
clips with two kinds of block reach that as soon as validation runs them without gradients, too."""


class Compilation(NamedTuple):
    """One call of torch's compiler."""

    function: str  # as "forward (latte_scale/model/blocks.py:105)"
    seconds: float  # without the backward graph's, which is compiled when it is first run
    reason: str  # torch's reasons why none of the function's existing graphs fits; "" for a first compilation


def compile_blocks(blocks: Sequence[nn.Module], backend: str = "inductor") -> None:
    """torch.compile each block in place: equal blocks share one compilation per shape; names are unchanged."""
    _allow_many_graphs()
    for block in blocks:
        block.compile(backend=backend, dynamic=False)


def compile_forwards(blocks: Sequence[nn.Module]) -> None:
    """torch.compile each block's forward alone: wrappers that are added afterwards are not compiled."""
    _allow_many_graphs()
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


def _allow_many_graphs() -> None:
    from torch._dynamo import config  # takes seconds to import: only where something is compiled

    config.recompile_limit = max(MOST_GRAPHS, config.recompile_limit)


class Compilations:
    """This process's compilations during a run: logged as they happen, counted by the bucket of the step."""

    def __init__(self, enabled: bool) -> None:
        """`enabled`: blocks are compiled (engine.compile); otherwise nothing is counted."""
        self.by_bucket: Counter[str] = Counter()
        self.recompiled: list[Compilation] = []  # after their bucket's first step
        self._enabled, self._last, self._reasons = enabled, None, Reasons()
        if enabled:
            from torch._dynamo.utils import set_compilation_metrics_limit

            set_compilation_metrics_limit(4 * MOST_GRAPHS)  # torch keeps 64
            self._reasons.listen()
            self._take()

    def note(self, bucket: str, step: int, is_expected: bool = False) -> tuple[int, int]:
        """Count the compilations since the last call, in a step of `bucket`: (graphs, number of them recompiled).

        A bucket's first step compiles its graphs. Graphs of a later step are recompilations, logged as warnings, unless
        `is_expected`.
        """
        new = self._take()
        is_again = bucket in self.by_bucket and not is_expected
        self.by_bucket[bucket] += len(new)
        if not new:
            return 0, 0
        if not is_again:
            seconds = sum(each.seconds for each in new)
            logger.info("step %d: compiled %d graphs for %s in %.0f s", step, len(new), bucket, seconds)
            return len(new), 0
        self.recompiled += new
        for each in new:
            logger.warning("step %d: compiled %s again for %s: %s", step, each.function, bucket, each.reason)
        return len(new), len(new)

    def _take(self) -> list[Compilation]:
        """Compilations of forward graphs since the last call, oldest first."""
        if not self._enabled:
            return []
        from torch._dynamo.utils import get_compilation_metrics

        new = []
        for entry in reversed(get_compilation_metrics()):
            if entry is self._last:
                break
            new.append(entry)
        self._last = new[0] if new else self._last
        return [self._compilation(entry) for entry in reversed(new) if entry.is_forward is not False]

    def _compilation(self, entry: Any) -> Compilation:
        """From torch's record, which names no function once the limit on graphs is reached."""
        where = f"{entry.co_name} ({entry.co_filename}:{entry.co_firstlineno})" if entry.co_name else "nothing any more"
        reason = self._reasons.next(entry.recompile_reason) if entry.recompile_reason else entry.fail_reason
        return Compilation(where, (entry.duration_us or 0) / 1e6, reason or "")


class Reasons(logging.Handler):
    """Collects torch's reasons for recompilations from its log.

    Its records give one graph that did not fit, often that of another size; its log gives all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._heard: deque[str] = deque()

    def listen(self) -> None:
        """Make torch log its reasons, to this handler alone; TORCH_LOGS, where set, decides what is logged."""
        torch._logging.set_logs(recompiles=True)
        logger = logging.getLogger("torch._dynamo.guards.__recompiles")
        logger.handlers = [each for each in logger.handlers if not isinstance(each, Reasons)] + [self]
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the lines that give a reason."""
        lines = (line.strip() for line in record.getMessage().splitlines())
        self._heard.append("; ".join(line.removeprefix("- ") for line in lines if line.startswith("- ")))

    def next(self, otherwise: str) -> str:
        """The reason for the oldest recompilation not returned yet; `otherwise` where torch logged none."""
        return self._heard.popleft() if self._heard else otherwise
