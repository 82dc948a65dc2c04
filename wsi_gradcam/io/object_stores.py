"""Object stores and web servers: clients, retries, and the meaning of errors. The only module that knows obstore."""

from __future__ import annotations

import base64
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from enum import Enum, auto
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from wsi_gradcam.errors import MissingExtraError, StoreError, from_extra
from wsi_gradcam.io.urls import closed_proxy, find_route, split_url

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, HTTPStore, ObjectStore, RetryConfig, S3Store

    __all__ = ["HTTPStore", "ObjectMeta", "ObjectStore", "S3Store"]

T = TypeVar("T")

S3 = "s3"
EXPECTED_S3_URL = (
    "expected s3://BUCKET/KEY; set credentials in the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
)
CREDENTIALS_HINT = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket"
# A failed request is repeated for this long, for slides and for results. A longer outage stops the run.
PATIENCE_S, OUT_PATIENCE_S = 30.0, 60.0
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
# Where machines in a cloud get credentials; obstore asks there if there are none.
INSTANCE_METADATA = "169.254.169.254"
ERROR_CHARACTERS = 240
FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 5.0


class Failure(Enum):
    """The kinds of failed requests that call for different advice."""

    MISSING = auto()
    NO_BUCKET = auto()
    IGNORES_RANGE = auto()
    ACCESS_DENIED = auto()
    NO_CREDENTIALS = auto()
    BEYOND_END = auto()
    REDIRECTED = auto()
    EXISTS = auto()  # for a put on condition that there is no object
    CHANGED = auto()  # for a put on condition that the object has a certain version
    REJECTED = auto()  # would fail again
    TRANSIENT = auto()


def classify(error: BaseException) -> Failure:
    """Return the kind of an error raised by obstore.

    Raises:
        MissingExtraError: obstore is not installed; this is the error itself.
    """
    if isinstance(error, MissingExtraError):
        raise error
    from obstore import exceptions

    kinds = {
        exceptions.NotSupportedError: Failure.IGNORES_RANGE,
        exceptions.PermissionDeniedError: Failure.ACCESS_DENIED,
        exceptions.UnauthenticatedError: Failure.ACCESS_DENIED,
        exceptions.AlreadyExistsError: Failure.EXISTS,
        exceptions.PreconditionError: Failure.CHANGED,
    }
    text = str(error)
    if "NoSuchBucket" in text:
        return Failure.NO_BUCKET
    if isinstance(error, FileNotFoundError):
        return Failure.MISSING
    for kind, failure in kinds.items():
        if isinstance(error, kind):
            return failure
    if INSTANCE_METADATA in text:
        return Failure.NO_CREDENTIALS
    if "416" in text and "Range" in text:
        return Failure.BEYOND_END
    if "redirect" in text.lower():
        return Failure.REDIRECTED
    # 408 and 429 ask for patience
    return Failure.REJECTED if re.search(r"\b4(?!08|29)\d\d [A-Z]", text) else Failure.TRANSIENT


def short_message(error: BaseException) -> str:
    """Return the first line of an obstore error, without secrets in URLs, up to `ERROR_CHARACTERS` long."""
    line = str(error).split("\n", 1)[0]
    line = re.sub(r"\?\S*", "", line)
    return re.sub(r"://[^/\s@]*@", "://", line)[:ERROR_CHARACTERS]


def store_error(path: object, error: Exception, action: str) -> OSError:
    """Return the error for a results path from an obstore error: a plain `FileNotFoundError`, or a `StoreError`.

    `action` is the participle for what failed: "read" or "written".
    """
    failure = classify(error)
    if failure is Failure.MISSING:
        return FileNotFoundError(f"{path}: does not exist")
    mends = {
        Failure.NO_BUCKET: "no such bucket; create it, or check --out and the endpoint in AWS_ENDPOINT_URL",
        Failure.ACCESS_DENIED: f"access was refused ({short_message(error)}); {CREDENTIALS_HINT}; they need "
        "permission to read, write, list and delete there",
        Failure.NO_CREDENTIALS: f"there are no credentials; {CREDENTIALS_HINT}",
        Failure.REDIRECTED: (
            f"the bucket is in another region or at another endpoint ({short_message(error)}); set "
            "AWS_REGION or AWS_ENDPOINT_URL"
        ),
        Failure.REJECTED: (
            f"the store rejects the request ({short_message(error)}); check --out and the store's settings"
        ),
    }
    other = (
        f"the store does not respond properly ({short_message(error)}); check the store and the network, and run the "
        "same command again: nothing finished is lost"
    )
    return StoreError(f"{path}: cannot be {action}: {mends.get(failure, other)}")


