"""Validation of results, which must agree with their digests, with the specification and with their slides.

Everything that carries meaning has a digest: the values of arrays and the bytes of all other files. What older versions
wrote without one is checked as far as it follows from something else.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.cam.facts import NO_METHOD
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.errors import ConfigError, WsiGradcamError, as_path, one_line
from wsi_gradcam.io.documents import read_json
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.results.display import display_problems
from wsi_gradcam.results.feature_store import FeatureStore, encoding_problems
from wsi_gradcam.results.heatmap import LABEL, HeatmapStore, check_specification
from wsi_gradcam.results.manifest import (
    DONE,
    METADATA,
    Manifest,
    SlideDone,
    SlideStatus,
    block_name,
    digest_of,
    is_of_array,
    span_name,
    unknown_files,
)
from wsi_gradcam.results.patch_store import OK, STATUS_NAMES, UNREADABLE, PatchStore, StoredTable
from wsi_gradcam.results.run import no_result, planned_slides
from wsi_gradcam.results.run_files import (
    RunFolder,
    RunRecord,
    SlideFolder,
    identity_problems,
    is_encoded,
    made_with,
    parse_run,
)
from wsi_gradcam.results.seals import (
    EXPORTS,
    LISTING,
    Seal,
    export_problems,
    file_problems,
    is_account,
    listing_problems,
    seal_of,
)
from wsi_gradcam.results.slide import NotAskedError, check_named, slide_address
from wsi_gradcam.results.slide_tables import (
    Record,
    is_there,
    parse_rows,
    parse_slide_records,
    record_problems,
    row_problems,
)
from wsi_gradcam.slides import open_slide
from wsi_gradcam.tissue import patch_grid

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.results.manifest import SlidePlan

AUDIT, EVIDENCE = "audit", "evidence"
GIVEN = ("names.yaml",)  # written by the user, in OUT/evidence
UNFINISHED = "is not finished; run the same explain command again"
OLD = "made by an older version, which stored fewer digests, so it was checked only against other files"


@dataclass(frozen=True)
class Finding:
    """Something wrong with a slide's result ("" for the run itself)."""

    slide: str
    problem: str


@dataclass(frozen=True)
class Validation:
    """The outcome of a validation.

    Attributes:
        findings: everything that is wrong.
        notes: what could not be checked, and why, in lines.
        failed: ids of the slides that failed: their files are not wrong, but incomplete.
    """

    findings: list[Finding]
    notes: list[str]
    failed: list[str]


def validate(out: StoragePathLike, *, remote_slides: bool = False) -> list[Finding]:
    """Return everything that is wrong with the results in `out`; empty if all is right.

    For each finished slide: the stores contain exactly the values that the manifest recorded, span by span and block by
    block; the other files are byte for byte as they were written, and there are no others; the heatmap conforms to
    OME-Zarr 0.5 and covers the whole slide at the right scale on every level; the table has a row for each patch with
    the stored values; the slide is still the same file. The run's own files agree with their digests and with the
    slides, and so do a finished audit and exports. A slide that was planned but has neither finished nor failed is a
    finding. Slides at URLs are requested only with `remote_slides`; without it, a note says that they were not
    compared. `out` may also be a folder of exports.

    Raises:
        ConfigError: `out` is not a result.
        StoreError: it cannot be read at all.
    """
    return check(out, remote_slides=remote_slides).findings


def check(out: StoragePathLike, *, remote_slides: bool = False) -> Validation:
    """Validate results as in `validate`, and also return what could not be checked."""
    folder = RunFolder(storage_path(out))
    data = _bytes(folder.run)
    if data is None and (folder.place / EXPORTS).is_file():
        notes: list[str] = []
        found = [Finding("", problem) for problem in _told("the exports", export_problems(folder.place, notes))]
        return Validation(found, notes, [])
    if data is None:
        raise ConfigError(no_result(folder.place))
    run = _Run(folder, data, remote_slides)
    old: list[str] = []
    for name, row in run.rows.items():
        if row["status"] != SlideStatus.FAILED or (folder.slide(name).manifest / DONE).is_file():
            problems = _told("its results", _check(name, folder.slide(name), run, old))
            run.findings += [Finding(name, problem) for problem in problems]
    wanted = [
        name for name, given in run.slides.items() if is_there(as_path(given["path"]))
    ]  # the others have left the archive
    left = dict.fromkeys(name for name in (*planned_slides(folder), *wanted) if name not in run.rows)
    run.findings += [Finding(name, UNFINISHED) for name in left]
    if old:
        run.old.append(f"{len(old)} of {len(run.rows)} slides")
    if run.old:
        run.notes.append(f"{', '.join(run.old)}: {OLD}")
    failed = [name for name, row in run.rows.items() if row["status"] == SlideStatus.FAILED]
    return Validation(run.findings, run.notes, failed)


