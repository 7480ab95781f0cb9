"""MDS shards in an S3 store: converted into it, indexed there, and trained on through a service that breaks."""

from pathlib import Path

from data_tools.cli import main as latte_data
from latte_scale.data.samples import open_dataset
from latte_scale.data.schema import MANIFEST
from latte_scale.store import open_store
from tests.data.loading import ids, load
from tests.data.making import make_latents, make_videos


def convert(source: Path | str, output: Path | str, to: str) -> None:
    assert latte_data(["convert", "--input", str(source), "--output", str(output), "--to", to]) == 0


def means(steps: list) -> list[float]:
    return [float(mean.mean()) for step in steps for batch in step for mean in batch.mean_BFCHW]


def test_latents_go_there_and_back_and_train_like_a_folders(s3, tmp_path):
    make_latents(tmp_path / "tar")
    convert(tmp_path / "tar", tmp_path / "mds", "mds")
    convert(tmp_path / "tar", f"{s3.url}/mds", "mds")
    convert(f"{s3.url}/mds", tmp_path / "back", "tar")
    for path in (tmp_path / "tar").glob("*.tar"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    golden = load(tmp_path / "mds", 4)
    for kind in ("reset", "cut", "short"):
        s3.fail(kind, match=r"^GET .*\.mds ")
    s3.fail("flip", match=r"^GET .*\.mds ", at=600)
    steps = load(f"{s3.url}/mds", 4)
    assert ids(steps) == ids(golden) == ids(load(f"{s3.url}/mds", 4, num_workers=2)) and means(steps) == means(golden)
    assert not any(batch.replaced for step in steps for batch in step)
    assert not any(fault.times for fault in s3.proxy.faults), "not every fault was met"


def test_clips_are_indexed_where_they_lie(s3, tmp_path):
    make_videos(tmp_path / "tar")
    convert(tmp_path / "tar", f"{s3.url}/mds", "mds")
    store = open_store(f"{s3.url}/mds")
    fingerprint = open_dataset(store.url).manifest.fingerprint()
    for name in [name for name in store.list() if name == MANIFEST or ".index." in name]:
        store.delete(name)
    assert latte_data(["index", store.url]) == 0
    assert open_dataset(store.url).manifest.fingerprint() == fingerprint
    assert latte_data(["verify", store.url]) == 0
