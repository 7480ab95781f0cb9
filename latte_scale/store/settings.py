"""How object stores are reached and cached.

Credentials are no settings: boto3's own chain finds them. If it finds none, requests are unsigned, which is enough for
a public bucket.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

MEBIBYTE = 1 << 20
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class StoreSettings:
    """Settings for s3:// URLs besides credentials; folders need none of them. Safe to log, to pickle and to save."""

    endpoint_url: str | None = None  # null: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or ~/.aws/config, else Amazon S3
    region: str | None = None  # null: AWS_REGION or ~/.aws/config
    # Bucket in the path or in the host name; auto: as ~/.aws/config says, else in the path unless it is Amazon's.
    addressing: Literal["auto", "path", "virtual"] = "auto"
    cache_dir: str | None = None  # local folder that caches what was read; null: no cache
    cache_bytes: int = 64 << 30  # maximum size of the cache, over all processes that share it
    # Fetch shuffled samples in blocks of this size (a multiple of 1 MiB) through the cache: fewer requests, more local
    # CPU time. cache_bytes must hold two shuffle windows (data.shuffle_window samples). null: fetch samples one by one.
    block_bytes: int | None = None
    num_connections: int = 16  # concurrent requests per process
    part_bytes: int = 8 * MEBIBYTE  # larger reads and writes are split into requests of this size
    read_ahead_bytes: int = 128 * MEBIBYTE  # memory for read-ahead, per process
    request_timeout_s: float = 20.0  # a request that takes longer is abandoned and retried
    stall_budget_s: float = 300.0  # time that one read or write may spend on retries before it is an error
    first_answer_s: float = 45.0  # the same before the endpoint's first answer, as it may be wrong
    hedge_after_s: float | None = 2.0  # a read that takes longer is requested once more (hedging); null: never
    scratch_dir: str | None = None  # local folder for files being uploaded; null: the system's temporary folder

    def __post_init__(self) -> None:
        for name in ("num_connections", "read_ahead_bytes", "cache_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"store.{name} must be at least 1, got {getattr(self, name)}")
        if self.part_bytes < 5 * MEBIBYTE:
            raise ValueError(
                f"store.part_bytes must be at least {5 * MEBIBYTE} (S3's own limit), got {self.part_bytes}"
            )
        if self.block_bytes is not None:
            if self.block_bytes < MEBIBYTE or self.block_bytes % MEBIBYTE:
                raise ValueError(f"store.block_bytes must be a multiple of {MEBIBYTE}, got {self.block_bytes}")
            if self.cache_dir is None:
                raise ValueError("store.block_bytes needs store.cache_dir, a local folder that keeps the blocks")
            if self.cache_bytes < 2 * self.block_bytes:
                raise ValueError(
                    f"store.cache_bytes must hold two blocks or more, {2 * self.block_bytes} bytes with "
                    f"store.block_bytes={self.block_bytes}, got {self.cache_bytes}; raise it, or leave out the blocks"
                )
        for name in ("request_timeout_s", "stall_budget_s", "first_answer_s", "hedge_after_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"store.{name} must be positive, got {value}")
        if self.endpoint_url is not None:
            check_endpoint(self.endpoint_url, "store.endpoint_url")
        for name in ("cache_dir", "scratch_dir"):
            if "://" in (getattr(self, name) or ""):
                raise ValueError(f"store.{name} must be a folder on a local disk, got {getattr(self, name)}")
        if self.cache_dir is not None and not self.cache_dir:
            raise ValueError("store.cache_dir is empty: give a folder, or leave the key out for no cache")

    @property
    def without_cache(self) -> "StoreSettings":
        """The same without a cache, for data that is read only once."""
        return replace(self, cache_dir=None, block_bytes=None)

    @property
    def timeouts_s(self) -> tuple[float, float]:
        """The longest wait for a connection, and for any bytes on one."""
        return min(CONNECT_TIMEOUT_S, self.request_timeout_s), self.request_timeout_s

    @property
    def cache_path(self) -> Path | None:
        """The cache folder with ~ expanded."""
        return None if self.cache_dir is None else Path(self.cache_dir).expanduser().absolute()


def check_endpoint(url: str, what: str) -> None:
    """Raise ValueError for an endpoint that is no http(s) URL or holds credentials, which are not repeated."""
    if "@" in url:
        raise ValueError(
            f"{what} holds a user name or password: leave them out; credentials come from AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE or an instance role"
        )
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{what}: expected http://HOST:PORT or https://HOST, got {url!r}")
