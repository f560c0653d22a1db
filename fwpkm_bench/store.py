"""The run folder: a journal that survives any death of the process, and what is derived from it."""

import json
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock

from fwpkm_bench.errors import UsageError

RUN = "run.json"
JOURNAL = "journal.jsonl"
TORN = "journal.torn"
LOCK = ".lock"
RUN_KEYS = {"digest", "command", "sweep", "environment"}
RECORD_KEYS = {"case_id", "case", "status", "reason", "columns", "elapsed_s"}


class RunFolder:
    """One folder, one sweep; a context manager that holds the folder's lock.

    Raises:
        UsageError: where the folder cannot be written, holds something else, another sweep, or is in use.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        self.digest = digest
        self._lock = filelock.FileLock(path / LOCK)
        self._journal: Any = None

    def __enter__(self) -> Self:
        made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to {self.path}: {error.strerror}; choose another --out") from None
        if not os.access(self.path, os.W_OK):
            raise UsageError(f"cannot write to {self.path}: permission denied; choose another --out")
        try:
            if not made:
                self._check_content()
            self._lock.acquire(
                timeout=0
            )  # the file stays: removing it would let two processes hold two locks
        except filelock.Timeout:
            raise UsageError(
                f"{self.path} is in use by another process; wait for it, or choose another --out"
            ) from None
        self.records = read_journal(self.path, mend=True)
        self._journal = (self.path / JOURNAL).open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()
        self._lock.release()

    def _check_content(self) -> None:
        if (self.path / RUN).exists():
            run = read_run(self.path)
            if run["digest"] != self.digest:
                raise UsageError(
                    f"{self.path} holds another sweep; give this one its own --name or --out, "
                    f"or run that one's command to finish it"
                )
        elif any(entry.name not in (LOCK, JOURNAL) for entry in self.path.iterdir()):
            raise UsageError(f"{self.path} is not empty and holds no run; choose another --out")

    def start(self, run: dict[str, Any]) -> None:
        """Write ``run.json``, unless the run is being resumed."""
        if not (self.path / RUN).exists():
            write_atomically(self.path / RUN, json.dumps({"digest": self.digest, **run}, indent=2) + "\n")

    def append(self, record: dict[str, Any]) -> None:
        """Add one finished attempt; it is on the disk when this returns."""
        self._journal.write(json.dumps(record) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self.records.append(record)


def read_run(path: Path) -> dict[str, Any]:
    """``run.json`` of the run folder ``path``."""
    try:
        run = json.loads((path / RUN).read_text(encoding="utf-8"))
        if not set(run) >= RUN_KEYS:
            raise ValueError(f"it lacks {', '.join(sorted(RUN_KEYS - set(run)))}")
        return run
    except FileNotFoundError:
        raise UsageError(f"{path} is no run folder: it has no {RUN}") from None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"cannot read {path / RUN}: {error}") from None


def read_journal(path: Path, *, mend: bool = False) -> list[dict[str, Any]]:
    """The finished attempts of the run folder ``path``, one a case: the last counts.

    A last line that was cut off while it was written is passed over; ``mend`` moves it to a file of its
    own, so that the journal can be appended to and the case run again.
    """
    journal = path / JOURNAL
    if not journal.exists():
        return []
    whole, newline, torn = journal.read_bytes().rpartition(b"\n")
    if torn and mend:
        with (path / TORN).open("ab") as file:
            file.write(torn + b"\n")
        with journal.open("r+b") as file:
            file.truncate(len(whole) + len(newline))
            os.fsync(file.fileno())
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            if not set(record) >= RECORD_KEYS:
                raise ValueError("not a record")
        except (ValueError, TypeError):
            raise UsageError(
                f"line {number} of {journal} is damaged; remove that line and run again"
            ) from None
        records[record["case_id"]] = record
    return list(records.values())


def write_atomically(path: Path, text: str) -> None:
    """Replace the file ``path``: readers see the old text or the new, whenever this process dies."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
