"""Names of layers and workloads, found by looking: folders, files and entry points.

Listing names imports nothing heavy; only `load_layer` and `load_workload` run the code that they name.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import fwpkm_bench
from fwpkm_bench.errors import UsageError, choose
from fwpkm_bench.layers.peers import PEERS, absence

ENTRY_POINTS = "fwpkm_bench.layers"
PEERS_FOLDER = "peers"
PEER = "peer:"  # what the names of other people's implementations start with


def folder(name: str) -> Path:
    """``layers``, ``sweeps`` or ``profiles``: beside the package in a checkout, inside it in a wheel."""
    for root in fwpkm_bench.__path__:
        if (path := Path(root) / name).is_dir():
            return path
    raise FileNotFoundError(f"the folder {name} is missing from the installation of fwpkm-bench")


def layer_names() -> list[str]:
    """The layers of this package and of installed entry points, sorted."""
    own = {p.parent.name for p in folder("layers").glob("*/__init__.py")} - {PEERS_FOLDER}
    return sorted({*own, *_entry_points()})


def peer_names() -> list[str]:
    """Other people's implementations, ``peer:...``, present or not."""
    return list(PEERS)


def peer_absence(name: str) -> str:
    """Why the peer ``name`` cannot run here, with the command that would mend that; empty where it can."""
    return absence(name)


def peer_of(name: str) -> str | None:
    """The layer of ours that the peer ``name`` is held against; None for what is no peer."""
    return PEERS[name].layer if name in PEERS else None


def is_file(name: str) -> bool:
    """Whether ``name`` is meant as ``path/to/file.py:Class``."""
    return ":" in name and not name.startswith(PEER)


def check_layer(name: str) -> None:
    """Refuse a name that no layer or peer has; a file is looked at when it is loaded.

    Raises:
        UsageError: with the nearest name.
    """
    if not is_file(name):
        choose("layer", name, peer_names() if name.startswith(PEER) else layer_names())


def workload_names() -> list[str]:
    """The workloads, sorted."""
    return sorted(p.stem for p in (Path(__file__).parent / "workloads").glob("[a-z]*.py"))


def sweep_files() -> dict[str, Path]:
    """The sweeps that come with the package, by name."""
    return {p.stem: p for p in sorted(folder("sweeps").glob("*.toml"))}


def profile_files() -> dict[str, Path]:
    """The profiles that come with the package, by name."""
    return {p.stem: p for p in sorted(folder("profiles").glob("*.toml"))}


def load_layer(name: str) -> Any:
    """The `SequenceLayer` class called ``name``, or the one that ``path/to/file.py:Class`` names.

    The class of an absent peer loads too; making a layer of it raises `NotImplementedError`.
    """
    if is_file(name):
        return _load_from_file(name)
    check_layer(name)
    if name in PEERS:
        module = importlib.import_module(f"fwpkm_bench.layers.{PEERS_FOLDER}.{PEERS[name].module}")
        return getattr(module, PEERS[name].class_name)
    points = _entry_points()
    if name in points:
        return points[name].load()
    return importlib.import_module(f"fwpkm_bench.layers.{name}").LAYER


def load_workload(name: str) -> ModuleType:
    """The workload module called ``name``."""
    return importlib.import_module(f"fwpkm_bench.workloads.{choose('workload', name, workload_names())}")


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _load_from_file(name: str) -> Any:
    path_text, _, class_name = name.rpartition(":")
    path = Path(path_text)
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(f"{path_text!r} is not a Python file; name a layer as path/to/file.py:Class")
    module_name = f"fwpkm_bench_layer_{path.stem}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise UsageError(f"{path} fails to import: {type(error).__name__}: {error}") from error
    layer = getattr(sys.modules[module_name], class_name, None)
    if layer is None:
        raise UsageError(f"{path} has no class {class_name!r}")
    missing = [
        a for a in ("Settings", "sizes", "backends", "memory_core", "forward") if not hasattr(layer, a)
    ]
    if missing:
        raise UsageError(
            f"{class_name} of {path} is no layer: it lacks {', '.join(missing)} (layers/contract.py)"
        )
    return layer
