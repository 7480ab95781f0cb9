"""The shipped encoders, loaded once; tests leave them as they are."""

import pytest

from latte_scale.encoders import EncoderSettings, TextEncoder, VideoAutoencoder, load_encoders


@pytest.fixture(scope="session")
def encoders() -> tuple[VideoAutoencoder, TextEncoder]:
    return load_encoders(EncoderSettings("tiny", "tiny", 48))


@pytest.fixture(scope="session")
def vae(encoders: tuple[VideoAutoencoder, TextEncoder]) -> VideoAutoencoder:
    return encoders[0]


@pytest.fixture(scope="session")
def text(encoders: tuple[VideoAutoencoder, TextEncoder]) -> TextEncoder:
    return encoders[1]
