"""Which frozen encoders a run or a data set uses, and the facts known without loading them.

In: the `encoders` section of a config. Out: facts for manifests and checks (hashes, widths, the latent scale), pixels
per latent, folders to copy. The decision worth knowing: facts come from config.json and hashes of the files, without
building a model, so a machine without the memory for an encoder can still check data against a config.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from latte_scale.encoders.files import (
    TINY,
    EncoderError,
    find_text,
    find_tokenizer,
    find_vae,
    read_config,
    text_sha256,
    text_width,
    vae_sha256,
)

SD_DOWNSCALE = 8  # pixels per latent of the SD VAE, with which Latte was trained


@dataclass(frozen=True)
class EncoderSettings:
    """Which frozen encoders a run or a data set uses."""

    vae: str  # "tiny" (shipped), a folder (AutoencoderKL, or one with a vae/ inside), or a hub id
    # "tiny" (shipped), a folder (T5EncoderModel, or text_encoder/ and tokenizer/ inside), or a hub id; null: no text,
    # for class-conditional and unconditional models (model.kind=latte)
    text: str | None
    text_max_length: int = 120  # tokens, end-of-sequence included; longer captions are cut (LattePipeline: 120)

    def __post_init__(self) -> None:
        if self.text_max_length < 1:
            raise ValueError(f"text_max_length must be at least 1 token, got {self.text_max_length}")


def are_local(settings: EncoderSettings) -> bool:
    """Whether all encoders can be read without a hub."""
    names = (settings.vae, settings.text)
    return all(name is None or name == TINY or Path(name).is_dir() for name in names)


@dataclass(frozen=True)
class EncoderFacts:
    """Facts about a pair of encoders, known without loading them: manifests record them and training compares them."""

    vae_sha256: str  # of the weights
    channels: int  # of the latents
    downscale: int  # pixels per latent, height and width
    scale: float
    shift: float
    text_sha256: str | None  # of weights and tokenizer; None without a text encoder
    text_dim: int | None  # width of an embedding


def encoder_facts(settings: EncoderSettings) -> EncoderFacts:
    """Facts of the settings' encoders from their files: parses configs and hashes weights.

    Raises EncoderError if one is missing.
    """
    vae = find_vae(settings.vae)
    text = None if settings.text is None else find_text(settings.text)
    config = read_config(vae)
    return EncoderFacts(
        vae_sha256=vae_sha256(vae),
        channels=int(config.get("latent_channels", 4)),  # default of AutoencoderKL: old configs lack keys
        downscale=2 ** (len(config.get("block_out_channels", (64,))) - 1),
        scale=float(config.get("scaling_factor", 0.18215)),
        shift=float(config.get("shift_factor") or 0.0),
        text_sha256=text and text_sha256(text, find_tokenizer(settings.text, text)),
        text_dim=text and text_width(text),
    )


def vae_downscale(settings: EncoderSettings) -> int:
    """Pixels per latent, from the VAE's config; that of the SD VAE if the files are not on this machine."""
    if not are_local(replace(settings, text=None)):
        return SD_DOWNSCALE
    return 2 ** (len(read_config(find_vae(settings.vae)).get("block_out_channels", (64,))) - 1)


def encoder_folders(settings: EncoderSettings) -> tuple[Path, Path, Path]:
    """Folders of the VAE, the text encoder and the tokenizer, without loading them. EncoderError if one is missing."""
    if settings.text is None:
        raise EncoderError("encoders.text is null, and a text-to-video pipeline needs a text encoder; name one")
    vae, text = find_vae(settings.vae), find_text(settings.text)
    return vae, text, find_tokenizer(settings.text, text)
