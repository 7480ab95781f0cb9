"""FVD, FID, KID, IS, CLIP score and CLIP consistency of sampled clips: which features each needs, and what is recorded.

In: the names of metrics, two sets of clips and the networks' files. Out: a value with its interval and everything
needed to compare it: counts, frames, size, network and its sha256. FVD follows StyleGAN-V: clips of 16 frames, real
ones every third frame from a random position, generated ones unchanged, 2048 of each, covariances divided by N. Here
the draws are seeded, and the default frame policy is that of the samples.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latte_scale.data.schema import VideoSettings
from latte_scale.data.video import VideoError, probe
from latte_scale.engine.dist import Ranks
from latte_scale.evaluation import scores
from latte_scale.evaluation.bootstrap import LEVEL, bootstrap
from latte_scale.evaluation.clips import Clip, ClipSet, choose
from latte_scale.evaluation.features import Window, extract, kept
from latte_scale.evaluation.networks import Network, cache_folder, find_network, load_network

NETWORK_OF = {
    "fvd": "i3d",
    "fid": "inception",
    "kid": "inception",
    "is": "inception",
    "clip": "clip",
    "clip_consistency": "clip",
}
NEEDS_REAL = ("fvd", "fid", "kid")
NEEDS_COUNT = (*NEEDS_REAL, "is")  # those whose value depends on the number of clips
STYLEGAN_V = VideoSettings(frames=16, frame_interval=3)

Show = Callable[[str], Callable[[int, int], None]]  # name of a stage -> its progress


@dataclass(frozen=True)
class Protocol:
    """How clips are read and scores computed; None: the samples' own policy, else StyleGAN-V's."""

    frames: int | None = None
    frame_interval: int | None = None  # of real clips; sampled ones are used unchanged
    size: int | None = None  # pixels per side; None: of the first sampled clip
    num_clips: int = 2048  # of each side
    num_resamples: int = 200
    seed: int = 0
    batch_size: int = 8  # clips embedded at a time: memory only

    def __post_init__(self) -> None:
        for name, least in {"size": 1, "num_clips": 1, "num_resamples": 0, "batch_size": 1}.items():
            came = getattr(self, name)
            if came is not None and came < least:
                raise ValueError(f"{name}: expected {least} or more, got {came}")


class Scorer:
    """Computes metrics one after another; networks and features are made when first needed and reused."""

    def __init__(
        self,
        real: ClipSet | None,
        fake: ClipSet,
        network_files: dict[str, str | None],
        protocol: Protocol,
        ranks: Ranks,
        show: Show,
    ) -> None:
        """network_files: network -> path or URL, None for its default place. A collective, as every method."""
        self._real_set, self._protocol, self._ranks, self._show = real, protocol, ranks, show
        self._files = network_files
        self._fake = choose(fake, protocol.num_clips, protocol.seed)
        self._real = choose(real, protocol.num_clips, protocol.seed) if real else []
        video = _video(fake, protocol)
        self._windows = {
            "real": Window(video, protocol.seed),
            "fake": Window(replace(video, frame_interval=1, window=None, sampling="stride"), None),
        }
        self._network = functools.cache(self._load)
        self._features = functools.cache(self._make_features)

    def check(self, name: str) -> None:
        """Raise ValueError if `name` cannot be computed: real clips, their number, or the network's file."""
        if name in NEEDS_REAL and self._real_set is None:
            raise ValueError(f"{name} compares with real clips: pass --real URL")
        came, wanted = [len(self._fake)] + ([len(self._real)] if name in NEEDS_REAL else []), self._protocol.num_clips
        if name in NEEDS_COUNT and wanted < 2:
            raise ValueError(f"{name}: expected --num-clips of 2 or more, got {wanted}")
        if name in NEEDS_COUNT and min(came) < wanted:
            words = f"{len(self._fake)} sampled" + (f" and {len(self._real)} real" if name in NEEDS_REAL else "")
            fewer = f", or pass --num-clips {min(came)}: scores of different counts do not compare"
            raise ValueError(
                f"{name}: expected {wanted} clips, got {words}; sample more{fewer if min(came) > 1 else ''}"
            )
        if name == "clip_consistency" and self._windows["fake"].video.frames < 2:
            raise ValueError("clip_consistency: expected clips of 2 frames or more, got 1; drop it")
        if name == "clip" and (without := [clip.name for clip in self._fake if clip.load()[1] == ""]):
            raise ValueError(
                f"clip: expected a prompt for every video, {len(without)} have none, the first is {without[0]}; pass "
                "a folder that `latte-scale sample` wrote (prompts.jsonl)"
            )
        find_network(NETWORK_OF[name], self._files[NETWORK_OF[name]])

    def score(self, name: str) -> dict[str, Any]:
        """The record of one metric: value, low, high, std_error, and how it was made."""
        protocol, network = self._protocol, self._network(NETWORK_OF[name])
        score, num_real = self._score_function(name), len(self._real) if name in NEEDS_REAL else 0
        interval = bootstrap(
            score, num_real, len(self._fake), protocol.num_resamples, protocol.seed, self._ranks,
            self._show(f"{name}: resampling"),
        )  # fmt: skip
        video = self._windows["real" if num_real else "fake"].video
        return {
            **vars(interval),
            "level": LEVEL,
            "num_resamples": protocol.num_resamples,
            "num_real": num_real,
            "num_fake": len(self._fake),
            "video": video.stored(),
            "seed": protocol.seed,
            "network": {"source": network.source, "sha256": network.sha256},
            "real_fingerprint": self._real_fingerprint() if num_real else None,
        }

    def _score_function(self, name: str) -> scores.Score:
        if name in ("fvd", "fid"):
            return scores.frechet_score(*self._both(NETWORK_OF[name]))
        if name == "kid":
            return scores.kernel_score(*self._both("inception"))
        if name == "is":
            return scores.inception_score(self._features("inception", "fake", "classes"))
        rows_UKD = self._features("clip", "fake", "features")
        frames_UKD, text_U1D = rows_UKD[:, :-1], rows_UKD[:, -1:]
        return scores.clip_score(frames_UKD, text_U1D) if name == "clip" else scores.temporal_score(frames_UKD)

    def _both(self, network: str) -> tuple[Tensor, Tensor]:
        return self._features(network, "real", "features"), self._features(network, "fake", "features")

    def _load(self, name: str) -> Network:
        return load_network(name, find_network(name, self._files[name]), self._ranks.device)

    def _make_features(self, name: str, side: str, kind: str) -> Tensor:
        network, window = self._network(name), self._windows[side]
        clips: list[Clip] = self._real if side == "real" else self._fake
        show = self._show(f"{name}: {len(clips)} {side} clips")

        def make() -> Tensor:
            return extract(clips, window, getattr(network, kind), self._ranks, self._protocol.batch_size, show)

        if side == "fake":
            return make()

        def facts() -> list[object]:
            names = [clip.name for clip in clips]
            made_by = network.sha256, name, kind, torch.__version__, "without TF32"
            return [self._real_fingerprint(), window, names, *made_by]

        return kept(make, cache_folder() / "features", facts, self._ranks)

    @functools.cached_property
    def _fingerprint(self) -> str:
        return self._real_set.fingerprint()

    def _real_fingerprint(self) -> str | None:
        """Fingerprint of the real set; only on rank 0, which alone reads the files and writes the record."""
        return self._fingerprint if self._ranks.rank == 0 else None


def _video(fake: ClipSet, protocol: Protocol) -> VideoSettings:
    """The frame policy of real clips. Raises VideoError naming a first clip that is no video."""
    video = fake.policy or STYLEGAN_V
    first = fake.clips[0]
    try:
        info = probe(first.load()[0])
    except VideoError as error:
        raise VideoError(f"{first.place}: {error}") from error
    size = {"height": protocol.size or info.height, "width": protocol.size or info.width}
    given = {key: getattr(protocol, key) for key in ("frames", "frame_interval")}
    return replace(video, **size, hflip=False, **{key: value for key, value in given.items() if value is not None})
