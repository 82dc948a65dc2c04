"""Names of everything below OUT, and `run.yaml`, the configuration with which a run was made."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from wsi_gradcam.cam.facts import Choice
from wsi_gradcam.errors import DocumentError, ResultError, ResumeError, StoreError, one_line
from wsi_gradcam.io.base import SMALL_BYTES
from wsi_gradcam.io.documents import read_json, read_yaml, to_yaml
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.io.zarr_stores import ZARR_CONTENTS
from wsi_gradcam.results.manifest import PLAN, Manifest
from wsi_gradcam.results.seals import BLANK, KEY, leads_out, sealed

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.run.plan import RunPlan


# Everything that is, or may come to be, at the top of OUT, of OUT/audit or of a folder of exports.
RESERVED = frozenset(
    {
        *(
            ".lock",
            "audit",
            "claim.json",
            "digests.json",
            "display.json",
            "evidence",
            "exports",
            "exports.json",
            "files.json",
            "log",
            "logs",
            "marks.jsonl",
        ),
        *("manifest.json", "metrics.json", "plan.json", "report.html", "run.html", "run.yaml", "slides.csv"),
        *("slides.jsonl", "status.json"),
    }
)
MARKS = "marks.jsonl"  # what people say about places
MARK = "~"  # none of our names ends in it


def folder_name(slide_id: str) -> str:
    """Return the name of a slide's folder in OUT, in OUT/audit and among exports, which is never one of ours.

    It is the slide's id, with a "~" added to its first part if that is in `RESERVED` on a disk that ignores case and
    trailing dots and spaces: no two ids give the same name.

    Raises:
        ResultError: the id leads out of OUT.

    >>> [folder_name(name) for name in ("a.svs", "audit/a.svs", "Audit~/a.svs", "more/audit/a.svs")]
    ['a.svs', 'audit~/a.svs', 'Audit~~/a.svs', 'more/audit/a.svs']
    """
    if leads_out(slide_id):
        raise ResultError(f"{slide_id!r} is not the name of a slide below OUT; slides.jsonl or slides.csv is damaged")
    first, slash, rest = slide_id.partition("/")
    return f"{first}{MARK}{slash}{rest}" if _is_reserved(first) else slide_id


def slide_id_of(folder: str) -> str:
    """Return the id of the slide whose folder has this name, or had it before `folder_name` existed.

    >>> [slide_id_of(name) for name in ("audit~/a.svs", "audit/a.svs", "a~/b.svs")]
    ['audit/a.svs', 'audit/a.svs', 'a~/b.svs']
    """
    first, slash, rest = folder.partition("/")
    return f"{first.removesuffix(MARK)}{slash}{rest}" if _is_reserved(first) else folder


def is_name(slide_id: str) -> bool:
    """Return whether a name is that of a folder below OUT, and of nothing outside."""
    return not leads_out(slide_id)


def _is_reserved(name: str) -> bool:
    return name.rstrip(f"{MARK}. ").casefold() in RESERVED


@dataclass(frozen=True)
class SlideFolder:
    """The folder of one slide's results."""

    place: StoragePath

    @property
    def heatmap(self) -> StoragePath:
        """OME-Zarr image of the heatmap."""
        return self.place / "heatmap.ome.zarr"

    @property
    def cams(self) -> StoragePath:
        """Patch store."""
        return self.place / "cams.zarr"

    @property
    def features(self) -> StoragePath:
        """Features of the patches, for slide-level models."""
        return self.place / "features.zarr"

    @property
    def table(self) -> StoragePath:
        """The table, with a row for each patch."""
        return self.place / "patches.parquet"

    @property
    def overview(self) -> StoragePath:
        """Picture of the slide and overlays."""
        return self.place / "overview.png"

    @property
    def tissue(self) -> StoragePath:
        """Tissue mask over the whole slide."""
        return self.place / "tissue.png"

    @property
    def manifest(self) -> StoragePath:
        """Manifest: plan, finished pieces, final record."""
        return self.place / "manifest"

    def covered(self) -> list[str]:
        """Return the names of the files whose bytes the slide's record covers; for chunks, it covers the values."""
        stores = tuple(f"{store.name}/" for store in (self.heatmap, self.cams, self.features))
        found = (n for n in self.place.all_files() if n.startswith(stores) and n.endswith("/zarr.json"))
        return sorted([*found, "manifest/plan.json", *(p.name for p in (self.table, self.overview, self.tissue))])

    def holds(self, slide_id: str) -> bool:
        """Return whether a slide was planned here, and no slide with another id."""
        return (self.manifest / PLAN).is_file() and self.slide_id in (slide_id, "")

    @property
    def slide_id(self) -> str:
        """The id of the slide that was planned here, from the heatmap's name; "" if that cannot be read."""
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError, IndexError):
            metadata = read_json((self.heatmap / "zarr.json").read())
            return str(metadata["attributes"]["ome"]["multiscales"][0]["name"])
        return ""

    def remove(self) -> None:
        """Delete the slide's results; files that are not ours stay."""
        Manifest(self.manifest).clear()
        for image in (self.heatmap, self.cams, self.features):
            image.remove_files(ZARR_CONTENTS)
        files = (self.table, self.overview, self.tissue)
        self.place.remove_files(re.compile("|".join(re.escape(file.name) for file in files)))


