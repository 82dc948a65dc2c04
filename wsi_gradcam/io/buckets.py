"""Buckets of object stores as runs write to them: patience, and what errors mean for OUT."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from wsi_gradcam.errors import StoreError
from wsi_gradcam.io.object_stores import CREDENTIALS_MEND, Trouble, s3_store, short, trouble_of

if TYPE_CHECKING:
    from wsi_gradcam.io.object_stores import ObjectStore

# A store that is away for longer stops the run.
PATIENCE_S = 60.0


class Bucket:
    """A bucket whose client is made when it is first used, and stays behind when the bucket is sent elsewhere."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def store(self) -> ObjectStore:
        """The client, one in a process: it keeps connections and credentials."""
        return s3_store(self.name, patience_s=PATIENCE_S)

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
