"""The folder of a profile: written aside and put in its place when it is whole."""

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd
import psutil

from fwpkm_bench.errors import UsageError
from fwpkm_bench.store import write_atomically

PROFILE = "profile.json"
UNFINISHED = ".unfinished"
PHASES, CASE, PARTS = "phases.csv", "case.csv", "parts.csv"
TRACE, OPERATORS = "trace.json.gz", "operators.csv"
MEMORY, MEMORY_SPLIT, SNAPSHOT = "memory.csv", "memory_split.csv", "allocator.json.gz"
SPEEDSCOPE, FLAMES, HOST = "host.speedscope.json", "host.svg", "host.csv"
KERNELS = "kernels.csv"


class ProfileFolder:
    """A context manager; ``work`` is where to write, `keep` puts that in the place of ``path``.

    Raises:
        UsageError: ``path`` holds something that is no profile, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path.parent / f".{path.name}.{os.getpid()}{UNFINISHED}"

    def __enter__(self) -> Self:
        taken = self.path.exists() or self.path.is_symlink()
        if taken and not (self.path.is_dir() and is_replaceable(self.path)):
            raise UsageError(f"{self.path} is not empty and holds no profile; choose another --out")
        self._clear_up()
        try:
            self.work.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"cannot write to {self.path}: {error.strerror}; choose another --out") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def _clear_up(self) -> None:
        """Remove what processes that were killed have left."""
        for path in self.path.parent.glob(f".{self.path.name}.*{UNFINISHED}"):
            number = path.name.removesuffix(UNFINISHED).rpartition(".")[2]
            if number.isdecimal() and not psutil.pid_exists(int(number)):
                shutil.rmtree(path, ignore_errors=True)

    def keep(self) -> None:
        """What was written takes the place of an earlier profile there."""
        old = self.work.with_suffix(".old")
        if self.path.exists():
            self.path.replace(old)
        self.work.replace(self.path)
        shutil.rmtree(old, ignore_errors=True)


def is_replaceable(path: Path) -> bool:
    """Whether the folder ``path`` is empty or a profile."""
    return not any(path.iterdir()) or (path / PROFILE).is_file()


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """``rows`` as a tidy table; what does not apply is empty, and whole numbers stay whole."""
    write_atomically(path, pd.DataFrame(rows).convert_dtypes().to_csv(index=False))


def read_table(path: Path) -> pd.DataFrame:
    """The table ``path``."""
    return pd.read_csv(path)


def write_profile(folder: Path, content: dict[str, Any]) -> None:
    """Write ``profile.json``: by it a folder is known as a profile."""
    write_atomically(folder / PROFILE, json.dumps(content, indent=2) + "\n")


def read_profile(folder: Path) -> dict[str, Any]:
    """What `write_profile` wrote."""
    content: dict[str, Any] = json.loads((folder / PROFILE).read_text(encoding="utf-8"))
    return content
