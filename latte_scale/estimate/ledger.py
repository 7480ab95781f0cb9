"""Bytes allocated on a rank's device, by part, at every moment of a step, and the parts at the peak.

In: allocations and frees of a step, in order. Out: the parts at the peak. `SingleEngineMemory` and `Fsdp2Memory` add
what the engines single and fsdp2 allocate besides activations; zero.py and zero3.py do so for DeepSpeed. All four have
the same calls: `begin` before a micro-batch, `on` for each entry of its log, `end` after its backward pass, and
`update` once, for the optimizer's step.
"""

from latte_scale.config import Config
from latte_scale.estimate.recording import MODEL, Entry
from latte_scale.estimate.weights import Weights, padded_bytes, rows_bytes, whole_bytes

PARTS = ("parameters", "gathered", "gradients", "optimizer", "ema", "activations", "workspace", "communication")


class Ledger:
    """Bytes now and at the peak; `moment` is the last log entry before the peak."""

    def __init__(self) -> None:
        self.now = dict.fromkeys(PARTS, 0)
        self.most: dict[str, int] = {}
        self.moment: Entry | None = None
        self.host = 0
        self.last: Entry | None = None
        self._total, self._most = 0, -1

    def add(self, part: str, size: float) -> None:
        """`size` bytes more, or less if it is negative."""
        self.change({part: size})

    def change(self, sizes: dict[str, float]) -> None:
        """Change several parts at one moment."""
        for part, size in sizes.items():
            self.now[part] += size
            self._total += size
        if self._total > self._most:
            self._most, self.most, self.moment = self._total, dict(self.now), self.last


class SingleEngineMemory:
    """Engine single: nothing is sharded."""

    def __init__(self, config: Config, weights: Weights, ledger: Ledger) -> None:
        size = weights.size_bytes
        ledger.change({"parameters": size, "optimizer": 2 * size, "ema": len(config.ema.decays) * size})
        self._weights, self._ledger = weights, ledger
        self._is_first = True

    def begin(self, is_last: bool) -> None:
        """Start a micro-batch."""

    def on(self, entry: Entry) -> None:
        """A gradient of a later micro-batch is freed when it is complete: it has been added to the existing one."""
        if entry.what == "gradient" or (entry.what == "complete" and not self._is_first):
            size = whole_bytes([self._weights.shape(entry.first, entry.second)])
            self._ledger.add("gradients", size if entry.what == "gradient" else -size)

    def end(self) -> None:
        """The backward pass is over."""
        self._is_first = False

    def update(self) -> None:
        """AdamW in place."""