def _bytes(place: StoragePath) -> bytes | None:
    try:
        return place.read()
    except FileNotFoundError:
        return None


def _told(what: str, problems: Iterable[str]) -> Iterator[str]:
    """Yield problems with a file; being unreadable is one."""
    try:
        yield from problems
    except WsiGradcamError as error:
        yield one_line(error)
    except Exception as error:  # damaged files may raise any error; each is a finding, not a crash
        yield f"{what} cannot be read: {one_line(error)}"


class _Run:
    """The files of the run itself, checked as they are read; damaged ones count as empty.

    Attributes:
        findings, notes: see `Validation`.
        old: names of what an older version made, of which not everything can be checked.
        values, record: the content of run.yaml.
        rows: those of slides.csv.
        slides: those of slides.jsonl.
        out, remote_slides: where the results are, and whether slides at URLs may be requested.
    """

    def __init__(self, folder: RunFolder, data: bytes, remote_slides: bool) -> None:
        self.remote_slides = remote_slides
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self.old: list[str] = []
        self.values: dict[str, Any] | None = None
        self.record: RunRecord | None = None
        self.rows: dict[str, dict[str, str]] = {}
        self.slides: Record = {}
        self.out = str(folder.place)
        self._folder, self._is_sealed = folder, seal_of(data) is not Seal.MISSING
        self._tell("run.yaml", self._read_values(data))
        self._tell("slides.jsonl", self._read_slides())
        self._tell("slides.csv", self._read_rows())
        if (display := _bytes(folder.display)) is not None:
            self._tell("display.json", display_problems(display))
        self._tell("status.json", self._check_account(folder.place))
        self._tell(AUDIT, self._check_part(AUDIT, folder.place / AUDIT, "metrics.json"))
        self._tell(EVIDENCE, self._check_part(EVIDENCE, folder.place / EVIDENCE, "evidence.json"))
        self._tell("exports", self._check_exports(folder.place))

    def _tell(self, name: str, problems: Iterable[str]) -> None:
        self.findings += [Finding("", problem) for problem in _told(name, problems)]

    def _read_values(self, data: bytes) -> Iterator[str]:
        if seal_of(data) is Seal.BROKEN:
            yield "run.yaml differs from what was written"
        self.values = parse_run(self._folder.run, data)
        self.record = RunRecord.from_json(self.values)
        yield from identity_problems(self.values)
        if not self._is_sealed:
            self.old.append("files of the run")

    def _read_slides(self) -> Iterator[str]:
        data = _bytes(self._folder.record)
        if data is not None:
            self.slides = parse_slide_records(self._folder.record, data)
            yield from record_problems(data, self.slides)
        elif self._is_sealed:
            yield "slides.jsonl is missing; run the same explain command again"

    def _read_rows(self) -> Iterator[str]:
        data = _bytes(self._folder.slides) or b""
        self.rows = parse_rows(self._folder.slides, data)
        if not self.rows:
            yield "slides.csv is missing or empty; run explain again to finish"
        self.findings += [Finding(name, problem) for name, problem in row_problems(data, self.rows)]
        if self._is_sealed:
            self.findings += [Finding(name, "is not in slides.jsonl") for name in self.rows if name not in self.slides]

    def _check_account(self, place: StoragePath, above: str = "") -> Iterator[str]:
        """Yield what is wrong with the files in which a run describes itself."""
        status, page = _bytes(place / "status.json"), _bytes(place / "run.html")
        if status is not None and seal_of(status) is Seal.BROKEN:
            yield f"{above}status.json differs from what was written"
        ended = status is not None and seal_of(status) is Seal.HOLDS and read_json(status)["state"] != "running"
        if page is None and ended:
            yield f"{above}run.html is missing; the next run writes it"
        if page is not None and (seal_of(page) is Seal.BROKEN or (ended and seal_of(page) is Seal.MISSING)):
            yield f"{above}run.html differs from what was written"

    def _check_part(self, part: str, place: StoragePath, last: str) -> Iterator[str]:
        """Yield what is wrong with an audit, or with evidence, according to the listing of its files.

        The listing exists once it is finished, and so does the file that is written `last`.
        """
        plan, listing, metrics = (_bytes(place / name) for name in ("plan.json", LISTING, last))
        if plan is None and listing is None and metrics is None:
            return
        yield from self._check_account(place, f"{part}/")
        if listing is not None:
            yield from (f"{part}/{problem}" for problem in listing_problems(place, listing, _is_no_result))
        elif metrics is None:
            self.notes.append(f"the {part} is not finished, so it was not checked; run the same {part} command again")
        elif plan is None or seal_of(plan) is not Seal.MISSING:
            yield f"{part}/{LISTING} is missing; run the same {part} command again"
        else:
            self.old.append(f"the {part}")
        if plan is not None:
            yield from _check_part_plan(part, read_json(plan), self.values)

    def _check_exports(self, out: StoragePath) -> Iterator[str]:
        """Yield what is wrong with exports in OUT, in `exports` or other folders at its top, by their listings."""
        yield from export_problems(out, self.notes, is_theirs=False)
        others = set(out.folder_names()) - {name.partition("/")[0] for name in self.rows}
        for name in sorted(others):
            if (out / name / EXPORTS).is_file():
                yield from export_problems(out / name, self.notes, f"{name}/")
            elif name == "exports":
                self.old.append(name)


