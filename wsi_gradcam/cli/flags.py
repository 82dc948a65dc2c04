"""The flags of each command. Those of `explain` are derived from the fields of `Settings`, as are the config keys."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from wsi_gradcam.cli import group
from wsi_gradcam.errors import ConfigError, quoted

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from wsi_gradcam.system.confinement import Limits

    Adding = argparse._ActionsContainer  # a parser, or a group of its flags

# Keys of a config file besides the settings: the type of their values, and how error messages name it.
PATTERNS = (list, "a pattern or a list of patterns")
RUN_KEYS: Mapping[str, tuple[type, str]] = {
    "slide": (list, "a path or a list of paths"),
    "model": (str, "text"),
    "out": (str, "text"),
    "workers": (int, "a whole number"),
    "scheduler": (str, "text"),
    "wait_for_workers": (float, "a number of seconds"),
    "only": PATTERNS,
    "skip": PATTERNS,
}
# Settings with several values take them as `--include A B`, except these.
REPEATED = {"target": "TARGET", "allow_hosts": "PATTERN"}  # --target A --target B
JOINED = ("method", "bag_method", "only")  # --method A,B
# Settings that do not affect features, or concern only features made elsewhere.
NOT_OF_ENCODING = (
    *("outlines", "target", "method", "bag_method", "bag_baseline", "features", "feature_patch_um", "feature_unit"),
    *("feature_axes", "feature_name", "window"),
)
# The settings by topic, common ones first: the groups in the help of `explain` and similar commands. Settings that are
# in none come last.
WHAT, HOW, SLIDE_LEVEL, READING = "what to explain", "how to explain it", "slide-level models", "how slides are read"
WHERE, RESUME, REST = "where to run", "resuming and output", "other settings"
GROUPS: Mapping[str, tuple[str, ...]] = {
    WHAT: ("target", "mask", "include", "exclude", "mask_frame", "tissue", "min_tissue", "outlines"),
    HOW: (
        *("method", "layer", "overlap", "stride_px", "patch_mpp", "patch_px", "allow_upsampling"),
        *("heatmap_stride", "window"),
    ),
    SLIDE_LEVEL: (
        *("bag_method", "bag_baseline", "features", "feature_name", "feature_patch_um", "feature_unit"),
        *("feature_axes", "feature_precision"),
    ),
    READING: (
        *("mpp", "replace_mpp", "trust_objective", "reader", "channels", "decode", "max_unreadable"),
        *("allow_hosts", "isolate", "isolate_memory", "isolate_seconds"),
    ),
    WHERE: ("device", "engine", "precision", "batch_size", "span_patches", "reader_threads", "torch_threads"),
}
METAVARS = {int: "N", float: "NUMBER", Path: "PATH"}
MASK_SETTINGS = ("mpp", "replace_mpp", "tissue", "mask", "include", "exclude", "mask_frame")
ISOLATION = ("isolate", "isolate_memory", "isolate_seconds")
FORMS = {
    "mpp": "MPP",
    "patch_px": "PX",
    "channels": "R,G,B",
    "batch_size": "N",
    "device": "DEVICE",
    "method": "NAME[,..]",
    "bag_method": "NAME[,..]",
    "only": "QUESTION[,..]",
}
EXAMPLES = {int: "224", float: "0.25"}
TRUST = "WSI_GRADCAM_TRUST_CODE"  # "1" in the environment is --trust-code, for scripts that run many commands


# --- flags from settings ---------------------------------------------------------------------------------------------


def add_settings(parser: Adding, names: Iterable[str] | None = None, prefix: str = "") -> None:
    """Add a flag for each field of `Settings`, or for the named ones; `prefix` begins their help."""
    from wsi_gradcam.run.settings import Settings

    for name in Settings.model_fields if names is None else names:
        _add_setting(parser, name, Settings.model_fields[name], prefix)


def _add_setting(parser: Adding, name: str, field: FieldInfo, prefix: str = "") -> None:
    text = prefix + _help(name, field)
    parser.add_argument(f"--{name.replace('_', '-')}", help=text, **_options(name, field))


def _help(name: str, field: FieldInfo) -> str:
    """Return the description of a field, with the flags of the fields that it names in backticks, and the default."""
    text = re.sub(r"`(\w+)`", lambda found: "--" + found[1].replace("_", "-"), field.description or "")
    if _is_repeated(name, field):
        text += "; may be given several times"
    if name in JOINED:
        text += "; several are joined by commas"
    if not isinstance(field.default, bool) and field.default not in (None, (), "") and "(default" not in text:
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        text += f" (default {default:g})" if isinstance(default, float) else f" (default {default})"
    return text.replace("%", "%%")


def _options(name: str, field: FieldInfo) -> dict[str, Any]:
    """Return how argparse reads a field's flag; as text if `parse_text` does the rest."""
    types = _types(field.annotation)
    if types == [bool]:
        return {"action": "store_true", "default": None}
    if types in ([int], [float]):
        return {"type": types[0], "metavar": METAVARS[types[0]]}
    if all(isinstance(choice, str) for choice in types):
        return {"choices": types}
    if _is_repeated(name, field):
        return {"action": "append", "metavar": REPEATED[name]}
    if types == [tuple[str, ...]] and name not in JOINED:
        return {"nargs": "+", "action": "extend", "metavar": "NAME"}
    return {"metavar": FORMS.get(name) or next((METAVARS[kind] for kind in types if kind in METAVARS), "NAME")}


