"""Object stores and web servers: how obstore opens them, and what its errors mean. The only module that knows it."""

from __future__ import annotations

import base64
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from enum import Enum, auto
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from wsi_gradcam.errors import StoreError
from wsi_gradcam.io.urls import split_url

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, HTTPStore, ObjectStore, RetryConfig, S3Store

    __all__ = ["HTTPStore", "ObjectMeta", "ObjectStore", "S3Store"]

T = TypeVar("T")

S3 = "s3"
S3_FORM = (
    "expected s3://BUCKET/KEY; credentials are given as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
)
CREDENTIALS_MEND = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket"
# A failed request is repeated for so long, of slides and of results. A store that is away for longer stops the run.
PATIENCE_S, OUT_PATIENCE_S = 30.0, 60.0
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
# Where machines in a cloud ask for credentials, and so does obstore where there are none.
INSTANCE_METADATA = "169.254.169.254"
ERROR_CHARACTERS = 240
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


class Trouble(Enum):
    """What an error of a server means."""

    MISSING = auto()
    NO_BUCKET = auto()
    IGNORES_RANGE = auto()
    REFUSED = auto()
    NO_CREDENTIALS = auto()
    BEYOND_END = auto()
    ELSEWHERE = auto()
    EXISTS = auto()  # asked to put only where nothing is
    CHANGED = auto()  # asked to replace a version that is no more
    REJECTED = auto()  # asked again, it would be so again
    UNREACHABLE = auto()  # may pass


def trouble_of(error: BaseException) -> Trouble:
    """What an error of obstore means."""
    from obstore import exceptions

    kinds = {
        exceptions.NotSupportedError: Trouble.IGNORES_RANGE,
        exceptions.PermissionDeniedError: Trouble.REFUSED,
        exceptions.UnauthenticatedError: Trouble.REFUSED,
        exceptions.AlreadyExistsError: Trouble.EXISTS,
        exceptions.PreconditionError: Trouble.CHANGED,
    }
    text = str(error)
    if "NoSuchBucket" in text:
        return Trouble.NO_BUCKET
    if isinstance(error, FileNotFoundError):
        return Trouble.MISSING
    for kind, trouble in kinds.items():
        if isinstance(error, kind):
            return trouble
    if INSTANCE_METADATA in text:
        return Trouble.NO_CREDENTIALS
    if "416" in text and "Range" in text:
        return Trouble.BEYOND_END
    if "redirect" in text.lower():
        return Trouble.ELSEWHERE
    # 408 and 429 ask for patience
    return Trouble.REJECTED if re.search(r"\b4(?!08|29)\d\d [A-Z]", text) else Trouble.UNREACHABLE


def short(error: BaseException) -> str:
    """The first line of an error of obstore, without the secrets of URLs and what comes after."""
    line = str(error).split("\n", 1)[0]
    line = re.sub(r"\?\S*", "", line)
    return re.sub(r"://[^/\s@]*@", "://", line)[:ERROR_CHARACTERS]


def bucket_and_key(url: str) -> tuple[str, str] | None:
    """Bucket and key of an s3:// URL; None where it names none, or holds credentials.

    >>> bucket_and_key("s3://bucket/a/b"), bucket_and_key("s3://me:secret@bucket/a")
    (('bucket', 'a/b'), None)
    """
    _, bucket, key = split_url(url)
    return None if not bucket or "@" in bucket else (bucket, key)


def s3_store(bucket: str, prefix: str | None = None, patience_s: float | None = None) -> S3Store:
    """A bucket, or what lies below a prefix; credentials, region and endpoint come from the environment."""
    from obstore.store import S3Store

    # Set by the user, and other tools take that for leave enough.
    plain = any(os.environ.get(name, "").lower().startswith("http://") for name in ENDPOINTS)
    patience = PATIENCE_S if patience_s is None else patience_s
    return S3Store(bucket, prefix=prefix, client_options=_client(plain, patience), retry_config=_retries(patience))


def web_store(url: str) -> HTTPStore:
    """What lies below a web address; user and password in it are sent as basic authentication.

    Raises:
        ValueError: no valid URL.
    """
    from obstore.store import HTTPStore

    scheme, host, _ = split_url(url)
    options = _client(scheme == "http", PATIENCE_S)
    user, at, _ = host.rpartition("@")
    if at:
        token = base64.b64encode(unquote(user).encode()).decode()
        options["default_headers"] = {"authorization": f"Basic {token}"}
        url = url.replace(user + at, "", 1)
    return HTTPStore(url, client_options=options, retry_config=_retries(PATIENCE_S))


def _client(plain: bool, patience_s: float) -> ClientConfig:
    return {"allow_http": plain, "connect_timeout": "5s", "timeout": f"{max(1, round(patience_s))}s"}


def _retries(patience_s: float) -> RetryConfig:
    first, longest = timedelta(seconds=FIRST_PAUSE_S), timedelta(seconds=LONGEST_PAUSE_S)
    backoff: Any = {"init_backoff": first, "max_backoff": longest, "base": 2}
    return {"max_retries": 100, "retry_timeout": timedelta(seconds=patience_s), "backoff": backoff}


def pauses(patience_s: float) -> Iterator[float]:
    """Seconds to wait before each further attempt, growing and jittered, until `patience_s` have passed.

    Obstore sends most requests again itself, but not those whose outcome it cannot know.
    """
    end, pause = time.monotonic() + patience_s, FIRST_PAUSE_S
    while time.monotonic() + pause < end:
        yield pause * random.uniform(0.5, 1)  # waiting processes shall not come back at once
        pause = min(2 * pause, LONGEST_PAUSE_S)


def patiently(call: Callable[[], T], patience_s: float) -> T:
    """What a call gives that does no harm when it is done twice, tried again while its trouble may pass."""
    waits = pauses(patience_s)
    while True:
        try:
            return call()
        except Exception as error:  # obstore raises many kinds
            pause = next(waits, None) if trouble_of(error) is Trouble.UNREACHABLE else None
            if pause is None:
                raise
            time.sleep(pause)


class Bucket:
    """A bucket whose client is made when it is first used, and stays behind when the bucket is sent elsewhere."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def store(self) -> ObjectStore:
        """The client, one in a process: it keeps connections and credentials."""
        return s3_store(self.name, patience_s=OUT_PATIENCE_S)

    def __getstate__(self) -> dict[str, str]:
        return {"name": self.name}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bucket) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


def error_of(place: object, error: Exception, done: str) -> OSError:
    """What an error of obstore means for OUT; a file that is not there is a plain `FileNotFoundError`.

    `done` is what could not be done: "read" or "written".
    """
    trouble = trouble_of(error)
    if trouble is Trouble.MISSING:
        return FileNotFoundError(f"{place}: does not exist")
    mends = {
        Trouble.NO_BUCKET: "no such bucket; make it, or check --out and the endpoint in AWS_ENDPOINT_URL",
        Trouble.REFUSED: f"access was refused ({short(error)}); {CREDENTIALS_MEND}, and let them read, write, list "
        "and delete there",
        Trouble.NO_CREDENTIALS: f"there are no credentials; {CREDENTIALS_MEND}",
        Trouble.ELSEWHERE: f"it lies elsewhere ({short(error)}); set AWS_REGION or AWS_ENDPOINT_URL",
        Trouble.REJECTED: f"the store refuses that ({short(error)}); check --out and the store's settings",
    }
    other = f"the store does not answer as it should ({short(error)}); check it and the network, and run the same "
    mend = mends.get(trouble, other + "command again, nothing finished is lost")
    return StoreError(f"{place}: cannot be {done}: {mend}")
