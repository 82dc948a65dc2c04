"""The flags of all commands: those that users know, those derived from the settings, and what their values become."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from typing import get_type_hints

import pytest

from tests.runs import ROOT
from wsi_gradcam.audit.plan import AuditSettings
from wsi_gradcam.audit.schema import QUESTIONS
from wsi_gradcam.cli.flags import GROUPS, HOW, READING, RESUME, SLIDE_LEVEL, WHAT, WHERE, parse_text
from wsi_gradcam.cli.main import COMMANDS, make_parser
from wsi_gradcam.errors import ConfigError
from wsi_gradcam.export import FORMATS
from wsi_gradcam.run.settings import Settings, make_settings

# Scripts of users rely on these. New ones may be added.
KNOWN = {
    "explain": "slide --model --out --target --method --layer --mpp --replace-mpp --patch-mpp --patch-px --overlap "
    "--stride-px --min-tissue --tissue --mask --include --exclude --heatmap-stride --window --batch-size "
    "--span-patches --device --engine --precision --reader --trust-objective --reader-threads --torch-threads "
    "--max-unreadable --only --skip --config --workers --scheduler --wait-for-workers --dry-run --overwrite "
    "--retry-failed --log-tasks --json",
    "demo": "slide --out --mpp --workers",
    "validate": "out --json",
    "status": "out --watch --json",
    "audit": "out --patches --seed --only --target --annotations --include --regions --model --against --fail-on "
    "--workers --scheduler --wait-for-workers --overwrite --json",
    "evidence": "out --places --seed --target --annotations --regions --skip-labels --model --against --fail-on "
    "--workers --scheduler --wait-for-workers --overwrite --json",
    "export": "out --to --dest --slide --channel --colormap --window --threshold --alpha --size --overwrite --json",
    "view": "out --port --host --slides --token --allow-host --open --no-isolate",
    "info": "slide --model --layer --mask-out --mpp --replace-mpp --tissue --mask --include --exclude --json",
    "doctor": "--out --scheduler --model --json",
}


def parsed(*arguments: str) -> argparse.Namespace:
    return make_parser(arguments).parse_args(arguments)


def help_of(command: str) -> str:
    """The help of a command on one line."""
    done = subprocess.run(
        [sys.executable, "-m", "wsi_gradcam.cli", command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return " ".join(done.stdout.split())


def arguments_of(command: str) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False)
    COMMANDS[command].add_arguments(parser)
    return [action.option_strings[0] if action.option_strings else action.dest for action in parser._actions]


@pytest.mark.parametrize("command", KNOWN)
def test_known_flags_are_kept(command: str) -> None:
    assert set(KNOWN[command].split()) <= set(arguments_of(command))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_description_two_examples_that_parse_and_a_short_usage(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    known = COMMANDS[command]
    assert known.description.endswith(".")
    assert known.help[0].islower()
    assert len(known.examples) == 2
    for example in known.examples:
        program, *arguments = shlex.split(example)
        assert program == "wsi-gradcam"
        assert arguments[0] == command
        assert parsed(*arguments).command == command
    (subparsers,) = (a for a in make_parser([command])._actions if isinstance(a, argparse._SubParsersAction))
    text = subparsers.choices[command].format_help()
    usage, _, rest = text.partition("\n\n")
    assert "\n" not in usage
    assert rest.startswith(known.description)
    assert text.endswith("".join(f"  {example}\n" for example in known.examples))
    assert max(map(len, text.splitlines())) <= 80


def test_flags_of_explain_are_in_groups_the_common_ones_first() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    COMMANDS["explain"].add_arguments(parser)
    groups = {
        group.title: [
            action.option_strings[0] if action.option_strings else action.dest for action in group._group_actions
        ]
        for group in parser._action_groups
        if group._group_actions
    }
    assert list(groups) == [WHAT, HOW, SLIDE_LEVEL, READING, WHERE, RESUME]  # none is left for the rest
    assert groups[WHAT][:4] == ["slide", "--model", "--out", "--target"]
    assert groups[HOW][:3] == ["--method", "--layer", "--overlap"]
    assert groups[READING][0] == "--mpp"
    assert {"--device", "--workers", "--scheduler"} <= set(groups[WHERE])
    assert groups[RESUME][:3] == ["--dry-run", "--overwrite", "--retry-failed"]
    assert set().union(*GROUPS.values()) == set(Settings.model_fields)


def test_every_setting_is_a_flag_with_a_description() -> None:
    flags = arguments_of("explain")
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in flags
        assert field.description


def test_every_setting_of_an_audit_is_a_flag_with_its_description() -> None:
    flags, text = arguments_of("audit"), help_of("audit")
    for name, hint in get_type_hints(AuditSettings, include_extras=True).items():
        (described,) = hint.__metadata__
        assert f"--{name.replace('_', '-')}" in flags
        assert described.description.partition("`")[0].strip() in text


def test_help_tells_defaults_choices_and_flags() -> None:
    text = help_of("explain")
    assert "instead of --overlap: patch pixels from one patch to the next" in text
    assert "--tissue {auto,with-pen,everything}" in text
    assert "a smaller share of tissue (default 0.1)" in text
    assert "0 to below 1 (default 0) " in text
    assert "several are joined by commas (default gradcam)" in text
    assert "(default False)" not in text
    assert "`" not in text


def test_help_names_every_question_and_every_format() -> None:
    assert f"answer only some of {', '.join(QUESTIONS)}" in help_of("audit")
    listed = f"{', '.join(FORMATS)}; docs/exports.md"
    assert listed.replace(" ", "") in help_of("export").replace(" ", "")  # lines may end at a hyphen


def test_values_become_settings() -> None:
    given = parsed(
        "explain",
        "a.svs",
        "--target",
        "x",
        "--target",
        "y",
        "--method",
        "gradcam, hirescam",
        "--include",
        "p",
        "q",
        "--overlap",
        "0.5",
        "--batch-size",
        "auto",
        "--replace-mpp",
        "--patch-px",
        "96,64",
        "--mpp",
        "0.5",
    )
    values = {name: value for name in Settings.model_fields if (value := getattr(given, name)) is not None}
    settings = make_settings(**parse_text(values))
    assert settings == make_settings(
        target=("x", "y"),
        method=("gradcam", "hirescam"),
        include=("p", "q"),
        overlap=0.5,
        batch_size="auto",
        replace_mpp=True,
        patch_px=(96, 64),
        mpp=(0.5, 0.5),
    )


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ({"batch_size": "8"}, {"batch_size": 8}),
        ({"batch_size": "auto"}, {"batch_size": "auto"}),
        ({"patch_px": "96"}, {"patch_px": (96, 96)}),
        ({"mpp": "0.25,0.3"}, {"mpp": (0.25, 0.3)}),
        ({"layer": "12", "device": "0"}, {"layer": "12", "device": "0"}),
        ({"slide": "1", "mpp": 0.5}, {"slide": "1", "mpp": 0.5}),
    ],
)
def test_text_becomes_numbers_where_a_setting_is_one(given: dict[str, object], becomes: dict[str, object]) -> None:
    assert parse_text(given) == becomes


@pytest.mark.parametrize(("name", "text"), [("mpp", "fine"), ("patch_px", "2.5"), ("patch_px", "")])
def test_text_that_is_no_number_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"--{name.replace('_', '-')} is {text!r}, expected a number such as .*Y,X"):
        parse_text({name: text})


def test_choices_are_checked_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed("explain", "--window", "gauss")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: --window is 'gauss', expected one of hann, uniform\n"