class Fsdp2Memory:
    """Engine fsdp2 (torch 2.13, torch/distributed/fsdp/_fully_shard): every tensor sharded by rows, units gathered.

    A unit is gathered into one buffer, from which its weights are copied. In forward the buffer lives until the next
    unit is copied out; the buffer of a unit that was prefetched lives until that unit is used. A unit's gradients stay
    unsharded until backward has passed it in the last micro-batch; then they are copied into a buffer, which lives
    until the next unit's, and reduce-scattered to rows.
    """

    def __init__(self, config: Config, weights: Weights, ledger: Ledger, num_shards: int, frees: bool) -> None:
        """`frees`: gathered weights are freed after forward."""
        units = weights.units(config.engine.blocks_per_unit)
        self._blocks_per_unit, self._ahead = config.engine.blocks_per_unit, config.engine.prefetch_units
        self._root, self._num_blocks = len(units) - 1, len(weights.blocks)
        self._padded = [padded_bytes(unit, num_shards) for unit in units]
        self._rows = [rows_bytes(unit, num_shards) for unit in units]
        self._weights, self._ledger, self._frees, self._is_alone = weights, ledger, frees, num_shards == 1
        rows = sum(self._rows)
        ledger.change({"parameters": rows, "optimizer": 2 * rows, "ema": len(config.ema.decays) * rows})
        self._gathered: set[int] = set()
        self._on_its_way: set[int] = set()  # gathered into its buffer, not yet copied out
        self._kept_buffer = 0  # of the unit that was copied out last in forward
        self._reducing = 0
        self._fresh = [0] * len(units)  # gradients of this micro-batch
        self._summed = [0] * len(units)  # of earlier micro-batches
        self._is_last = True

    def begin(self, is_last: bool) -> None:
        """Start a micro-batch; gradients are reduced in the last one."""
        self._is_last = is_last

    def on(self, entry: Entry) -> None:
        """Follow FSDP's hooks, which sit where the recording's marks are."""
        unit = self._root if entry.first == MODEL else entry.first // self._blocks_per_unit
        if entry.what == "gradient":
            size = whole_bytes([self._weights.shape(entry.first, entry.second)])
            self._fresh[unit] += size
            self._ledger.add("gradients", size)
        elif entry.what == "enter" and self._is_edge(entry.first, 0):
            self._gather(unit, in_forward=True)
            first = 0 if unit == self._root else unit + 1
            for ahead in range(first, min(first + self._ahead, self._root)):
                self._send(ahead)
        elif entry.what == "leave" and self._is_edge(entry.first, -1):
            self._leave(unit)
        elif entry.what == "back" and self._is_edge(entry.first, -1):
            self._gather(unit, in_forward=False)
            named = [] if unit == self._root else range(unit - 1, max(-1, unit - 1 - self._ahead), -1)
            for ahead in named or range(unit - 1, max(-1, unit - 2), -1):  # unless named, the next one
                self._send(ahead)
        elif entry.what == "passed" and self._is_edge(entry.first, 0):
            self._pass(unit)

    def end(self) -> None:
        """The backward pass is over: the root unit comes last, and buffers are freed."""
        self._pass(self._root)
        self._ledger.add("communication", -self._reducing)
        self._reducing = 0

    def update(self) -> None:
        """AdamW in place on the rows."""
        self._ledger.add("gradients", -sum(self._rows))

    def _is_edge(self, block: int, edge: int) -> bool:
        """Whether a block is the first (0) or last (-1) of its unit; a model is both."""
        if block == MODEL or self._blocks_per_unit == 1:
            return True
        return block % self._blocks_per_unit == 0 if edge == 0 else (
            (block + 1) % self._blocks_per_unit == 0 or block == self._num_blocks - 1
        )  # fmt: skip

    def _send(self, unit: int) -> None:
        if unit not in self._gathered and unit not in self._on_its_way:
            self._on_its_way.add(unit)
            self._ledger.add("communication", 0 if self._is_alone else self._padded[unit])

    def _gather(self, unit: int, in_forward: bool) -> None:
        self._send(unit)
        if unit not in self._on_its_way:
            return
        self._on_its_way.remove(unit)
        self._gathered.add(unit)
        buffer = 0 if self._is_alone else self._padded[unit]
        if in_forward:
            self._free_kept_buffer()
        self._ledger.add("gathered", self._padded[unit])
        if in_forward:
            self._kept_buffer = buffer
        else:
            self._ledger.add("communication", -buffer)

    def _free_kept_buffer(self) -> None:
        self._ledger.add("communication", -self._kept_buffer)
        self._kept_buffer = 0

    def _leave(self, unit: int) -> None:
        if self._frees:
            self._free(unit)
        if unit == self._root:
            self._free_kept_buffer()

    def _free(self, unit: int) -> None:
        if unit in self._gathered:
            self._gathered.remove(unit)
            self._ledger.add("gathered", -self._padded[unit])

    def _pass(self, unit: int) -> None:
        if self._summed[unit]:
            self._ledger.add("gradients", -self._fresh[unit])  # added to those of the micro-batches before
        else:
            self._summed[unit] = self._fresh[unit]
        self._fresh[unit] = 0
        self._free(unit)
        if not self._is_last:
            return
        self._ledger.add("communication", -self._reducing)
        self._reducing = self._padded[unit]
        self._ledger.add("communication", self._reducing)
        self._ledger.add("gradients", -self._summed[unit])
        self._ledger.add("gradients", self._rows[unit])
        self._summed[unit] = 0
