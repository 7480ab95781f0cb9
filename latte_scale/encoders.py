"""The frozen encoders: a VAE between pixels and latents, and a T5 from captions to embeddings.

In: names (`tiny`, a local folder in diffusers' or transformers' layout, or a hub id). Out: `VideoAutoencoder` and
`TextEncoder`, which shard encoding, training on raw clips, sampling and export share, so that the latent scale and the
rule for text are defined once. Both follow diffusers' LattePipeline: frames are encoded one by one, captions are
lowered and stripped, padded to `text_max_length` and run with an attention mask, then trimmed to their real tokens.
The decision worth knowing: raw latents are what the VAE gives, and only `to_model_units` turns them into what the
model sees; shards store raw latents, and the manifest stores the scale.

Shapes: B clips, F frames, C channels, H W pixels, h w latents, L tokens, D width. diffusers and transformers are
imported when an encoder is loaded, not with this module.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

CAPTION_CLEANING = "lower-strip"
"""What `clean_caption` does, as manifests record it."""

ASSETS = Path(__file__).parent / "assets"
TINY = "tiny"
MAX_PIXELS = 1 << 21  # of one forward pass: 8 frames of 512 x 512, about 12 GB of activations of the SD VAE in fp32
TEXT_BATCH = 16  # captions of one forward pass
MAX_CHARACTERS = 8192  # of a caption, as data_tools/captions.py keeps it; no text encoder reads that far
SD_DOWNSCALE = 8  # pixels a latent of the SD VAE, with which Latte was trained

_HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")
_WEIGHTS = ("*.safetensors", "*.bin")  # the first kind that is there; .bin is read with weights_only=True
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")


class EncoderError(ValueError):
    """An encoder that is missing, of another kind, or was given something it cannot encode."""


@dataclass(frozen=True)
class EncoderSettings:
    """Which frozen encoders a run or a data set uses."""

    vae: str  # "tiny" (shipped), a folder (AutoencoderKL, or one with a vae/ inside), or a hub id
    # "tiny" (shipped), a folder (T5EncoderModel, or text_encoder/ and tokenizer/ inside), or a hub id; null: no text,
    # for models that know a class or nothing (model.kind=latte)
    text: str | None
    text_max_length: int = 120  # tokens, the end mark included; longer captions are cut (LattePipeline: 120)

    def __post_init__(self) -> None:
        if self.text_max_length < 1:
            raise ValueError(f"text_max_length must be at least 1 token, came {self.text_max_length}")


@dataclass(frozen=True)
class EncoderFacts:
    """What manifests record about a pair of encoders and training compares, known without loading them."""

    vae_sha256: str  # of the weights
    channels: int  # of the latents
    downscale: int  # pixels a latent, height and width
    scale: float
    shift: float
    text_sha256: str | None  # of weights and tokenizer; None without a text encoder
    text_dim: int | None  # width of an embedding


def encoder_facts(settings: EncoderSettings) -> EncoderFacts:
    """Facts of the settings' encoders from their files alone: configs are parsed, weights are hashed.

    Raises EncoderError if one is missing.
    """
    vae = _find_vae(settings.vae)
    text = None if settings.text is None else _find_text(settings.text)
    config = _read_config(vae)
    return EncoderFacts(
        vae_sha256=_vae_sha256(vae),
        channels=int(config.get("latent_channels", 4)),  # the defaults are AutoencoderKL's: old configs lack keys
        downscale=2 ** (len(config.get("block_out_channels", (64,))) - 1),
        scale=float(config.get("scaling_factor", 0.18215)),
        shift=float(config.get("shift_factor") or 0.0),
        text_sha256=text and _text_sha256(text, _tokenizer_folder(settings.text, text)),
        text_dim=text and int(_read_config(text)["d_model"]),
    )


def vae_downscale(settings: EncoderSettings) -> int:
    """Pixels a latent, from the VAE's config alone; that of the SD VAE where the files are not at hand."""
    if not are_local(settings):
        return SD_DOWNSCALE
    return 2 ** (len(_read_config(_find_vae(settings.vae)).get("block_out_channels", (64,))) - 1)