def _is_no_result(name: str) -> bool:
    return is_account(name) or name in GIVEN


def _check_part_plan(part: str, values: dict[str, Any], run: dict[str, Any] | None) -> Iterator[str]:
    identity = values["identity"]
    if hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest() != values["digest"]:
        yield f"{part}/plan.json: digest is not that of identity"
    sample = json.dumps(dict(sorted(values["samples"].items())), sort_keys=True)
    if hashlib.sha256(sample.encode()).hexdigest() != identity["sample"]:
        yield f"{part}/plan.json: the sample is not that of identity"
    if run is not None and identity["run"] != run["run_digest"]:
        yield f"{part}: was made from other results; run {part} again, with --overwrite"


def _check(name: str, folder: SlideFolder, run: _Run, old: list[str]) -> Iterator[str]:
    """Yield everything wrong with a slide's results; its name is added to `old` if an older version made them."""
    manifest = Manifest(folder.manifest)
    plan, done = manifest.plan(), manifest.done()
    if plan is not None and run.values is not None and is_encoded(run.values):
        yield from _told(
            "features.zarr", encoding_problems(FeatureStore(folder.features, read_only=True), manifest, plan)
        )
        return
    if plan is None or done is None:
        yield UNFINISHED
        return
    if not done.is_covered:
        old.append(name)
    files = list(
        _told(
            "its files", file_problems(folder.place, done.files, unknown_files(folder.place) if done.is_covered else ())
        )
    )
    yield from files
    yield from _told("manifest/done.json", _check_record(name, folder, plan, done, run))
    yield from _told("manifest/plan.json", _check_plan(plan, run))
    yield from _told("slides.csv", _check_row(run.rows[name], plan, done, run))
    reshaped = {problem.partition("/")[0] for problem in files if is_of_array(problem.partition(" ")[0])}
    if folder.cams.name not in reshaped:  # otherwise its arrays may claim any size
        yield from _told("cams.zarr", _check_spans(folder, plan, done))
        yield from _told("patches.parquet", _check_table(folder, plan, run))
    yield from _told("heatmap.ome.zarr", _check_heatmap(folder, plan, done, run, folder.heatmap.name not in reshaped))
    yield from _told(run.rows[name]["path"], _check_slide(run.rows[name], plan, run))


def _check_record(name: str, folder: SlideFolder, plan: SlidePlan, done: SlideDone, run: _Run) -> Iterator[str]:
    if seal_of((folder.manifest / DONE).read()) is not (Seal.HOLDS if done.is_covered else Seal.MISSING):
        yield "manifest/done.json differs from what was written"
    if done.outcome.patches != plan.patches:
        yield f"manifest/done.json has {done.outcome.patches} patches, expected {plan.patches} as planned"
    if not done.is_covered:
        return
    if done.slide != name:
        yield f"holds the results of {done.slide}"
    if run.values is not None and done.made_with != made_with(run.values):
        yield "was made with another model or other targets than run.yaml states"