def _is_repeated(name: str, field: FieldInfo) -> bool:
    return name in REPEATED and _types(field.annotation) == [tuple[str, ...]]


def _types(annotation: Any) -> list[Any]:
    """Return the types that an annotation allows, without None and constraints; for a Literal its values."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _types(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [kind for member in get_args(annotation) if member is not NoneType for kind in _types(member)]
    return list(get_args(annotation)) if origin is Literal else [annotation]


def parse_text(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings with text turned into numbers if a field takes a pair of numbers, or a number or a word.

    Raises:
        ConfigError: text that is neither a number nor Y,X for a pair.
    """
    from wsi_gradcam.run.settings import Settings

    parsed = dict(values)
    for name, value in values.items():
        if isinstance(value, str) and name in Settings.model_fields:
            types = _types(Settings.model_fields[name].annotation)
            if get_origin(types[0]) is tuple and Ellipsis not in get_args(types[0]):
                parsed[name] = _parse_numbers(name, value, types[0])
            elif int in types and value.isdecimal():
                parsed[name] = int(value)
    return parsed


def _parse_numbers(name: str, text: str, wanted: Any) -> tuple[float, ...]:
    """Return the numbers of a pair, for which a single one may stand, or of more."""
    number: type[int] | type[float] = _types(get_args(wanted)[0])[0]
    is_pair = len(get_args(wanted)) == 2
    try:
        values = tuple(number(part) for part in text.split(","))
    except ValueError as error:
        form = f"a number such as {EXAMPLES[number]}, or Y,X" if is_pair else "numbers such as 2,1,0"
        raise ConfigError(f"--{name.replace('_', '-')} is {text!r}, expected {form}") from error
    return values * 2 if is_pair and len(values) == 1 else values


# --- the config file -------------------------------------------------------------------------------------------------


def isolation(arguments: argparse.Namespace) -> Limits | None:
    """Return the limits that a command's flags ask for; None without --isolate.

    Raises:
        ConfigError: impossible values.
    """
    if not getattr(arguments, "isolate", None):
        return None
    from wsi_gradcam.run.settings import make_settings

    return make_settings(**{name: value for name in ISOLATION if (value := getattr(arguments, name))}).isolation


