"""What a process shares: one client, and nothing that reveals credentials."""

import dataclasses
import json
import logging
import multiprocessing
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from latte_scale.store import (
    CredentialsError,
    NeverAllowedError,
    NeverReachedError,
    StoreError,
    StoreSettings,
    UnreachableError,
    connection,
    open_store,
)
from latte_scale.store.connection import connection_for
from tests.store.ceph import HOST

pytest.importorskip("boto3")
SECRET, TOKEN = "never-to-be-seen", "no-token-either"


def test_stores_share_a_connection_and_children_make_their_own():
    settings = StoreSettings(endpoint_url="http://127.0.0.1:1")
    mine = connection_for(settings)
    assert connection_for(StoreSettings(endpoint_url="http://127.0.0.1:1")) is mine
    assert connection_for(StoreSettings(endpoint_url="http://127.0.0.1:2")) is not mine
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(has_connections) is False


class MetadataService(BaseHTTPRequestHandler):
    """That of a machine in the cloud, where a role gives the credentials; too busy for the first requests."""

    busy = 0

    def do_PUT(self) -> None:
        self.answer(b"token")

    def do_GET(self) -> None:
        role = {"Code": "Success", "AccessKeyId": "key", "SecretAccessKey": SECRET, "Token": TOKEN}
        is_list = self.path.endswith("security-credentials/")
        self.answer(b"trainer" if is_list else json.dumps(role | {"Expiration": "2099-01-01T00:00:00Z"}).encode())

    def answer(self, body: bytes) -> None:
        cls = type(self)
        cls.busy -= 1
        self.send_response(503 if cls.busy >= 0 else 200)
        self.end_headers()
        self.wfile.write(b"" if cls.busy >= 0 else body)

    def log_message(self, *_) -> None:
        pass


