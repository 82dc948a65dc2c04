"""The exceptions of wsi_gradcam.

Every error that a user can cause is a `WsiGradcamError` and also the built-in exception that a caller would catch.
Messages say on one line what was given, what was expected and how to fix it.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

AGAIN = "run the same command again; nothing finished is lost"
MAX_MESSAGE = 1000  # characters: files, and libraries that quote them, may say anything


class WsiGradcamError(Exception):
    """Any error that wsi_gradcam raises on purpose."""


class ConfigError(WsiGradcamError, ValueError):
    """A setting or a command line that cannot be used."""


class SlideError(WsiGradcamError):
    """A slide that cannot be used; the message names it."""


class SlideNotFoundError(SlideError, FileNotFoundError):
    """No file at the slide's path."""


class SlideFormatError(SlideError, ValueError):
    """The file is not a slide that a reader knows, or is damaged beyond opening."""


class SlideContentError(SlideFormatError):
    """The file does not contain a picture in colour or grey, or only part of one: no reader may show it."""


class SlideAccessError(SlideError, ConnectionError):
    """A remote slide that cannot be reached, or may not be read."""


class MppError(SlideError, ValueError):
    """The slide's micrometres per pixel are missing or make no sense."""


class SlideReadError(SlideError, OSError):
    """A region of an opened slide could not be decoded."""


class SlideMemoryError(SlideError, RuntimeError):
    """A slide on which workers died, usually for lack of memory."""


class StainError(SlideError, ValueError):
    """Tissue whose stain cannot be measured and so cannot be normalised."""


class FeatureError(SlideError, ValueError):
    """Feature vectors of a slide that cannot be read, or whose positions on the slide are not known."""


class DocumentError(WsiGradcamError, ValueError):
    """YAML or JSON that cannot be read within bounds; the code that reads a file adds its name."""


class AnnotationError(WsiGradcamError, ValueError):
    """A mask or a file of annotations that cannot be used; the message names it."""


class MarkError(WsiGradcamError, ValueError):
    """Something that is not a valid mark on a slide, or name of a cluster; the message says what is expected."""


class ModelError(WsiGradcamError, ValueError):
    """A model that cannot be loaded, or does not behave as its specification says."""


class BagSizeError(ModelError):
    """A slide with more patches than this machine's memory holds for an aggregator that sees them all at once."""


class LayerError(ModelError):
    """No layer to explain, or a named layer that cannot be tapped."""


class EngineError(ModelError):
    """An engine that is not available or cannot run the model."""


class TargetError(WsiGradcamError, ValueError):
    """A target that the model does not have."""


class StoreError(WsiGradcamError, OSError):
    """The output folder cannot be written or read."""


class ResultError(WsiGradcamError, ValueError):
    """A folder without results, or results that do not exist yet."""


class MissingPartError(WsiGradcamError, FileNotFoundError):
    """A result without a part that it should have."""


class UnknownNameError(ResultError, LookupError):
    """A slide or channel that a result does not have."""


class ResumeError(WsiGradcamError, ValueError):
    """The output folder holds results of another model, slide or configuration, or another run is at work there."""


class TileError(WsiGradcamError, LookupError):
    """A request for a tile that does not exist."""


class NotShownError(WsiGradcamError, LookupError):
    """A request to the viewer for a slide, patch or column that the results do not have."""


class OutsideError(WsiGradcamError, PermissionError):
    """A path or a link that leads out of the results."""


class RangeError(WsiGradcamError, ValueError):
    """A Range header that cannot be satisfied."""


class WorkerError(WsiGradcamError, RuntimeError):
    """The cluster cannot do the work: there are no workers, or workers died too often on the same task."""


class DeviceError(WorkerError):
    """A GPU that this process can no longer use at all: the process must end, and no slide is at fault."""


class MissingExtraError(WsiGradcamError, ImportError):
    """A package that only some tasks need and that is not installed; the message names the extra that installs it."""


class StoppedError(WsiGradcamError, RuntimeError):
    """The run was told to stop before all was done."""


