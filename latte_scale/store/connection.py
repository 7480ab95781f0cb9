"""What a process shares over all its S3 stores with the same settings: one boto3 client, its threads, its counters.

In: StoreSettings. Out: a Connection, made once a process; a forked child makes its own, because sockets and threads do
not survive a fork. boto3 signs, finds credentials and keeps connections open; its own retries are off, because every
try must count against one budget. Its loggers are kept at WARNING: below that they print signatures and tokens.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from latte_scale.store.base import Counters, CredentialsError, NeverAllowedError, NeverReachedError
from latte_scale.store.faults import Fault, fault_of, store_error
from latte_scale.store.get import Getter
from latte_scale.store.retry import Budget, HedgeAllowance, wait_s
from latte_scale.store.settings import StoreSettings, check_endpoint
from latte_scale.store.threads import Threads

T = TypeVar("T")
METADATA_SERVICE = {"metadata_service_num_attempts": 3, "metadata_service_timeout": 2}
"""For credentials from a machine's role. botocore asks once, for 1 s, and reports that there are none if the service is
busy, as it is when all ranks and loader workers of a machine start at once."""
LOUD_WAIT_S = 1.0  # waits of at least this length are logged as warnings, shorter ones as info

log = logging.getLogger(__name__)


class Connection:
    """A boto3 client with the threads that use it."""

    def __init__(self, settings: StoreSettings) -> None:
        self.settings = settings
        self.client: Any
        self.getter: Getter
        self.is_anonymous: bool  # there are no credentials: requests are unsigned, which is enough for a public bucket
        self.counters = Counters()
        self.reached = False  # the endpoint has answered this process, even with an error
        self.allowed = False  # and has granted a request
        self.endpoint = settings.endpoint_url or "the endpoint of the environment"
        self.renew()
        self.endpoint = self.client.meta.endpoint_url
        self.hedges = HedgeAllowance()
        self.requests = Threads(settings.num_connections, "store-request")
        self.readers = Threads(settings.num_connections, "store-reader")

    def renew(self) -> None:
        """Read the credentials (again: another program may have renewed them on disk). Raises CredentialsError."""
        try:
            session, self.client, self.is_anonymous = _client(self.settings)
        except Exception as error:
            if isinstance(error, ValueError):
                raise
            found = store_error(fault_of(error), "s3://", "reading settings and credentials", self.endpoint)
            is_first = isinstance(found, CredentialsError) and not self.allowed
            raise (NeverAllowedError(str(found)) if is_first else found) from error
        self.getter = Getter(session, self.client, self.settings, self.is_anonymous)

    def call(self, url: str, doing: str, request: Callable[[Any], T], passing: tuple[str, ...] = ()) -> T:
        """The result of `request(client)`, retried while its faults are transient and the budget lasts.

        Raises a StoreError, or `Passed` with the fault for the kinds in `passing`, which the caller handles.
        """
        tries = Tries(self, url, doing, Budget(self.settings.stall_budget_s))
        while True:
            try:
                self.counters.num_requests += 1
                answer = request(self.client)
            except Exception as error:
                fault = fault_of(error)
                if fault.kind in passing:
                    raise Passed(fault, tries.num_failed) from error
                tries.failed(fault, error)
            else:
                self.reached = self.allowed = True
                return answer


class Passed(Exception):
    """A fault that the caller of `Connection.call` handles; `num_failed` tries failed before it."""

    def __init__(self, fault: Fault, num_failed: int) -> None:
        super().__init__(fault.reason)
        self.fault, self.num_failed = fault, num_failed


class Tries:
    """The failed tries of one operation: waits before the next, or raises the StoreError that ends it."""

    def __init__(self, connection: Connection, url: str, doing: str, budget: Budget) -> None:
        self.connection, self.url, self.doing, self.budget = connection, url, doing, budget
        self.num_failed = 0
        self._in_a_row, self._renewed = 0, False

    def failed(self, fault: Fault, error: Exception, num_bytes: int = 0) -> None:
        """Count a failure and wait. Bytes received before it reset the wait and extend the budget."""
        self.num_failed += 1
        self.budget.earn(num_bytes)
        self.connection.reached |= fault.is_answer or num_bytes > 0
        if fault.kind in ("expired", "setup") and not self._renewed:
            self._renewed = True
            self.connection.renew()
            return
        self._in_a_row = 1 if num_bytes else self._in_a_row + 1
        seconds = wait_s(self._in_a_row)
        if not fault.retryable or seconds >= self._left_s():
            raise self.error(fault) from error
        self.connection.counters.num_retries += 1
        level = logging.WARNING if seconds >= LOUD_WAIT_S else logging.INFO
        what = f"{self.url}: {self.doing}: try {self.num_failed} failed ({fault.reason}); the next in {seconds:.1f} s"
        log.log(level, "%s", what)
        time.sleep(seconds)

    def error(self, fault: Fault) -> Exception:
        """The StoreError that ends the operation now."""
        if fault.kind == "denied" and self.connection.is_anonymous:
            fault = Fault("no credentials", fault.reason)
        spent_s = self.budget.spent_s
        error = store_error(fault, self.url, self.doing, self.connection.endpoint, self.num_failed, spent_s)
        if not fault.is_answer and not self.connection.reached:
            return NeverReachedError(f"{error} (it has not answered since the start: store.first_answer_s)")
        if isinstance(error, CredentialsError) and not self.connection.allowed:
            return NeverAllowedError(str(error))
        return error

    def _left_s(self) -> float:
        """Seconds within which the next try must begin. Before the first answer, a try may take its whole connect
        timeout without an answer, so that time is subtracted."""
        if self.connection.reached:
            return self.budget.left_s
        settings = self.connection.settings
        return min(self.budget.left_s, settings.first_answer_s - settings.timeouts_s[0] - self.budget.spent_s)


_connections: dict[StoreSettings, Connection] = {}
_lock = threading.Lock()


def connection_for(settings: StoreSettings) -> Connection:
    """The Connection of this process for these settings."""
    with _lock:
        if settings not in _connections:
            _connections[settings] = Connection(settings)
        return _connections[settings]


def _after_fork() -> None:
    """Start a forked child without connections, and with a free lock."""
    global _lock
    _lock = threading.Lock()
    _connections.clear()


os.register_at_fork(after_in_child=_after_fork)


def _client(settings: StoreSettings) -> tuple[Any, Any, bool]:
    """A botocore session, an S3 client of it, and whether requests are unsigned because there are no credentials.

    Raises ValueError without boto3 or for an endpoint that holds credentials.
    """
    try:
        import boto3
        import botocore.session
        from botocore import UNSIGNED
        from botocore.config import Config
    except ImportError as error:
        raise ValueError("s3:// needs boto3: run pip install 'latte_scale[s3]'") from error
    for name in ("boto3", "botocore", "urllib3"):
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.WARNING)
    session = botocore.session.get_session()
    for name, value in METADATA_SERVICE.items():
        if session.get_config_variable(name) == 1:  # botocore's default
            session.set_config_variable(name, value)
    boto = boto3.session.Session(botocore_session=session)
    is_anonymous = session.get_credentials() is None

    def make(addressing: str) -> Any:
        config = Config(
            max_pool_connections=settings.num_connections,
            connect_timeout=settings.timeouts_s[0],
            read_timeout=settings.timeouts_s[1],
            retries={"total_max_attempts": 1},
            tcp_keepalive=True,
            # Content-MD5 and our own digests do this work; trailing checksums are unknown to many services.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": addressing},
            **({"signature_version": UNSIGNED} if is_anonymous else {}),
        )
        return boto.client("s3", endpoint_url=settings.endpoint_url, region_name=settings.region, config=config)

    style = _style_of_config(session) if settings.addressing == "auto" else settings.addressing
    known = settings.endpoint_url is not None and style == "auto"
    client = make("path" if known and not _is_amazon(settings.endpoint_url) else style)
    check_endpoint(client.meta.endpoint_url, "the endpoint of the environment")
    if not known and style == "auto" and not _is_amazon(client.meta.endpoint_url):
        client = make("path")  # few self-hosted services have a host name for every bucket
    return session, client, is_anonymous


def _style_of_config(session: Any) -> str:
    """The addressing_style of ~/.aws/config; "auto" without one."""
    of_s3 = session.get_scoped_config().get("s3")
    return of_s3.get("addressing_style", "auto") if isinstance(of_s3, dict) else "auto"


def _is_amazon(endpoint: str) -> bool:
    return ".amazonaws.com" in endpoint
