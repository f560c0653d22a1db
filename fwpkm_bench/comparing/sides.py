"""The two sides of a comparison: a copy of a checkout each, or the layers at hand, with settings.

A copy is made once and outside the repository, so that what is edited or committed meanwhile changes
nothing. Of a copy only ``layers`` and ``fwpkm_bench/kernels`` run: the tool that measures is the same.
"""

import io
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fwpkm_bench.errors import UsageError, choose
from fwpkm_bench.spec import Value

WORKING_TREE = "working tree"
LARGEST_NEW_BYTES = 16 * 2**20  # of an untracked file
MEASURED = ("layers", "fwpkm_bench/kernels")  # the parts of a checkout that a side takes part with


@dataclass(frozen=True)
class Side:
    """What runs: the layers of ``root`` (those of this tool where it is None) with settings of its own.

    ``root`` is a copy of ``repository``; ``package`` is a folder to be searched before the tool's own for
    ``layers`` and ``kernels``.
    """

    name: str  # "A" or "B"
    label: str
    repository: Path | None = None
    root: Path | None = None
    package: Path | None = None
    commit: str | None = None
    dirty: bool = False
    backend: str | None = None
    settings: dict[str, tuple[Value, ...]] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """For ``comparison.json``."""
        changed = {name: value for name, (value, *_) in self.settings.items()}
        return {
            "label": self.label,
            "commit": self.commit,
            "dirty": self.dirty,
            "backend": self.backend,
            "settings": changed,
        }


def find_repository() -> Path:
    """The checkout that the user stands in, or else the one that this tool runs from.

    Raises:
        UsageError: neither is a git checkout.
    """
    for start in (Path.cwd(), Path(__file__).resolve().parents[2]):
        try:
            return Path(_git(start, "rev-parse", "--show-toplevel").strip())
        except (OSError, subprocess.CalledProcessError):
            continue
    raise UsageError(
        "git refs are compared in a git checkout; stand in one, or give --a and --b, or two runs"
    )


def export(repository: Path, ref: str | None, name: str, into: Path) -> Side:
    """A side from a copy of ``ref``, or of the working tree where it is None, in the folder ``into``.

    Raises:
        UsageError: no commit is called ``ref``.
    """
    root = into / name
    commit = _commit(repository, ref or "HEAD")
    dirty = ref is None and bool(_git(repository, "status", "--porcelain"))
    if ref is None:
        _copy_working_tree(repository, root)
    else:
        archive = _run("git", "-C", str(repository), "archive", "--format=tar", commit).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(root, filter=_harmless)
    package = into / f"{name}-package"
    package.mkdir()
    for part in MEASURED:
        if (root / part).is_dir():
            (package / Path(part).name).symlink_to(root / part)
    said = f"{WORKING_TREE} ({commit[:10]}{' with changes' if dirty else ''})"
    label = said if ref is None else (ref if commit.startswith(ref) else f"{ref} ({commit[:10]})")
    return Side(name, label, repository, root, package, commit, dirty)


def changed_layers(a: Side, b: Side, names: list[str]) -> list[str]:
    """Those of the layers ``names`` whose files differ; all where a file differs that they share."""
    assert a.root is not None
    assert b.root is not None
    shared = ("fwpkm_bench/kernels", "layers/contract.py")
    if any(_content(a.root / part) != _content(b.root / part) for part in shared):
        return names
    return [n for n in names if _content(a.root / "layers" / n) != _content(b.root / "layers" / n)]


def _content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def _commit(repository: Path, ref: str) -> str:
    asked = f"{ref}^{{commit}}"
    try:
        return _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", asked).strip()
    except subprocess.CalledProcessError:
        listed = _git(repository, "for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags")
        if not listed:
            raise UsageError(f"{repository} has no commit yet; there is nothing to compare with") from None
        choose("git ref or run folder", ref, [n for n in (*listed.split(), "HEAD") if n != ref])
        raise


def _harmless(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    """What may be unpacked: not a link that leads out of the copy."""
    try:
        return tarfile.data_filter(member, path)
    except tarfile.FilterError:
        return None


def _copy_working_tree(repository: Path, root: Path) -> None:
    """Tracked files as they are now, and new ones that git does not ignore, if they are no checkpoints."""
    tracked = set(_git(repository, "ls-files", "-z").split("\0"))
    new = _git(repository, "ls-files", "-z", "--others", "--exclude-standard").split("\0")
    for name in filter(None, (*tracked, *new)):
        source, target = repository / name, root / name
        if not source.is_file():
            continue  # a deleted file is listed too
        if name in tracked or source.stat().st_size <= LARGEST_NEW_BYTES:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def _git(repository: Path, *arguments: str) -> str:
    return _run("git", "-C", str(repository), *arguments).stdout.decode()


def _run(*command: str) -> subprocess.CompletedProcess[bytes]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # a hook sets them
    return subprocess.run(command, check=True, capture_output=True, env=environment)