@contextmanager
def from_extra(extra: str, what: str) -> Iterator[None]:
    """Import packages of an extra inside this context; `what` names the thing that needs them.

    >>> try:
    ...     with from_extra("viewer", "view"):
    ...         import no_such_package
    ... except MissingExtraError as error:
    ...     print(error)
    view needs no_such_package, which is not installed: pip install 'wsi-gradcam[viewer]'

    Raises:
        MissingExtraError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        if package == __package__:
            raise
        raise MissingExtraError(
            f"{what} needs {package}, which is not installed: pip install 'wsi-gradcam[{extra}]'"
        ) from error


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a question with the names that are close to an unknown one; "" if none is.

    >>> did_you_mean("clases", ["classes", "mpp"]), did_you_mean("zzz", ["mpp"])
    ('did you mean classes?', '')
    >>> did_you_mean("mask", ["masks", "task", "masc"])
    'did you mean masks, task or masc?'
    """
    from difflib import get_close_matches  # imported only when something is wrong

    by_lower = {known.lower(): known for known in names}
    near = [by_lower[found] for found in get_close_matches(name.lower(), by_lower, 3, cutoff)]
    return f"did you mean {' or '.join(filter(None, (', '.join(near[:-1]), *near[-1:])))}?" if near else ""


def one_line(error: BaseException) -> str:
    """Return the error's message on one line, cut if too long, preceded by its type if it is not one of ours.

    >>> one_line(MppError("a.svs: no mpp"))
    'a.svs: no mpp'
    >>> one_line(RuntimeError("two\\nlines"))
    'RuntimeError: two lines'
    """
    text = shortened(as_text(" ".join(str(error)[: 2 * MAX_MESSAGE].split())))
    return text if isinstance(error, WsiGradcamError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


# Bytes in a file name that are not text (on Linux, names are bytes), and the character that marks them in our names.
_NO_TEXT = re.compile("[\ud800-\udfff\ufffd]")
_MARKED = re.compile("(?:\ufffd[89a-f][0-9a-f])+")


def as_text(name: str) -> str:
    """Return a file's name or path as valid text: each byte that is not text becomes U+FFFD and two digits.

    `as_path` is the inverse: no two names give the same text.

    >>> as_text("a\\udce9.tif") == "a\\ufffde9.tif", as_text("é.tif")
    (True, 'é.tif')
    """

    def escaped(found: re.Match[str]) -> str:
        return "".join(f"\ufffd{byte:02x}" for byte in found[0].encode("utf-8", "surrogateescape"))

    try:
        return _NO_TEXT.sub(escaped, name)
    except UnicodeEncodeError:  # half a surrogate pair, which no file name has
        return name.encode("utf-8", "replace").decode()


def as_path(text: str) -> str:
    """Return the file's name or path from the text that `as_text` made of it.

    >>> as_path(as_text("a\\udce9\\ufffd.tif")) == "a\\udce9\\ufffd.tif"
    True
    """
    return _MARKED.sub(
        lambda found: bytes.fromhex(found[0].replace("\ufffd", "")).decode("utf-8", "surrogateescape"), text
    )


def canonical(name: str) -> str:
    """Return a name in Unicode normalisation form C: programs and disks write "é" as one code point or as two."""
    from unicodedata import normalize  # imported only when names are compared: it takes a megabyte

    return normalize("NFC", name)


def picked(name: str, names: Iterable[str]) -> str | None:
    """Return the name that is meant: an exact match, else the only one that differs just in its normalisation form.

    >>> picked("Krebs-é", ["Krebs-e\\u0301", "glass"]) == "Krebs-e\\u0301", picked("x", ["y"])
    (True, None)
    """
    known = list(names)
    if name in known:
        return name
    alike = {each for each in known if canonical(each) == canonical(name)}
    return alike.pop() if len(alike) == 1 else None


def shortened(text: str, most: int = MAX_MESSAGE) -> str:
    """Return text of at most `most` characters, with dots where the rest was.

    >>> shortened("tumour", 5)
    'tu...'
    """
    return text if len(text) <= most else f"{text[: most - 3]}..."


class _Quoting(reprlib.Repr):
    """Short representations of values of any size, in a time that does not depend on the size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlong = 40

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 1000 else f"a number of {x.bit_length()} bits"


def quoted(value: object) -> str:
    """Return a value from a file as messages quote it: short, whatever it is.

    >>> quoted("a" * 1000)[-10:]
    "aaaaaaaaa'"
    >>> quoted([[[1, 2, 3]]] * 10**6)
    '[[[1, 2, 3]], [[1, 2, 3]], [[1, 2, 3]], [[1, 2, 3]], [[1, 2, 3]], [[1, 2, 3]], ...]'
    """
    return shortened(_Quoting().repr(value), 200)


# In the words of host and device allocators; creating a library's handle hardly ever fails for any other reason.
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|bad allocation|bad_alloc|_ALLOC(ATION)?_FAILED"
    r"|_NOT_INITIALIZED when calling `cu\w+Create|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)
# From CUDA and similar: failures of a kernel or of the hardware, after which every call in the process fails the same
# way.
_LOST_DEVICE = re.compile(
    r"\b(CUDA|HIP) (driver )?error\b|Triton Error \[(CUDA|HIP)\]"
    r"|_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"
    r"|illegal memory access|device-side assert|unspecified launch failure|uncorrectable ECC",
    re.IGNORECASE,
)
# And the words for a machine that cannot run it at all, and never could.
_NO_DEVICE = re.compile(
    r"no CUDA-capable|invalid device ordinal|no kernel image|driver version is insufficient|device\(s\) is/are busy"
    r"|initialization error|operation not supported",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device or the host ran out of memory; allocators raise plain RuntimeErrors too.

    >>> is_out_of_memory(RuntimeError("CUDA error: out of memory")), is_out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    if isinstance(error, MemoryError):
        return True
    named = type(error).__name__ == "OutOfMemoryError"  # torch's own error; torch need not be loaded here
    return isinstance(error, RuntimeError) and (named or _NO_MEMORY.search(str(error)) is not None)


def lost_device(error: BaseException) -> BaseException | None:
    """Return the error, or its cause, that made a GPU unusable for this process; None for any other error.

    >>> lost_device(RuntimeError("CUDA error: an illegal memory access was encountered"))
    RuntimeError('CUDA error: an illegal memory access was encountered')
    >>> lost_device(RuntimeError("CUDA error: out of memory"))
    """
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        text, named = str(found), type(found).__name__ == "AcceleratorError"
        other = not isinstance(found, RuntimeError) or is_out_of_memory(found) or _NO_DEVICE.search(text)
        if not other and (named or _LOST_DEVICE.search(text)):
            return found
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None


@contextmanager
def device_errors() -> Iterator[None]:
    """Turn errors after which the process can no longer use its GPU into DeviceErrors, as a context.

    Raises:
        DeviceError: instead of such an error.
    """
    try:
        yield
    except DeviceError:
        raise
    except Exception as error:
        if (cause := lost_device(error)) is None:
            raise
        raise DeviceError(
            f"the GPU has failed, and this process can no longer use it ({one_line(cause)}); no slide is at fault; "
            f"{AGAIN}; if it fails again, check the system messages (nvidia-smi, dmesg)"
        ) from error


# Control characters (C0, DEL, C1), line and paragraph separators, direction marks and overrides, invisible joiners and
# tags, and non-characters.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def counted(number: int, noun: str) -> str:
    """Return a number with the noun that it counts, with an s in the plural.

    >>> counted(1, "slide"), counted(12345, "slide")
    ('1 slide', '12,345 slides')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Return text on one line that is safe to print: names from files cannot move the cursor or hide anything.

    >>> printable("a\\x1b[2Jb\\n.tif")
    'a\\\\x1b[2Jb\\\\n.tif'
    """
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)
