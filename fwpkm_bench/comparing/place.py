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
from fwpkm_bench import catalog
from fwpkm_bench.comparing.sides import Side
from fwpkm_bench.measurement import UnsupportedError

TOOL = Path(fwpkm_bench.__file__).parent
PARTS = ("layers", "kernels")
HARNESS = ("fwpkm_bench", "__main__", "__mp_main__")


@dataclass(frozen=True)
class Place:
    """Where the code of a side is that has a copy of its own."""

    repository: Path  # what ``root`` is a copy of
    root: Path
    package: Path  # holds those of ``layers`` and ``kernels`` that the copy has

    @classmethod
    def of(cls, side: Side) -> "Place | None":
        """None where a side runs this tool's own layers."""
        if side.repository is None or side.root is None or side.package is None:
            return None
        return cls(side.repository.resolve(), side.root.resolve(), side.package)

    def enter(self) -> None:
        """From now on this process runs the code of the side."""
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
        """Refuse a ``layer`` that the copy lacks, and modules from the repository itself.

        Raises:
            UnsupportedError: naming what is not the side's own.
        """
        if not catalog.is_file(layer) and not (self.package / "layers" / layer).is_dir():
            raise UnsupportedError(f"it has no layer {layer!r}")
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file is None or name.partition(".")[0] in HARNESS:
                continue
            path = Path(file).resolve()
            if self._is_inside(path) and not path.is_relative_to(self.root):
                raise UnsupportedError(f"it imports {name} from {path}, not from the copy of this side")

    def _moved(self, entry: str) -> str:
        """An entry of the search path, in the copy where it lies in the repository."""
        path = Path(entry).resolve() if entry else self.repository
        if path == TOOL.parent or not self._is_inside(path):
            return entry  # the harness itself stays where it is
        return str(self.root / path.relative_to(self.repository))

    def _is_inside(self, path: Path) -> bool:
        """Whether ``path`` is code of the repository's own."""
        return path.is_relative_to(self.repository) and "site-packages" not in path.parts


def lend(module: str) -> None:
    """Let ``fwpkm_bench.kernels.<module>`` be the tool's where a side has none: the tool itself needs it."""
    name = f"fwpkm_bench.kernels.{module}"
    if importlib.util.find_spec(name) is None:
        spec = importlib.util.spec_from_file_location(name, TOOL / "kernels" / f"{module}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