def merge_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of `explain` by config key: flags, and those of the --config file that no flag overrides.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key or a value of the wrong type.
    """
    from wsi_gradcam.run.settings import Settings

    names = [*RUN_KEYS, *(name for name in Settings.model_fields if hasattr(arguments, name))]
    values = _read_config(arguments.config, names) if arguments.config else {}
    given = {name: value for name in names if (value := getattr(arguments, name)) not in (None, [])}
    if {"workers", "scheduler"} & given.keys():  # each replaces the other
        values = {key: value for key, value in values.items() if key not in ("workers", "scheduler")}
    return parse_text(values | given)


def _read_config(path: Path, names: list[str]) -> dict[str, Any]:
    from wsi_gradcam.run.settings import read_config

    values = {key.replace("-", "_"): value for key, value in read_config(path).items() if value is not None}
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            expected = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
            raise ConfigError(f"{path}: unknown key {quoted(key)}; {expected}")
    for key in RUN_KEYS.keys() & values.keys():
        values[key] = _check_type(path, key, values[key])
    return values


def _check_type(path: Path, key: str, value: Any) -> Any:
    """Return the value of a key in `RUN_KEYS`, a single path or pattern as a list."""
    kind, expected = RUN_KEYS[key]
    if kind is list and isinstance(value, str):
        return [value]
    kinds = (int, float) if kind is float else (kind,)
    if type(value) not in kinds or (kind is list and not all(isinstance(item, str) for item in value)):
        raise ConfigError(f"{path}: {key} is {quoted(value)}, expected {expected}")
    return value


# --- commands --------------------------------------------------------------------------------------------------------


def add_explain(parser: argparse.ArgumentParser, settings: Iterable[str] | None = None) -> None:
    """Add the arguments of `explain` or, with fewer `settings`, those of a similar command."""
    wanted = list(_settings() if settings is None else settings)
    groups = {title: group(parser, title) for title in (WHAT, HOW, SLIDE_LEVEL, READING, WHERE, RESUME, REST)}
    _add_slides(groups[WHAT])
    for title, names in GROUPS.items():
        add_settings(groups[title], [name for name in names if name in wanted])
        if title == WHAT:
            _add_patterns(groups[WHAT])
        if title == HOW:
            _add_trust(groups[HOW])
    _add_workers(groups[WHERE], "how long to wait for workers that are missing (default 50)")
    _add_resume(groups[RESUME], dry_run=settings is None)
    add_settings(
        groups[REST], [name for name in wanted if name not in {one for some in GROUPS.values() for one in some}]
    )


def _add_slides(where: Adding) -> None:
    add = where.add_argument
    add("slide", nargs="*", help="slides, folders, patterns ('a/**/*.svs') or lists of slides (.csv, .parquet)")
    add(
        "--model",
        help="a model file (.yaml), the name of a bundled model (oral-tumour, ihc-dab), timm:NAME, torchvision:NAME, "
        "module:function, a TorchScript or .pt2 file, a WSInfer or Hugging Face folder",
    )
    add("--out", metavar="PATH", help="folder for the results, or s3://BUCKET/KEY; a run there is continued")


def _add_patterns(where: Adding) -> None:
    add = partial(where.add_argument, nargs="+", action="extend", metavar="PATTERN")
    add("--only", help="only slides whose ids match, such as '2023/**'")
    add("--skip", help="all slides but those whose ids match")


def _add_resume(where: Adding, dry_run: bool) -> None:
    add = where.add_argument
    if dry_run:
        add("--dry-run", action="store_true", help="print what would be done and how long it would take, and stop")
    add("--overwrite", action="store_true", help="recompute finished slides, even if --out has other settings")
    add("--retry-failed", action="store_true", help="retry slides that failed before")
    add("--config", type=Path, metavar="FILE", help="YAML file with these names as keys; flags take precedence")
    add("--log-tasks", action="store_true", help="log a line for each task, in the folder log of --out")
    _add_json(where)


def add_encode(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `encode`: those of `explain` on which features depend."""
    add_explain(parser, [name for name in _settings() if name not in NOT_OF_ENCODING])


def _settings() -> Iterable[str]:
    from wsi_gradcam.run.settings import Settings

    return Settings.model_fields


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `demo`."""
    add = parser.add_argument
    add("slide", nargs="?", help="an H&E slide of yours; by default, a slide is made from real tissue")
    add(
        "--stain",
        choices=("he", "ihc"),
        default="he",
        help="the slide to make: H&E with pathologists' outlines (default), or IHC",
    )
    add("--out", default="demo-output", metavar="PATH", help="folder for the results (default: demo-output)")
    add("--mpp", type=float, metavar="MPP", help="the slide's micrometres per pixel, if the file's are wrong")
    add("--workers", type=int, metavar="N", help="number of worker processes (default: none, use this process)")


def add_validate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `validate`."""
    parser.add_argument("out", help="folder of results, or s3://BUCKET/KEY")
    _add_json(parser)
    _add_remote_slides(parser)