@dataclass(frozen=True)
class RunFolder:
    """OUT."""

    place: StoragePath

    @property
    def run(self) -> StoragePath:
        """The resolved configuration."""
        return self.place / "run.yaml"

    @property
    def slides(self) -> StoragePath:
        """The table, with a row for each slide."""
        return self.place / "slides.csv"

    @property
    def display(self) -> StoragePath:
        """The run's display windows, computed on first use."""
        return self.place / "display.json"

    @property
    def record(self) -> StoragePath:
        """The slides and their ids, written before work begins."""
        return self.place / "slides.jsonl"

    def slide(self, slide_id: str) -> SlideFolder:
        """Return the folder of a slide: the one that `folder_name` gives, or where an older version put its results."""
        return SlideFolder(self.place / self.path_of(slide_id))

    def path_of(self, slide_id: str) -> str:
        """Return the path of a slide's folder, relative to OUT."""
        name = folder_name(slide_id)
        if name != slide_id and not SlideFolder(self.place / name).holds(slide_id):
            return slide_id if SlideFolder(self.place / slide_id).holds(slide_id) else name
        return name

    def emptied(self, slide_id: str) -> SlideFolder:
        """Return the folder for a slide that is computed again; what an older version put elsewhere is deleted."""
        new = SlideFolder(self.place / folder_name(slide_id))
        if (old := self.slide(slide_id)) != new:
            old.remove()
        return new


PACKAGES = (
    "wsi-gradcam",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "openslide-python",
    "openslide-bin",
    "tifffile",
    "zarr",
    "dask",
    "distributed",
    "scikit-image",
    "pillow",
    "openvino",
)


def write_run(place: StoragePathLike, run: RunPlan) -> None:
    """Write `run.yaml`: the resolved configuration, versions and digests.

    Raises:
        StoreError: the folder cannot be written.
    """
    values = {KEY: BLANK, **run_values(run), "versions": versions()}
    storage_path(place).write(sealed(to_yaml(values)))


def run_values(run: RunPlan) -> dict[str, Any]:
    """Return the resolved configuration and its digests as plain values."""
    facts = run.facts
    model = {
        "name": facts.name,
        "source": facts.source,
        "digest": facts.digest,
        "license": facts.license,
        "classes": list(facts.classes),
        "activation": facts.activation,
        "patch_px": list(facts.patch_px),
        "mpp": run.mpp,
        "mean": list(facts.mean),
        "std": list(facts.std),
        "stain": None if facts.stain is None else facts.stain.to_json(),
        "layer": facts.layer,
        "view": list(facts.view),
        "batch_size": facts.batch_size,
        "cam_shape": list(facts.cam_shape),
        "weights": run.spec.weights or "the source's own",
        "spec": run.spec.model_dump(mode="json", exclude_unset=True, exclude={"provenance"}),
        "folder": str(run.spec.folder),
        "provenance": run.spec.provenance,
        "notes": list(facts.notes),
    }
    return {
        "run_digest": run.digest(),
        "identity": run.identity(),
        "settings": run.settings.model_dump(mode="json"),
        "model": model,
        "targets": [asdict(target) for target in run.targets],
        "choice": facts.choice.to_json(),
        **({"encoding": run.encoding()} if facts.bag is not None else {}),
        **({"baseline": list(run.baseline)} if run.baseline else {}),
    }


