"""The direction of imports, read from the import statements."""

import ast
from pathlib import Path

import pytest

from fwpkm_bench.layers.peers import PEERS

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "fwpkm_bench"
RANK = [  # a module imports only from lines below its own
    {"__main__"},
    {"cli"},
    {"commands.sweep", "commands.compare", "commands.profile", "commands.check"},
    {"commands.options"},
    {"comparing.command", "profiling.command"},
    {"compare", "comparing.results", "comparing.runs", "profiling.run"},
    {"comparing.compared", "profiling.page"},
    {"comparing.duel", "comparing.gate", "profiling.words", "profiling.pictures"},
    {"comparing.remote"},
    {"comparing.bench", "comparing.verdicts", "display", "report"},
    {"comparing.place"},
    {"run", "plot", "verify"},
    {"palette"},
    {"parity", "executors.local", "tables"},
    {"profiling.phases", "profiling.trace", "profiling.memory", "profiling.host", "profiling.one_case"},
    {"profiling.gpu", "profiling.kernels"},
    {"profiling.folder"},
    {"worker", "store", "profiling.spec", "executors.child"},
    {"workloads.throughput", "workloads.recall"},
    {"measure.ceilings", "measure.phase_clock", "measure.counting"},
    {"measure.kernel_calls"},
    {"measure.compiled"},
    {"comparing.sides"},
    {"spec", "measure.timing", "measure.memory", "measure.environment", "stats"},
    {"catalog", "measurement", "ranges"},
    {"kernels.product_key_triton", "kernels.rows_triton", "kernels.subkey_gradients_triton"},
    {
        "errors",
        "kernels.phases",
        "kernels.precision",
        "kernels.product_key",
        "kernels.slots",
        "kernels.triton_support",
        "kernels.triton_blocks",
    },
    {"kernels.fla_support"},
]


def imported(path: Path) -> set[str]:
    """The absolute modules that ``path`` imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def modules() -> dict[str, Path]:
    found = {str(p.relative_to(TOOL).with_suffix("")).replace("/", "."): p for p in TOOL.rglob("*.py")}
    return {name: path for name, path in found.items() if not name.endswith("__init__")}


def test_every_module_has_its_place() -> None:
    assert sorted(modules()) == sorted(name for line in RANK for name in line)


@pytest.mark.parametrize("name", modules())
def test_the_tool_imports_downwards(name: str) -> None:
    level = {module: i for i, line in enumerate(RANK) for module in line}
    own = {n.removeprefix("fwpkm_bench.") for n in imported(modules()[name]) if n.startswith("fwpkm_bench.")}
    for other in own & level.keys():
        assert level[other] > level[name], f"{name} imports {other}"


@pytest.mark.parametrize(
    "name",
    [
        "plot",
        "palette",
        "report",
        "tables",
        "store",
        "stats",
        "ranges",
        "catalog",
        "spec",
        "profiling.folder",
        "profiling.page",
        "profiling.words",
        "profiling.pictures",
    ],
)
def test_rows_are_read_without_torch(name: str) -> None:
    """But for the doctor, who looks for devices inside a function."""
    tree = ast.parse(modules()[name].read_text())
    top = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    assert "torch" not in top


@pytest.mark.parametrize(
    "path", sorted((ROOT / "layers").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_layers_know_nothing_of_the_tool_and_of_each_other(path: Path) -> None:
    own = {n for n in imported(path) if n.startswith("fwpkm_bench")}
    assert {n for n in own if not n.startswith("fwpkm_bench.kernels")} == set()
    folder, *_ = parts = path.relative_to(ROOT / "layers").parts
    # A peer stands on the layer that it is held against: its projections, its sizes, its cost.
    shared = {"contract"} | ({peer.layer for peer in PEERS.values()} if folder == "peers" else set())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level < len(parts) or (node.level == len(parts) and node.module in shared), (
                ast.unparse(node)
            )
