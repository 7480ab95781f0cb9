"""Store settings: read strictly from a config, and free of credentials."""

import pickle

import pytest

from latte_scale import settings
from latte_scale.store import StoreSettings, open_store


def test_they_are_a_config_section():
    made = settings.from_mapping(StoreSettings, {"endpoint_url": "http://127.0.0.1:9000", "num_connections": 4})
    assert made == StoreSettings(endpoint_url="http://127.0.0.1:9000", num_connections=4)
    assert settings.from_mapping(StoreSettings, settings.to_mapping(made)) == made
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(settings.SettingsError, match="did you mean cache_dir"):
        settings.from_mapping(StoreSettings, {"cache_dirs": "/tmp"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_connections": 0}, "store.num_connections must be at least 1, got 0"),
        ({"cache_bytes": 0}, "store.cache_bytes must be at least 1"),
        ({"part_bytes": 1000}, "store.part_bytes must be at least"),
        ({"request_timeout_s": 0.0}, "store.request_timeout_s must be positive"),
        ({"hedge_after_s": -1.0}, "store.hedge_after_s must be positive"),
        ({"endpoint_url": "127.0.0.1:9000"}, "expected http://HOST:PORT"),
        ({"block_bytes": 1 << 20}, "store.block_bytes needs store.cache_dir"),
        ({"block_bytes": 1 << 19, "cache_dir": "c"}, "store.block_bytes must be a multiple of 1048576"),
        ({"block_bytes": 8 << 20, "cache_dir": "c", "cache_bytes": 9 << 20}, "store.cache_bytes must hold two blocks"),
        ({"cache_dir": "s3://bucket/cache"}, "store.cache_dir must be a folder on a local disk, got s3://bucket/cache"),
        ({"cache_dir": "file:///tmp/cache"}, "store.cache_dir must be a folder on a local disk"),
        ({"scratch_dir": "s3://bucket/x"}, "store.scratch_dir must be a folder on a local disk"),
        ({"cache_dir": ""}, "leave the key out for no cache"),
    ],
)
def test_what_cannot_work_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StoreSettings(**values)


def test_what_is_read_once_goes_past_cache_and_blocks():
    cached = StoreSettings(region="x", cache_dir="c", block_bytes=1 << 20)
    assert cached.without_cache == StoreSettings(region="x")


def test_credentials_have_no_place_in_settings_and_urls():
    with pytest.raises(ValueError, match="holds a user name or password") as refused:
        StoreSettings(endpoint_url="http://someone:hunter2@host:9000")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ValueError, match="expected s3://BUCKET/PREFIX") as refused:
        open_store("s3://someone:hunter2@bucket/x")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ValueError, match=r"a bucket name of two or more letters, .*, got 'a'"):
        open_store("s3://a/x")