# Keys of the model in run.yaml. Its name, its licence and its file's location may change when a run is continued.
MEANT = (
    "digest",
    "classes",
    "activation",
    "patch_px",
    "mpp",
    "mean",
    "std",
    "stain",
    "layer",
    "view",
    "cam_shape",
)


def made_with(values: dict[str, Any]) -> str:
    """Return the sha256 of everything in run.yaml on which results depend; a slide's record carries it."""
    model = {key: values["model"].get(key) for key in MEANT}
    meant = {"identity": values["identity"], "targets": values.get("targets"), "model": model}
    return hashlib.sha256(json.dumps(meant, sort_keys=True).encode()).hexdigest()


def read_run(place: StoragePathLike) -> dict[str, Any] | None:
    """Read the mapping that `write_run` wrote; None if there is none.

    Raises:
        StoreError: it is damaged.
    """
    try:
        return parse_run(place, storage_path(place).read(SMALL_BYTES))
    except FileNotFoundError:
        return None


def parse_run(place: StoragePathLike, data: bytes) -> dict[str, Any]:
    """Return the mapping in the bytes of a run.yaml.

    Raises:
        StoreError: it is damaged.
    """
    try:
        values = read_yaml(data, aliases=True)  # of older versions
    except DocumentError as error:
        raise StoreError(f"{place}: damaged; choose another --out, or use --overwrite") from error
    if not isinstance(values, dict) or not {"run_digest", "identity", "model"} <= values.keys():
        raise StoreError(f"{place}: not a run.yaml from wsi_gradcam; choose another --out")
    return values


def identity_problems(values: dict[str, Any]) -> Iterator[str]:
    """Yield everything in run.yaml that does not follow from its identity, on which the results depend."""
    identity, model, settings = values["identity"], values["model"], values.get("settings", {})
    if hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest() != values["run_digest"]:
        yield "run.yaml: run_digest is not that of identity"
    known = identity["settings"]
    resolved = {
        "model.digest": (model.get("digest"), identity["model"]),
        "model.layer": (model.get("layer"), known["layer"]),
        "model.batch_size": (model.get("batch_size"), known["batch_size"]),
        "targets": (values.get("targets"), known["target"]),
        "choice.engine": (values.get("choice", {}).get("engine"), known.get("engine")),
        "choice.precision": (values.get("choice", {}).get("precision"), known.get("precision")),
        "model.mpp": (model.get("mpp"), known.get("patch_mpp") or model.get("mpp")),
        "model.patch_px": (model.get("patch_px"), known.get("patch_px") or model.get("patch_px")),
    }
    if "decode" in known:
        resolved["choice.decode"] = (values.get("choice", {}).get("decode"), known["decode"])
    chosen = {"target", "layer", "engine", "precision", "batch_size", "decode"}  # settings say what was asked for
    resolved |= {f"settings.{key}": (settings.get(key), known[key]) for key in known if key not in chosen}
    for name, (found, expected) in resolved.items():
        if found is not None and found != expected:
            yield f"run.yaml: {name} is {str(found)[:40]}, expected {str(expected)[:40]} from its identity"


# Readers of results allocate memory for a patch, and for the part of the slide under it.
MAX_PATCH_PX, MAX_MPP = 1 << 13, 1e4


@dataclass(frozen=True)
class ModelRecord:
    """The model in run.yaml; fields that older versions did not write are empty.

    Attributes:
        patch_px: (height, width) of a patch, at `mpp` micrometres per pixel.
        spec: the model file's keys; None if the model cannot be loaded from them. Its paths start at `folder`.
    """

    name: str
    classes: tuple[str, ...]
    patch_px: tuple[int, int]
    mpp: float
    layer: str = ""
    digest: str = ""
    weights: str = ""
    batch_size: int = 0
    spec: dict[str, Any] | None = None
    folder: str = "."

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ModelRecord:
        """Return the model in run.yaml; raises KeyError, TypeError or ValueError for other values."""
        height, width = values["patch_px"]
        for side in (height, width):
            if type(side) is not int or not 1 <= side <= MAX_PATCH_PX:
                raise ValueError(f"patch_px is {str(side)[:40]}, expected 1 to {MAX_PATCH_PX}")
        mpp = values["mpp"]
        if not isinstance(mpp, int | float) or not 0 < mpp < MAX_MPP:
            raise ValueError(f"mpp is {str(mpp)[:40]}, expected micrometres per pixel")
        if not isinstance(values["classes"], list | tuple):
            raise TypeError("classes is not a list")
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        return cls(**{**known, "classes": tuple(values["classes"]), "patch_px": (height, width)})


