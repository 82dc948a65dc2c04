"""The sources of networks, each `build_SOURCE(spec) -> Built`, and the loading of weights from files into networks.

People have weights as training frameworks save them: nested, or with a prefix before each name. Weights that fit a
network apart from this are used, and a note says so; others are refused with the names that are missing.
"""

from __future__ import annotations

import mmap
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from wsi_gradcam.errors import ModelError, one_line, printable, shortened
from wsi_gradcam.io.documents import LongZipError, open_zip
from wsi_gradcam.models.spec import is_torchscript

if TYPE_CHECKING:
    from pathlib import Path

    from wsi_gradcam.models.spec import Activation, ModelSpec, Resizing


@dataclass(frozen=True)
class Built:
    """A network with everything that its source states about it; None for what it does not.

    Attributes:
        patch_px: (height, width) to be read from a slide; `resizing` turns it into the network's input.
        code_digest: identifies the source's code, unless that is a released package.
        notes: what was done to make it fit, a line each.
    """

    module: nn.Module
    classes: tuple[str, ...] | None = None
    patch_px: tuple[int, int] | None = None
    mpp: float | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    scale: float | None = None
    resizing: Resizing | None = None
    activation: Activation | None = None
    license: str | None = None
    code_digest: str = ""
    notes: tuple[str, ...] = ()


State = Mapping[str, Tensor]


def plain_dtype(code: str, *more: bool) -> np.dtype[Any]:
    """Return the type of NumPy numbers that a pickle names; a custom type may have any size.

    Raises:
        ValueError: it is not a numeric type.
    """
    found = np.dtype(code, *more)
    if found.kind not in "biuf":
        raise ValueError(f"{found} is not a numeric type")
    return found


