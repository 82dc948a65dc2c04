"""The command line: parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from wsi_gradcam import __version__
from wsi_gradcam.errors import ConfigError, StoppedError, WsiGradcamError, one_line
from wsi_gradcam.system.isolation import guard
from wsi_gradcam.system.stopping import STOP

DONE, SOME_FAILED, WRONG_USAGE = 0, 1, 2

# Flags of `explain` that are settings: name, type, help.
SETTINGS: tuple[tuple[str, Any, str], ...] = (
    ("method", str, "explanations, several joined by commas: gradcam (default), hirescam, ...; 'info' lists all"),
    ("layer", str, "module whose output is explained, or A+B (default: the model file's, else found)"),
    ("mpp", str, "micrometres per level-0 pixel of slides that do not tell theirs: one number, or Y,X"),
    ("replace-mpp", bool, "use --mpp, and the mpp of a list, also for slides that tell another"),
    ("patch-mpp", float, "micrometres per pixel of the model's input (default: the model file's)"),
    ("patch-px", int, "side of the model's input in pixels (default: the model file's)"),
    ("overlap", float, "share of a patch its neighbour covers too, 0 (default) to below 1"),
    ("stride-px", int, "instead of --overlap: patch pixels from one patch to the next"),
    ("min-tissue", float, "leave out patches with a smaller share of tissue (default 0.1)"),
    ("tissue", str, "what counts as tissue: auto (default), with-pen for stains that look like ink, everything"),
    ("mask", str, "part to explain: a PNG, GeoJSON, ASAP or ImageScope file, or a folder with one a slide"),
    ("include", list, "annotation classes of --mask that are in (default: all that are not excluded)"),
    ("exclude", list, "annotation classes of --mask that are out"),
    ("heatmap-stride", int, "level-0 pixels per heatmap pixel, a power of two (default 16)"),
    ("window", str, "how overlapping patches are weighed: hann (default) or uniform"),
    ("batch-size", str, "patches per forward pass (default 32), or auto"),
    ("span-patches", int, "patches per unit of work (default 256)"),
    ("device", str, "where the model runs: cpu (default), cuda, cuda:1, mps"),
    ("engine", str, "what runs the network up to the layer: auto (default), eager, compile, openvino"),
    ("precision", str, "of the network up to the layer: auto (default), float32, bfloat16, float16"),
    ("reader", str, "what opens slides: auto (default), openslide, tiff, ome-zarr, picture"),
    ("trust-objective", bool, "take the mpp of slides that do not tell it from the objective's power (40x: 0.25)"),
    ("reader-threads", int, "threads that read patches while the model works (default 2)"),
    ("torch-threads", int, "threads of the model on a CPU (default: all, shared between workers)"),
    ("max-unreadable", float, "share of unreadable patches above which a slide has failed (default 0.01)"),
)

# How argparse takes kinds of flags that have not just one value.
KINDS: dict[type, dict[str, Any]] = {
    bool: {"action": "store_true", "default": None},
    list: {"nargs": "+", "action": "extend", "metavar": "NAME"},
}

# Keys of a config file that are no settings.
WHERE: dict[str, type] = {
    "slide": list,
    "model": str,
    "out": str,
    "workers": int,
    "scheduler": str,
    "wait_for_workers": float,
    "only": list,
    "skip": list,
}
WHERE_TEXT = {list: "a path or a list of paths", str: "text", int: "a whole number", float: "a number of seconds"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 all done, 1 some slides failed or the run could not go on, 2 nothing could start.

    Told to stop by SIGINT or SIGTERM it returns 130 or 143, once what was in work is finished.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    stoppable: AbstractContextManager[None] = nullcontext()
    if argv is None and arguments.run in (_explain, _demo, _audit):  # a command of its own: no threads yet
        guard()
        stoppable = STOP.at_signals()
    try:
        with stoppable:
            code: int = arguments.run(arguments)
            return code
    except StoppedError as error:
        print(one_line(error), file=sys.stderr)
        return STOP.exit_code
    except WsiGradcamError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return WRONG_USAGE
    except KeyboardInterrupt:
        print(one_line(STOP.error()), file=sys.stderr)
        return STOP.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wsi-gradcam",
        description="Where a CNN looks on whole slides: heatmaps that open aligned over the slide.",
    )
    parser.add_argument("--version", action="version", version=f"wsi-gradcam {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_explain(commands)
    demo = commands.add_parser("demo", help="explain a real slide with a trained model that comes along")
    demo.add_argument("slide", nargs="?", help="an H&E slide; without one, an IHC slide is laid out")
    demo.add_argument("--out", default="demo-output", help="folder for the results (default: demo-output)")
    demo.add_argument("--mpp", type=float, help="the slide's micrometres per pixel, where the file is wrong")
    demo.add_argument("--workers", type=int, help="number of processes (default: this one)")
    demo.set_defaults(run=_demo)
    check = commands.add_parser("validate", help="check results against manifest, specification and slide")
    check.add_argument("out", help="folder that explain made, or s3://BUCKET/KEY")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(run=_validate)
    status = commands.add_parser("status", help="how far a run is, seen from outside")
    status.add_argument("out", help="folder that explain works on")
    status.add_argument("--watch", action="store_true", help="go on until the run ends")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_status)
    _add_audit(commands)
    _add_export(commands)
    _add_view(commands)
    info = commands.add_parser("info", help="what is known of a slide or a model")
    info.add_argument("slide", nargs="*", help="slide files")
    info.add_argument("--model", help="a model, as for explain")
    info.add_argument("--layer", help="a layer of the model to test")
    info.add_argument("--mask-out", type=Path, help="write a PNG of the slide with its tissue, ink and shadows")
    for name in ("mpp", "replace-mpp", "tissue", "mask", "include", "exclude"):
        kind, text = next((kind, text) for known, kind, text in SETTINGS if known == name)
        info.add_argument(f"--{name}", help=f"with --mask-out: {text}", **KINDS.get(kind, {"type": kind}))
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    doctor = commands.add_parser("doctor", help="check this machine, a folder for results, and a cluster's workers")
    doctor.add_argument("--out", help="folder for the results, to be tried here and from the workers")
    doctor.add_argument("--scheduler", help="address of a Dask scheduler, whose workers are checked")
    doctor.add_argument("--model", help="a model, as for explain, to be loaded here and on the workers")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_view(commands: Any) -> None:
    view = commands.add_parser("view", help="show results over their slides in a browser")
    view.add_argument("out", help="folder that explain made, or s3://BUCKET/KEY")
    view.add_argument("--port", type=int, default=8765, help="port to listen on, 0 for any (default 8765)")
    view.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    view.add_argument("--slides", type=Path, help="folder to take slides from, where they have moved")
    view.add_argument("--token", action="store_true", help="ask for a token on 127.0.0.1 too: others use this machine")
    view.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a proxy's name for the server")
    view.add_argument("--open", action="store_true", help="open the page in a browser")
    view.set_defaults(run=_view)


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser("explain", help="explain slides", description="Explain slides.")
    explain.add_argument("slide", nargs="*", help="slides, folders, patterns ('a/**/*.svs'), lists (.csv, .parquet)")
    explain.add_argument(
        "--model",
        help="model file (.yaml), a bundled name, timm:NAME, torchvision:NAME, module:function, a TorchScript or .pt2 "
        "file, a WSInfer or Hugging Face folder",
    )
    explain.add_argument("--out", help="folder for the results, or s3://BUCKET/KEY; a run there is continued")
    explain.add_argument(
        "--target",
        action="append",
        help="class name, index, 'predicted', 'all', CLASS-CLASS or module:function; may be given several times "
        "(default: all of up to 10 classes, else predicted)",
    )
    for name, kind, text in SETTINGS:
        explain.add_argument(f"--{name}", help=text, **KINDS.get(kind, {"type": kind}))
    for name, text in (("only", "explain only slides with"), ("skip", "leave out slides with")):
        explain.add_argument(
            f"--{name}", nargs="+", action="extend", metavar="PATTERN", help=f"{text} ids like these: '2023/**'"
        )
    explain.add_argument("--config", type=Path, help="YAML file with the same names as keys; flags come first")
    where = explain.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, help="run on this many processes of this machine")
    where.add_argument("--scheduler", help="run on the Dask cluster at this address")
    explain.add_argument(
        "--wait-for-workers", type=float, metavar="SECONDS", help="how long to wait for missing workers (default 50)"
    )
    explain.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    explain.add_argument(
        "--overwrite",
        action="store_true",
        help="make finished slides anew, whatever settings --out holds",
    )
    explain.add_argument("--retry-failed", action="store_true", help="try slides again that failed before")
    explain.add_argument("--log-tasks", action="store_true", help="a line for each task in the log below --out")
    explain.add_argument("--json", action="store_true", help="print JSON")
    explain.set_defaults(run=_explain)


def _add_audit(commands: Any) -> None:
    text = "whether the explanations of a run can be believed"
    audit = commands.add_parser("audit", help=text, description=f"Find out {text}.")
    audit.add_argument("out", help="folder that explain made, or s3://BUCKET/KEY; an audit there is continued")
    audit.add_argument("--patches", type=int, help="about so many of all slides together (default 200)")
    audit.add_argument("--seed", type=int, help="of the sample and of all random numbers (default 0)")
    questions = "faithfulness, sanity, stability, locality, saturation, shortcuts, plausibility"
    audit.add_argument("--only", metavar="QUESTION[,..]", help=f"ask some only of {questions}")
    audit.add_argument("--target", help="which of the run's targets (default: each patch's predicted class)")
    audit.add_argument("--annotations", help="a file, or a folder with one a slide, of areas that show the target")
    audit.add_argument("--include", nargs="+", action="extend", metavar="NAME", help="annotation classes that count")
    audit.add_argument("--regions", help="as --annotations, of what should not decide: rulers, folds, pen")
    audit.add_argument("--model", help="the run's model, where its files have moved")
    audit.add_argument("--against", metavar="OUT2", help="compare with the audit of another run, on its patches")
    audit.add_argument("--fail-on", metavar="QUESTION[,..]|any", help="end with 1 where a verdict on these fails")
    where = audit.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, help="run on this many processes of this machine")
    where.add_argument("--scheduler", help="run on the Dask cluster at this address")
    audit.add_argument("--wait-for-workers", type=float, metavar="SECONDS", help="as for explain")
    audit.add_argument("--overwrite", action="store_true", help="measure anew, whatever audit there is")
    audit.add_argument("--json", action="store_true", help="print JSON")
    audit.set_defaults(run=_audit)


def _audit(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.audit.running import audit_run
    from wsi_gradcam.cli.audit import failing, print_audit
    from wsi_gradcam.cli.terminal import progress

    names = (
        "patches",
        "seed",
        "target",
        "annotations",
        "include",
        "regions",
        "model",
        "against",
        "workers",
        "scheduler",
    )
    options = {name: value for name in (*names, "wait_for_workers") if (value := getattr(arguments, name)) is not None}
    if arguments.only is not None:
        options["only"] = _listed(arguments.only)
    fail_on = None if arguments.fail_on is None else failing(_listed(arguments.fail_on))
    with progress(quiet=arguments.json) as listener:
        try:
            outcome = audit_run(arguments.out, overwrite=arguments.overwrite, listener=listener, **options)
        except StoppedError:
            raise
        except WsiGradcamError as error:
            if not listener.began:
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)
            return SOME_FAILED
    failures = [] if fail_on is None else outcome.metrics.failed(fail_on)
    print_audit(outcome, failures, arguments.json)
    return SOME_FAILED if outcome.failed or failures else DONE


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write results in the formats of other programs")
    export.add_argument("out", help="folder that explain made")
    formats = "ome-zarr-0.4, ome-tiff, tiff, geojson, qupath, png, deepzoom; docs/exports.md says which for what"
    export.add_argument("--to", required=True, metavar="FORMAT", help=formats)
    export.add_argument("--dest", help="folder for the files (default: OUT/exports)")
    export.add_argument("--slide", nargs="+", action="extend", default=[], metavar="ID", help="default: all")
    export.add_argument(
        "--channel",
        nargs="+",
        action="extend",
        metavar="NAME",
        help='labels such as "gradcam: tumour", or classes (default: all; of pictures and regions, the first)',
    )
    export.add_argument("--colormap", help="a colour map of matplotlib (default inferno); gray: one sample")
    export.add_argument("--window", help="values that colour runs between: run (default), slide, or LOW,HIGH")
    export.add_argument("--threshold", type=float, help="show values from this on; regions: default middle of window")
    export.add_argument("--alpha", type=float, help="opacity over the slide (default 0.6)")
    export.add_argument("--size", type=int, help="longest side of a PNG in pixels (default 2000)")
    export.add_argument("--overwrite", action="store_true", default=None, help="replace files that exist")
    export.add_argument("--json", action="store_true", help="print JSON")
    export.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.export import Exported, export

    names = ("channel", "colormap", "window", "threshold", "alpha", "size", "overwrite")
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if "channel" in options:
        options["channel"] = tuple(options["channel"])
    if "," in options.get("window", ""):
        options["window"] = _window(options["window"])

    def tell(done: Exported) -> None:
        for line in [f"error: {done.slide}: {done.error}"] if done.error else map(str, done.paths):
            print(line, file=sys.stderr if done.error else sys.stdout, flush=True)

    if arguments.dest is None and "://" in arguments.out:
        raise ConfigError(f"{arguments.out}: exports are written to a local folder; say which with --dest")
    dest = Path(arguments.out) / "exports" if arguments.dest is None else Path(arguments.dest)
    listeners = (None, None) if arguments.json else (tell, _tell_progress)
    done = export(arguments.out, arguments.to, dest, arguments.slide, *listeners, **options)
    if arguments.json:
        print(json.dumps([{**each.__dict__, "paths": [str(path) for path in each.paths]} for each in done]))
    return SOME_FAILED if any(each.error for each in done) else DONE


def _tell_progress(done: int, total: int) -> None:
    """A line now and then while the run's window is found out, which takes a while for an archive."""
    if done % 100 == 0:
        print(f"display window of the run: {done} of {total} slides read", file=sys.stderr, flush=True)


