"""What DeepSpeed's ZeRO stage 3 allocates in a step besides activations (0.19, deepspeed/runtime/zero).

In: the weights, the ranks, the entries of a step's log. Out: entries in the ledger. Every weight is sharded, and a rank
holds its shards twice (stage3.py compares a device with a string, so it makes a master copy even of fp32 weights), plus
a buffer for its gradients. The decision worth knowing: the model is of the third step and later ones, when DeepSpeed
has learned the order in which weights are used (partitioned_param_coordinator.py). From then on the next weights are
prefetched into one buffer, from which each is copied, and they stay gathered if they are used again soon.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from latte_scale.config import Config
from latte_scale.estimate.ledger import Ledger
from latte_scale.estimate.recording import MODEL, Entry
from latte_scale.estimate.weights import Weights
from latte_scale.estimate.zero import NORM_BYTES, Place

REUSED_WITHIN = 1_000_000_000  # elements (stage3_max_reuse_distance): weights used again before so many stay gathered
MOST_LIVE = 1_000_000_000  # gathered elements beyond which nothing is prefetched (stage3_max_live_parameters)

LAST = 2  # weights of a block (weight and bias of its last layer) that are used only after the rest of it has run
OUTPUT = -2  # in place of a block: the model's weights that were defined after the blocks


@dataclass
class _Sent:
    """Weights that were prefetched together, into one buffer."""

    waiting: set[Place]  # not used yet
    size: int  # bytes of the buffer
    is_copied: bool = False


class Zero3Memory:
    """ZeRO stage 3, as ledger.py calls it.

    Weights are used in the order in which they were defined; those defined after the blocks belong to the output layer.
    """

    def __init__(self, config: Config, weights: Weights, ledger: Ledger, num_gpus: int) -> None:
        self._ledger, self._offloads = ledger, config.engine.cpu_offload
        self._numel = {place: math.prod(weights.shape(*place)) for place in weights.order}
        self._pieces = {place: -(-numel // num_gpus) for place, numel in self._numel.items()}
        self._num_gpus, total, piece = num_gpus, sum(self._numel.values()), sum(self._pieces.values())
        self._persistent = {
            place for place, numel in self._numel.items() if numel <= config.engine.zero_persistent_elements
        }
        self._bucket = min(config.engine.zero_bucket_elements, total)
        self._ahead = min(config.engine.zero_prefetch_elements, total)
        states = {"optimizer": 12 * piece, "ema": 4 * piece * len(config.ema.decays), "gradients": 4 * piece}
        if self._offloads:
            ledger.host += sum(states.values())
            states = {}
        self._there = set(self._persistent)
        there = 4 * sum(self._numel[place] for place in self._there)
        ledger.change({"parameters": 4 * piece, "gathered": there, "communication": 4 * self._bucket} | states)
        checkpointing = config.engine.activation_checkpointing
        # Without a cast to bf16 autograd saves the gathered weights themselves, and so keeps them alive.
        self._autograd_keeps = config.train.precision != "bf16" and checkpointing == "none"
        self._set_order(weights, computed_again=checkpointing != "none")
        self._sent_with: dict[Place, _Sent] = {}
        self._used, self._next = 0, 0  # weights used in this micro-batch; and requested or skipped
        self._filled: list[Place] = []

    def _set_order(self, weights: Weights, computed_again: bool) -> None:
        """The order in which weights are used, and the elements used between forward and backward of a block."""
        places = {
            index: [(index, number) for number in range(len(shapes))] for index, shapes in enumerate(weights.blocks)
        }
        last = max(place for place, (block, _) in enumerate(weights.order) if block != MODEL)
        places[MODEL] = [place for place in weights.order[:last] if place[0] == MODEL]
        places[OUTPUT] = list(weights.order[last + 1 :])
        self._of, self._last = places, len(weights.blocks) - 1
        blocks = [MODEL, *range(len(weights.blocks)), OUTPUT]
        self._order, self._back_at = [place for block in blocks for place in places[block]], {}
        for block in reversed(blocks):
            self._back_at[block] = len(self._order)
            self._order += places[block]
        visits, self._until_backward, passed = 3 if computed_again else 2, {}, 0
        for block in reversed(blocks):
            self._until_backward[block] = passed
            passed += visits * sum(self._numel[place] for place in places[block])

    def begin(self, is_last: bool) -> None:
        """Start a micro-batch: weights are used from the first one on again."""
        self._used, self._next = 0, 0

    def on(self, entry: Entry) -> None:
        """Follow DeepSpeed's hooks."""
        if entry.what == "gradient":
            self._ledger.add("gradients", 4 * self._numel[entry[1:]])
        elif entry.what == "complete":
            self._fill(entry[1:])
        elif entry.what == "enter":
            self._use(self._of[entry.first] if entry.first == MODEL else self._of[entry.first][:-LAST])
        elif entry.what == "back":
            self._use(self._of[OUTPUT if entry.first == MODEL else entry.first])
        elif entry.what == "leave" and entry.first != MODEL:
            self._use(self._of[entry.first][-LAST:])
            if not self._stays(entry.first):
                self._release(entry.first)
            if entry.first == self._last:
                self._use(self._of[OUTPUT])
        elif entry.what == "passed":
            self._release(entry.first)

    def end(self) -> None:
        """The backward pass is over."""
        self._reduce()
        self._release(OUTPUT)
        self._release(MODEL)

    def update(self) -> None:
        """Norms are computed one by one; then the gradients are flattened into a second copy."""
        if self._offloads:
            return
        largest = NORM_BYTES * max(self._pieces.values())
        self._ledger.add("workspace", largest)
        self._ledger.add("workspace", -largest)
        self._ledger.add("gradients", 4 * sum(self._pieces.values()))
        self._ledger.add("gradients", -4 * sum(self._pieces.values()))

    def _use(self, places: Sequence[Place]) -> None:
        for place in places:
            self._use_one(place)

    def _use_one(self, place: Place) -> None:
        """Gather a weight unless it is gathered or on its way, and prefetch the next ones."""
        sent = self._sent_with.pop(place, None)
        if sent is None and place not in self._there:
            self._there.add(place)  # a single weight is gathered in place
            self._ledger.add("gathered", 4 * self._numel[place])
        elif sent is not None:
            self._arrive(sent, place)
        self._used += 1
        self._next = max(self._next, self._used)
        self._send_ahead()

    def _arrive(self, sent: _Sent, place: Place) -> None:
        """The first weight that is used has the whole buffer copied out; the last one frees the buffer."""
        if not sent.is_copied:
            sent.is_copied = True
            self._there |= sent.waiting
            self._ledger.add("gathered", 4 * sum(self._numel[other] for other in sent.waiting))
        sent.waiting.remove(place)
        if not sent.waiting:
            self._ledger.add("communication", -sent.size)

    def _send_ahead(self) -> None:
        there = sum(self._numel[place] for place in self._there | self._sent_with.keys())
        limit, elements, places = min(MOST_LIVE - there, self._ahead), 0, set()
        while self._next < len(self._order) and elements < limit:
            place = self._order[self._next]
            self._next += 1
            if place not in self._there and place not in self._sent_with and place not in places:
                places.add(place)
                elements += self._numel[place]
        if places:
            sent = _Sent(places, 4 * self._num_gpus * sum(self._pieces[place] for place in places))
            self._ledger.add("communication", sent.size)
            self._sent_with |= dict.fromkeys(places, sent)

    def _stays(self, block: int) -> bool:
        """Whether a block's weights stay gathered after forward, for their next use."""
        soon = self._until_backward[block] < REUSED_WITHIN
        return self._autograd_keeps or soon or self._next > self._back_at[block]

    def _release(self, block: int) -> None:
        for place in self._of[block]:
            if place in self._there and place not in self._persistent:
                self._there.remove(place)
                self._ledger.add("gathered", -4 * self._numel[place])

    def _fill(self, place: Place) -> None:
        """Move a gradient into the bucket; one larger than the bucket is reduced by itself."""
        filled = sum(self._numel[other] for other in self._filled)
        if self._filled and filled + self._numel[place] > self._bucket:
            self._reduce()
            filled = 0
        self._filled.append(place)
        if filled + self._numel[place] <= self._bucket:
            self._ledger.add("gradients", -4 * self._numel[place])

    def _reduce(self) -> None:
        """The bucket is reordered by rank, in a buffer of its own, and reduced."""
        size = 4 * self._num_gpus * sum(self._pieces[place] for place in self._filled)
        alone = len(self._filled) == 1 and self._numel[self._filled[0]] % self._num_gpus == 0
        self._ledger.add("communication", 0 if alone else size)
        self._ledger.add("communication", 0 if alone else -size)
        if len(self._filled) == 1 and self._numel[self._filled[0]] > self._bucket:
            self._ledger.add("gradients", -4 * self._numel[self._filled[0]])
        self._filled = []
