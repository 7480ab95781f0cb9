"""A corner of a real S3 service that boto3's environment leads to."""

from collections.abc import Iterator

import pytest

from tests.store.service import Corner, make_corner


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Corner]:
    """An empty prefix, reached as a user's would be; skipped where no service can be started."""
    corner = make_corner(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", corner.proxy.url)
    yield corner
    corner.proxy.stop()