@dataclass(frozen=True)
class RunRecord:
    """run.yaml for those who read results.

    Attributes:
        run_digest: digest of everything on which results depend, besides the slide.
        settings: by name, see `wsi_gradcam.Settings`; those that an older version did not have are missing.
        choice: engine and precision; None if an older version wrote it.
        is_slide_level: whether the model answers for whole slides.
    """

    run_digest: str
    settings: dict[str, Any]
    model: ModelRecord
    choice: Choice | None
    is_slide_level: bool = False

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunRecord:
        """Return the record from what `read_run` returned.

        Raises:
            StoreError: it is damaged.
        """
        try:
            model = ModelRecord.from_json(values["model"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"run.yaml: not from wsi_gradcam, or damaged ({one_line(error)}); choose another --out"
            ) from error
        settings = values.get("settings", {})
        if not isinstance(settings, dict):
            raise StoreError(
                "run.yaml: not from wsi_gradcam, or damaged (settings is not a mapping); choose another --out"
            )
        if isinstance(settings.get("method"), str):  # the first format has only one
            settings = {**settings, "method": (settings["method"],)}
        spec = model.spec if isinstance(model.spec, dict) else {}
        return cls(values["run_digest"], settings, model, stored_choice(values), "aggregator" in spec)

    @property
    def reader(self) -> str:
        """The name of the reader with which slides are opened."""
        return str(self.settings.get("reader", "auto"))

    @property
    def channels(self) -> tuple[int, int, int] | None:
        """Channels that are shown as red, green and blue, for slides of grey pictures; None if none were chosen."""
        match self.settings.get("channels"):
            case [int(red), int(green), int(blue)] if min(red, green, blue) >= 0:
                return red, green, blue
        return None


def stored_choice(stored: dict[str, Any]) -> Choice | None:
    """Return the engine and precision of a run; None if an older version wrote it."""
    try:
        return Choice.from_json(stored["choice"])
    except (KeyError, TypeError):
        return None


def is_encoded(stored: dict[str, Any]) -> bool:
    """Return whether a run.yaml is that of a run that only computed features."""
    return bool(stored.get("encoding")) and not stored["model"].get("classes")


def check_same_run(place: StoragePathLike, run: RunPlan) -> None:
    """Refuse to mix results.

    Raises:
        ResumeError: OUT was made by another model or configuration; the message says what differs.
    """
    stored = read_run(place)
    if stored is None or stored["run_digest"] == run.digest():
        return
    if is_encoded(stored) and not run.only_encodes and stored.get("encoding") == run.encoding():
        return
    if run.only_encodes and not is_encoded(stored):
        raise ResumeError(
            f"{storage_path(place).parent}: holds explained slides; if they are of a slide-level model, 'wsi-gradcam "
            "export --to trident' writes their features; otherwise choose another --out"
        )
    differences = _differences(stored["identity"], run.identity())
    raise ResumeError(
        f"{storage_path(place).parent}: holds results of another model or configuration ({differences}); choose "
        "another --out, or recompute everything with --overwrite"
    )


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of all packages that results may depend on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    flat_old, flat_new = ({**i["settings"], "model": i["model"], "format": i["format"]} for i in (old, new))
    changed = [key for key in sorted({*flat_old, *flat_new}) if flat_old.get(key) != flat_new.get(key)]

    def shown(value: object) -> str:
        text = str(value)
        return text if len(text) <= 40 else text[:12] + "..."

    return ", ".join(f"{key}: {shown(flat_old.get(key))} there, {shown(flat_new.get(key))} now" for key in changed)