def _check_plan(plan: SlidePlan, run: _Run) -> Iterator[str]:
    """Yield everything in a plan that does not follow from run.yaml and the slide's size."""
    if run.values is None:
        return
    model, settings = run.values["model"], run.values["identity"]["settings"]
    if plan.run_digest != run.values["run_digest"]:
        yield "was made with another model or configuration than run.yaml states"
    if (plan.stride, plan.span) != (settings["heatmap_stride"], settings["span_patches"]):
        yield "manifest/plan.json has another stride or span than run.yaml"
    height, width = model["patch_px"]
    expected = patch_grid(plan.slide_px, plan.slide_mpp, (height, width), model["mpp"], (height, width)).footprint
    if bool(plan.features) != ("given_features" in settings):
        yield "manifest/plan.json and run.yaml differ in whether features were made elsewhere"
    if plan.features:  # patches are then as large as `boxes` says, which has a digest
        expected = plan.footprint
    if not np.allclose(plan.footprint, expected, rtol=1e-9, atol=0):
        yield f"manifest/plan.json has a footprint of {plan.footprint}, expected {expected}"
    scale = expected[0] / height, expected[1] / width
    view = np.array(model.get("view", (0, 0, height, width))) * [*scale, *scale]
    if not np.allclose(plan.view, view, rtol=1e-9, atol=1e-9):
        yield f"manifest/plan.json has a view of {plan.view}, expected {tuple(view.tolist())}"


def _check_row(row: dict[str, str], plan: SlidePlan, done: SlideDone, run: _Run) -> Iterator[str]:
    """Yield what in a row of slides.csv does not follow from the slide's manifest; it may record a later failure."""
    outcome = done.outcome
    expected = {"status": outcome.status, "patches": outcome.patches, "unreadable": outcome.unreadable}
    expected |= {"mpp_y": plan.slide_mpp[0], "mpp_x": plan.slide_mpp[1], "slide_digest": plan.slide_digest}
    if row["status"] == SlideStatus.FAILED:
        if not row["error"]:
            yield "slides.csv says that it failed, but not why"
        del expected["status"]
        if row["patches"] == "0":
            expected.clear()
    if run.record is not None:
        expected["model_digest"] = run.record.model.digest
    for column, value in expected.items():
        if row[column] != str(value):
            yield f"slides.csv has {column} {row[column]!r}, expected {value}"
    given = run.slides.get(row["id"], {})
    for column in ("label", "site", "scanner"):
        if given.get("path") == row["path"] and given.get(column, "") != row[column]:
            yield f"slides.csv has {column} {row[column]!r}, slides.jsonl {given.get(column, '')!r}"


def _check_spans(folder: SlideFolder, plan: SlidePlan, done: SlideDone) -> Iterator[str]:
    store = PatchStore(folder.cams, read_only=True)
    if (store.patches, store.span) != (plan.patches, plan.span):
        yield f"cams.zarr has {store.patches} patches in spans of {store.span}, expected {plan.patches} and {plan.span}"
        return
    for number, ((start, stop), digest) in enumerate(zip(plan.spans, store.digests(plan.spans), strict=True)):
        name = span_name(number)
        if name not in done.spans:
            yield f"span {number} is not in the manifest"
        elif digest != done.spans[name]:
            yield f"span {number} (patches {start} to {stop}) of cams.zarr differs from what was computed"
    known = store.known_digests() if done.is_covered else {}
    for name, digest in known.items():
        if done.arrays.get(name) != digest:
            yield f"{name} of cams.zarr differs from what was computed"
    if done.answer:
        for name, digest in FeatureStore(folder.features, read_only=True).digests().items():
            if done.arrays.get(name) != digest:
                yield f"{name} differs from what was computed"
    if (unreadable := int((store.status() == UNREADABLE).sum())) != done.outcome.unreadable:
        yield f"manifest/done.json has {done.outcome.unreadable} unreadable patches, cams.zarr {unreadable}"


def _check_heatmap(
    folder: SlideFolder, plan: SlidePlan, done: SlideDone, run: _Run, with_values: bool
) -> Iterator[str]:
    try:
        check_specification(folder.heatmap)
    except Exception as error:  # its error types differ between releases
        yield f"heatmap.ome.zarr is not valid OME-Zarr: {one_line(error)}"
        return
    if not with_values:
        return
    heatmap = HeatmapStore(folder.heatmap, read_only=True)
    if heatmap.shapes != plan.level_shapes:
        yield f"heatmap.ome.zarr has levels {heatmap.shapes}, expected {plan.level_shapes} for this slide"
        return
    ome = heatmap.attributes["ome"]
    label = read_json((folder.heatmap / "labels" / LABEL / METADATA).read())
    yield from _check_scales("heatmap.ome.zarr", ome, plan)
    yield from _check_scales(f"label {LABEL}", label["attributes"]["ome"], plan)
    yield from _told("heatmap.ome.zarr/zarr.json", _check_channels(heatmap.attributes, plan, run))
    count = len(ome["omero"]["channels"])
    for level in range(len(plan.level_shapes)):
        for number, block in enumerate(plan.blocks(level)):
            found = [digest_of((heatmap.read(level, channel, block),)) for channel in range(count)]
            found.append(digest_of((heatmap.read_flags(level, block),)))
            if done.blocks.get(block_name(level, number)) != found:
                yield f"level {level} of heatmap.ome.zarr, block {number}, differs from what was computed"


