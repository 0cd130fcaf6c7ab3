"""Files that are whole or not there, and JSON: everything that a run keeps is written through here."""

from __future__ import annotations

import errno
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kdbench import world
from kdbench.errors import UserError

log = logging.getLogger(__name__)

_TEMPORARY = ".tmp"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place.

    A process killed at any moment leaves the old file or the new one, never a half. Of several processes of one
    training the first writes. Raises OSError naming `path` (a full disk, a quota, a forbidden folder), and
    UserError for a device, a pipe or a folder there: a rename would put a file in its place.
    """
    if not world.first():
        return
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is there already, and is no file: write elsewhere")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with naming(path):
            write(temporary)
            with open(temporary, "r+b") as file:  # Windows syncs only what may be written
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=False, allow_nan=True) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Raises UserError naming the file if it is missing or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:  # bytes that are no text, text that is no JSON, [[[[...
        raise UserError(f"{path}: not a readable JSON file ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises UserError naming the file if it is missing or holds anything else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged: it must hold a JSON object, not {type(found).__name__}")
    return found


def in_bytes(size: float) -> str:
    """A size in words: "3.2 GB"."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def on_disk(path: Path) -> int:
    """Bytes that a file takes; a sparse one fewer than its size, but on Windows, which does not say."""
    status = path.stat()
    return getattr(status, "st_blocks", -(-status.st_size // 512)) * 512


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError say which of our files it is about, and a full disk what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
        hint = "; with room again, the same command goes on from the last checkpoint" if full else ""
        raise OSError(error.errno, f"{os.strerror(error.errno)}{hint}", str(path)) from error


def lock(path: Path | str, wait: float = -1.0) -> AbstractContextManager[object]:
    """A lock that one process at a time holds, on any machine; it raises filelock.Timeout after `wait` seconds (-1:
    never).

    Where a file system has no locks a warning says so once, and there is none: two processes would not see each other.
    """
    why = _lacks_locks(Path(path).parent)
    return nullcontext() if why else FileLock(path, timeout=wait)


def is_locked(path: Path) -> bool:
    """Whether some process holds a lock."""
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # no right to look, or no locks
        return False


_lockless: dict[int, str] = {}  # by device: why it has no locks; "" for one that has


def _lacks_locks(folder: Path) -> str:
    """Why the file system of a folder gives no locks; "" if it does, or if that cannot be tried."""
    if os.name != "posix":
        return ""
    import fcntl

    device = folder.stat().st_dev if folder.is_dir() else -1
    if device != -1 and device not in _lockless:
        try:
            # Without a name where that can be had: nothing of it is left by a kill.
            with tempfile.TemporaryFile(dir=folder, prefix=".probe.", suffix=_TEMPORARY) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _lockless[device] = ""
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
                return ""  # a folder that may not be written, a full disk
            _lockless[device] = os.strerror(error.errno or 0)
            log.warning(
                "%s: its file system gives no locks (%s): let one process at a time work in it; two would train the "
                "same run", folder, _lockless[device],
            )  # fmt: skip
    return _lockless.get(device, "")


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove the temporary files of writes that a kill cut short, but those of processes that are still there.

    For whoever has just got the folder's lock: a file of this process's own number is an earlier process's.
    """
    for path in folder.glob(f".{name}.*{_TEMPORARY}"):
        number = path.name.removesuffix(_TEMPORARY).rpartition(".")[2]
        if number.isdecimal() and (int(number) == os.getpid() or not _alive(int(number))):
            with suppress(OSError):  # Windows keeps a file that another process has open
                path.unlink()


def _alive(process: int) -> bool:
    if os.name != "posix":  # there a signal of 0 is no question; the system itself keeps open files from being removed
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True
