"""The frozen text encoder: captions to embeddings.

In: raw captions. Out: one T5 embedding per caption. Text is processed as in diffusers' LattePipeline: captions are
lowercased and stripped, padded to `text_max_length` and run with an attention mask, then trimmed to their real tokens.
The decision worth knowing: embeddings are returned without padding, so they do not depend on their neighbours, and on
`text_max_length` only if it truncates them; batching pads them again. `null` and negative prompts keep their padding
and are cut later.

Shapes: B captions, L tokens, D width. transformers is imported when an encoder is loaded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from latte_scale.encoders.files import find_text, find_tokenizer, loading, text_sha256

CAPTION_CLEANING = "lower-strip"
"""What `clean_caption` does, as manifests record it."""

TEXT_BATCH = 16  # captions of one forward pass
MAX_CHARACTERS = 8192  # of a caption, as data_tools/captions.py keeps it; no text encoder reads that far


def clean_caption(caption: str) -> str:
    """The caption as the text encoder gets it: LattePipeline's rule without its optional web cleaning.

    A foreign caption may have megabytes, of which the tokenizer would take seconds to keep a few hundred tokens.
    """
    return caption[:MAX_CHARACTERS].lower().strip()


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
        self.folder = find_text(name)
        self.tokenizer_folder = find_tokenizer(name, self.folder)
        with loading(name, self.folder, "T5EncoderModel (encoders.text)"):
            self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_folder, local_files_only=True)
            self.model = T5EncoderModel.from_pretrained(self.folder, dtype=dtype, local_files_only=True)
        self.model.eval().requires_grad_(False).to(self.device)
        self.dim = int(self.model.config.d_model)
        self.sha256 = text_sha256(self.folder, self.tokenizer_folder)

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One fp32 embedding [L_i, D] per caption: real tokens with end-of-sequence; longer captions are truncated.

        Cleans the captions first. Padded positions are masked, so an embedding does not depend on its neighbours.
        """
        embeddings: list[Tensor] = []
        for first in range(0, len(captions), TEXT_BATCH):
            whole_BLD, lengths = self._forward(captions[first : first + TEXT_BATCH])
            embeddings += [whole_LD[:length].clone() for whole_LD, length in zip(whole_BLD, lengths, strict=True)]
        return embeddings

    def null(self) -> Tensor:
        """The embedding of the empty caption, padding included: fp32 [max_length, D].

        Guidance and caption drop cut it to the length of the caption that it stands for, as LattePipeline does.
        """
        return self.encode_whole("")

    def encode_whole(self, caption: str) -> Tensor:
        """One caption's embedding with its padded positions, fp32 [max_length, D]: a negative prompt, to be cut."""
        return self._forward([caption])[0][0]

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each cleaned caption before truncation (above `max_length`), end-of-sequence included."""
        return [len(ids) for ids in self.tokenizer([clean_caption(c) for c in captions]).input_ids] if captions else []

    def what_is_cut(self, captions: Sequence[str]) -> str:
        """A warning about captions that are longer than `max_length`; "" if there are none."""
        pairs = zip(self.num_tokens(captions), captions, strict=True)
        cut = [(length, caption) for length, caption in pairs if length > self.max_length]
        if not cut:
            return ""
        length, caption = max(cut)
        number = "a caption is" if len(cut) == 1 else f"{len(cut)} captions are"
        return (
            f"{number} cut to text_max_length={self.max_length} tokens, the longest has {length}: {caption[:60]!r}...; "
            "shorten it, or raise encoders.text_max_length, for which data are encoded anew"
        )

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
        ids_BL, mask_BL = inputs.input_ids, inputs.attention_mask
        ids, mask = (tensor.to(self.device, non_blocking=True) for tensor in (ids_BL, mask_BL))
        embeddings_BLD = self.model(ids, attention_mask=mask)[0]
        return embeddings_BLD.float(), mask_BL.sum(1).tolist()  # from the host's mask, without waiting for the model
