"""The command line: `kdbench COMMAND ...`. Commands are the modules of kdbench/commands, imported when called."""

from __future__ import annotations

import argparse
import ast
import errno
import functools
import importlib
import io
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kdbench import __version__, world
from kdbench.errors import UserError, in_your_code, nearest, printable, told, traced

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_COMMANDS = Path(__file__).parent / "commands"


def main() -> int:
    """Run the command line in sys.argv. Returns the exit code; the only place where errors become messages."""
    _allow_lazy_help()
    _steady_streams()
    try:
        _stop_in_order()
        world.join()
        if not world.first():
            _stay_silent()
        folder = _current_folder()
        if folder not in sys.path:
            sys.path.append(folder)  # a user's own `_target_` modules: a console script has no cwd on its path
        code = int(_chosen(sys.argv[1:])() or 0)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        return _exit_code(stop)
    except KeyboardInterrupt as stop:
        return _stopped(stop)
    except Exception as error:
        return _report(error)


def _stop_in_order() -> None:
    """A terminal that hangs up, and whoever ends the process in an orderly way, stop it as Ctrl-C does. One that comes
    twice at once counts once.

    Who started it may have chosen otherwise: nohup ignores a hang-up, submitit saves at a signal.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # Python lets no other thread choose
    stop = _Stop()
    for number in (getattr(signal, name, None) for name in ("SIGHUP", "SIGTERM", "SIGINT")):  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)


def _stay_silent() -> None:
    """What all processes of a training would say, the first one says."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    logging.disable()
    warnings.simplefilter("ignore")


class _Stop:
    """What a signal does: it stops the work, unless an earlier one did a moment ago.

    Ctrl-C comes twice where a launcher (uv run, a shell's script) passes on what the terminal has sent to all. The
    second one would fall into what the first one has begun: files that were put off are being written.
    """

    AGAIN = 1.0  # seconds after which it is meant as another one

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last = clock, -math.inf

    def __call__(self, number: int, _frame: object) -> None:
        now = self._clock()
        if now - self._last >= self.AGAIN:
            self._last = now
            raise KeyboardInterrupt(number)


def _stopped(stop: KeyboardInterrupt) -> int:
    """Say that the work was stopped and how it goes on, in the run's own log too; the exit code that shells expect."""
    number = signal.Signals(stop.args[0]) if stop.args else signal.SIGINT
    why = "" if number == signal.SIGINT else f" by {number.name}"
    said = f"stopped{why}. The same command goes on from the last complete epoch."
    _say(f"\nkdbench: {said}")
    if why and (log := logging.getLogger("kdbench.failure")).handlers:  # nobody may be there to read the console
        log.error("%s", said)
    return 128 + number


class _Outlet(io.FileIO):
    """A stream whose reader may go away (`kdbench train | head`, a terminal's window): what comes then is dropped, and
    the work goes on."""

    def write(self, data: ReadableBuffer) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                where = {1: "standard output", 2: "standard error"}.get(self.fileno(), "a standard stream")
                raise OSError(error.errno, os.strerror(error.errno or 0), where) from error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return memoryview(data).nbytes


def _steady_streams() -> None:
    """Standard streams that end no training: closed ones lead nowhere, and characters that a console lacks become ?.

    A log file that cannot be written (a full disk) is no traceback a line: the message at the end says what is wrong.
    """
    logging.raiseExceptions = False
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed: the next file that is opened would get its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
        elif name != "stdin" and stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            if os.name == "nt" and stream.isatty():  # a console there takes UTF-16 by a call of its own
                stream.reconfigure(errors="replace")
                continue
            raw = _Outlet(stream.fileno(), "w", closefd=False)
            outlet: Any = raw if stream.write_through else io.BufferedWriter(raw)  # python -u: nothing is kept back
            steady = io.TextIOWrapper(outlet, stream.encoding, "replace")
            steady.reconfigure(line_buffering=stream.line_buffering, write_through=stream.write_through)
            setattr(sys, name, steady)


def _current_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the current folder is not there any more: change to one that is") from error


def commands() -> dict[str, Path]:
    """Every command and its module. A new command is a new file: nothing else to edit."""
    files = sorted(_COMMANDS.glob("*.py"))
    return {file.stem.replace("_", "-"): file for file in files if not file.stem.startswith("_")}


def purpose(module: Path) -> str:
    """The first line of a module's docstring, read without importing it."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def _chosen(arguments: list[str]) -> Callable[[], int | None]:
    """What the command line asks for, ready to be called; sys.argv is then the command's own."""
    known = commands()
    first = arguments[0] if arguments else "--help"
    if first in ("-sc", "--shell-completion"):
        return _completion(arguments, known)
    if first in ("-h", "--help", "help"):
        return functools.partial(_print, _usage(known), 0 if arguments else 2)
    if first in ("-V", "--version", "version"):
        return functools.partial(_print, f"kdbench {__version__}", 0)
    if first not in known:
        raise UserError(_unknown(arguments, known))
    if first != "train":
        world.refuse_several("command", first, "train is what they do together")
    return _command(first, arguments[1:], known)


