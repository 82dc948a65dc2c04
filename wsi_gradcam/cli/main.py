"""The commands of the command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wsi_gradcam import __version__
from wsi_gradcam.cli import (
    WRONG_USAGE,
    HelpFormatter,
    Parser,
    PrintableFormatter,
    Streams,
    examples_text,
    flags,
    given,
    leave,
    say,
    split,
)
from wsi_gradcam.errors import ConfigError, StoppedError, StoreError, WsiGradcamError, from_extra, one_line
from wsi_gradcam.system.isolation import STOP, supervise

if TYPE_CHECKING:
    from wsi_gradcam.cli.terminal import Quiet

DONE, SOME_FAILED = 0, 1
EXAMPLES = (
    "wsi-gradcam demo",
    "wsi-gradcam explain slides/ --model oral-tumour --target tumour --out results/",
    "wsi-gradcam COMMAND --help     the flags of a command, with examples",
)
SWITCHES = ("overwrite", "retry_failed", "log_tasks", "trust_code")  # of explain
NO_PLACE = {errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EROFS}  # nothing could be written at all


@dataclass(frozen=True)
class Command:
    """A command: the help in the list of commands, its arguments, and the function that runs it.

    Its own help begins with `description` and ends with `examples`; `usage` is what must be given.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    usage: str
    description: str
    examples: tuple[str, ...]
    works: bool = False  # it writes files, so it continues even if nobody reads its output
    stoppable: bool = False  # SIGINT and SIGTERM stop it once the work in progress is finished


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if all is done, 1 if slides failed or the run broke off, 2 if nothing could start.

    If stopped by SIGINT or SIGTERM, it returns 130 or 143 once the work in progress is finished.
    """
    if argv is None:
        _main_of_process()
    return _run(make_parser(argv).parse_args(argv), nullcontext())


def _main_of_process() -> NoReturn:
    """Run the command line in a process of its own, and end the process with the status."""
    streams = Streams()
    streams.take()
    try:
        arguments = make_parser(sys.argv[1:]).parse_args()
        stoppable: AbstractContextManager[None] = nullcontext()
        if COMMANDS[arguments.command].works:
            streams.work()
        if COMMANDS[arguments.command].stoppable:  # there are no threads yet
            supervise()
            stoppable = STOP.handle_signals()
        status = _run(arguments, stoppable)
    except SystemExit as end:  # from wrong arguments, or in the waiting process
        status = end.code if isinstance(end.code, int) else DONE
    except OSError:
        if not streams.failed:
            raise
        status = DONE
    leave(streams.status(status))


def _run(arguments: argparse.Namespace, stoppable: AbstractContextManager[None]) -> int:
    from wsi_gradcam.io.urls import allowing  # not in the waiting process
    from wsi_gradcam.system.confinement import isolating

    if logging.lastResort is not None:  # records without any other handler are printed by this one
        logging.lastResort.setFormatter(PrintableFormatter())
    hosts = getattr(arguments, "allow_hosts", None)
    try:
        with stoppable, allowing(hosts), isolating(flags.isolation(arguments)):
            return COMMANDS[arguments.command].run(arguments)
    except StoppedError as error:
        say(one_line(error), error=True)
        return STOP.exit_code
    except WsiGradcamError as error:
        say(f"error: {one_line(error)}", error=True)
        return SOME_FAILED if isinstance(error, BrokenOffError) else WRONG_USAGE
    except KeyboardInterrupt:
        say(one_line(STOP.error()), error=True)
        return STOP.exit_code


def make_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser for these arguments: only commands named in them get flags, because some take time to make."""
    parser = Parser(
        prog="wsi-gradcam",
        description="Show where a model looks on whole slides, and whether that explanation can be believed.",
        epilog=examples_text(EXAMPLES),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wsi-gradcam {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.help,
            usage=f"wsi-gradcam {name} {command.usage}",
            description=command.description,
            epilog=examples_text(command.examples),
            formatter_class=HelpFormatter,
        )
        if name in argv:
            command.add_arguments(subparser)
    return parser


class BrokenOffError(WsiGradcamError):
    """A run that had begun and could not continue: the disk is full, the cluster is gone. Finished work is kept."""


def _explain(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.api import explain, preview
    from wsi_gradcam.cli.output import print_outcome, print_preview

    slides, model, out, settings, run, chosen = _of_run(arguments)
    if arguments.dry_run:
        found = preview(slides, model, out, settings, **chosen, trust_code=arguments.trust_code)
        print_preview(found, arguments.json)
        return SOME_FAILED if found.errors else DONE
    switches: dict[str, Any] = {name: getattr(arguments, name) for name in SWITCHES}
    with _reporting(arguments.json) as listener:
        outcome = explain(slides, model, out, settings, listener=listener, **run, **chosen, **switches)
    print_outcome(outcome, arguments.json)
    return SOME_FAILED if outcome.failed else DONE


def _encode(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.api import encode
    from wsi_gradcam.cli.output import print_outcome

    slides, model, out, settings, run, chosen = _of_run(arguments)
    switches: dict[str, Any] = {name: getattr(arguments, name) for name in SWITCHES}
    with _reporting(arguments.json) as listener:
        outcome = encode(slides, model, out, settings, listener=listener, **run, **chosen, **switches)
    print_outcome(outcome, arguments.json)
    return SOME_FAILED if outcome.failed else DONE


def _of_run(arguments: argparse.Namespace) -> tuple[Any, ...]:
    """Return slides, model, out, settings, where to run, and patterns of ids, from the flags and the --config file.

    Raises:
        ConfigError: one of the first three is missing, or a value is wrong.
    """
    from wsi_gradcam.executors import check_workers
    from wsi_gradcam.run.settings import make_settings

    values = flags.merge_config(arguments)
    run = {key: values.pop(key, None) for key in flags.RUN_KEYS}
    for key, flag in (("slide", "SLIDE"), ("model", "--model"), ("out", "--out")):
        if not run[key]:
            example = f"wsi-gradcam {arguments.command} slides/ --model oral-tumour --out results/"
            raise ConfigError(f"{flag} is missing; give it here or in the --config file, as in: {example}")
    settings = make_settings(**values)
    check_workers(run["workers"], run["scheduler"])
    slides, model, out = run.pop("slide"), run.pop("model"), run.pop("out")
    return slides, model, out, settings, run, {key: run.pop(key) or () for key in ("only", "skip")}


@contextmanager
def _reporting(quiet: bool) -> Iterator[Quiet]:
    """Return a listener that reports progress; errors after the work has begun become a `BrokenOffError`."""
    from wsi_gradcam.cli.terminal import progress

    with progress(quiet) as listener:
        try:
            yield listener
        except StoppedError:
            raise
        except WsiGradcamError as error:
            if not listener.began:
                raise
            raise BrokenOffError(one_line(error)) from error


def _demo(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.cli.output import print_agreement, print_audit, print_outcome, print_results
    from wsi_gradcam.demo import run as demo

    started, out = time.monotonic(), Path(arguments.out)
    if arguments.slide is not None:
        example = demo.given_example(Path(arguments.slide), out)
    else:
        say("laying out a slide of real tissue ...")
        example = demo.make_ihc_example(out) if arguments.stain == "ihc" else demo.make_he_example(out)
    with _reporting(quiet=False) as listener:
        outcome = demo.explain_example(example, arguments.workers, arguments.mpp, listener)
    print_outcome(outcome, as_json=False)
    if outcome.failed:
        return SOME_FAILED
    slide = example.out.slide(outcome.records[0].slide.id)
    if example.outlines is not None:
        say("", "a brief audit:")
        print_audit(demo.audit_example(example), (), as_json=False)
    print_results(example.out, slide)
    if (agreement := demo.agreement(slide, example)) is not None:
        print_agreement(agreement)
    say("", f"total time: {time.monotonic() - started:.0f} s")
    return DONE


def _validate(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.cli.output import print_validation
    from wsi_gradcam.results.validation import check

    validation = check(arguments.out, remote_slides=arguments.remote_slides)
    print_validation(arguments.out, validation, arguments.json)
    return SOME_FAILED if validation.findings else DONE


def _status(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.run.status import observe, shown

    before = None
    for seen in observe(arguments.out, arguments.watch):
        text = json.dumps(seen.to_json()) if arguments.json else shown(seen)
        if text != before:
            say(*text.split("\n"))
        before = text
    return DONE if seen.is_well else SOME_FAILED


def _audit(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.audit.plan import AuditSettings
    from wsi_gradcam.audit.running import audit_run
    from wsi_gradcam.cli.output import print_audit, questions_to_fail_on

    settings = [field.name for field in fields(AuditSettings)]
    options = given(arguments, *settings, "model", "against", "workers", "scheduler", "wait_for_workers")
    if "only" in options:
        options["only"] = split(options["only"])
    switches = {name: getattr(arguments, name) for name in ("overwrite", "trust_code", "remote_slides")}
    fail_on = None if arguments.fail_on is None else questions_to_fail_on(split(arguments.fail_on))
    with _reporting(arguments.json) as listener:
        outcome = audit_run(arguments.out, listener=listener, **options, **switches)
    failures = [] if fail_on is None else outcome.metrics.failed(fail_on)
    print_audit(outcome, failures, arguments.json)
    return SOME_FAILED if outcome.failed or failures else DONE


def _card(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.card import write_card

    switches = {name: getattr(arguments, name) for name in ("overwrite", "trust_code")}
    say(*write_card(arguments.model, arguments.out, arguments.dest, **switches))
    return DONE


def _evidence(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.cli.output import run_evidence

    with _reporting(arguments.json) as listener:
        return run_evidence(arguments, listener)


def _export(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.cli.output import parse_window, print_exported, print_window_progress
    from wsi_gradcam.export import export
    from wsi_gradcam.results.run import open_result

    names = ("channel", "colormap", "window", "threshold", "alpha", "size", "overwrite", "frame", "dicom_attributes")
    options = given(arguments, *names, "remote_slides", "min_area", "simplify")
    if "channel" in options:
        options["channel"] = tuple(options["channel"])
    if "," in options.get("window", ""):
        options["window"] = parse_window(options["window"])
    if arguments.dest is None and "://" in arguments.out:
        raise ConfigError(f"{arguments.out}: exports are written to a local folder; choose one with --dest")
    dest = Path(arguments.out) / "exports" if arguments.dest is None else Path(arguments.dest)
    listeners = (None, None) if arguments.json else (print_exported, print_window_progress)
    result = open_result(arguments.out)
    try:
        done = export(result, arguments.to, dest, arguments.slide, *listeners, **options)
    except StoreError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno not in NO_PLACE:
            raise BrokenOffError(one_line(error)) from error
        raise
    if arguments.json:
        print(json.dumps([{**each.__dict__, "paths": [str(path) for path in each.paths]} for each in done]))
    return SOME_FAILED if any(each.error for each in done) else DONE


def _view(arguments: argparse.Namespace) -> int:
    with from_extra("viewer", "wsi-gradcam view"):
        from wsi_gradcam.viewer.app import view

    names = ("host", "port", "slides", "annotations", "mask_frame", "read_only", "token", "allow_host", "remote_slides")
    view(
        arguments.out,
        arguments.second,
        **{name: getattr(arguments, name) for name in names},
        isolate=arguments.isolate,
        tls=None if arguments.tls is None else tuple(arguments.tls),
        browse=arguments.open,
        announce=say,
    )
    return DONE


def _info(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.cli.output import mask_info, model_info, result_info, slide_info

    if not arguments.slide and not arguments.model:
        raise ConfigError("nothing to describe; give slide files, results, or --model")
    found = [result_info(path) or slide_info(path) for path in arguments.slide]
    if arguments.mask_out:
        if len(found) != 1:
            raise ConfigError(f"--mask-out makes a picture of one slide, but {len(found)} are given")
        values = flags.parse_text(given(arguments, *flags.MASK_SETTINGS))
        found[0] |= mask_info(arguments.slide[0], arguments.mask_out, values)
    if arguments.model:
        found.append(model_info(arguments.model, arguments.layer, arguments.trust_code))
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        for number, item in enumerate(found):
            say(*[""] * bool(number), *(f"{key:>16}  {value}" for key, value in item.items()))
    return DONE


def _doctor(arguments: argparse.Namespace) -> int:
    from wsi_gradcam.doctor import FAIL, format_check, worst
    from wsi_gradcam.doctor.checks import examine

    checks = []
    for check in examine(arguments.out, arguments.scheduler, arguments.model, trust_code=arguments.trust_code):
        checks.append(check)
        if not arguments.json:
            say(format_check(check))
    if arguments.json:
        print(json.dumps({"status": worst(checks), "checks": [check.__dict__ for check in checks]}))
    return SOME_FAILED if worst(checks) == FAIL else DONE


COMMANDS = {
    "demo": Command(
        "explain and audit an example slide with a bundled model",
        flags.add_demo,
        _demo,
        usage="[SLIDE] [options]",
        description="Explain and audit a slide of real tissue with a bundled model, in half a minute.",
        examples=("wsi-gradcam demo", "wsi-gradcam demo my-slide.svs --out my-demo/"),
        works=True,
        stoppable=True,
    ),
    "explain": Command(
        "compute heatmaps of what a model looks at",
        flags.add_explain,
        _explain,
        usage="SLIDE... --model MODEL --out PATH [options]",
        description="Compute heatmaps of what a model looks at, and a table of patches, for slides.",
        examples=(
            "wsi-gradcam explain slides/ --model oral-tumour --target tumour --out results/",
            "wsi-gradcam explain 'all/**/*.svs' --model my.yaml --out results/ --workers 4",
        ),
        works=True,
        stoppable=True,
    ),
    "audit": Command(
        "test whether the explanations can be believed",
        flags.add_audit,
        _audit,
        usage="OUT [options]",
        description="Test whether the explanations of a run can be believed, and write a report.",
        examples=(
            "wsi-gradcam audit results/",
            "wsi-gradcam audit results/ --target tumour --annotations drawn/ --fail-on any",
        ),
        works=True,
        stoppable=True,
    ),
    "evidence": Command(
        "show what the model looks at, across the archive",
        flags.add_evidence,
        _evidence,
        "OUT [options]",
        "Sort what the model looks at, across all slides of a run, and write a report.",
        ("wsi-gradcam evidence results/", "wsi-gradcam evidence results/ --target tumour --fail-on shortcut"),
        works=True,
        stoppable=True,
    ),
    "view": Command(
        "show results over their slides in a browser",
        flags.add_view,
        _view,
        usage="OUT [options]",
        description="Show results over their slides in a browser, offline.",
        examples=("wsi-gradcam view results/ --open", "wsi-gradcam view results/ --slides /moved/slides --port 0"),
    ),
    "card": Command(
        "write a model card from a run and its audit",
        flags.add_card,
        _card,
        usage="MODEL OUT [options]",
        description="Write a model card as Markdown and HTML from a run and its audit.",
        examples=(
            "wsi-gradcam card my-model.yaml results/",
            "wsi-gradcam card oral-tumour results/ --dest supplement/ --overwrite",
        ),
        works=True,
    ),
    "export": Command(
        "write results in the formats of other programs",
        flags.add_export,
        _export,
        usage="OUT --to FORMAT [options]",
        description="Write results in the formats of other programs.",
        examples=(
            "wsi-gradcam export results/ --to qupath",
            "wsi-gradcam export results/ --to png --size 4000 --slide a.svs",
        ),
        works=True,
    ),
    "status": Command(
        "show the progress of a run or an audit",
        flags.add_status,
        _status,
        usage="OUT [options]",
        description="Show the progress of a run or an audit, from any machine that sees its folder.",
        examples=("wsi-gradcam status results/", "wsi-gradcam status results/ --watch"),
    ),
    "info": Command(
        "describe slides, models and results",
        flags.add_info,
        _info,
        usage="[SLIDE_OR_OUT...] [options]",
        description="Describe slides, folders of slides, models and results.",
        examples=("wsi-gradcam info slide.svs --mask-out tissue.png", "wsi-gradcam info --model my-model.yaml"),
    ),
    "validate": Command(
        "check that results are complete and undamaged",
        flags.add_validate,
        _validate,
        usage="OUT [options]",
        description="Check results against their manifest, the OME-Zarr format and their slides.",
        examples=("wsi-gradcam validate results/", "wsi-gradcam validate s3://bucket/results --json"),
    ),
    "encode": Command(
        "compute features for slide-level models",
        flags.add_encode,
        _encode,
        usage="SLIDE... --model MODEL --out PATH [options]",
        description="Compute features of patches, for slide-level models and other programs.",
        examples=(
            "wsi-gradcam encode slides/ --model slide-model.yaml --out features/",
            "wsi-gradcam encode slides/ --model timm:resnet50 --patch-mpp 0.5 --out out/",
        ),
        works=True,
        stoppable=True,
    ),
    "doctor": Command(
        "test this machine, a folder for results, and a cluster",
        flags.add_doctor,
        _doctor,
        usage="[options]",
        description="Test this machine, a folder for results, a model, and the workers of a cluster.",
        examples=(
            "wsi-gradcam doctor --out results/",
            "wsi-gradcam doctor --scheduler tcp://host:8786 --out results/",
        ),
    ),
}


if __name__ == "__main__":
    sys.exit(main())
