"""Checks that the data matches the config, before anything is built, and reports every difference.

In: a config and its open data sets. Out: nothing, or a ManifestError that says what was expected, what was found and
what to do. Latents are compared with the files of the config's encoders if these are on this machine, else with their
names: a node that trains from latents needs no encoder.
"""

from collections.abc import Sequence

from latte_scale.config import Config
from latte_scale.data.fit import Expected, check_manifest
from latte_scale.data.samples import Dataset
from latte_scale.data.schema import ManifestError
from latte_scale.encoders import CAPTION_CLEANING, EncoderFacts, are_local, encoder_facts


def check_data(config: Config, datasets: Sequence[Dataset]) -> None:
    """Refuse data or encoders that do not fit the model: ManifestError lists every difference."""
    kind = datasets[0].manifest.kind
    encoders = config.read_encoders
    facts = encoder_facts(encoders) if kind == "video" or are_local(encoders) else None
    text_dim = config.model.caption_channels if config.model.kind == "latte_t2v" else None
    if facts is not None:
        check_widths(config, facts, text_dim)
    expected = Expected(
        video=config.video,
        vae_sha256=facts and facts.vae_sha256,
        latent_channels=config.model.in_channels,
        latent_downscale=facts and facts.downscale,
        latent_scale=facts and facts.scale,
        latent_shift=facts and facts.shift,
        text_sha256=facts and text_dim and facts.text_sha256,
        text_max_length=text_dim and config.encoders.text_max_length,
        text_dim=text_dim,
        caption_cleaning=text_dim and CAPTION_CLEANING,
    )
    for dataset in datasets:
        check_manifest(dataset.manifest, expected, dataset.store.url)
        check_classes(config, dataset)
        if facts is None:
            check_names(config, dataset)
    check_sizes(config, kind, facts.downscale if facts is not None else datasets[0].manifest.latents.downscale)


def check_sizes(config: Config, kind: str, downscale: int) -> None:
    """Every size of the config must divide into latents, and these into patches."""
    for policy in config.video.policies():
        if kind == "video" and (policy.height % downscale or policy.width % downscale):
            raise ManifestError(
                f"clips of {policy.size} pixels do not divide into latents of {downscale} x {downscale} pixels (of "
                "encoders.vae); change this size to multiples of it"
            )
        sides = [policy.height // downscale, policy.width // downscale]
        if any(side % config.model.patch_size for side in sides):
            raise ManifestError(
                f"latents of {sides[0]} x {sides[1]} do not divide into patches of model.patch_size="
                f"{config.model.patch_size}; change it, or video.height and video.width"
            )


def check_widths(config: Config, facts: EncoderFacts, text_dim: int | None) -> None:
    """Check the model's channels against those of the encoders."""
    if facts.channels != config.model.in_channels:
        raise ManifestError(
            f"the VAE gives latents of {facts.channels} channels, but model.in_channels is {config.model.in_channels}; "
            "make them equal"
        )
    if text_dim is not None and facts.text_dim != text_dim:
        raise ManifestError(
            f"the text encoder gives embeddings of width {facts.text_dim}, but model.caption_channels is {text_dim}; "
            "make them equal"
        )


def check_classes(config: Config, dataset: Dataset) -> None:
    """A class model needs labels with its number of classes."""
    if config.model.kind != "latte" or not config.model.num_classes:
        return
    names = dataset.manifest.class_names
    if names is None or len(names) != config.model.num_classes:
        came = "no labels" if names is None else f"{len(names)} classes"
        raise ManifestError(
            f"{dataset.store.url}: model.num_classes is {config.model.num_classes}, the data has {came}; make them "
            "equal, or set model.num_classes=0 for an unconditional model"
        )


def check_names(config: Config, dataset: Dataset) -> None:
    """Check a latents data set against the names of encoders whose files are not on this machine."""
    for key, wanted, info in (
        ("vae", config.encoders.vae, dataset.manifest.vae),
        ("text", config.encoders.text if config.model.kind == "latte_t2v" else None, dataset.manifest.text),
    ):
        if wanted is not None and (info is None or info.name != wanted):
            raise ManifestError(
                f"{dataset.store.url}: encoders.{key}: expected {wanted}, got {info and info.name}; set it to what "
                "encoded the data, or to a folder with the same weights"
            )