def test_a_metadata_service_that_is_busy_is_asked_again(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    MetadataService.busy = 2
    with ThreadingHTTPServer(("127.0.0.1", 0), MetadataService) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        _, client, _ = connection._client(StoreSettings(endpoint_url="http://127.0.0.1:1", region="x"))
        credentials = client._request_signer._credentials  # asked for when it was made
        server.shutdown()
    assert credentials is not None and credentials.access_key == "key"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"AWS_PROFILE": "unheard-of"}, "boto3 cannot work with what is set here; check AWS_PROFILE .*ProfileNotFound"),
        ({"AWS_ACCESS_KEY_ID": "alone"}, "no credentials were found; set AWS_ACCESS_KEY_ID .*PartialCredentialsError"),
        ({"AWS_PROFILE": "program"}, "the credentials have expired; renew them .*CredentialRetrievalError"),
        ({"AWS_PROFILE": "role"}, "check AWS_PROFILE .*InvalidConfigError"),
        ({"AWS_PROFILE": "sign-on"}, "the credentials have expired; renew them .*SSOTokenLoadError"),
    ],
)
def test_settings_of_boto3_that_are_wrong_say_what_to_do(tmp_path, monkeypatch, variables, reason):
    (tmp_path / "config").write_text(
        "[profile program]\ncredential_process = /bin/false\n"
        "[profile role]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = unheard-of\n"
        "[profile sign-on]\nsso_start_url = https://x.example\nsso_region = us-east-1\nsso_account_id = 123\n"
        "sso_role_name = x\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    outside = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
    for name, value in {**outside, "AWS_EC2_METADATA_DISABLED": "true", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(connection, "_connections", {})
    store = open_store("s3://bucket/x", StoreSettings(endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(NeverAllowedError, match=f"^s3://.*{reason}.*http://127.0.0.1:9"):
        store.read("x", 0, 1)


def has_connections() -> bool:
    from latte_scale.store import connection

    return bool(connection._connections)


@pytest.mark.parametrize(
    ("settings", "style"),
    [
        (StoreSettings(endpoint_url="https://s3.example.org", region="x"), "path"),
        (StoreSettings(endpoint_url="https://s3.example.org", region="x", addressing="virtual"), "virtual"),
        (StoreSettings(region="eu-west-1"), "auto"),
    ],
)
def test_a_service_of_ones_own_is_addressed_by_path(settings, style, monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    assert connection_for(settings).client.meta.config.s3["addressing_style"] == style


@pytest.mark.parametrize("told_by", ["the setting", "the AWS config"])
def test_a_service_that_wants_the_bucket_in_the_host_name(s3, told_by, tmp_path, monkeypatch):
    """Of the names BUCKET.s3.test no name server knows, so they are looked up here; the service is radosgw's own."""
    look_up = socket.getaddrinfo

    def of_tests(host, *more, **options):
        return look_up("127.0.0.1" if str(host).endswith(HOST) else host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", of_tests)
    settings = dataclasses.replace(s3.settings(), endpoint_url=f"http://{HOST}:{s3.proxy.port}")
    if told_by == "the setting":
        settings = dataclasses.replace(settings, addressing="virtual")
    else:
        (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    store = open_store(s3.url, settings)
    store.write("a", b"0123")
    assert store.read("a") == b"0123" and store.read("a", 1, 2) == b"12" and store.list() == ["a"]
    store.delete("a")
    asked = [(seen.headers["host"], seen.line.split()[1]) for seen in s3.proxy.seen]
    assert len(asked) >= 5
    for host, path in asked:
        assert host.partition(":")[0] == f"{store.bucket}.{HOST}" and not path.startswith(f"/{store.bucket}")


@pytest.mark.parametrize("code", ["SecondLevelDomainForbidden", "PathStyleDomainForbidden", "InvalidPathAccess"])
def test_a_service_that_refuses_the_bucket_in_the_path_says_what_to_set(s3, code):
    s3.fail("answer", status=403, code=code, times=4)
    for ask in (lambda store: store.read("x"), lambda store: store.list()):
        with pytest.raises(CredentialsError, match=rf"bucket in the host name; set store.addressing=virtual .*{code}"):
            ask(s3.store())


def test_an_endpoint_that_names_the_bucket_too_is_told(s3):
    """Some services show such an address for each bucket; by the path, a listing then asks for an object."""
    store = open_store(s3.url, dataclasses.replace(s3.settings(), endpoint_url=f"{s3.proxy.url}/{s3.store().bucket}"))
    with pytest.raises(
        StoreError, match=r"does the endpoint name the bucket, too\? Leave it out of store.endpoint_url"
    ):
        store.list()


def test_credentials_are_in_no_log_and_no_error(s3, monkeypatch, caplog):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    for name in ("boto3", "botocore", "urllib3"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    with caplog.at_level(logging.DEBUG):
        store = s3.store(num_connections=5, stall_budget_s=1.0)
        s3.fail("answer", times=2)
        with pytest.raises(StoreError) as raised:
            store.read("x", 0, 1)
    written = caplog.text + "".join(traceback.format_exception(raised.value)) + repr(store.settings) + repr(vars(store))
    assert "503" in caplog.text, "the retries are logged"
    assert SECRET not in written and TOKEN not in written and "testkey" not in written


def test_an_endpoint_that_never_answers_is_told_early_and_one_that_did_is_waited_for(s3):
    gone = open_store(s3.url, StoreSettings(endpoint_url="http://127.0.0.1:9", first_answer_s=11.0))
    for read in (lambda: gone.read("x"), lambda: gone.size("x")):
        begun = time.monotonic()
        with pytest.raises(NeverReachedError, match=r"cannot connect to http://127.0.0.1:9 .*store.first_answer_s"):
            read()
        assert time.monotonic() - begun < 5, "store.stall_budget_s is 300 s"
    s3.fail("silence", times=99)
    silent = s3.store(stall_budget_s=60.0, request_timeout_s=0.5, first_answer_s=3.0)
    for read in (lambda: silent.read("x"), lambda: silent.read("x", 0, 5), lambda: silent.size("x")):
        with pytest.raises(
            NeverReachedError, match=r"last (.*TimeoutError|no answer in .*) \(http.*store.first_answer_s"
        ):
            read()
    s3.proxy.reset()
    store = s3.store(stall_budget_s=3.0, first_answer_s=10.1)
    store.write("x", b"1")
    s3.proxy.stop()
    begun = time.monotonic()
    with pytest.raises(UnreachableError) as caught:
        while True:  # what is connected already may be answered once more
            store.read("x")
    assert not isinstance(caught.value, NeverReachedError) and time.monotonic() - begun > 0.5


class WebPage(BaseHTTPRequestHandler):
    """What answers on another port of some services: a page, whatever it is asked for."""

    def do_GET(self) -> None:
        body = b"<html>sign in</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def web_page(monkeypatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with ThreadingHTTPServer(("127.0.0.1", 0), WebPage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_web_page_is_not_taken_for_an_empty_bucket(web_page):
    """A run would find no checkpoint there, and start at step 0."""
    store = open_store("s3://bucket/x", StoreSettings(endpoint_url=f"http://{web_page}"))
    for look in (store.list, store.folders, lambda: store.size("a"), lambda: store.exists("a")):
        with pytest.raises(NeverAllowedError, match=r"check .* store.endpoint_url \(an answer that is not S3's"):
            look()


def test_https_where_http_is_spoken_is_told_early(web_page):
    store = open_store("s3://bucket/x", StoreSettings(endpoint_url=f"https://{web_page}", first_answer_s=11.0))
    for look in (store.list, lambda: store.read("a", 0, 1)):
        with pytest.raises(NeverReachedError, match="is it http"):
            look()