def _window(text: str) -> tuple[float, float]:
    """LOW,HIGH."""
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise ConfigError(f"--window is {text!r}, expected run, slide, or two numbers LOW,HIGH") from error
    return low, high


def _explain(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.api import check_where, explain, preview
    from wsi_gradcam.cli.report import print_outcome, print_preview
    from wsi_gradcam.cli.terminal import progress
    from wsi_gradcam.run.settings import make_settings

    values = _merged(arguments)
    where = {key: values.pop(key, None) for key in WHERE}
    for key, flag in (("slide", "SLIDE"), ("model", "--model"), ("out", "--out")):
        if not where[key]:
            raise ConfigError(f"{flag} is missing; give it on the command line or in the --config file")
    settings = make_settings(**values)
    check_where(where["workers"], where["scheduler"])
    chosen = {key: where[key] or () for key in ("only", "skip")}
    if arguments.dry_run:
        found = preview(where["slide"], where["model"], where["out"], settings, **chosen)
        print_preview(found, arguments.json)
        return SOME_FAILED if found.errors else DONE
    stopped: WsiGradcamError | None = None
    with progress(quiet=arguments.json) as listener:
        try:
            outcome = explain(
                where["slide"],
                where["model"],
                where["out"],
                settings,
                workers=where["workers"],
                scheduler=where["scheduler"],
                wait_for_workers=where["wait_for_workers"],
                overwrite=arguments.overwrite,
                retry_failed=arguments.retry_failed,
                log_tasks=arguments.log_tasks,
                listener=listener,
                **chosen,
            )
        except StoppedError:
            raise
        except WsiGradcamError as error:
            if not listener.began:
                raise
            stopped = error  # the disk is full, the cluster is gone: what is finished stays
    if stopped is not None:
        print(f"error: {one_line(stopped)}", file=sys.stderr)
        return SOME_FAILED
    print_outcome(outcome, arguments.json)
    return SOME_FAILED if outcome.failed else DONE


def _merged(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keys of the config file, overridden by flags."""
    from wsi_gradcam.run.settings import read_config

    names = [*WHERE, "target", *(name.replace("-", "_") for name, _, _ in SETTINGS)]
    values = read_config(arguments.config) if arguments.config else {}
    values = {key.replace("-", "_"): value for key, value in values.items() if value is not None}
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            expected = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
            raise ConfigError(f"{arguments.config}: unknown key {key!r}; {expected}")
    for key, kind in WHERE.items():
        if kind is list and isinstance(values.get(key), str):
            values[key] = [values[key]]
    for key, kind in WHERE.items():
        kinds = (int, float) if kind is float else (kind,)
        if key in values and not (type(values[key]) in kinds and (kind is not list or _all_text(values[key]))):
            expected = "a pattern or a list of patterns" if key in ("only", "skip") else WHERE_TEXT[kind]
            raise ConfigError(f"{arguments.config}: {key} is {values[key]!r}, expected {expected}")
    given = {name: value for name in names if (value := getattr(arguments, name)) not in (None, [])}
    if {"workers", "scheduler"} & given.keys():  # one replaces the other
        values = {key: value for key, value in values.items() if key not in ("workers", "scheduler")}
    values.update(given)
    if isinstance(values.get("batch_size"), str) and values["batch_size"].isdecimal():
        values["batch_size"] = int(values["batch_size"])
    return _pair(values)


def _pair(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with an mpp that is text as (y, x)."""
    if isinstance(values.get("mpp"), str):
        try:
            values["mpp"] = tuple(float(part) for part in values["mpp"].split(","))
        except ValueError as error:
            raise ConfigError(f"--mpp is {values['mpp']!r}, expected a number such as 0.25, or Y,X") from error
        values["mpp"] = values["mpp"] * 2 if len(values["mpp"]) == 1 else values["mpp"]
    return values


def _all_text(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _demo(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.demo.run import run_demo

    return DONE if run_demo(arguments.slide, Path(arguments.out), arguments.workers, arguments.mpp) else SOME_FAILED


def _validate(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.results.validation import failed_slides, validate

    findings = validate(arguments.out)
    if arguments.json:
        print(json.dumps([finding.__dict__ for finding in findings]))
    else:
        for finding in findings:
            print(f"{finding.slide or arguments.out}: {finding.problem}")
        print(f"{len(findings)} problems found" if findings else f"{arguments.out}: valid")
    if failed := failed_slides(arguments.out):
        print(
            f"{len(failed)} slides of the run failed and have no results that could be checked: "
            f"{', '.join(failed[:5])}{' ...' if len(failed) > 5 else ''}; slides.csv says why",
            file=sys.stderr if arguments.json else sys.stdout,
        )
    return SOME_FAILED if findings else DONE


def _view(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.viewer.serve import view

    view(
        arguments.out,
        host=arguments.host,
        port=arguments.port,
        slides=arguments.slides,
        token=arguments.token,
        allow_host=arguments.allow_host,
        browse=arguments.open,
        announce=lambda text: print(text, flush=True),
    )
    return DONE


def _status(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.run.status import look, shown

    before = None
    for state in look(arguments.out, arguments.watch):
        text = json.dumps(state.to_json()) if arguments.json else shown(state)
        if text != before:
            print(text, flush=True)
        before = text
    return DONE if state.well else SOME_FAILED


def _info(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.cli.report import mask_info, model_info, slide_info

    if not arguments.slide and not arguments.model:
        raise ConfigError("nothing to show; give slide files, or --model")
    found = [slide_info(path) for path in arguments.slide]
    if arguments.mask_out:
        if len(found) != 1:
            raise ConfigError(f"--mask-out makes a picture of one slide, {len(found)} are given")
        names = ("mpp", "replace_mpp", "tissue", "mask", "include", "exclude")
        values = {name: value for name in names if (value := getattr(arguments, name)) is not None}
        found[0] |= mask_info(arguments.slide[0], arguments.mask_out, _pair(values))
    if arguments.model:
        found.append(model_info(arguments.model, arguments.layer))
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n\n".join("\n".join(f"{key:>16}  {value}" for key, value in item.items()) for item in found))
    return DONE


def _doctor(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.doctor import FAIL, examine, shown, worst

    checks = []
    for check in examine(arguments.out, arguments.scheduler, arguments.model):
        checks.append(check)
        if not arguments.json:
            print(shown(check), flush=True)
    status = worst(checks)
    if arguments.json:
        print(json.dumps({"status": status, "checks": [check.__dict__ for check in checks]}))
    return SOME_FAILED if status == FAIL else DONE


if __name__ == "__main__":
    sys.exit(main())
