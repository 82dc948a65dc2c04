"""Choose the program that explains a run: the requested one, or the fastest that preserves the maps.

Choices are stored on the machine: timing is noisy, and a worker has fewer threads than a process on its own, so the
same command could choose OpenVINO once and eager PyTorch the next time, whose values differ in the last bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wsi_gradcam.cam.engine import explain_batch
from wsi_gradcam.cam.facts import AUTO, ENGINES, PRECISIONS, Choice, Trial
from wsi_gradcam.cam.program import EagerProgram, Program, SplitProgram, cut_at
from wsi_gradcam.cam.targets import PREDICTED, Target, make_score
from wsi_gradcam.cam.trunks import exact, low_precisions, make_trunk
from wsi_gradcam.errors import EngineError, one_line
from wsi_gradcam.io.local import write_atomic
from wsi_gradcam.models.graph import fixed_batch
from wsi_gradcam.system.processes import release_freed_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, fx, nn

    from wsi_gradcam.cam.facts import Layer
    from wsi_gradcam.cam.methods import Score


# Stricter than what is promised for all patches (0.999 and 99%), because a few dozen represent them here: over 2,970
# patches, the lowest correlation in bfloat16 was 0.9992, whereas 32 patches had 0.99995.
MIN_PEARSON, MAX_PEAK_RISK = 0.9998, 0.003
# A less exact or less plain program must be worth it, and two runs on one machine should choose alike.
MIN_SPEEDUP = 1.2
TOLERANCE = 1e-3  # share of the largest logit by which float32 may differ on another engine
TEST_IMAGES = 8  # images
TIMED_S = 0.4
MAX_TIMINGS = 5


def make_program(module: nn.Module, layers: tuple[Layer, ...], engine: str, precision: str, images: Tensor) -> Program:
    """Return the program for an engine and a precision; `images` [B, 3, H, W] are as large as its batches.

    Raises:
        EngineError: it is not available; the message has the reason.
    """
    cut = _Cut(module, layers, images)
    with exact(images.device):
        if engine == "eager" and precision == "float32":
            return _plain_program(module, layers, images, cut)
        return _split_program(module, layers, engine, precision, images, cut)


def _plain_program(module: nn.Module, layers: tuple[Layer, ...], images: Tensor, cut: _Cut) -> Program:
    """Return the eager float32 program: the whole network, or cut in two if its head then has less to do."""
    if len(layers) == 1 and layers[0].layout.axes == "bnk":
        with suppress(EngineError):
            if cut.parts()[1].meta["spared"]:
                return _split_program(module, layers, "eager", "float32", images, cut)
    return EagerProgram(module, layers)


def choose(
    module: nn.Module, layers: tuple[Layer, ...], engine: str, precision: str, images: Tensor, batch_size: int
) -> tuple[Choice, Program]:
    """Return the choice for a run, and its program; `images` [N, 3, H, W] should be whole batches of the run's patches.

    A requested engine or precision is used. For what is left to `auto`, programs are timed on `images`, and their
    Grad-CAM of the predicted class is compared with that of eager float32, map by map. The fastest with sufficiently
    similar maps is chosen.

    Raises:
        EngineError: a requested engine or precision is not available.
    """
    if AUTO not in (engine, precision):
        return Choice(engine, precision), make_program(module, layers, engine, precision, images[:batch_size])
    with exact(images.device):
        return _fastest(module, layers, engine, precision, torch.split(images, batch_size))


def _fastest(
    module: nn.Module, layers: tuple[Layer, ...], engine: str, precision: str, batches: Sequence[Tensor]
) -> tuple[Choice, Program]:
    plain = EagerProgram(module, layers)
    scores = _predictions(plain, batches)
    reference, rate = _timed(plain, batches, scores)
    trials = [Trial("eager", "float32", rate, 1.0, 1.0, 0.0)]
    best: tuple[Trial, Program | None] | None = None
    if engine in ("eager", AUTO) and precision in ("float32", AUTO):
        best = trials[0], plain
    cut = _Cut(module, layers, batches[0])
    for candidate in _candidates(engine, precision, batches[0].device):
        if candidate[1] == "float16" and best is not None and best[0].precision == "bfloat16":
            continue  # not faster than bfloat16 on any hardware that has both
        if candidate[0] == "eager" and best is not None and best[0].engine == "openvino":
            continue
        must_agree = precision == AUTO or candidate[1] == "float32"
        release_freed_memory()  # left over from the one before
        trial, program = _try(candidate, module, layers, batches, cut, scores, reference, must_agree)
        if program is not None and best is not None and not _faster(trial, best[0]):
            trial = replace(trial, remark=f"not {MIN_SPEEDUP:g} times faster than {best[0].engine} {best[0].precision}")
        elif program is not None:
            # Created again at the end, in a second or two: two of them at once would be the peak memory of a run.
            best = trial, None if trial.engine == "openvino" else program
        trials.append(trial)
        del program
    if best is None:
        reasons = "; ".join(f"{t.engine} {t.precision}: {t.remark}" for t in trials[1:])
        raise EngineError(f"no engine works with --engine {engine} --precision {precision}: {reasons}")
    chosen, made = best
    if made is plain:
        made = _plain_program(module, layers, batches[0], cut)
    elif made is None:
        release_freed_memory()
        made = _split_program(module, layers, chosen.engine, chosen.precision, batches[0], cut)
    return Choice(chosen.engine, chosen.precision, tuple(trials)), made


def reuse_choice(
    choice: Choice, module: nn.Module, layers: tuple[Layer, ...], images: Tensor, batch_size: int
) -> Program | None:
    """Return the program of an earlier choice; None if it fails here, or does not preserve the maps of `images`.

    A precision below float32 is compared again, because how much it changes depends on the slides.
    """
    try:
        program = make_program(module, layers, choice.engine, choice.precision, images[:batch_size])
    except EngineError:
        return None
    if choice.precision == "float32":
        return program
    batches = torch.split(images, batch_size)
    plain = EagerProgram(module, layers)
    scores = _predictions(plain, batches)
    found, reference = (
        torch.cat([_explain(p, batch, score) for batch, score in zip(batches, scores, strict=True)])
        for p in (program, plain)
    )
    return program if fidelity(found, reference).is_enough else None


def likeness(program: Program, reference: Tensor, images: Tensor, batch_size: int) -> Fidelity:
    """Compare maps of two versions of the same patches, [N, 3, H, W] each: Grad-CAM of the class of `reference`.

    N is whole batches.
    """
    batches = torch.split(reference, batch_size)
    scores = _predictions(program, batches)
    expected, found = (
        torch.cat([_explain(program, batch, score) for batch, score in zip(read, scores, strict=True)])
        for read in (batches, torch.split(images, batch_size))
    )
    return fidelity(found, expected)


@dataclass(frozen=True)
class Fidelity:
    """The likeness of maps to reference maps, see `Trial`."""

    pearson: float
    same_peak: float
    peak_risk: float

    @property
    def is_enough(self) -> bool:
        """True if the maps are close enough to the reference."""
        return self.pearson >= MIN_PEARSON and self.peak_risk <= MAX_PEAK_RISK


def fidelity(cams: Tensor, reference: Tensor) -> Fidelity:
    """Compare the maps [N, T, h, w] with those of `reference`, pair by pair.

    Two constant maps are alike; a constant map and any other are not. The risk that a peak moves is estimated from all
    pairs of one map's lead (of its highest cell over the second) and another map's error of that lead, both in units of
    the map's deviation: in this way, a few dozen maps reveal risks far below one in a few dozen.
    """
    a, b = (maps.flatten(0, 1).flatten(1).cpu().double() for maps in (reference, cams))  # Apple's GPUs have no float64
    same_peak = (a.argmax(dim=1) == b.argmax(dim=1)).double().mean()
    spread = a.std(dim=1)
    first, second = a.topk(2, dim=1).indices.unbind(dim=1)
    rows = torch.arange(len(a))
    lead, found = a[rows, first] - a[rows, second], b[rows, first] - b[rows, second]
    varied = spread > 0
    leads, errors = (lead / spread)[varied], ((found - lead) / spread)[varied]
    risk = (leads[:, None] + errors[None] < 0).double().mean() if varied.any() else torch.zeros(())
    centred_a, centred_b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    sizes = centred_a.norm(dim=1) * centred_b.norm(dim=1)
    pearson = (centred_a * centred_b).sum(dim=1) / sizes.clamp(min=torch.finfo(torch.float64).tiny)
    pearson[(centred_a.norm(dim=1) == 0) & (centred_b.norm(dim=1) == 0)] = 1.0
    return Fidelity(float(pearson.nan_to_num(nan=-1.0).min()), float(same_peak), float(risk))


class _Cut:
    """Trunk and head of a network, created when first needed."""

    def __init__(self, module: nn.Module, layers: tuple[Layer, ...], images: Tensor) -> None:
        self._made: tuple[fx.GraphModule, fx.GraphModule] | EngineError | None = None
        self._arguments = module, layers, images

    def parts(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Return (trunk, head)."""
        if self._made is None:
            module, layers, images = self._arguments
            try:
                if len(layers) > 1:
                    raise EngineError("several layers can be explained only with eager float32")
                self._made = cut_at(module, layers[0].name, images)
            except EngineError as error:
                self._made = error
        if isinstance(self._made, EngineError):
            raise self._made
        return self._made


