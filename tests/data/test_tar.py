"""The tar walk against Python's tarfile, and its refusals."""

import io
import subprocess
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latte_scale.data.tar import END, TarError, header, padded, split_name, walk


def tar_of(members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def reader(data: bytes):
    return lambda offset, size: data[offset : offset + size]


def members_of(data: bytes, **options) -> list[tuple[str, bytes]]:
    return [(m.name, data[m.offset : m.offset + m.size]) for m in walk(reader(data), "x.tar", **options)]


names = st.text(st.sampled_from("abz0/é-_ ."), min_size=1, max_size=200).filter(
    lambda name: (
        not name.startswith("/") and not name.endswith("/") and ".." not in name.split("/") and name.strip("./ ")
    )
)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=6),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_the_walk_sees_what_tarfile_wrote(members, kind):
    data = tar_of(members, kind)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(info.name, archive.extractfile(info).read()) for info in archive]
    assert [(name.rstrip("/"), payload) for name, payload in members_of(data)] == expected


@settings(max_examples=50, deadline=None)
@given(names, st.binary(max_size=1500))
def test_tarfile_reads_our_headers(name, payload):
    data = header(name, len(payload)) + payload + bytes(padded(len(payload)) - len(payload)) + END
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        (info,) = archive
        assert archive.extractfile(info).read() == payload
        assert (info.name, info.mtime, info.uid, info.gid) == (name.rstrip("/"), 0, 0, 0)


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_sparse_files_of_gnu_tar_are_refused(tmp_path, version):
    """Their members are plain to who does not know the records: a clip of other bytes was stored, without a word."""
    with (tmp_path / "a.mp4").open("wb") as file:
        file.write(b"x" * 4096)
        file.seek(1 << 20)
        file.write(b"y" * 4096)
    command = ["tar", "--format=posix", "-S", f"--sparse-version={version}", "-cf", "x.tar", "a.mp4"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(TarError, match=r"member 'a\.mp4' is sparse \(GNU\.sparse\..*pack it again without tar's -S"):
        members_of((tmp_path / "x.tar").read_bytes())


def test_a_member_begins_at_its_first_header_block():
    data = tar_of([("a.txt", b"1"), ("n" * 180 + ".txt", b"2"), ("b.txt", b"3")])
    first, second, third = walk(reader(data), "x.tar")
    assert second.start == padded(first.offset + first.size) and third.start == padded(second.offset + second.size)
    assert second.offset - second.start > 512  # long-name blocks lie before it
    alone = list(walk(reader(data), "x.tar", start=second.start, end=third.start))
    assert alone == [second]


def test_every_cut_is_seen_and_names_the_last_sound_member():
    members = [("a.txt", b"x" * 700), ("b.txt", b"y" * 100)]
    data = tar_of(members)
    sound_end = 512 + 1024 + 512 + 512
    for end in range(0, sound_end + 1, 128):
        cut = data[:end]
        expected = rf"x\.tar: the archive is cut at byte {end}; the last sound member"
        with pytest.raises(TarError, match=expected) as error:
            list(walk(reader(cut), "x.tar", total=len(cut)))
        sound = "b.txt" if end >= 512 + 1024 + 512 + 100 else "a.txt" if end >= 512 + 700 else "none"
        assert f"last sound member is '{sound}'" in str(error.value), end


@pytest.mark.parametrize("position", [0, 100, 124, 148, 156, 500])
def test_a_flipped_header_bit_is_seen(position):
    data = bytearray(tar_of([("a.txt", b"1"), ("b.txt", b"2")]))
    data[1024 + position] ^= 4
    with pytest.raises(TarError, match=r"no sound tar header at byte 1024; the last sound member is 'a\.txt'"):
        members_of(bytes(data))


def test_something_else_is_no_tar():
    with pytest.raises(TarError, match="not an uncompressed tar"):
        members_of(b"\x1f\x8b" + bytes(range(256)) * 4)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.txt", "a/../../x.txt"])
def test_names_that_leave_the_archive_are_refused(name):
    with pytest.raises(TarError, match=f"member '{name}' points outside the archive"):
        members_of(tar_of([("ok.txt", b""), (name, b"")]))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(kind):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("evil.mp4")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(TarError, match=r"member 'evil\.mp4' is .*only regular files"):
        members_of(buffer.getvalue())


def test_folders_are_passed_over():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("clips")
        info.type = tarfile.DIRTYPE
        archive.addfile(info)
        archive.addfile(tarfile.TarInfo("clips/a.txt"))
    assert members_of(buffer.getvalue()) == [("clips/a.txt", b"")]


def test_sizes_of_8_gib_and_more_are_read():
    info = tarfile.TarInfo("big.mp4")
    info.size = 9 << 30
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        (member,) = walk(reader(info.tobuf(kind)), "x.tar", end=1)
        assert member.size == 9 << 30


def with_size_field(block: bytes, field: bytes) -> bytes:
    """A header block with another size field, and the checksum that fits."""
    changed = bytearray(block[:124] + field.ljust(12, b"\0") + block[136:])
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


@pytest.mark.parametrize("field", [b"-0000001000", b"twelve bytes"])
def test_a_size_that_is_none_is_refused_and_the_walk_ends(field):
    with pytest.raises(TarError, match="the header at byte 0 says a size of"):
        members_of(with_size_field(header("a.mp4", 0), field) + END)


@pytest.mark.parametrize("size", ["-512", "many"])
def test_a_size_of_a_pax_header_that_is_none_is_refused(size):
    info = tarfile.TarInfo("a.mp4")
    info.pax_headers = {"size": size}
    with pytest.raises(TarError, match=f"the header at byte 0 says a size of '{size}'"):
        members_of(info.tobuf(tarfile.PAX_FORMAT) + END)


def test_names_are_split_by_the_rule_of_webdataset():
    from webdataset.tariterators import base_plus_ext

    for name in ("a.txt", "dir/b.c.d.JPG", "x/y.z/k.latents.safetensors", "noext", "a/.hidden", "v1.0/clip.mp4"):
        key, extension = base_plus_ext(name)
        expected = (key, extension.lower()) if key else None
        if not name.endswith(".hidden"):  # webdataset calls this sample "a/"
            assert split_name(name) == expected
    assert split_name("a/.hidden") is None
    assert split_name("__meta__/info.json") is None
    assert split_name("./a.txt") == ("a", "txt")
