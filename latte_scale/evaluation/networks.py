"""The networks that turn clips into features: files or URLs given by the user, their sha256 recorded with every score.

i3d and inception are the TorchScript modules published with StyleGAN-V and StyleGAN2-ADA, called with the same
arguments as in those tools and without TF32, so that the numbers agree; clip is a folder of a CLIP model and its
tokenizer in the layout of transformers. The decision worth knowing: CLIP runs through transformers, which is already a
dependency and reads the published CLIP models, including OpenCLIP's. open_clip itself needs a torchvision that matches
the build of torch.

Shapes: B clips, F frames, C channels, H W pixels, K vectors of a clip, D width of a feature.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latte_scale.store import local_path

TO_FETCH = {  # network -> (name in the folder of networks, what to fetch)
    "i3d": (
        "i3d_torchscript.pt",
        "StyleGAN-V's I3D, https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
    ),
    "inception": (
        "inception-2015-12-05.pt",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    ),
    "clip": (
        "clip-vit-large-patch14",
        "config.json, model.safetensors, preprocessor_config.json and the tokenizer's files of "
        "https://huggingface.co/openai/clip-vit-large-patch14 (a folder)",
    ),
}


Embed = Callable[[Tensor, list[str]], Tensor]
"""(uint8 pixels [B, F, 3, H, W] on the network's device, captions) -> float32 [B, K, D]."""


@dataclass(frozen=True)
class Network:
    """A feature network: its source, and its functions of clips."""

    source: str
    sha256: str  # of the file, or of a folder's weights and configuration
    features: Embed  # i3d: K = 1; inception: a row per frame; clip: a row per frame, then one of the caption
    classes: Embed | None = None  # inception: probabilities of each frame


@contextmanager
def whole_fp32() -> Iterator[None]:
    """Convolutions on a GPU without TF32, torch's default for them, which keeps 10 bits of the mantissa."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def cache_folder() -> Path:
    """The folder of networks and cached features: $LATTE_CACHE, or ~/.cache/latte_scale."""
    return Path(os.environ.get("LATTE_CACHE") or Path.home() / ".cache" / "latte_scale")


def find_network(name: str, given: str | None) -> Path:
    """The local file or folder of a network: the one given (a URL is fetched first), or its default place.

    Raises ValueError saying what to fetch and where to put it.
    """
    usual, fetch = TO_FETCH[name]
    place = cache_folder() / "networks" / usual
    if given is None:
        if place.exists():
            return place
        raise ValueError(f"no {name} network: fetch {fetch}, and put it at {place} or pass --{name} PATH")
    if given.startswith(("http://", "https://")):
        return _fetched(name, given)
    path = Path(local_path(given))
    if not path.exists():
        raise ValueError(f"--{name} {given}: there is no such file; fetch {fetch}, and put it there or at {place}")
    return path


def _fetched(name: str, url: str) -> Path:
    """The file at a URL, downloaded once."""
    if name == "clip":
        raise ValueError(f"--clip takes a folder, got {url}; fetch {TO_FETCH['clip'][1]}")
    path = cache_folder() / "networks" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))  # to a temporary name, then renamed
        except OSError as error:
            raise ValueError(
                f"--{name} {url}: cannot be fetched ({error}); fetch it elsewhere, pass its path"
            ) from error
    return path


def load_network(name: str, path: Path, device: torch.device) -> Network:
    """Load a network onto a device. Raises ValueError for a file that is none."""
    return _load_clip(path, device) if name == "clip" else _load_script(name, path, device)


# ------------------------------------------------------------------------------------------------- i3d and inception


def _load_script(name: str, path: Path, device: torch.device) -> Network:
    try:
        script = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is no TorchScript module ({str(error).splitlines()[0]}); fetch {TO_FETCH[name][1]}"
        ) from error
    call = _checked_call(script, path, name)

    def clip_features(pixels_BFCHW: Tensor, _captions: list[str]) -> Tensor:
        # rescale: 0..255 to -1..1; resize: to 224 pixels; return_features: the 400 numbers before the softmax.
        return call(pixels_BFCHW.transpose(1, 2).float(), 1, rescale=True, resize=True, return_features=True)

    def frame_features(pixels_BFCHW: Tensor, _captions: list[str]) -> Tensor:
        return call(pixels_BFCHW.flatten(0, 1), pixels_BFCHW.shape[1], return_features=True)

    def frame_classes(pixels_BFCHW: Tensor, _captions: list[str]) -> Tensor:
        # Without the last bias, as in the original implementation of the Inception Score.
        return call(pixels_BFCHW.flatten(0, 1), pixels_BFCHW.shape[1], no_output_bias=True)

    if name == "i3d":
        return Network(str(path), _sha256(path), clip_features)
    return Network(str(path), _sha256(path), frame_features, frame_classes)


def _checked_call(script: Any, path: Path, name: str) -> Callable[..., Tensor]:
    """The module as (input, vectors per clip, options) -> [B, K, D]; ValueError for one of another kind."""

    def call(x: Tensor, num_rows: int, **options: bool) -> Tensor:
        try:
            with torch.no_grad(), whole_fp32():
                out = script(x, **options)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"{path} does not take input {list(x.shape)} with {', '.join(options)}: {reason}; as --{name} is "
                f"expected {TO_FETCH[name][1]}"
            ) from error
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x):
            came = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{path}: expected features [{len(x)}, D] of input {list(x.shape)}, got {came}")
        return out.float().view(-1, num_rows, out.shape[1])

    return call


# --------------------------------------------------------------------------------------------------------------- clip


def _load_clip(path: Path, device: torch.device) -> Network:
    from transformers import CLIPModel, CLIPTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    try:
        model = CLIPModel.from_pretrained(path, local_files_only=True).to(device).eval()
        tokenizer = CLIPTokenizerFast.from_pretrained(path, local_files_only=True)
        processor = CLIPImageProcessorPil.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no CLIP model ({error}); fetch {TO_FETCH['clip'][1]}") from error

    @torch.no_grad()
    @whole_fp32()
    def features(pixels_BFCHW: Tensor, captions: list[str]) -> Tensor:
        images = list(pixels_BFCHW.flatten(0, 1).cpu().numpy().transpose(0, 2, 3, 1))
        seen = processor(images=images, return_tensors="pt")["pixel_values"].to(device)
        frames_ND = model.visual_projection(model.vision_model(pixel_values=seen).pooler_output)
        tokens = tokenizer(captions, padding=True, truncation=True, max_length=77, return_tensors="pt").to(device)
        text_BD = model.text_projection(model.text_model(**tokens).pooler_output)
        return torch.cat([frames_ND.view(*pixels_BFCHW.shape[:2], -1), text_BD[:, None]], dim=1).float()

    return Network(str(path), _sha256(path), features)


def _sha256(path: Path) -> str:
    """sha256 of a file, or of the weights and configuration in a folder."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for member in sorted(path.iterdir()):
        if member.suffix in (".json", ".safetensors", ".bin", ".txt"):
            with open(member, "rb") as file:
                digest.update(f"{member.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
