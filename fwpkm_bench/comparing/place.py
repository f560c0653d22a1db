"""How a process comes to run another checkout's layers with this tool's harness.

The process is forked from a server that has torch and this tool imported. Then the side's own copy of the
layers and their kernels is put before the tool's, and what lies in the repository is imported from the copy.
"""

import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import fwpkm_bench
from fwpkm_bench.comparing.sides import Side
from fwpkm_bench.measurement import UnsupportedError

TOOL = Path(fwpkm_bench.__file__).parent
PARTS = ("layers", "kernels")


@dataclass(frozen=True)
class Place:
    """Where a side's code is: nowhere else than the tool's own, where all is None."""

    repository: Path | None  # what ``root`` is a copy of
    root: Path | None
    package: Path | None  # holds those of ``layers`` and ``kernels`` that the copy has

    @classmethod
    def of(cls, side: Side) -> "Place":
        return cls(side.repository, side.root, side.package)

    def enter(self) -> None:
        """From now on this process runs the code of the side."""
        if self.root is None or self.repository is None or self.package is None:
            return
        os.chdir(self.root)
        sys.path[:] = [self._moved(entry) for entry in sys.path]
        if not any(self.package.iterdir()):
            return  # somebody's own repository: its files run over this package's layers
        for part in PARTS:
            own = f"fwpkm_bench.{part}"
            for name in [n for n in sys.modules if n == own or n.startswith(f"{own}.")]:
                del sys.modules[name]
            if hasattr(fwpkm_bench, part):
                delattr(fwpkm_bench, part)
        fwpkm_bench.__path__.insert(0, str(self.package))

    def check(self, layer: str) -> None:
        """Refuse a ``layer`` of this package that the copy lacks, and modules from the repository itself.

        Raises:
            UnsupportedError: naming what is not the side's own.
        """
        if self.root is None or self.repository is None or self.package is None:
            return
        if (
            any(self.package.iterdir())
            and layer.isidentifier()
            and not (self.package / "layers" / layer).is_dir()
        ):
            raise UnsupportedError(f"it has no layer {layer!r}")
        root, repository = self.root.resolve(), self.repository.resolve()
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file is None or name.partition(".")[0] in ("fwpkm_bench", "__mp_main__"):
                continue
            path = Path(file).resolve()
            inside = path.is_relative_to(repository) and not path.is_relative_to(root)
            if inside and "site-packages" not in path.parts:
                raise UnsupportedError(
                    f"its layer imports {name} from {path}, not from the copy of this side"
                )

    def _moved(self, entry: str) -> str:
        """An entry of the search path, in the copy where it lies in the repository."""
        assert self.root is not None
        assert self.repository is not None
        path = Path(entry).resolve() if entry else self.repository
        tool = (
            TOOL.parent == self.repository and path == self.repository
        )  # an installed checkout: the harness
        inside = path.is_relative_to(self.repository) and "site-packages" not in path.parts
        return str(self.root / path.relative_to(self.repository)) if inside and not tool else entry


def lend(module: str) -> None:
    """Let ``fwpkm_bench.kernels.<module>`` be the tool's where a side has none: the tool itself needs it."""
    name = f"fwpkm_bench.kernels.{module}"
    if importlib.util.find_spec(name) is None:
        spec = importlib.util.spec_from_file_location(name, TOOL / "kernels" / f"{module}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
