"""The command line: parses arguments, calls the package's public functions and prints what they return.

It may use every other room, and none uses it. `wsi-gradcam --help` and mistakes in arguments must be answered at once,
so `main` and `flags` import heavy modules only when a command needs them.
"""

from __future__ import annotations

import argparse
import atexit
import io
import logging
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from wsi_gradcam.errors import did_you_mean, printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

WRONG_USAGE = 2
NOT_WRITTEN = 1  # exit status if, say, standard output is on a full disk
MAX_HELP_COLUMNS = 100
PIPE_CLOSED = 128 + getattr(signal, "SIGPIPE", 13)  # like that of a program ended by the signal


def say(*lines: object, error: bool = False) -> None:
    """Print lines, as all commands do: whatever comes from a file or folder reaches the terminal as visible text."""
    stream = sys.stderr if error else sys.stdout
    if stream is not None:  # print would use the other one
        print("\n".join(printable(str(line)) for line in lines), file=stream, flush=True)


def given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the named arguments that were given."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def split(text: str) -> tuple[str, ...]:
    """Return the names in a comma-separated list."""
    return tuple(name.strip() for name in text.split(","))


def group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Return a group of flags, which the help shows below its title."""
    return parser.add_argument_group(title)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help whose examples keep their line breaks, with room for the names of flags, and at most 100 columns wide."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, MAX_HELP_COLUMNS) - 2
        super().__init__(prog, max_help_position=26, width=width)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line: what was given, what may be meant, and a command that works."""

    def error(self, message: str) -> NoReturn:
        """Print the error on one line, and exit."""
        words = self._unknown(message) or self._missing(message) or self._wrong_value(message) or message
        self.exit(WRONG_USAGE, printable(f"error: {words}") + "\n")

    def _unknown(self, message: str) -> str:
        """Return what is said of a command or flag that there is not; "" for any other mistake."""
        if found := re.match(r"argument COMMAND: invalid choice: '(.*)' \(choose from (.*)\)$", message, re.DOTALL):
            near = did_you_mean(found[1], _choices(found[2]))
            return f"{found[1]}: no such command; {near or 'expected one of ' + ', '.join(_choices(found[2]))}"
        if not (found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL)):
            return ""
        words, parser = found[1].split(" "), self._of_command()
        flag = next((word for word in words if word.startswith("-")), "").partition("=")[0]
        if not flag:
            return f"{words[0]}: one argument too many; expected {parser.format_usage().partition(': ')[2].strip()}"
        near = did_you_mean(flag, _flags_of(parser), cutoff=0.7)
        return f"{flag}: no such flag; {near or f'see {parser.prog} --help'}"

    def _missing(self, message: str) -> str:
        """Return what is said of arguments or values that are missing, or too many; "" for any other mistake."""
        if found := re.match(r"the following arguments are required: (.*)", message):
            names = [name if name.startswith("-") else name.upper() for name in found[1].split(", ")]
            are = "are" if len(names) > 1 else "is"
            more = f"; all commands: {self.prog} --help" if names == ["COMMAND"] else ""
            return f"{' and '.join(names)} {are} missing, as in: {self._example()}{more}"
        if found := re.match(r"argument (\S+): expected (?:at least )?one argument", message):
            shown = found[1] in self._example().split()
            return f"{found[1]} needs a value{f', as in: {self._example()}' if shown else f'; see {self.prog} --help'}"
        found = re.match(r"argument (\S+): not allowed with argument (\S+)", message)
        return f"{found[2]} and {found[1]} exclude each other; give one of them" if found else ""

    def _wrong_value(self, message: str) -> str:
        """Return what is said of a flag's value that cannot be; "" for any other mistake."""
        if found := re.match(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)$", message, re.DOTALL):
            near, choices = did_you_mean(found[2], _choices(found[3])), _choices(found[3])
            return f"{found[1]} is '{found[2]}', expected one of {', '.join(choices)}{near and '; ' + near}"
        found = re.match(r"argument (\S+): invalid (int|float) value: (.*)", message, re.DOTALL)
        return f"{found[1]} is {found[3]}, expected a {'whole ' * (found[2] == 'int')}number" if found else ""

    def _example(self) -> str:
        """Return the first of the examples that end the help."""
        return (self.epilog or "examples:\n").split("\n")[1].strip()

    def _of_command(self) -> argparse.ArgumentParser:
        """Return the parser of the command whose flags were made; this one if that is not clear."""
        made = [parser for parser in self._commands() if len(parser._actions) > 1]
        return made[0] if len(made) == 1 else self

    def _commands(self) -> list[argparse.ArgumentParser]:
        """Return the parsers of the commands below."""
        found = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return [parser for action in found for parser in action.choices.values()]