def _command(command: str, arguments: list[str], known: dict[str, Path]) -> Callable[[], int | None]:
    sys.argv = [sys.argv[0], *arguments]
    main: Callable[[], int | None] = _module(command, known).main
    return main


def _print(text: str, code: int) -> int:
    print(text)
    return code


def _module(command: str, known: dict[str, Path]) -> ModuleType:
    return importlib.import_module(f"kdbench.commands.{known[command].stem}")


def _usage(known: dict[str, Path]) -> str:
    width = max(map(len, known))
    listed = "\n".join(f"  {name:<{width}}  {purpose(module)}" for name, module in known.items())
    return f"""kdbench {__version__}: knowledge distillation experiments from composable configs

usage: kdbench COMMAND ...     (kdbench COMMAND --help says more)

{listed}

examples:
  kdbench train                                          # small built-in data, a teacher, a student: about a minute
  kdbench train loss=dkd student=resnet8 schedule.epochs=60
  kdbench train -m loss=kl loss.tau=1,2,4 seed=0,1,2     # a sweep: nine runs
  kdbench list loss                                      # what can be chosen
  kdbench compare outputs/runs                           # one table of all runs

tab completion: eval "$(kdbench -sc install=bash)"       (or zsh, fish)"""


def _unknown(arguments: list[str], known: dict[str, Path]) -> str:
    first, line = arguments[0], " ".join(arguments)
    if "=" in first or first in ("-m", "--multirun", "-c", "--cfg", "--info", "-i") or first.startswith("--config"):
        return f"no command given. Did you mean: kdbench train {line}"
    hint = nearest(first, known, "Did you mean: kdbench {}? ")
    return f"there is no command '{first}'. {hint}Commands: {', '.join(known)}"


def _completion(arguments: list[str], known: dict[str, Path]) -> Callable[[], int | None]:
    """Tab completion: commands here, then Hydra's completion of overrides for the commands that take them.

    The shell's hook calls `kdbench -sc query=bash` with the line so far in COMP_LINE.
    """
    if not any(argument.startswith("query=") for argument in arguments):
        return _command("train", arguments, known)  # install, uninstall
    line = os.environ.get("COMP_LINE", "")
    typed = line.split()
    if len(typed) < 2 or (len(typed) == 2 and not line.endswith(" ")):
        return functools.partial(_print, " ".join(known), 0)
    command = typed[1]
    if command not in known or not getattr(_module(command, known), "TAKES_KEYS", False):
        return int
    os.environ["COMP_LINE"] = typed[0] + line[line.index(command) + len(command) :]
    return _command(command, arguments, known)


def _report(error: Exception) -> int:
    """Print an error; returns the exit code. What is no UserError is a fault of the program."""
    if traced():
        traceback.print_exception(error)
    if isinstance(error, (UserError, OSError)):  # OSError: a full disk, a folder that may not be written
        _say(printable(f"kdbench: {_of_system(error) if isinstance(error, OSError) else error}"))
        return 1
    hint = "With KDBENCH_TRACEBACK=1 the same command shows where it did."
    said = told(error)
    if not in_your_code(error):
        said, hint = f"unexpected {said}", f"This should not happen. {hint}"
    if _is_memory(error):
        said = said.replace(type(error).__name__, "out of memory", 1).removeprefix("unexpected ")
        hint = "Smaller batches take less (schedule.batch_size, trainer.accumulate)."
    _say(f"{printable(f'kdbench: {said}')}\n{hint}")
    return 1


def _of_system(error: OSError) -> str:
    """What the system says of a file: the file first, without the error's number."""
    if error.filename is None or error.strerror is None:
        return str(error)
    files = " -> ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if name)
    kind = isinstance(error, (FileExistsError, NotADirectoryError))
    said = f"a file stands where a folder has to be ({error.strerror})" if kind else error.strerror
    return f"{files}: {said}"


def _is_memory(error: Exception) -> bool:
    """Whether the machine or the GPU had too little memory; torch, which may not be loaded, has no type for a CPU's."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _say(text: str) -> None:
    """Print a message that ends the command, unless another process of the same training has done so."""
    if world.is_new(text):
        print(text, file=sys.stderr)


def _exit_code(stop: SystemExit) -> int:
    if isinstance(stop.code, str):
        print(stop.code, file=sys.stderr)
        return 1
    return int(stop.code or 0)


def _allow_lazy_help() -> None:
    """Python 3.14's argparse refuses help texts that are no strings; Hydra 1.3 has one, made when it is shown."""
    check = getattr(argparse.ArgumentParser, "_check_help", None)
    if check and not hasattr(check, "lenient"):

        def lenient(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
            if isinstance(action.help, str):
                check(parser, action)

        lenient.lenient = True  # type: ignore[attr-defined]
        argparse.ArgumentParser._check_help = lenient  # type: ignore[attr-defined]
