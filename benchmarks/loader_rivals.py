"""The other loaders of benchmarks/loader.py: each writes the samples in its own format, and reads them its own way.

In: a folder. Out: an iterable of (latents [8, 16, 4, 64, 64], text [8, 60, 4096]), float16 tensors of one epoch.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader_samples import BATCH, NUM_SAMPLES, PER_SHARD, SAMPLE_BYTES, sample, tensors

Batches = Iterable[tuple[Any, Any]]


def write_webdataset(folder: str) -> None:
    import webdataset

    os.makedirs(folder)
    with webdataset.ShardWriter(f"{folder}/shard-%06d.tar", maxcount=PER_SHARD, verbose=0) as writer:
        for number in range(NUM_SAMPLES):
            latents, text = sample(number)
            writer.write({"__key__": f"{number:06d}", "latents.bin": latents.tobytes(), "text.bin": text.tobytes()})


def read_webdataset(folder: str, order: str, num_workers: int) -> Batches:
    import webdataset

    urls = sorted(map(str, Path(folder).glob("*.tar")))
    shuffled = order == "random"
    data = webdataset.WebDataset(urls, shardshuffle=len(urls) if shuffled else False, empty_check=False)
    data = data.shuffle(256) if shuffled else data
    data = data.to_tuple("latents.bin", "text.bin").map(lambda pair: tensors(*pair))
    return torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=num_workers)


def write_energon(folder: str) -> None:
    write_webdataset(folder)
    command = [str(Path(sys.executable).with_name("energon")), "prepare", folder, "--non-interactive", "--no-progress"]
    subprocess.run([*command, "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"], check=True)


def read_energon(folder: str, order: str, num_workers: int) -> Batches:
    from benchmarks import loader_energon  # its classes cross processes, so they stand in a module

    batches = loader_energon.batches(folder, order == "random", num_workers, BATCH)
    return itertools.islice(batches, NUM_SAMPLES // BATCH)  # a training set has no end


def write_mds(folder: str) -> None:
    streaming = import_streaming()
    columns = {"latents": "ndarray:float16:16,4,64,64", "text": "ndarray:float16:60,4096"}
    with streaming.MDSWriter(out=folder, columns=columns, size_limit=PER_SHARD * (SAMPLE_BYTES + 1024)) as writer:
        for number in range(NUM_SAMPLES):
            latents, text = sample(number)
            writer.write({"latents": latents, "text": text})


def read_mds(folder: str, order: str, num_workers: int) -> Batches:
    streaming = import_streaming()
    shuffled = order == "random"
    data = streaming.StreamingDataset(local=folder, shuffle=shuffled, batch_size=BATCH, num_canonical_nodes=1)
    loader = streaming.StreamingDataLoader(data, batch_size=BATCH, num_workers=num_workers)
    return ((batch["latents"], batch["text"]) for batch in loader)


def import_streaming() -> Any:
    """mosaicml-streaming without its vision part, whose torchvision is a CUDA build."""
    import types

    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    import streaming
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()  # what a run that was ended left behind, or the next cannot start
    return streaming


def pair_of_tensors(number: int) -> dict[str, Any]:
    latents, text = sample(number)
    return {"latents": torch.from_numpy(latents), "text": torch.from_numpy(text)}


def write_litdata(folder: str) -> None:
    import litdata

    numbers = list(range(NUM_SAMPLES))
    litdata.optimize(pair_of_tensors, inputs=numbers, output_dir=folder, chunk_size=PER_SHARD, num_workers=1)


def read_litdata(folder: str, order: str, num_workers: int) -> Batches:
    import litdata

    data = litdata.StreamingDataset(folder, shuffle=order == "random")
    loader = litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=num_workers)
    return ((batch["latents"], batch["text"]) for batch in loader)


LOADERS: dict[str, tuple[Callable[[str], None], Callable[[str, str, int], Batches]]] = {
    "webdataset": (write_webdataset, read_webdataset),
    "energon": (write_energon, read_energon),
    "mds": (write_mds, read_mds),
    "litdata": (write_litdata, read_litdata),
}
