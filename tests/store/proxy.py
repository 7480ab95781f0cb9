"""An HTTP proxy in front of an S3 service that answers, delays or damages requests as a test requires.

In: faults, each for the next few requests that match; a latency; a bandwidth. Out: the service's answers, with the
faults in them, and a log of the requests. One thread per connection, in the process of the test. As a separate process:

    python -m tests.store.proxy --upstream 127.0.0.1:7480 --port 7481 --latency-ms 20
"""

import argparse
import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

CHUNK = 1 << 18
Kind = Literal["pass", "answer", "silence", "stall", "slow", "reset", "cut", "short", "flip", "lost", "range"]


@dataclass
class Fault:
    """What happens to the next `times` requests in whose first line `match`, a regular expression, is found.

    pass: nothing. answer: the service is not asked; `status` and `code` come back. silence: no answer for `seconds`.
    stall: nothing for `seconds` at byte `at` of the body. slow: `rate` bytes/s from there on. reset, cut: the
    connection is reset, or closed, there. short: the body ends there, and its length says so. flip: that byte is
    inverted. lost: the service did what was asked, and the answer is lost. range: the whole answer comes, and `code` as
    its Content-Range.
    """

    kind: Kind
    match: str = ""
    times: int = 1
    at: int = 0
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 30.0
    rate: int = 1000


@dataclass(frozen=True)
class Seen:
    """One request as it came."""

    line: str
    headers: dict[str, str]


