"""The text encoder: LattePipeline's rule for captions, and embeddings that no neighbour changes."""

import json
from pathlib import Path

import torch

from data_tools import captions
from data_tools.shapes import combinations, prompt
from latte_scale.encoders import TextEncoder, VideoAutoencoder, clean_caption
from latte_scale.encoders.text import MAX_CHARACTERS
from tests.clips import CLIPS, needs_clips


def test_text_is_trimmed_and_independent_of_its_neighbours(text: TextEncoder) -> None:
    short, long = "a red circle moves left", "two children throw a basketball at a hoop in a school gym"
    together = text.encode([short, long, ""])
    assert [len(e) for e in together] == text.num_tokens([short, long, ""])
    assert len(together[0]) == 6 and len(together[2]) == 1 and together[0].shape[1] == text.dim == 64
    torch.testing.assert_close(together[0], text.encode([short])[0], atol=1e-5, rtol=1e-5)
    narrow = TextEncoder("tiny", 8)
    torch.testing.assert_close(narrow.encode([short])[0], together[0], atol=1e-5, rtol=1e-5)
    assert together[0].untyped_storage().nbytes() == together[0].numel() * 4  # no view of the padded batch


def test_text_follows_latte_pipeline(vae: VideoAutoencoder, text: TextEncoder, tmp_path: Path) -> None:
    """Parity with diffusers at batch 1: the shipped encoders in a LattePipeline, embeddings and null cut alike."""
    from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

    transformer = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=16,
        patch_size=2, cross_attention_dim=16, caption_channels=64, video_length=4, norm_type="ada_norm_single",
        norm_elementwise_affine=False, activation_fn="gelu-approximate", attention_bias=True,
    )  # fmt: skip
    made = LattePipeline(text.tokenizer, text.model, vae.model, transformer, DDIMScheduler())
    made.save_pretrained(tmp_path / "pipeline")
    pipeline = LattePipeline.from_pretrained(tmp_path / "pipeline")
    caption = "  A Red circle moves LEFT "
    positive, negative = pipeline.encode_prompt(caption, negative_prompt="")
    ours = text.encode([caption])[0]
    torch.testing.assert_close(ours, positive.squeeze(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text.null()[: len(ours)], negative.squeeze(), atol=1e-5, rtol=1e-5)
    assert clean_caption(caption) == "a red circle moves left"
    assert TextEncoder(str(tmp_path / "pipeline"), 48).num_tokens([caption]) == [len(ours)]
    assert VideoAutoencoder(str(tmp_path / "pipeline")).scale == vae.scale


def test_null_is_whole_and_begins_like_the_empty_caption(text: TextEncoder) -> None:
    null = text.null()
    assert null.shape == (48, 64)
    torch.testing.assert_close(null[:1], text.encode([""])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(TextEncoder("tiny", 12).null(), null[:12], atol=1e-5, rtol=1e-5)


def test_long_captions_are_cut_as_t5_does(text: TextEncoder) -> None:
    caption = " ".join(["a red circle moves left and"] * 20)
    assert text.num_tokens([caption, "a"]) == [121, 2]
    assert len(text.encode([caption])[0]) == 48
    ids = text.tokenizer(caption, max_length=48, truncation=True).input_ids
    assert len(ids) == 48 and ids[-1] == text.tokenizer.eos_token_id


@needs_clips
def test_captions_of_real_clips_are_not_cut(text: TextEncoder) -> None:
    rows = [json.loads(line) for line in (CLIPS / "captions.jsonl").read_text().splitlines()]
    assert max(text.num_tokens([row["text"] for row in rows])) <= 48


def test_the_text_encoder_is_frozen(text: TextEncoder) -> None:
    assert not text.model.training
    assert not any(parameter.requires_grad for parameter in text.model.parameters())


def test_the_tokenizer_knows_shapes_words_and_spells_the_rest(text: TextEncoder) -> None:
    tokens = text.tokenizer.tokenize("a yellow square moves down")
    assert tokens == ["▁a", "▁yellow", "▁square", "▁moves", "▁down"]
    printable = "".join(map(chr, range(32, 127)))
    assert text.tokenizer.unk_token_id not in text.tokenizer(printable).input_ids
    assert (
        text.tokenizer.decode(text.tokenizer("zebra crossing").input_ids, skip_special_tokens=True) == "zebra crossing"
    )


def test_embeddings_tell_shapes_captions_apart_linearly(text: TextEncoder) -> None:
    """A linear map of the mean embedding, fitted on the seen prompts, finds every word of the held-out ones."""
    seen, held_out = combinations()
    features = {c: text.encode([prompt(c)])[0].mean(0) for c in [*seen, *held_out]}
    centre = torch.stack([features[c] for c in seen]).mean(0)
    for aspect in range(3):
        words = sorted({c[aspect] for c in seen})
        x = torch.stack([features[c] - centre for c in seen])
        y = torch.eye(len(words))[[words.index(c[aspect]) for c in seen]]
        weights = torch.linalg.solve(x.T @ x + 1e-3 * torch.eye(64), x.T @ (y - 1 / len(words)))
        for c in held_out:
            scores = (features[c] - centre) @ weights
            first, second = scores.topk(2).values
            assert words[int(scores.argmax())] == c[aspect]
            assert first - second > 0.25


def test_a_caption_is_cut_where_the_toolchain_cuts_it() -> None:
    """data_tools may not cost the time of importing an encoder, so it has the number a second time."""
    assert captions.MAX_CHARACTERS == MAX_CHARACTERS
