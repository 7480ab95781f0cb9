"""The files that turn shards of synthetic latents into a data set for the loader."""

import hashlib
from collections.abc import Sequence

import numpy as np
from safetensors.numpy import save

from latte_scale.data import schema
from latte_scale.store import Store


def save_manifest(
    store: Store, entries: Sequence[schema.ShardEntry], video: schema.VideoSettings, text: tuple[int, int]
) -> None:
    """The null embedding and the manifest; `text`: the most tokens of a caption, and its width."""
    null = save({"embedding": np.zeros(text, np.float16)})
    store.write(schema.NULL_TEXT, null)
    manifest = schema.Manifest(
        kind="latents",
        shards=tuple(entries),
        caption_cleaning="none",
        video=video,
        latents=schema.LatentsInfo("mean", 4, 8, 1.0, 0.0),
        vae=schema.VaeInfo("none", "0" * 64),
        text=schema.TextInfo("none", "0" * 64, *text),
        null_text=schema.FileInfo(schema.NULL_TEXT, hashlib.sha256(null).hexdigest()),
    )
    schema.save_manifest(store, manifest)