@dataclass
class Proxy:
    """Listens on loopback, or where it is told; `start` it, `stop` it."""

    upstream: tuple[str, int]
    port: int = 0
    host: str = "127.0.0.1"
    latency_s: float = 0.0  # before each request is passed on
    bytes_per_s: float = 0.0  # of all answers together; 0: no limit
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._link_free = 0.0

    @property
    def url(self) -> str:
        """The endpoint that clients are given."""
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Begin to listen."""
        self._listener = socket.create_server((self.host, self.port), backlog=256)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def stop(self) -> None:
        """End, and wake up whatever waits in a fault."""
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def reset(self) -> None:
        """Forget faults and log."""
        with self._lock:
            self.faults.clear()
            self.seen.clear()

    def ranges(self) -> list[str]:
        """The ranges that were asked for, in order: "0-99"."""
        headers = [seen.headers for seen in self.seen if seen.line.startswith("GET")]
        return [each["range"].removeprefix("bytes=") for each in headers if "range" in each]

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = _Stream(socket.create_connection(self.upstream))
        server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client, server.socket, contextlib.suppress(OSError):
            stream = _Stream(client)
            while head := stream.head():
                if not self._exchange(stream, server, head):
                    return

    def _exchange(self, client: "_Stream", server: "_Stream", head: bytes) -> bool:
        """One request and its answer; whether the connection goes on."""
        line, headers = _parse(head)
        fault = self._fault(line, headers)
        kind = fault.kind if fault else None
        self._wait(self.latency_s)
        if kind == "answer":
            client.socket.sendall(_answer(fault, line))
            return False
        server.socket.sendall(head)
        if headers.get("expect", "").lower() == "100-continue":
            client.socket.sendall(server.head())
        server.relay_from(client, int(headers.get("content-length", 0)))
        answer = server.head()
        if kind == "lost":
            return False
        if kind == "silence":
            self._wait(fault.seconds)
            return False
        _, headers = _parse(answer)
        empty = line.startswith("HEAD") or answer[9:12] in (b"204", b"304")
        length = 0 if empty else int(headers.get("content-length", 0))
        if kind == "short":
            answer = answer.replace(b"ontent-Length: %d\r" % length, b"ontent-Length: %d\r" % fault.at)
        if kind == "range":
            answer = re.sub(rb"(?i)(content-range: )[^\r]*", rb"\g<1>" + fault.code.encode(), answer)
        client.socket.sendall(answer)
        if kind in (None, "pass", "range"):
            if headers.get("transfer-encoding") == "chunked" and not empty:
                client.relay_chunks_from(server)
            client.relay_from(server, length, self._pace)
            return headers.get("connection", "").lower() != "close"
        return self._damage(client, server, length, fault)

    def _damage(self, client: "_Stream", server: "_Stream", length: int, fault: Fault) -> bool:
        """The body with the fault in it."""
        client.relay_from(server, min(fault.at, length))
        left = max(0, length - fault.at)
        if fault.kind == "flip" and left:
            client.socket.sendall(bytes([server.exactly(1)[0] ^ 0xFF]))
            client.relay_from(server, left - 1)
            return True
        if fault.kind == "stall":
            self._wait(fault.seconds)
            client.relay_from(server, left)
            return True
        while fault.kind == "slow" and left and not self._ended.is_set():
            size = min(left, max(1, fault.rate // 10))
            client.socket.sendall(server.exactly(size))
            left -= size
            self._wait(0.1)
        if fault.kind == "reset":
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def _fault(self, line: str, headers: dict[str, str]) -> Fault | None:
        with self._lock:
            self.seen.append(Seen(line, headers))
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, line):
                    fault.times -= 1
                    return fault
        return None

    def _pace(self, size: int) -> None:
        """Wait until a link of `bytes_per_s`, which all answers share, has brought so many bytes."""
        if self.bytes_per_s:
            with self._lock:
                self._link_free = max(self._link_free, time.monotonic()) + size / self.bytes_per_s
                seconds = self._link_free - time.monotonic()
            self._wait(seconds)

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self._ended.wait(seconds)


class _Stream:
    """A socket with the bytes that were read too far."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._rest = b""

    def head(self) -> bytes:
        """A head with its empty line; b"" at the end of the connection."""
        while b"\r\n\r\n" not in self._rest:
            more = self.socket.recv(CHUNK)
            if not more:
                return b""
            self._rest += more
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n"

    def line(self) -> bytes:
        """A line with its end."""
        while b"\r\n" not in self._rest:
            self._rest += self.socket.recv(CHUNK) or b"0\r\n"
        line, _, self._rest = self._rest.partition(b"\r\n")
        return line + b"\r\n"

    def some(self, limit: int) -> bytes:
        """At least one byte of a body."""
        if self._rest:
            data, self._rest = self._rest[:limit], self._rest[limit:]
            return data
        data = self.socket.recv(min(limit, CHUNK))
        if not data:
            raise OSError("the other side ended in the middle of a body")
        return data

    def exactly(self, size: int) -> bytes:
        """So many bytes of a body."""
        data = b""
        while len(data) < size:
            data += self.some(size - len(data))
        return data

    def relay_from(self, other: "_Stream", size: int, pace: Callable[[int], None] = lambda size: None) -> None:
        """Pass on so many bytes of a body, each piece when `pace` says so."""
        while size:
            data = other.some(size)
            pace(len(data))
            self.socket.sendall(data)
            size -= len(data)

    def relay_chunks_from(self, other: "_Stream") -> None:
        """Pass on a chunked body without trailers."""
        size = 1
        while size:
            line = other.line()
            self.socket.sendall(line)
            size = int(line.split(b";")[0], 16)
            self.relay_from(other, size + 2)


def _parse(head: bytes) -> tuple[str, dict[str, str]]:
    """First line, and the headers with names in lower case."""
    line, *rest = head.decode("latin-1").split("\r\n")
    pairs = (each.partition(":") for each in rest if each)
    return line, {name.strip().lower(): value.strip() for name, _, value in pairs}


def _answer(fault: Fault, line: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>injected</Message></Error>".encode()
    head = f"HTTP/1.1 {fault.status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + (b"" if line.startswith("HEAD") else body)


def main() -> None:
    """Run until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", required=True, help="HOST:PORT of the service")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--mb-per-s", type=float, default=0.0, help="of all answers together; 0: no limit")
    args = parser.parse_args()
    host, _, port = args.upstream.rpartition(":")
    link = {"latency_s": args.latency_ms / 1000, "bytes_per_s": args.mb_per_s * 1e6}
    proxy = Proxy((host, int(port)), port=args.port, **link)
    proxy.start()
    print(proxy.url, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