def add_card(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `card`."""
    add = parser.add_argument
    add("model", help="the model that OUT was made with, as for --model of explain")
    add("out", help="folder of results, or s3://BUCKET/KEY; its audit is used if it exists")
    text = "folder for NAME.card.md and NAME.card.html (default: the current one)"
    add("--dest", metavar="PATH", default=".", help=text)
    add("--overwrite", action="store_true", help="replace existing cards")
    _add_trust(parser)


def add_status(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `status`."""
    parser.add_argument("out", help="folder that a run or an audit writes to")
    parser.add_argument("--watch", action="store_true", help="print changes until the run ends")
    _add_json(parser)


def add_audit(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `audit`."""
    from wsi_gradcam.audit.plan import AuditSettings

    add = _add_judging(parser, "audit", "an audit", AuditSettings).add_argument
    add("--against", metavar="OUT2", help="compare with the audit of another run, on the patches of that audit")
    add("--fail-on", metavar="QUESTION[,..]|any", help="exit with status 1 if a verdict on one of these fails")


def add_evidence(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evidence`."""
    from wsi_gradcam.evidence import EvidenceSettings

    limits = _add_judging(parser, "look at", "evidence", EvidenceSettings)
    limits.add_argument("--against", metavar="OUT2", help="compare with the evidence of another run, on its patches")
    limits.add_argument("--fail-on", choices=["shortcut"], help="exit with status 1 if evidence looks like a shortcut")


def _add_judging(parser: argparse.ArgumentParser, work: str, made: str, settings: type[Any]) -> Adding:
    """Add the arguments that commands judging a run have in common; return the group of comparisons and limits."""
    from pydantic.fields import FieldInfo

    what, compared, where = (group(parser, title) for title in (f"what to {work}", "comparisons and limits", WHERE))
    what.add_argument("out", help=f"folder of results, or s3://BUCKET/KEY; {made} there is continued")
    types = get_type_hints(settings, include_extras=True)
    for field in fields(settings):
        _add_setting(what, field.name, FieldInfo.from_annotated_attribute(types[field.name], field.default))
    what.add_argument("--model", help="the run's model, if its files have moved")
    _add_trust(what)
    _add_workers(where, "as for explain")
    _add_remote_slides(group(parser, READING))
    resume = group(parser, RESUME)
    resume.add_argument(
        "--overwrite", action="store_true", help=f"measure again, even if the {work} has other settings"
    )
    _add_json(resume)
    return compared


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    what, how, rest = (group(parser, title) for title in ("what to export", "how values are shown", "files"))
    formats = (
        "ome-zarr-0.4, ome-tiff, tiff, asap, tissuumaps, geojson, clusters-geojson, marks-geojson, marks-csv, qupath, "
        "png, deepzoom, dsa, asap-xml, omero-rois, cytomine, dicom-parametric-map, dicom-segmentation, dicom-labelmap, "
        "dicom-clusters, dicom-annotations, dicom-sr, trident, clam; docs/exports.md. Several by commas; or all"
    )
    what.add_argument("out", help="folder of results")
    what.add_argument("--to", required=True, metavar="FORMAT", help=formats)
    what.add_argument(
        "--slide", nargs="+", action="extend", default=[], metavar="ID", help="ids of slides (default: all)"
    )
    channels = 'labels such as "gradcam: tumour", or classes (default: all; for pictures and regions, the first)'
    what.add_argument("--channel", nargs="+", action="extend", metavar="NAME", help=channels)
    add = how.add_argument
    add("--window", help="values between which the colours run: run (default), slide, or LOW,HIGH")
    add(
        "--threshold",
        type=float,
        metavar="VALUE",
        help="show values from this one up (for regions by default the middle of the window)",
    )
    add("--min-area", type=float, metavar="UM2", help="leave out hot regions below this area in µm² (default 0)")
    about = "how far outlines may lie from the borders of pixels, in heatmap pixels (default 0.75)"
    add("--simplify", type=float, metavar="PX", help=about)
    add("--colormap", metavar="NAME", help="a colour map of matplotlib (default inferno); gray has a single channel")
    add("--alpha", type=float, metavar="0..1", help="opacity over the slide (default 0.6)")
    add("--size", type=int, metavar="PX", help="longest side of a PNG in pixels (default 2000)")
    add(
        "--frame",
        choices=("bounds", "slide"),
        help="origin of GeoJSON: the scanned part, as in QuPath (default), or the slide",
    )
    add = rest.add_argument
    about = "YAML or JSON: patient, study and specimen of slides that are not DICOM, such as PatientID: A1"
    add("--dicom-attributes", metavar="FILE", help=about)
    add("--dest", metavar="PATH", help="folder for the files (default: OUT/exports)")
    add("--overwrite", action="store_true", default=None, help="replace existing files")
    _add_json(rest)
    _add_remote_slides(group(parser, READING))


def add_view(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `view`, which isolates slides unless told otherwise."""
    add = parser.add_argument
    add("out", help="folder of results, or s3://BUCKET/KEY")
    add("second", nargs="?", metavar="out2", help="results of another run over the same slides, to compare")
    add("--open", action="store_true", help="open the page in a browser")
    add("--slides", type=Path, metavar="PATH", help="folder of the slides, if they have moved")
    drawn = "annotations to show over slides and maps: a file, or a folder with a file for each slide"
    add("--annotations", type=Path, metavar="PATH", help=f"{drawn} (GeoJSON, ASAP, ImageScope, masks)")
    frame = "what these were drawn on: the slide, or its scanned part as in QuPath (default: detected)"
    add("--mask-frame", choices=("auto", "slide", "bounds"), default="auto", help=frame)
    add("--read-only", action="store_true", help="do not save marks (OUT/marks.jsonl)")
    add = (server := group(parser, "server")).add_argument
    add("--port", type=int, metavar="N", default=8765, help="port to listen on, 0 for any free one (default 8765)")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: this machine only)")
    add("--token", action="store_true", help="require a token on 127.0.0.1 too, for machines with several users")
    add("--allow-host", action="append", default=[], metavar="NAME", help="a name by which a proxy calls the server")
    add("--tls", nargs=2, metavar=("CERT", "KEY"), help="files with a certificate and its key, to serve https://")
    _add_remote_slides(group(parser, READING))
    about = "read slides in the server's process, instead of a restricted process each (Linux only; docs/viewer.md)"
    server.add_argument("--no-isolate", dest="isolate", action="store_false", default=None, help=about)


def add_info(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `info`."""
    add = parser.add_argument
    add("slide", nargs="*", help="slide files, or folders of slides or results")
    add("--model", help="a model, as for explain")
    _add_trust(parser)
    add("--layer", help="a layer of the model, to be tested")
    _add_json(parser)
    masks = group(parser, "picture of the tissue mask")
    masks.add_argument(
        "--mask-out", type=Path, metavar="FILE", help="write a PNG of the slide with its tissue, ink and shadows"
    )
    add_settings(masks, MASK_SETTINGS, prefix="with --mask-out: ")
    reading = group(parser, READING)
    _add_allow_hosts(reading)
    _add_isolate(reading)


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doctor`."""
    add = parser.add_argument
    add("--out", metavar="PATH", help="folder for results, to be tested from here and from the workers")
    add("--scheduler", metavar="URL", help="address of a Dask scheduler, whose workers are tested")
    add("--model", help="a model, as for explain, to be loaded here and on the workers")
    _add_trust(parser)
    _add_json(parser)


def _add_workers(parser: Adding, wait_help: str) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, metavar="N", help="run in this many processes on this machine")
    where.add_argument("--scheduler", metavar="URL", help="run on the Dask cluster at this address")
    parser.add_argument("--wait-for-workers", type=float, metavar="SECONDS", help=wait_help)


def _add_trust(parser: Adding) -> None:
    about = "allow a model or target that contains code (TorchScript, .pt2, WSInfer, module:function) to run it"
    parser.add_argument("--trust-code", action="store_true", default=os.environ.get(TRUST) == "1", help=about)


def _add_remote_slides(parser: Adding) -> None:
    text = "contact other machines for slides whose URLs are in the results"
    parser.add_argument("--remote-slides", action="store_true", help=text)
    _add_allow_hosts(parser)
    _add_isolate(parser)


def _add_isolate(parser: Adding) -> None:
    """Add the flags for reading slides in separate processes, as for `explain`."""
    add_settings(parser, ISOLATION)


def _add_allow_hosts(parser: Adding) -> None:
    add_settings(parser, ["allow_hosts"])


def _add_json(parser: Adding) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