def _choices(text: str) -> list[str]:
    """Return the choices that a message of argparse lists, in quotes or without."""
    return [choice.strip("'") for choice in text.split(", ")]


def _flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """Return the long names of a parser's flags."""
    return [name for action in parser._actions for name in action.option_strings if name.startswith("--")]


def examples_text(lines: Sequence[str]) -> str:
    """Return the examples for the end of a help text, one per line."""
    return "\n".join(["examples:", *(f"  {line}" for line in lines)])


class PrintableFormatter(logging.Formatter):
    """Formats log records in the way `say` prints."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record on one line."""
        return printable(super().format(record))


class Outlet(io.FileIO):
    """Standard output or error; after its first failure, such as a closed pipe, nothing more is written to it.

    Work on slides then continues; if unread output makes the work `vain`, as for a command that only prints, it ends
    with the error.

    Attributes:
        error: the failure.
    """

    def __init__(self, descriptor: int, vain: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.vain = vain
        self.error: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write bytes; return how many have been handled.

        Raises:
            OSError: they cannot be written, for the first time, and the work is in vain.
        """
        if self.error is None:
            try:
                return super().write(data) or 0  # None comes from a full pipe that must not be waited for
            except OSError as error:
                self.error = error
                if self.vain:
                    raise
        return memoryview(data).nbytes


class Streams:
    """The standard streams of one of our processes: all exist, and the last output is written or given up."""

    def __init__(self) -> None:
        for descriptor in range(3):
            _opened(descriptor)
        self._out, self._error = Outlet(1, vain=True), Outlet(2, vain=False)

    def take(self) -> None:
        """Install our streams; if Python found none, reading gives nothing and what is written is lost."""
        if sys.stdin is None:
            sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115 - until the process ends
        if sys.stdout is None or sys.platform != "win32":  # whose consoles take characters, not bytes
            sys.stdout = _text(self._out, sys.stdout)
        if sys.stderr is None or sys.platform != "win32":
            sys.stderr = _text(self._error, sys.stderr, at_once=True)

    def work(self) -> None:
        """Let the command continue whatever happens to its output: it writes results."""
        self._out.vain = False

    @property
    def failed(self) -> OSError | None:
        """The failure of standard output, or else of standard error."""
        return self._out.error or self._error.error

    def status(self, status: int) -> int:
        """Return the exit status of a command that would end with this one, after reporting lost output."""
        self.work()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if self.failed is None:
            return status
        if isinstance(self.failed, BrokenPipeError):
            return status or PIPE_CLOSED
        say(f"error: cannot write to standard output: {self.failed.strerror}; redirect it elsewhere", error=True)
        return status or NOT_WRITTEN


def _opened(descriptor: int) -> None:
    """Make sure that a descriptor is open: otherwise the next file that is opened would receive what is printed."""
    try:
        os.fstat(descriptor)
    except OSError:
        with suppress(OSError):
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)


def _text(outlet: Outlet, before: Any, at_once: bool = False) -> io.TextIOWrapper:
    """Return a text stream in place of an outlet; characters that its encoding lacks are escaped."""
    at_once = at_once or outlet.isatty() or getattr(before, "write_through", False)  # PYTHONUNBUFFERED
    return io.TextIOWrapper(
        io.BufferedWriter(outlet),
        encoding=getattr(before, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=at_once,
    )


def leave(status: int) -> NoReturn:
    """End this process at once, after everything that is due at its end.

    The interpreter is not torn down: C++ libraries whose threads are still running then, or end with it, abort the
    process ("terminate called without an active exception"), and finished work would be reported as a crash.
    """
    with suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons, as Python does
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