def retry_delays(patience_s: float) -> Iterator[float]:
    """Yield the seconds to wait before each further attempt, growing and jittered, until `patience_s` have passed.

    Obstore repeats most requests itself, but not those whose outcome it cannot know.
    """
    end, delay = time.monotonic() + patience_s, FIRST_DELAY_S
    while time.monotonic() + delay < end:
        yield delay * random.uniform(0.5, 1)  # waiting processes should not all come back at once
        delay = min(2 * delay, LONGEST_DELAY_S)


def retry(call: Callable[[], T], patience_s: float) -> T:
    """Return the result of an idempotent call, repeated for up to `patience_s` while its failures are transient."""
    delays = retry_delays(patience_s)
    while True:
        try:
            return call()
        except Exception as error:  # obstore raises many kinds
            delay = next(delays, None) if classify(error) is Failure.TRANSIENT else None
            if delay is None:
                raise
            time.sleep(delay)


def bucket_and_key(url: str) -> tuple[str, str] | None:
    """Return the bucket and key of an s3:// URL; None if it names no bucket, or contains credentials.

    >>> bucket_and_key("s3://bucket/a/b"), bucket_and_key("s3://me:secret@bucket/a")
    (('bucket', 'a/b'), None)
    """
    _, bucket, key = split_url(url)
    return None if not bucket or "@" in bucket else (bucket, key)


def s3_store(bucket: str, prefix: str | None = None, patience_s: float | None = None, signed: bool = True) -> S3Store:
    """Return a client for a bucket, or for what is below a prefix, configured by the environment.

    If not `signed`, the bucket is accessed without the user's credentials.
    """
    with from_extra("remote", "s3://"):
        from obstore.store import S3Store

    # Set by the user, which other tools take as permission.
    plain = any(os.environ.get(name, "").lower().startswith("http://") for name in ENDPOINTS)
    patience = PATIENCE_S if patience_s is None else patience_s
    options, retries = _client_options(plain, patience), _retry_config(patience)
    keys: Any = {} if signed else {"skip_signature": True}
    return S3Store(bucket, prefix=prefix, client_options=options, retry_config=retries, **keys)


def web_store(url: str, names: Sequence[str] = ("",)) -> HTTPStore:
    """Return a client for a web address; a user and password in it become basic authentication.

    With `names`, the client is for a folder, which has a file with one of these names. It follows redirects to hosts
    that are known to be allowed, and to no others: those go through a proxy that refuses everything.

    Raises:
        ValueError: not a valid URL.
        RouteError: the server, or one that it redirects to, must not be contacted.
    """
    with from_extra("remote", "https://"):
        from obstore.store import HTTPStore

    route = find_route(url, names, PATIENCE_S / 6)
    scheme, host, _ = split_url(route.url)
    options = _client_options(scheme == "http", PATIENCE_S)
    headers = {"host": route.host} if route.host else {}
    user, at, _ = host.rpartition("@")
    if at:
        headers["authorization"] = f"Basic {base64.b64encode(unquote(user).encode()).decode()}"
    if headers:
        options["default_headers"] = headers
    if route.hosts is not None:
        options |= {"proxy_url": closed_proxy(), "proxy_excludes": ",".join(route.hosts)}
    address = route.url.replace(user + at, "", 1)
    return HTTPStore(address, client_options=options, retry_config=_retry_config(PATIENCE_S))


def _client_options(plain: bool, patience_s: float) -> ClientConfig:
    return {"allow_http": plain, "connect_timeout": "5s", "timeout": f"{max(1, round(patience_s / 2))}s"}


def _retry_config(patience_s: float) -> RetryConfig:
    first, longest = timedelta(seconds=FIRST_DELAY_S), timedelta(seconds=LONGEST_DELAY_S)
    backoff: Any = {"init_backoff": first, "max_backoff": longest, "base": 2}
    # A hanging request takes half of it, so the last one that is begun ends in time.
    return {"max_retries": 100, "retry_timeout": timedelta(seconds=patience_s / 2), "backoff": backoff}


class Bucket:
    """A bucket with results. Its client is created on first use, and is not pickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def store(self) -> S3Store:
        """The client, one per process: it keeps connections and credentials."""
        return s3_store(self.name, patience_s=OUT_PATIENCE_S)

    def __getstate__(self) -> dict[str, str]:
        return {"name": self.name}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bucket) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)