def encoder_folders(settings: EncoderSettings) -> tuple[Path, Path, Path]:
    """Folders of the VAE, the text encoder and the tokenizer, without loading them. EncoderError if one is missing."""
    if settings.text is None:
        raise EncoderError("encoders.text is null, and a text-to-video pipeline needs a text encoder; name one")
    vae, text = _find_vae(settings.vae), _find_text(settings.text)
    return vae, text, _tokenizer_folder(settings.text, text)


def load_encoders(
    settings: EncoderSettings, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple["VideoAutoencoder", "TextEncoder | None"]:
    """The encoders of the settings, frozen, on `device`; no text encoder where `text` is None.

    Raises EncoderError if one cannot be loaded.
    """
    vae = VideoAutoencoder(settings.vae, device, dtype)
    if settings.text is None:
        return vae, None
    return vae, TextEncoder(settings.text, settings.text_max_length, device, dtype)


def are_local(settings: EncoderSettings) -> bool:
    """Whether all encoders can be read without asking a hub."""
    names = (settings.vae, settings.text)
    return all(name is None or name == TINY or Path(name).is_dir() for name in names)


def clean_caption(caption: str) -> str:
    """The caption as the text encoder is given it: LattePipeline's rule without its optional web cleaning.

    A foreign caption may have megabytes, of which the tokenizer would take seconds to keep a few hundred tokens.
    """
    return caption[:MAX_CHARACTERS].lower().strip()


def check_latents(latents_BFChw: Tensor, channels: int, decoder: str) -> None:
    """EncoderError, which names the decoder, for another number of channels or for latents that are not finite."""
    if latents_BFChw.ndim != 5 or latents_BFChw.shape[2] != channels:
        raise EncoderError(f"{decoder}: expected latents [B, F, {channels}, h, w], came {list(latents_BFChw.shape)}")
    if not bool(latents_BFChw.isfinite().all()):
        raise EncoderError(f"{decoder}: the latents hold NaN or infinity; the model that made them diverged")


class VideoAutoencoder:
    """A frozen diffusers AutoencoderKL over the frames of clips."""

    def __init__(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from diffusers import AutoencoderKL

        self.name, self.device, self.dtype = name, torch.device(device), dtype
        self.folder = _find_vae(name)
        with loading(name, self.folder):
            self.model = AutoencoderKL.from_pretrained(
                self.folder, torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False
            )
        self.model.eval().requires_grad_(False).to(self.device)
        config = self.model.config
        self.scale = float(config.scaling_factor)
        self.shift = float(config.shift_factor or 0.0)
        self.downscale = 2 ** (len(config.block_out_channels) - 1)  # pixels a latent, height and width
        self.channels = int(config.latent_channels)
        self.sha256 = _vae_sha256(self.folder)

    def to_model_units(self, raw: Tensor) -> Tensor:
        """(raw - shift) * scale: what the diffusion model sees, about unit variance."""
        return (raw - self.shift) * self.scale

    def to_raw(self, latents: Tensor) -> Tensor:
        """The inverse of `to_model_units`."""
        return latents / self.scale + self.shift

    @torch.no_grad()
    def encode(self, pixels_BFCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, raw fp32 [B, F, C, h, w], of uint8 RGB clips [B, F, 3, H, W].

        Raises EncoderError for another type or shape, or a height or width that is not a multiple of `downscale`.
        """
        self._check_pixels(pixels_BFCHW)
        frames_NCHW = pixels_BFCHW.flatten(0, 1)
        means, stds = [], []
        for chunk in frames_NCHW.split(max(1, MAX_PIXELS // (frames_NCHW.shape[-1] * frames_NCHW.shape[-2]))):
            posterior = self.model.encode((chunk.to(self.device).float() / 127.5 - 1).to(self.dtype)).latent_dist
            means.append(posterior.mean.float())
            stds.append(posterior.std.float())
        clips = pixels_BFCHW.shape[:2]
        return torch.cat(means).unflatten(0, clips), torch.cat(stds).unflatten(0, clips)

    @torch.no_grad()
    def decode(self, latents_BFChw: Tensor) -> Tensor:
        """uint8 RGB clips [B, F, 3, H, W] on the encoder's device, of latents [B, F, C, h, w] in model units.

        Raises EncoderError for another number of channels, or latents that are not finite.
        """
        check_latents(latents_BFChw, self.channels, f"VAE {self.name}")
        latents_Nchw = latents_BFChw.flatten(0, 1)
        pixels_a_frame = latents_Nchw.shape[-1] * latents_Nchw.shape[-2] * self.downscale**2
        frames = []
        for chunk in latents_Nchw.split(max(1, MAX_PIXELS // pixels_a_frame)):
            raw = self.to_raw(chunk.to(self.device).float()).to(self.dtype)
            pixels = (self.model.decode(raw).sample.float() + 1) * 127.5
            frames.append(pixels.round().clamp(0, 255).to(torch.uint8))
        return torch.cat(frames).unflatten(0, latents_BFChw.shape[:2])

    def _check_pixels(self, pixels_BFCHW: Tensor) -> None:
        shape = list(pixels_BFCHW.shape)
        if pixels_BFCHW.dtype != torch.uint8 or len(shape) != 5 or shape[2] != 3:
            raise EncoderError(
                f"VAE {self.name}: expected uint8 pixels [B, F, 3, H, W], came {pixels_BFCHW.dtype} {shape}"
            )
        if shape[3] % self.downscale or shape[4] % self.downscale:
            raise EncoderError(
                f"VAE {self.name}: height and width must be multiples of {self.downscale} pixels, came "
                f"{shape[3]} x {shape[4]}; change video.height and video.width"
            )


class TextEncoder:
    """A frozen T5 encoder and its tokenizer."""

    def __init__(
        self,
        name: str,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from transformers import AutoTokenizer, T5EncoderModel

        self.name, self.max_length = name, max_length
        self.device, self.dtype = torch.device(device), dtype
        self.folder = _find_text(name)
        self.tokenizer_folder = _tokenizer_folder(name, self.folder)
        with loading(name, self.folder):
            self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_folder, local_files_only=True)
            self.model = T5EncoderModel.from_pretrained(self.folder, dtype=dtype, local_files_only=True)
        self.model.eval().requires_grad_(False).to(self.device)
        self.dim = int(self.model.config.d_model)
        self.sha256 = _text_sha256(self.folder, self.tokenizer_folder)

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One fp32 embedding [L_i, D] a caption, real tokens and the end mark only; longer captions are cut.

        Captions are cleaned here. Padded positions are masked, so an embedding does not depend on its neighbours.
        """
        embeddings: list[Tensor] = []
        for first in range(0, len(captions), TEXT_BATCH):
            whole_BLD, lengths = self._forward(captions[first : first + TEXT_BATCH])
            embeddings += [whole_LD[:length].clone() for whole_LD, length in zip(whole_BLD, lengths, strict=True)]
        return embeddings

    def null(self) -> Tensor:
        """The embedding of the empty caption, whole: fp32 [max_length, D].

        Guidance and caption drop cut it to the length of the caption that it stands for, as LattePipeline does.
        """
        return self.encode_whole("")

    def encode_whole(self, caption: str) -> Tensor:
        """One caption's embedding with its padded positions, fp32 [max_length, D]: a negative prompt, to be cut."""
        return self._forward([caption])[0][0]

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each cleaned caption before cutting, the end mark included; above `max_length` it will be cut."""
        return [len(ids) for ids in self.tokenizer([clean_caption(c) for c in captions]).input_ids] if captions else []

    @torch.no_grad()
    def _forward(self, captions: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Embeddings padded to max_length, fp32 [B, max_length, D], and the number of real tokens of each."""
        inputs = self.tokenizer(
            [clean_caption(caption) for caption in captions],
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask_BL = inputs.attention_mask.to(self.device)
        embeddings_BLD = self.model(inputs.input_ids.to(self.device), attention_mask=mask_BL)[0]
        return embeddings_BLD.float(), mask_BL.sum(1).tolist()


def _vae_sha256(folder: Path) -> str:
    return _files_sha256(_weight_files(folder))


def _text_sha256(folder: Path, tokenizer_folder: Path) -> str:
    return _files_sha256([*_weight_files(folder), *_tokenizer_files(tokenizer_folder)])


def _files_sha256(paths: Sequence[Path]) -> str:
    """sha256 over names and contents of files in the given order, hex."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(f"{path} is not JSON ({error}); copy the encoder again") from error


def _find_vae(name: str) -> Path:
    return find_folder(name, "tiny_vae", "vae", "an AutoencoderKL (config.json and weights, or a vae/ folder)")


def _find_text(name: str) -> Path:
    expected = "a T5 encoder (config.json, weights and tokenizer, or text_encoder/ and tokenizer/ folders)"
    return find_folder(name, "tiny_t5", "text_encoder", expected)


def find_folder(name: str, tiny: str | None, subfolder: str, expected: str) -> Path:
    """The folder with config.json and weights: shipped (`tiny`, if there is one), local, or fetched from the hub.

    Raises EncoderError saying what was expected.
    """
    if name == TINY and tiny is not None:
        return ASSETS / tiny
    if Path(name).is_dir():
        return _inside(name, Path(name), subfolder, expected)
    if _HUB_ID.match(name):
        return _fetch(name, subfolder, expected)
    raise EncoderError(
        f"no encoder {name!r}: expected {TINY!r}, an existing folder with {expected}, or a hub id as in "
        "'stabilityai/sd-vae-ft-ema'; check the path"
    )


def _inside(name: str, folder: Path, subfolder: str, expected: str) -> Path:
    for candidate in (folder / subfolder, folder):
        if (candidate / "config.json").is_file() and _weight_files(candidate):
            return candidate
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise EncoderError(f"{name}: expected {expected}; the folder holds {found}")


def _fetch(name: str, subfolder: str, expected: str) -> Path:
    """The encoder's folder of a hub repository: downloaded, or from the local cache where there is no network."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        snapshot = snapshot_download(name, allow_patterns=hub_files(HfApi().list_repo_files(name), subfolder))
    except Exception as error:  # the hub's client raises OSErrors, ValueErrors and its HTTP library's own
        try:
            snapshot = snapshot_download(name, local_files_only=True)
        except Exception:
            raise EncoderError(
                f"{name}: is no folder here and could not be fetched from the hub ({type(error).__name__}: "
                f"{(str(error) or 'no reason given').splitlines()[0]}); without a network give the path of a local copy"
            ) from error
    return _inside(name, Path(snapshot), subfolder, expected)


def hub_files(files: Sequence[str], subfolder: str) -> list[str]:
    """Which of a repository's files an encoder needs: one folder's config and weights, and for text the tokenizer.

    A pipeline's repository holds other models, and many hold the same weights several times over.
    """
    folder = f"{subfolder}/" if f"{subfolder}/config.json" in files else ""
    folders = {folder, "tokenizer/"} if subfolder == "text_encoder" else {folder}
    near = [file for file in files if file.removesuffix(file.rpartition("/")[2]) in folders]
    small = [file for file in near if file.endswith((".json", "spiece.model"))]
    for pattern in _WEIGHTS:
        if weights := [file for file in near if fnmatch(file, pattern) and not _is_variant(file)]:
            return small + weights
    return small


def _is_variant(file: str) -> bool:
    """Another copy of the weights, which from_pretrained reads only when asked: model.fp16.safetensors."""
    return ".fp16" in file or ".bf16" in file or "non_ema" in file


def _weight_files(folder: Path) -> list[Path]:
    """The weight files that from_pretrained reads: safetensors if there are any, else .bin. Sorted by name."""
    for pattern in _WEIGHTS:
        if files := sorted(path for path in folder.glob(pattern) if not _is_variant(path.name)):
            return files
    return []


def _tokenizer_folder(name: str, encoder: Path) -> Path:
    """Where the tokenizer lies: beside the weights, or in the tokenizer/ folder of a pipeline."""
    for candidate in (encoder, encoder.parent / "tokenizer"):
        if _tokenizer_files(candidate):
            return candidate
    raise EncoderError(
        f"{name}: no tokenizer in {encoder} or {encoder.parent / 'tokenizer'}; expected one of "
        f"{', '.join(_TOKENIZER_FILES)}"
    )


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / file for file in _TOKENIZER_FILES if (folder / file).is_file()]


@contextmanager
def loading(name: str, folder: Path) -> Iterator[None]:
    """Turn whatever from_pretrained raises (OSError, ValueError, KeyError, ...) into an EncoderError with the place."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # a bar a file is noise beside our own
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise EncoderError(
            f"{name}: {folder} could not be loaded ({type(error).__name__}: {reason}); give a folder that "
            "AutoencoderKL (encoders.vae) or T5EncoderModel (encoders.text) can load"
        ) from error