def _split_program(
    module: nn.Module, layers: tuple[Layer, ...], engine: str, precision: str, images: Tensor, cut: _Cut
) -> Program:
    trunk, head = cut.parts()
    tf32 = precision != "float32" and images.device.type == "cuda"
    program = SplitProgram(module, layers[0], make_trunk(trunk, engine, precision, images), head, tf32)
    try:
        found = program.predict(images)
    except Exception as error:  # the head may not take what another engine hands it
        raise EngineError(f"engine {engine} cannot run this model in {precision}: {one_line(error)[:300]}") from error
    if precision == "float32":
        some = images if fixed_batch(head) else images[:TEST_IMAGES]
        _self_test(engine, found[: len(some)], EagerProgram(module, layers).predict(some))
    return program


def _self_test(engine: str, found: Tensor, expected: Tensor) -> None:
    off = float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
    if not off <= TOLERANCE:  # holds for NaN, too
        raise EngineError(f"engine {engine} gives outputs that differ from the model's by {off:.2g} of the largest")


def _candidates(engine: str, precision: str, device: torch.device) -> Iterator[tuple[str, str]]:
    """Yield the engines and precisions to try besides eager float32, the simplest first.

    On a CPU with OpenVINO the others are not tried, unless it fails in the one precision that is requested:
    torch.compile compiles for up to minutes, in every worker, and both were slower on every network that was measured.
    """
    for name in _engines(device, precision) if engine == AUTO else (engine,):
        if name not in ENGINES:
            raise EngineError(f"engine {name!r} is not known; expected {AUTO}, {', '.join(ENGINES)}")
        try:
            low = low_precisions(name, device)
        except EngineError:
            low = ()
        for one in ("float32", *low) if precision == AUTO else (precision,):
            if one not in PRECISIONS:
                raise EngineError(f"precision {one!r} is not known; expected {AUTO}, {', '.join(PRECISIONS)}")
            if (name, one) != ("eager", "float32"):
                yield name, one


