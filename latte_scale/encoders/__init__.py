"""The frozen encoders: a VAE between pixels and latents, and a T5 from captions to embeddings.

In: names (`tiny`, a local folder in diffusers' or transformers' layout, or a hub id). Out: `VideoAutoencoder` and
`TextEncoder`. Shard encoding, training on raw clips, sampling and export share them, so that the latent scale and the
processing of captions are defined once. `settings` names the encoders and has the facts that are known without loading
them; `files` finds, fetches and hashes their files; `vae` and `text` are the encoders.

diffusers and transformers are imported when an encoder is loaded, not with this package, so that reading a config and
checking data against it do not wait for them.
"""

import torch

from latte_scale.encoders.files import EncoderError, find_folder, find_vae, loading
from latte_scale.encoders.settings import (
    EncoderFacts,
    EncoderSettings,
    are_local,
    encoder_facts,
    encoder_folders,
    vae_downscale,
)
from latte_scale.encoders.text import CAPTION_CLEANING, TextEncoder, clean_caption
from latte_scale.encoders.vae import VideoAutoencoder, check_latents

__all__ = [
    "CAPTION_CLEANING",
    "EncoderError",
    "EncoderFacts",
    "EncoderSettings",
    "TextEncoder",
    "VideoAutoencoder",
    "are_local",
    "check_latents",
    "clean_caption",
    "encoder_facts",
    "encoder_folders",
    "find_folder",
    "find_vae",
    "load_encoders",
    "loading",
    "vae_downscale",
]


def load_encoders(
    settings: EncoderSettings, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[VideoAutoencoder, TextEncoder | None]:
    """The encoders of the settings, frozen, on `device`; no text encoder where `text` is None.

    Raises EncoderError if one cannot be loaded.
    """
    vae = VideoAutoencoder(settings.vae, device, dtype)
    if settings.text is None:
        return vae, None
    return vae, TextEncoder(settings.text, settings.text_max_length, device, dtype)
