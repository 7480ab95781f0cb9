"""The files of an encoder: finds, fetches, checks and hashes them.

In: a name (`tiny`, a local folder in diffusers' or transformers' layout, alone or inside a pipeline, or a hub id). Out:
the folder that from_pretrained reads, and a sha256 of the files that it reads there. Files that are missing, of another
kind or unreadable raise an EncoderError with what was expected and the remedy.
The decision worth knowing: one rule selects the weights, safetensors before .bin and never a variant (fp16, bf16,
non_ema). Fetching, accepting a folder and hashing follow it, so that a manifest records the weights that were loaded.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"
TINY = "tiny"

_HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")
_WEIGHTS = ("*.safetensors", "*.bin")  # the first kind that exists; .bin is read with weights_only=True
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")


class EncoderError(ValueError):
    """An encoder that is missing, of another kind, or was given something it cannot encode."""


def text_width(folder: Path) -> int:
    """Width of an embedding, from the config of a T5 encoder."""
    width = read_config(folder).get("d_model")
    if not isinstance(width, int):
        raise EncoderError(f"{folder / 'config.json'}: expected d_model of a T5 encoder, got {width!r}; copy it again")
    return width


def find_vae(name: str) -> Path:
    """Folder of a VAE. EncoderError if there is none."""
    return find_folder(name, "tiny_vae", "vae", "an AutoencoderKL (config.json and weights, or a vae/ folder)")


def find_text(name: str) -> Path:
    """Folder of a text encoder. EncoderError if there is none; its tokenizer may be elsewhere."""
    expected = "a T5 encoder (config.json, weights and tokenizer, or text_encoder/ and tokenizer/ folders)"
    return find_folder(name, "tiny_t5", "text_encoder", expected)


def find_tokenizer(name: str, encoder: Path) -> Path:
    """The tokenizer's folder: that of the weights, or a pipeline's tokenizer/. EncoderError if in neither."""
    for candidate in (encoder, encoder.parent / "tokenizer"):
        if _tokenizer_files(candidate):
            return candidate
    raise EncoderError(
        f"{name}: no tokenizer in {encoder} or {encoder.parent / 'tokenizer'}; expected one of "
        f"{', '.join(_TOKENIZER_FILES)}"
    )


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
    """The encoder's folder of a hub repository: downloaded, or from the local cache if there is no network."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        snapshot = snapshot_download(name, allow_patterns=hub_files(HfApi().list_repo_files(name), subfolder))
    except Exception as error:  # the hub's client raises OSError, ValueError and errors of its HTTP library
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

    A pipeline's repository holds other models, and many hold several copies of the same weights.
    """
    folder = f"{subfolder}/" if f"{subfolder}/config.json" in files else ""
    folders = {folder, "tokenizer/"} if subfolder == "text_encoder" else {folder}
    near = [file for file in files if file.removesuffix(file.rpartition("/")[2]) in folders]
    small = [file for file in near if file.endswith((".json", "spiece.model"))]
    for pattern in _WEIGHTS:
        if weights := [file for file in near if fnmatch(file, pattern) and not _is_variant(file)]:
            return small + weights
    return small


def _weight_files(folder: Path) -> list[Path]:
    """The weight files that from_pretrained reads: safetensors if there are any, else .bin. Sorted by name."""
    for pattern in _WEIGHTS:
        if files := sorted(path for path in folder.glob(pattern) if not _is_variant(path.name)):
            return files
    return []


def _is_variant(file: str) -> bool:
    """Whether it is another copy of the weights, read by from_pretrained only on request: model.fp16.safetensors."""
    return ".fp16" in file or ".bf16" in file or "non_ema" in file


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / file for file in _TOKENIZER_FILES if (folder / file).is_file()]


def read_config(folder: Path) -> dict:
    """config.json of an encoder's folder. EncoderError, with the path, if it is not JSON."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(f"{path} is not JSON ({error}); copy the encoder again") from error


def vae_sha256(folder: Path) -> str:
    """Hash of a VAE's weights, hex, without its config."""
    return _files_sha256(_weight_files(folder))


def text_sha256(folder: Path, tokenizer_folder: Path) -> str:
    """Hash of a text encoder's weights and of its tokenizer, hex."""
    return _files_sha256([*_weight_files(folder), *_tokenizer_files(tokenizer_folder)])


def _files_sha256(paths: Sequence[Path]) -> str:
    """sha256 over names and contents of files in the given order, hex."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def loading(name: str, folder: Path, loader: str) -> Iterator[None]:
    """Turn whatever from_pretrained raises (OSError, ValueError, KeyError, ...) into an EncoderError with the path.

    `loader`: what reads the folder, and where it was named.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()  # a bar per file would clutter our own
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise EncoderError(
            f"{name}: {folder} could not be loaded ({type(error).__name__}: {reason}); give a folder that {loader} can "
            "load"
        ) from error
