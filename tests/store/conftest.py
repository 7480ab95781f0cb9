"""A separate prefix in a real S3 service for each test that requests it."""

from collections.abc import Iterator

import pytest

from tests.store.service import Corner, make_corner


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Corner]:
    """An empty prefix behind a proxy; skipped where no service can be started."""
    corner = make_corner(monkeypatch)
    yield corner
    corner.proxy.stop()