def _check_channels(attributes: dict[str, Any], plan: SlidePlan, run: _Run) -> Iterator[str]:
    """Yield what in the channels' description does not follow from run.yaml, and windows without a width."""
    channels = attributes["ome"]["omero"]["channels"]
    for channel in channels:
        window = [channel["window"][key] for key in ("min", "start", "end", "max")]
        if not (all(map(math.isfinite, window)) and window[0] <= window[1] < window[2] <= window[3]):
            yield f"heatmap.ome.zarr/zarr.json has a window {window} of {channel['label']}, expected rising numbers"
    if run.values is None:
        return
    identity = run.values["identity"]
    targets = [Target(**target) for target in run.values["targets"]]
    given = identity["settings"]["method"]
    methods = [method for method in ([given] if isinstance(given, str) else given) if method != NO_METHOD]
    labels = [f"{method}: {target.label}" for method in methods for target in targets]
    labels += [f"probability: {target.label}" for target in targets if target.is_class]
    labels += identity["settings"].get("bag_channels", [])
    if [channel["label"] for channel in channels] != labels:
        yield f"heatmap.ome.zarr/zarr.json has other channels than {', '.join(labels)}"
    said = attributes["wsi_gradcam"]
    if any(said.get(key) != value for key, value in {**identity, "slide": plan.slide_digest}.items()):
        yield "heatmap.ome.zarr/zarr.json belongs to another model, configuration or slide"


def _check_scales(name: str, ome: dict[str, Any], plan: SlidePlan) -> Iterator[str]:
    datasets = ome["multiscales"][0]["datasets"]
    if len(datasets) != len(plan.level_shapes):
        yield f"{name} names {len(datasets)} levels, expected {len(plan.level_shapes)}"
    for level, dataset in enumerate(datasets):
        expected = [mpp * plan.stride * 2**level for mpp in plan.slide_mpp]
        transforms = dataset["coordinateTransformations"]
        if len(transforms) != 1 or not np.allclose(transforms[0]["scale"][-2:], expected, rtol=1e-9, atol=0):
            yield f"level {level} of {name} has {transforms}, expected only the scale {expected} um"


def _check_table(folder: SlideFolder, plan: SlidePlan, run: _Run) -> Iterator[str]:
    table = StoredTable(folder.table, plan.patches).read()
    store = PatchStore(folder.cams, read_only=True)
    yx = store.yx()
    if not (np.array_equal(table["y"], yx[:, 0]) and np.array_equal(table["x"], yx[:, 1])):
        yield "patches.parquet has other positions than cams.zarr"
    if not np.array_equal(table["tissue"], store.share("tissue")):
        yield "patches.parquet has other shares of tissue than cams.zarr"
    ok = np.asarray(table["status"]) == STATUS_NAMES[OK]
    if not np.array_equal(ok, store.status() == OK):
        yield "patches.parquet has another status of some patches than cams.zarr"
    logits = store.logits(0, plan.patches)
    for i, name in enumerate(run.record.model.classes if run.record else ()):
        if not np.array_equal(np.asarray(table[f"logit_{name}"])[ok], logits[ok, i]):
            yield f"patches.parquet has other logits of {name} than cams.zarr"


def _check_slide(row: dict[str, str], plan: SlidePlan, run: _Run) -> Iterator[str]:
    try:
        check_named(as_path(row["path"]), run.out, run.remote_slides)
    except NotAskedError as error:
        run.notes.append(f"{row['id']}: not compared with the slide: {error}")
        return
    reader, channels = (run.record.reader, run.record.channels) if run.record else ("auto", None)
    slide = open_slide(slide_address(as_path(row["path"]), run.out), plan.slide_mpp, reader, channels=channels)
    try:
        if slide.info.digest != plan.slide_digest:
            yield f"{row['path']} is not the file that was explained"
        elif (slide.info.height, slide.info.width) != plan.slide_px:
            height, width = plan.slide_px
            yield f"{row['path']} is {slide.info.width} x {slide.info.height} px, expected {width} x {height}"
    finally:
        slide.close()