# What NumPy numbers consist of in pickles, under the names of NumPy 1 and 2.
NUMBERS: list[Any] = [
    *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    (plain_dtype, "numpy.dtype"),
    *(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
]
# Where training scripts keep what they train, most likely first: the first one that fits is used.
PLACES = ("", "state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
# Averages over training steps, and models that follow another: used only if nothing else fits.
AVERAGES = re.compile(
    r"(^|[._])(ema|swa|averaged?|shadow|teacher|polyak)(?=[._]|$)|ema_?model|model_?ema", re.IGNORECASE
)
# What wrappers (torch.compile, FSDP, activation checkpointing) insert between the parts of a name.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
MAX_NESTED = 4  # dicts in dicts
MAX_PARTS = 12  # parts of a name that may be its prefix
MAX_PREFIXES = 32  # prefixes that are tried
NAMED = 3  # names in a message
MAX_OF_HEAD = 4  # tensors of a classifier
SAVE_ANEW = (
    "objects in pickles are never loaded; on the original machine, save only the weights: "
    "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
)

LIGHTNING = (
    "is a Lightning checkpoint, which holds pickled objects besides the weights; if you trust it, save the weights to "
    "a file of their own: import torch; from safetensors.torch import save_file; s = torch.load('in.ckpt', "
    "map_location='cpu', weights_only=False)['state_dict']; save_file({k: v.contiguous() for k, v in s.items()}, "
    "'weights.safetensors')"
)
MAX_PEEKED = 4 << 20  # bytes


def load_weights(module: nn.Module, path: Path, spec: ModelSpec) -> tuple[str, ...]:
    """Load the weights in a file into a network; return notes on which parts of the file were used.

    In a checkpoint, the state dict is searched for that fits as it is, or without one prefix before its names. All
    names after that prefix must be the network's; other names are left out and reported. If several fit, plain weights
    are preferred to averages.

    Raises:
        ModelError: the file contains no such weights, or several, or objects that are not loaded.
    """
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    states = states_in(path)
    matches = [match for place, state in states for match in _matches(own, place, state)]
    fitting = sorted((match for match in matches if match.fits), key=lambda match: match.rank)
    if not fitting and len(states) > 1:  # parts in separate dicts
        whole = {f"{place}.{name}".lstrip("."): value for place, state in states for name, value in state.items()}
        fitting = [match for match in _matches(own, "", whole) if match.fits]
    if not fitting:
        raise ModelError(_misfit(matches, own, path, spec))
    chosen, others = fitting[0], [m for m in fitting[1:] if not m.same_as(fitting[0])]
    if others and others[0].rank == chosen.rank:
        both = " and ".join(printable(shortened(m.where or "the file itself", 100)) for m in (chosen, others[0]))
        raise ModelError(
            f"{spec.name}: {path} contains several sets of weights that fit, {both}; save only the intended one"
        )
    try:
        module.load_state_dict({**own, **chosen.renamed} if len(chosen.renamed) < len(own) else chosen.renamed)
    except RuntimeError as error:
        raise ModelError(f"{spec.name}: {path} does not fit {spec.source}: {one_line(error)[:400]}") from error
    return chosen.notes(path.name, others)


@dataclass(frozen=True, eq=False)
class Match:
    """A file's weights compared with a network.

    Attributes:
        place: place of the state dict in the file.
        prefix: prefix of each of its names that belongs to the network.
        renamed: tensors by the network's names, as far as it has them.
        missing, unexpected, reshaped: the network's names that are missing; names after the prefix that it does not
            have; names of tensors with another shape.
        left: names without the prefix, which are not used.
    """

    place: str
    prefix: str
    renamed: State
    missing: Sequence[str]
    unexpected: Sequence[str]
    reshaped: Sequence[str]
    left: Sequence[str]

    @property
    def fits(self) -> bool:
        """Whether the network gets all of its weights, and all names after the prefix are its own."""
        return not (self.missing or self.unexpected or self.reshaped)

    @property
    def where(self) -> str:
        """The place and the prefix in a single name."""
        return ".".join(filter(None, (self.place, self.prefix.removesuffix("."))))

    @property
    def rank(self) -> tuple[bool, int]:
        """A measure of how likely it is meant; smaller is likelier."""
        known = PLACES.index(self.place) if self.place in PLACES else len(PLACES)
        return bool(AVERAGES.search(self.where)), known

    @property
    def score(self) -> tuple[int, int]:
        """A measure of how close it is to the network."""
        return len(self.renamed) - len(self.reshaped), -len(self.unexpected)

    def same_as(self, other: Match) -> bool:
        """Return whether both are the same weights, stored twice."""
        return self.renamed.keys() == other.renamed.keys() and all(
            torch.equal(value, other.renamed[name]) for name, value in self.renamed.items()
        )

    def notes(self, file: str, others: Sequence[Match]) -> tuple[str, ...]:
        """Return notes on the choice, one line each."""
        place = f"{printable(self.place)!r} of {file}" if self.place else file
        found = [f"the weights are those in {place} with the prefix {printable(self.prefix)!r}"] if self.prefix else []
        if self.left:
            found.append(f"not used from {place}: {_some(self.left)}")
        if others:
            found.append(
                f"the weights are {printable(self.where or 'those at the top')!r} of {file}, which also holds "
                f"{', '.join(repr(printable(m.where)) for m in others[:NAMED])}; to use those, save them on their own"
            )
        return tuple(found)


def _matches(own: State, place: str, state: State) -> Iterator[Match]:
    """Yield the state dict compared with the network, with each prefix that could be meant, and as it is."""
    plain = {WRAPPERS.sub("", name): value for name, value in state.items()}
    wrapped = len(plain) < len(state) or any(WRAPPERS.search(name) for name in own)
    given = state if wrapped or plain.keys() == state.keys() else plain
    inner = {name.partition(".")[0] for name in own}
    outer = f"{inner.pop()}." if len(inner) == 1 and all("." in name for name in own) else ""
    for added in dict.fromkeys(("", outer)):  # a network that itself wraps the one that was saved
        wanted = {name.removeprefix(added): value for name, value in own.items()}
        counts: Counter[str] = Counter()
        for name in given:
            parts = name.split(".", MAX_PARTS)
            tails = (".".join(parts[i:]) for i in range(len(parts)))
            counts.update(name.removesuffix(tail) for tail in tails if tail in wanted)
        prefixes = dict.fromkeys(["", *(prefix for prefix, _ in counts.most_common(MAX_PREFIXES))])
        whole = [p for p in prefixes if p and counts[p] >= len(_needed(wanted))]
        for prefix in prefixes:
            copies = tuple(p for p in whole if p != prefix and p.startswith(prefix))
            yield _held(own, wanted, given, place, prefix, added, copies)


def _held(
    own: State, wanted: State, state: State, place: str, prefix: str, added: str, copies: tuple[str, ...]
) -> Match:
    """Return the match after one prefix; `copies` are prefixes of whole other networks after it."""
    inside = {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix) and not (copies and name.startswith(copies))
    }
    beside = [name for name in state if not name.startswith(prefix) or (copies and name.startswith(copies))]
    # A head that was trained on a backbone has no prefix.
    found = {**{name: state[name] for name in beside if name in wanted}, **inside}
    renamed: dict[str, Tensor] = {f"{added}{name}": value for name, value in found.items() if name in wanted}
    return Match(
        place=place,
        prefix=prefix,
        renamed=state if renamed.keys() == state.keys() else renamed,
        missing=[name for name in _needed(own) if name not in renamed],
        unexpected=[f"{prefix}{name}" for name in inside if name not in wanted],
        reshaped=[name for name, value in renamed.items() if value.shape != own[name].shape],
        left=[name for name in beside if name not in wanted or name in inside],
    )


def _needed(own: State) -> list[str]:
    """Return the names that must be present: counters of training steps, which old checkpoints lack, do not matter."""
    return [name for name in own if name.rpartition(".")[2] != "num_batches_tracked"]


def _misfit(matches: Sequence[Match], own: State, path: Path, spec: ModelSpec) -> str:
    """Return the message for weights that do not fit: in words, or with the names of the closest match."""
    best = max(matches, key=lambda match: match.score)
    start = f"{spec.name}: {path} does not fit {spec.source}"
    if not (best.missing or best.unexpected) and (outputs := _outputs(best, own)):
        has, wants = outputs
        if spec.classes is not None and wants == len(spec.classes):
            return (
                f"{start}: the checkpoint has {has} outputs, the model file lists {wants} classes; list those that it "
                "was trained on"
            )
        return (
            f"{start}: the checkpoint has {has} outputs, the network {wants}; list the {has} classes under 'classes:' "
            "in the model file, or build the network with that many"
        )
    if not best.renamed:
        given = next(iter(best.unexpected or best.left), "")
        return f"{start}: none of its names occurs in the network: it has {_some([given])}, expected {_some(list(own))}"
    shapes = [f"{name} {tuple(best.renamed[name].shape)} for {tuple(own[name].shape)}" for name in best.reshaped]
    unexpected = [*best.unexpected, *(best.left if best.missing else ())]
    lists = {"missing": best.missing, "unexpected": unexpected, "of another shape": shapes}
    told = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in lists.items() if names)
    headless = 0 < len(best.missing) <= MAX_OF_HEAD and not (unexpected or shapes)
    mend = "it has no trained head to explain" if headless else "is 'source:' the network that it was saved from?"
    return f"{start}: {told}; {mend}"


