"""Real-world clips: valid but unusual ones, and bad ones, each with the reason that must be reported."""

import io
import struct
from fractions import Fraction

import av
import numpy as np

from tests.data.making import frame_grey, make_clip


def rotated(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """The mp4 with another display matrix (a, b, c, d) in its track header."""
    identity = b"".join(number.to_bytes(4, "big") for number in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    a, b, c, d = ((value << 16).to_bytes(4, "big", signed=True) for value in matrix)
    other = a + b + bytes(4) + c + d + bytes(12) + (1 << 30).to_bytes(4, "big")
    place = data.index(identity, data.index(b"tkhd"))
    return data[:place] + other + data[place + 36 :]


def audio_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000, layout="mono")
        for number in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 1024 * number
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def zero_frames() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        output.start_encoding()
    return buffer.getvalue()


def flat_clip(
    container: str = "mp4",
    pix_fmt: str = "yuv420p",
    sides: tuple[int, int] = (48, 64),
    times_ms: list[int] | None = None,
) -> bytes:
    """12 frames, each filled with its grey, a tenth of a second apart or at `times_ms`; sides: height and width."""
    buffer, tick = io.BytesIO(), Fraction(1, 1000)
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream("libx264", rate=10, options={"crf": "1", "g": "5", "preset": "ultrafast"})
        stream.height, stream.width = sides
        stream.pix_fmt, stream.time_base, stream.codec_context.time_base = pix_fmt, tick, tick
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((*sides, 3), frame_grey(number), np.uint8), format="rgb24")
            frame.pts, frame.time_base = times_ms[number] if times_ms else 100 * number, tick
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def endless(num_frames: int = 3_000_000) -> bytes:
    """An mp4 of a few kilobytes whose index names one byte after the other as frames, far past its end."""
    data = bytearray(make_clip(20))
    for box, words in (("stsz", {8: 1, 12: num_frames}), ("stsc", {16: num_frames}), ("stts", {12: num_frames})):
        for at, value in words.items():
            place = data.index(box.encode()) + at
            data[place : place + 4] = struct.pack(">I", value)
    return bytes(data)


def latin_tag() -> bytes:
    """An mp4 whose title is Latin-1, as old cameras and editors write it, and so no UTF-8."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output, av.open(io.BytesIO(flat_clip())) as clip:
        output.metadata["title"] = "TITLE"
        stream = output.add_stream_from_template(clip.streams.video[0])
        for packet in clip.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    assert b"TITLE" in buffer.getvalue()
    return buffer.getvalue().replace(b"TITLE", "Fête!".encode("latin-1"))


VARIABLE_MS = [0, 10, 500, 510, 520, 3000, 3001, 3002, 9000, 9500, 9501, 20_000]
SOUND = {
    "ten_bit": flat_clip(pix_fmt="yuv420p10le"),
    "ten_bit_444": flat_clip(pix_fmt="yuv444p10le"),
    "variable_rate": flat_clip(times_ms=VARIABLE_MS),
    "variable_rate_mkv": flat_clip("matroska", times_ms=VARIABLE_MS),
    "wild_rate": flat_clip(times_ms=list(range(12))),  # 1000 frames a second
    "rotated": rotated(flat_clip(), (0, 1, -1, 0)),
    "latin_tag": latin_tag(),
}
"""Of 48 x 64 pixels as stored, frame i filled with frame_grey(i)."""
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n"
SDP = (
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
BAD = {
    "audio_only": (audio_only(), "audio only: no video stream"),
    "zero_frames": (zero_frames(), "zero frames"),
    "cut": (make_clip(20)[:700], "corrupt"),
    "page": (b"<html>404</html>" * 99, "corrupt"),
    "empty": (b"", "corrupt"),
    "endless": (endless(), "endless: more than"),
    "playlist": (PLAYLIST, "corrupt"),
    "stream": (SDP, "corrupt"),
}
"""name -> (bytes, how the reason begins)."""
