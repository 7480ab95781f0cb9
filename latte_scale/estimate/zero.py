"""What DeepSpeed's ZeRO allocates in a step besides activations (0.19, deepspeed/runtime/zero).

In: the weights, the ranks, the entries of a step's log. Out: entries in the ledger. Stages 1 and 2 (stage_1_and_2.py)
flatten the weights of a group and split them into equal pieces; gradients go through a bucket, whose contents are
copied once more during the reduction if they belong to several ranks. Stage 3 is in zero3.py.
"""

import math
from itertools import chain

from latte_scale.config import Config
from latte_scale.estimate.ledger import Ledger
from latte_scale.estimate.recording import Entry
from latte_scale.estimate.weights import Weights
from latte_scale.optim import is_decayed

ALIGNED_TO = 2  # elements: stage_1_and_2.py, nccl_start_alignment_factor
NORM_BYTES = 8  # per element of a gradient while its norm is computed: in float64 (zero/utils.py, get_norm_dtype)
Place = tuple[int, int]  # block and number of a weight


def groups_of(config: Config, weights: Weights) -> list[list[Place]]:
    """The optimizer's groups (optim.param_groups): one without weight decay, else decayed weights and the others."""
    if not config.optim.weight_decay:
        return [list(weights.order)]
    decayed = [place for place in weights.order if is_decayed(weights.shape(*place))]
    plain = [place for place in weights.order if not is_decayed(weights.shape(*place))]
    return [group for group in (decayed, plain) if group]


class ZeroMemory:
    """ZeRO stages 1 and 2, as ledger.py calls it."""

    def __init__(self, config: Config, weights: Weights, ledger: Ledger, num_gpus: int) -> None:
        self._ledger, self._stage, self._offloads = ledger, config.engine.zero_stage, config.engine.cpu_offload
        self._numel = {place: math.prod(weights.shape(*place)) for place in weights.order}
        self._groups = groups_of(config, weights)
        self._pieces, self._ranks_of, self._owned = [], {}, []
        for group in self._groups:
            self._lay_out(group, num_gpus)
        total = sum(self._numel.values())
        self._bucket = min(config.engine.zero_bucket_elements, total)
        flat, held = num_gpus * sum(self._pieces), min(sum(self._pieces), total)
        states = {"optimizer": 12 * sum(self._pieces), "ema": 4 * held * len(config.ema.decays)}
        if self._offloads:  # the largest gradient has a buffer on the device on its way to the host
            ledger.host += sum(states.values())
            states = {"communication": 4 * max(self._numel.values())}
        ledger.change({"parameters": 4 * flat} | states)
        self._owned_bytes = 0 if self._offloads else 4 * sum(self._numel[place] for place in self._owned)
        self._filled: list[Place] = []
        self._has_bucket, self._has_owned, self._is_first, self._is_last = False, False, True, True

    def _lay_out(self, group: list[Place], num_gpus: int) -> None:
        """Note which ranks own which weights of a group."""
        total = sum(self._numel[place] for place in group)
        piece = -(-total // (ALIGNED_TO * num_gpus)) * ALIGNED_TO
        self._pieces.append(piece)
        start = 0
        for place in group:
            stop = start + self._numel[place]
            self._ranks_of[place] = range(start // piece, (stop - 1) // piece + 1)
            if start < piece:
                self._owned.append(place)  # by rank 0, possibly only in part
            start = stop

    def begin(self, is_last: bool) -> None:
        """Start a micro-batch."""
        self._is_last = is_last

    def on(self, entry: Entry) -> None:
        """Follow the gradients; nothing else changes ZeRO's allocations."""
        place = entry.first, entry.second
        if entry.what == "gradient":
            self._ledger.add("gradients", 4 * self._numel[place])
        if entry.what != "complete":
            return
        if not self._has_bucket:
            self._ledger.add("communication", 4 * self._bucket)
            self._has_bucket = True
        if self._stage == 2:
            self._fill(place)
        elif not self._is_first:  # added to those of the micro-batches before
            self._ledger.add("gradients", -4 * self._numel[place])

    def end(self) -> None:
        """The backward pass is over; stage 1 reduces now, after the last one."""
        if self._stage == 1 and self._is_last:
            for place in chain.from_iterable(self._groups):
                self._fill(place)
        if self._stage == 2 or self._is_last:
            self._reduce()
            self._ledger.add("communication", -4 * self._bucket)
            self._has_bucket = False
        if self._stage == 2 and not self._is_first:
            self._ledger.add("gradients", -self._owned_bytes)  # added to those of the micro-batches before
        self._has_owned = False
        self._is_first = False

    def update(self) -> None:
        """The owned gradients are flattened once more, group by group, after the norm of each."""
        largest = max((self._numel[place] for place in self._owned), default=0)
        if self._offloads:
            return
        self._ledger.add("workspace", NORM_BYTES * largest)
        self._ledger.add("workspace", -NORM_BYTES * largest)
        for piece in self._pieces:
            self._ledger.add("gradients", 4 * piece)
            self._ledger.add("gradients", -4 * piece)

    def _fill(self, place: Place) -> None:
        """Move a gradient into the bucket; one larger than the bucket is reduced by itself."""
        filled = sum(self._numel[other] for other in self._filled)
        if filled + self._numel[place] > self._bucket:
            self._reduce()
        self._filled.append(place)
        if self._numel[place] <= self._bucket:
            self._ledger.add("gradients", -4 * self._numel[place])

    def _reduce(self) -> None:
        if not self._filled:
            return
        size = 4 * sum(self._numel[place] for place in self._filled)
        owners = {rank for place in self._filled for rank in self._ranks_of[place]}
        copied = size if len(owners) > 1 else 0
        self._ledger.add("communication", copied)
        self._ledger.add("communication", -copied)
        for place in self._filled:
            is_owned = 0 in self._ranks_of[place]
            if is_owned and not self._has_owned:
                self._ledger.add("gradients", self._owned_bytes)
                self._has_owned = True
            if self._numel[place] > self._bucket and (is_owned or self._stage == 2):
                self._ledger.add("gradients", -4 * self._numel[place])
        self._filled = []