def _outputs(match: Match, own: State) -> tuple[int, int] | None:
    """Return the numbers of outputs of checkpoint and network, if these alone differ."""
    pairs = {(tuple(match.renamed[name].shape), tuple(own[name].shape)) for name in match.reshaped}
    numbers = {(found[:1], wanted[:1]) for found, wanted in pairs}
    if len(numbers) != 1 or any(found[1:] != wanted[1:] or not found for found, wanted in pairs):
        return None
    ((found, wanted),) = numbers
    return (found[0], wanted[0]) if found and wanted else None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(printable(shortened(name, 200)) for name in names[:NAMED]) + more


def states_in(path: Path, numbers: bool = False) -> list[tuple[str, State]]:
    """Return the dicts of tensors in a file by their places; pickles are read only by torch's restricted unpickler.

    Args:
        numbers: accept a file that also contains NumPy numbers (a loss, a score), whose types are allowed by name.

    Raises:
        ModelError: it is damaged, contains objects, or contains no tensors.
    """
    with torch.serialization.safe_globals(NUMBERS if numbers else []):
        content = _read(path)
    found = list(_dicts(content, ()))
    if not found:
        raise ModelError(f"{path}: expected a state dict of tensors, found a {type(content).__name__} without any")
    return found


def _dicts(value: Any, place: tuple[str, ...]) -> Iterator[tuple[str, State]]:
    if not isinstance(value, dict) or len(place) > MAX_NESTED:
        return
    tensors = {key: each for key, each in value.items() if isinstance(key, str) and isinstance(each, Tensor)}
    if tensors:
        yield ".".join(place), value if len(tensors) == len(value) else tensors
    for key, each in value.items():
        if isinstance(key, str):
            yield from _dicts(each, (*place, key))


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # damaged files raise many kinds of errors
            raise ModelError(f"{path}: not a safetensors file: {one_line(error)[:300]}; is it damaged?") from error
    if is_torchscript(path):
        raise ModelError(
            f"{path}: not a plain state dict but a TorchScript program; make it the source ('source: {path.name}'), "
            "and leave out 'weights:'"
        )
    try:
        problem = saved_problem(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {one_line(error)}") from error
    if problem:
        raise ModelError(f"{path}: {problem}; {SAVE_ANEW}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise struct, index, unicode and many other errors
        objects = _objects(path, error)
        what = (
            f"holds {objects}, which is not a tensor" if objects else f"not a plain state dict ({type(error).__name__})"
        )
        raise ModelError(f"{path}: {what}; {SAVE_ANEW}") from error


MAX_PICKLE = 8 << 20  # bytes of the names and descriptions of tensors; 10,000 of them take one MiB
ZIP = b"PK\x03\x04"
WITH_ROOM = "holds a bytearray, which is not a tensor"
# What zipfile raises where an archive is damaged; RuntimeError where an entry is said to be encrypted.
UNREADABLE = (zipfile.BadZipFile, NotImplementedError, KeyError, ValueError, EOFError, RuntimeError, zlib.error)
ROOM = b"bytearray"  # the only thing besides tensors from which torch's restricted unpickler makes any number of bytes


def saved_problem(path: Path, most: int = MAX_PICKLE) -> str:
    """Return why torch may not read a file: it claims more than it contains, or is a damaged archive; else "".

    `torch.save` does not compress, and its description of the tensors is short: at most `most` bytes. An archive that
    cannot be looked into is refused, because torch might read more of it.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP)) == ZIP:  # torch, too, distinguishes the formats by this; the older one is a pickle
                return _archive_problem(file, path.stat().st_size, most)
            return WITH_ROOM if _finds_room(file) else ""
    except UNREADABLE as error:
        return f"damaged: it cannot be unpacked ({one_line(error)[:200] or type(error).__name__})"


def _archive_problem(file: BinaryIO, size: int, most: int) -> str:
    try:
        archive = open_zip(file)
    except LongZipError as error:
        return f"not a tensor as torch.save writes it: it {error}"
    with archive:
        entries = archive.infolist()
        packed = any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries)
        if packed or sum(e.file_size for e in entries) > size:
            return "not a tensor as torch.save writes it: it is compressed, or a part occurs twice"
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if any(entry.file_size > most for entry in pickles):
            return f"not a tensor as torch.save writes it: its description has more than {most:,} bytes"
        return WITH_ROOM if any(ROOM in archive.read(entry) for entry in pickles) else ""


def _finds_room(file: BinaryIO) -> bool:
    if not file.seek(0, os.SEEK_END):
        return False
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(ROOM) >= 0


def _objects(path: Path, error: Exception) -> str:
    """Return the names of the objects for which torch refused a pickle, without loading anything."""
    names: list[str] = []
    with suppress(Exception):  # for files in torch's older format, and damaged ones
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if not names:
        names = re.findall(r"(?:GLOBAL|class) ([\w.]+)", str(error))[:1]
    return _some([name for name in names if "." in name])


def is_lightning(path: Path) -> bool:
    """Return whether a file is a Lightning checkpoint, without unpickling anything."""
    with (
        suppress(OSError, ValueError, zipfile.BadZipFile, NotImplementedError, KeyError),
        open_zip(path) as archive,
    ):
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return any(b"pytorch-lightning_version" in archive.open(name).read(MAX_PEEKED) for name in names[:1])
    return False