def _engines(device: torch.device, precision: str) -> tuple[str, ...]:
    if device.type != "cpu":
        return ("eager", "cudagraphs", "compile") if device.type == "cuda" else ("eager", "compile")
    if find_spec("openvino") is None:
        return ("eager",)
    return ("openvino",) if precision in (AUTO, "float32") else ("openvino", "eager")


def _try(
    candidate: tuple[str, str],
    module: nn.Module,
    layers: tuple[Layer, ...],
    batches: Sequence[Tensor],
    cut: _Cut,
    scores: Sequence[Score],
    reference: Tensor,
    must_agree: bool,
) -> tuple[Trial, Program | None]:
    trial = Trial(*candidate)
    try:
        program = _split_program(module, layers, *candidate, batches[0], cut)
        cams, rate = _timed(program, batches, scores)
    except EngineError as error:
        return replace(trial, remark=str(error)), None
    alike = fidelity(cams, reference)
    trial = replace(trial, patches_per_s=rate, **asdict(alike))
    if must_agree and not alike.is_enough:
        return replace(trial, remark="maps differ from float32's"), None
    return trial, program


def _predictions(plain: Program, batches: Sequence[Tensor]) -> list[Score]:
    """Return the score of the class that float32 predicts, batch by batch.

    All programs thus explain the same class, even if another precision would predict the other of two close classes.
    """
    with exact(batches[0].device):
        return [make_score(Target(PREDICTED), plain.predict(batch)) for batch in batches]


def _timed(program: Program, batches: Sequence[Tensor], scores: Sequence[Score]) -> tuple[Tensor, float]:
    """Return Grad-CAM of the predicted class for all batches, and the best of a few rates (patches/s) of the first."""
    cams = torch.cat([_explain(program, batch, score) for batch, score in zip(batches, scores, strict=True)])
    times: list[float] = []
    while len(times) < MAX_TIMINGS and sum(times) < TIMED_S:
        started = time.perf_counter()
        _explain(program, batches[0], scores[0])
        times.append(time.perf_counter() - started)
    return cams, len(batches[0]) / min(times)


def _explain(program: Program, images: Tensor, score: Score) -> Tensor:
    cams = explain_batch(program, images, [score]).cams["gradcam"]
    if cams.is_cuda:
        torch.cuda.synchronize()
    return cams


def _faster(trial: Trial, best: Trial) -> bool:
    assert trial.patches_per_s is not None
    assert best.patches_per_s is not None
    return trial.patches_per_s >= MIN_SPEEDUP * best.patches_per_s


PACKAGES = ("wsi-gradcam", "torch", "openvino")


def cache_file() -> Path:
    """Return the file of stored choices: below $XDG_CACHE_HOME, else ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "wsi-gradcam" / "engines.json"


def choice_key(device: torch.device, *request: object) -> str:
    """Return the key of a choice: a digest of the machine, the versions, and the request."""
    machine = [platform.machine(), _processor(), str(device)]
    if device.type == "cuda":
        machine += [torch.cuda.get_device_name(device), *PRECISIONS]  # those that were available to be tried
    return hashlib.sha256(json.dumps([machine, [_version(p) for p in PACKAGES], request]).encode()).hexdigest()


def read_choice(key: str) -> Choice | None:
    """Return the choice stored under `key`; None if there is none, or the file cannot be read."""
    try:
        return Choice.from_json(json.loads(cache_file().read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def store_choice(key: str, choice: Choice) -> None:
    """Store a choice, if the folder can be written."""
    path = cache_file()
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(known, dict):  # not ours, or damaged
        known = {}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({**known, key: choice.to_json()}, indent=1).encode())


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
