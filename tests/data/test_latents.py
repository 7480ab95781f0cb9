"""How latents and embeddings are stored: round trips with bounded errors, sizes of real shapes, refusals."""

import numpy as np
import pytest
from safetensors.numpy import save

from latte_scale.data import latents
from latte_scale.data.latents import pack_latents, pack_text, quantised, restored, unpack_latents, unpack_text
from latte_scale.data.schema import LatentsInfo, TextInfo
from latte_scale.data.shards import LatentSample, ShardFile
from latte_scale.store import open_store

CLIP, TOKENS, WIDTH = (16, 4, 64, 64), 30, 4096  # 16 frames of 512 x 512 px of the SD VAE, a caption of T5-XXL


def info(kind, dtype="float16"):
    return LatentsInfo(kind, 4, 8, 0.18215, 0.0, dtype)


def posterior(shape, seed=0):
    """A mean of the spread that the SD VAE gives, and a smooth std around 0.02."""
    generator = np.random.default_rng(seed)
    mean = 5.5 * generator.standard_normal(shape, dtype=np.float32)
    return mean, np.exp(0.3 * generator.standard_normal((*shape[:2], 1, 1)) - 4 * np.ones(shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(2, 4, 6, 8), (1, 4, 5, 7), (3, 16, 1, 1), (1, 4, 2, 3)])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_mean_and_its_coarse_std_come_back(shape, dtype):
    mean, std = posterior(shape)
    arrays = pack_latents(mean, std, info("mean_logstd", dtype))
    back, back_std = unpack_latents(arrays, info("mean_logstd", dtype), shape)
    assert back.dtype == back_std.dtype == np.float16 and back.shape == back_std.shape == shape
    step = np.abs(mean).max() * (2**-11 if dtype == "float16" else 0.56 / 127)
    assert np.abs(back - mean).max() <= step
    assert np.abs(np.log(back_std.astype(np.float32) / std)).max() < 0.5 / latents.LOG_STD_STEPS + 2e-3


def test_neighbours_share_the_mean_of_their_log_std():
    std = np.exp(np.array([[-4.0, -2.0, -1.0], [-4.0, -2.0, -3.0], [-5.0, -5.0, -7.0]], np.float32))[None, None]
    arrays = pack_latents(np.zeros_like(std), std, info("mean_logstd"))
    expected = [[-3.0, -2.0], [-5.0, -7.0]]
    np.testing.assert_array_equal(arrays["logstd"][0, 0], ((np.array(expected) + 15) * 10).astype(np.uint8))
    back = np.log(unpack_latents(arrays, info("mean_logstd"), std.shape)[1].astype(np.float32))[0, 0]
    np.testing.assert_allclose(back, [[-3, -3, -2], [-3, -3, -2], [-5, -5, -7]], atol=2e-3)


def test_the_whole_range_of_the_vae_fits_the_byte():
    """AutoencoderKL clamps the log-variance to -30 to 20; a std of zero is taken for the least."""
    std = np.exp(np.array([-15.0, 10.0], np.float32)).reshape(2, 1, 1, 1)
    assert pack_latents(std * 0, std, info("mean_logstd"))["logstd"].ravel().tolist() == [0, 250]
    assert pack_latents(std * 0, std * 0, info("mean_logstd"))["logstd"].ravel().tolist() == [0, 0]


def test_kinds_keep_what_they_say():
    mean, std = posterior((2, 4, 6, 8))
    noise = np.random.default_rng(1).standard_normal(mean.shape, dtype=np.float32)
    assert pack_latents(mean, std, info("mean")).keys() == {"mean"}
    assert pack_latents(mean, std, info("mean_std")).keys() == {"mean", "std"}
    sample = pack_latents(mean, std, info("sample"), noise)
    assert sample.keys() == {"sample"}
    drawn, no_std = unpack_latents(sample, info("sample"), mean.shape)
    assert no_std is None
    np.testing.assert_array_equal(drawn, (mean + std * noise).astype(np.float16))
    with pytest.raises(ValueError, match=r"mean: expected shape .* got nothing"):
        unpack_latents(sample, info("mean"), mean.shape)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000])
def test_eight_bits_err_by_half_a_step_of_their_block(size):
    array = np.random.default_rng(size).standard_normal(size, dtype=np.float32) * np.geomspace(1e-3, 1e3, size)
    array[: size // 3] = 0
    values, scales = quantised(array.astype(np.float32))
    assert values.dtype == np.int8 and scales.dtype == np.float16
    errors = np.abs(restored(values, scales).astype(np.float32) - array)
    steps = np.repeat(scales.astype(np.float32), latents.BLOCK)[:size]
    assert (errors <= 0.56 * steps + 2**-11 * np.abs(array)).all()  # half a step, and the roundings to float16
    assert not restored(values, scales)[: size // 3].any()


def test_embeddings_come_back_and_others_are_refused():
    about = TextInfo("t5", "a" * 64, 120, WIDTH, "int8")
    embedding = np.random.default_rng(0).standard_normal((TOKENS, WIDTH), dtype=np.float32)
    embedding[:, 7] *= 40  # T5 has a few channels far above the others; they must not cost the rest their bits
    back = unpack_text(pack_text(embedding, "int8"), about).astype(np.float32)
    noise = ((back - embedding) ** 2).mean()
    assert 10 * np.log10((embedding**2).mean() / noise) > 30
    with pytest.raises(ValueError, match="embedding: expected int8, got float16"):
        unpack_text(pack_text(embedding, "float16"), about)
    with pytest.raises(ValueError, match=r"embedding: expected \[1 to 120, 4096\], got nothing"):
        unpack_text({}, about)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7e4])
def test_values_that_float16_cannot_hold_are_refused(value):
    mean = np.full((1, 1, 2, 2), value, np.float32)
    for bad in ((mean, np.ones_like(mean)), (np.ones_like(mean), mean)):
        with pytest.raises(ValueError, match="which float16 cannot hold"):
            pack_latents(*bad, info("mean_logstd"))
    with pytest.raises(ValueError, match="which float16 cannot hold"):
        pack_text(mean[0, 0], "int8")


def test_eight_bits_with_a_whole_std_make_no_sense():
    with pytest.raises(ValueError, match="use kind mean_logstd, mean or sample"):
        info("mean_std", "int8")


@pytest.mark.parametrize(
    ("kind", "dtype", "most_bytes"),
    [
        ("mean_logstd", "float16", 860_000),
        ("mean", "float16", 800_000),
        ("sample", "float16", 800_000),
        ("mean", "int8", 400_000),
        ("mean_logstd", "int8", 470_000),
    ],
)
def test_bytes_of_a_clip(kind, dtype, most_bytes, tmp_path):
    """Two clips with captions of their own in a tar, headers and index included."""
    store = open_store(tmp_path)
    with ShardFile(store, "shard-000000.tar", "latents") as shard:
        for number in range(2):
            noise = np.zeros(CLIP, np.float32)
            clip = save(pack_latents(*posterior(CLIP, number), info(kind, dtype), noise))
            text = save(pack_text(np.full((TOKENS, WIDTH), number, np.float32), dtype))
            about = {"source": "city/bikes/000123.mp4", "fps": 29.97, "frames": 16, "height": 512, "width": 512}
            caption = f"clip {number}: " + "many words of a long caption that fills its thirty tokens well " * 2
            shard.add(LatentSample(f"{number:09d}", caption, "16x64x64", clip, text, about))
        shard.close()
    total = sum(store.size(name) for name in store.list()) / 2
    assert 0.9 * most_bytes < total <= most_bytes
