"""Atomic checkpoints, from any engine and number of ranks to any other.

`settings` is the config section. `format` defines the content of a checkpoint, `load` finds and reads the newest valid
one, and `save` writes one in the background (`write`). `depot` is the interface of a place for checkpoints: a `folder`
(which changes the disk only through `disk`) or a `bucket`. Outside training, `content` compares and converts
checkpoints of any format, with `dcp` for torch's and `deepspeed` for DeepSpeed's.
"""

from latte_scale.checkpoint.format import (
    MANIFEST,
    STEP_FOLDER,
    Checkpoint,
    CheckpointError,
    Manifest,
    OutOfReachError,
    Piece,
    Trees,
    UnusableStoreError,
    part_of_copies,
    state_trees,
)
from latte_scale.checkpoint.load import (
    find_newest_sound,
    list_steps,
    load_full,
    load_into,
    on_rank_0,
    open_checkpoint,
    verify,
    verify_tree,
)
from latte_scale.checkpoint.save import Checkpointer
from latte_scale.checkpoint.settings import CheckpointSettings

__all__ = [
    "MANIFEST",
    "STEP_FOLDER",
    "Checkpoint",
    "CheckpointError",
    "CheckpointSettings",
    "Checkpointer",
    "Manifest",
    "OutOfReachError",
    "Piece",
    "Trees",
    "UnusableStoreError",
    "find_newest_sound",
    "list_steps",
    "load_full",
    "load_into",
    "on_rank_0",
    "open_checkpoint",
    "part_of_copies",
    "state_trees",
    "verify",
    "verify_tree",
]
