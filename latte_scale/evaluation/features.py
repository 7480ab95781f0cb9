"""From clips to features, over all ranks: each rank embeds every n-th clip, and all ranks get the features of all.

One all-reduce of arrays that are zero in the other ranks' rows exchanges them, so the features, and all scores, do not
depend on the number of ranks. A clip that cannot be read on one rank is an error on all ranks, so none waits for a
failed one. Features of real clips are cached in a file named by a hash of all that determines them.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import TooShortError
from latte_scale.engine.dist import Ranks
from latte_scale.evaluation.clips import Clip, read_window
from latte_scale.evaluation.networks import Embed
from latte_scale.store import open_store

Progress = Callable[[int, int], None]  # (done, total) of this rank's part


@dataclass(frozen=True)
class Window:
    """Which frames of a clip are used, and their size."""

    video: VideoSettings
    seed: int | None  # draws the position in a real clip; None: the first frames, for sampled ones


def extract(
    clips: Sequence[Clip], window: Window, embed: Embed, ranks: Ranks, batch_size: int, progress: Progress
) -> Tensor:
    """Features [U, K, D], float32 on the rank's device, of all clips. A collective.

    Raises ValueError on all ranks if any clip cannot be read or embedded.
    """
    mine = list(range(ranks.rank, len(clips), ranks.size))
    problem, parts = "", []
    try:
        for first in range(0, len(mine), batch_size):
            batch = [clips[number] for number in mine[first : first + batch_size]]
            parts.append(_embed_batch(batch, window, embed, ranks.device))
            progress(min(first + batch_size, len(mine)), len(mine))
    except (ValueError, OSError) as error:
        problem = str(error)
        if isinstance(error.__cause__, TooShortError):
            problem += "; choose a smaller --frame-interval or --frames, or leave such clips out"
    own = torch.cat(parts) if parts and not problem else None
    said = ranks.all_gather_object((problem, None if own is None else tuple(own.shape[1:])))
    problems = [text for text, _ in said if text]
    if problems:
        raise ValueError(problems[0])
    shape = next(shape for _, shape in said if shape is not None)
    features_UKD = torch.zeros(len(clips), *shape, device=ranks.device)
    if own is not None:
        features_UKD[mine] = own
    return ranks.sum_(features_UKD)


def _embed_batch(batch: Sequence[Clip], window: Window, embed: Embed, device: torch.device) -> Tensor:
    read = [read_window(clip, window.video, window.seed) for clip in batch]
    pixels_BFCHW = torch.from_numpy(np.stack([pixels for pixels, _ in read])).to(device)
    return embed(pixels_BFCHW, [caption for _, caption in read])


def kept(make: Callable[[], Tensor], folder: Path, facts: Callable[[], Sequence[object]], ranks: Ranks) -> Tensor:
    """The result of `make`, cached in a file under a hash of `facts` (computed on rank 0 only). A collective."""
    store, known, name = open_store(folder), None, ""
    if ranks.rank == 0:
        name = hashlib.sha256("\n".join(map(str, facts())).encode()).hexdigest()[:32] + ".npy"
        known = np.load(io.BytesIO(store.read(name))) if store.exists(name) else None
    known = ranks.broadcast_object(known)
    if known is not None:
        return torch.from_numpy(known).to(ranks.device)
    made = make()
    if ranks.rank == 0:
        data = io.BytesIO()
        np.save(data, made.cpu().numpy())
        store.write(name, data.getvalue())
    return made
