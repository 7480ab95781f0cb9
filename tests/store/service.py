"""The S3 service of a test session, started on first use and ended with the process; one prefix of it per test.

In: nothing. Out: `service()`, a running radosgw, or a skip with the reason; `Corner`, a test's own prefix, with a proxy
for faults before it and the environment that boto3 reads.
"""

import atexit
import functools
import shutil
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from latte_scale.store import StoreSettings, open_store
from latte_scale.store.s3 import S3Store
from tests.store.ceph import ACCESS_KEY, SECRET_KEY, Ceph, CephError, missing_programs
from tests.store.proxy import Fault, Proxy

BUCKET = "latte-scale-tests"
NUM_STARTS = 2  # a command of its own may give up after seconds on a machine that stalls
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}
CLEARED = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION")


@functools.cache
def _start() -> Ceph | str:
    """The service, or why there is none."""
    try:
        from botocore.exceptions import BotoCoreError
    except ImportError:
        return "no S3 tests: boto3 is not installed (pip install 'latte_scale[s3]')"
    missing = missing_programs()
    if missing:
        return f"no S3 service to test with: {', '.join(missing)} not installed (radosgw, ceph-mon, ceph-osd)"
    for _ in range(NUM_STARTS):
        root = Path(tempfile.mkdtemp(prefix="latte-scale-ceph-"))
        ceph = Ceph(root)
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        atexit.register(ceph.stop)  # runs first
        try:
            ceph.start()
            _make_bucket(ceph)
            return ceph
        except (CephError, BotoCoreError) as error:
            reason = f"the S3 service did not start: {error}"
            ceph.stop()
    return reason


def _make_bucket(ceph: Ceph) -> None:
    """The bucket of all tests; the first one takes Ceph some seconds."""
    import boto3

    endpoint = f"http://127.0.0.1:{ceph.port}"
    keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY}
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys).create_bucket(Bucket=BUCKET)


def service() -> Ceph:
    """The running service; skips the test that asks for it if it cannot be had."""
    started = _start()
    if isinstance(started, str):
        pytest.skip(started)
    return started


@dataclass
class Corner:
    """A test's own prefix, and the way to it."""

    proxy: Proxy
    url: str = field(default_factory=lambda: f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}")

    def settings(self, **changes: object) -> StoreSettings:
        """Settings that reach the service through the proxy, and give up soon enough for tests."""
        values = {"stall_budget_s": 20.0, "request_timeout_s": 6.0, "hedge_after_s": None, **changes}
        return StoreSettings(endpoint_url=self.proxy.url, **values)

    def store(self, **changes: object) -> S3Store:
        """A store at the prefix."""
        return open_store(self.url, self.settings(**changes))

    def fail(self, kind: str, **about: object) -> None:
        """Let the next requests meet a fault."""
        self.proxy.faults.append(Fault(kind, **about))


def make_corner(monkeypatch: pytest.MonkeyPatch, host: str = "127.0.0.1") -> Corner:
    """A corner of the service behind a proxy that listens on an address of this machine, and the environment for it."""
    ceph = service()
    for name in CLEARED:
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("latte_scale.store.connection._connections", {})  # those of another test's environment
    proxy = Proxy(ceph.address, host=host)
    proxy.start()
    return Corner(proxy)
