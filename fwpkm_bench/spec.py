"""A sweep is data: `Sweep` is what was asked for, `Case` one point of it.

TOML files and the command line both land here, and an unknown key is an error.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwpkm_bench import catalog
from fwpkm_bench.errors import UsageError, choose
from fwpkm_bench.ranges import format_length, parse_lengths

DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = ("cpu", "cuda")
LONGEST_S = 7 * 24 * 3600
BEST = "best"  # the fastest implementation that a layer has for the device
SIZES = ("laptop", "paper")
LAYERS = ("softmax", "linear", "gdn", "pkm", "fwpkm")
WORKLOADS = ("throughput", "recall")

Value = int | float | str | bool


@dataclass(frozen=True, kw_only=True)
class Case:
    """One point of a sweep: everything that decides what is run and measured.

    ``settings`` are the layer's own and, for a workload with settings, the workload's, both resolved.
    """

    layer: str
    backend: str
    workload: str
    mode: str
    seq: int
    batch: int
    dtype: str
    device: str
    seed: int
    budget_s: float
    layer_settings: dict[str, Value]
    workload_settings: dict[str, Value]

    @property
    def case_id(self) -> str:
        """Readable, and unique to the settings."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()
        what = self.mode or self.workload
        is_file = catalog.is_file(self.layer)
        layer = Path(self.layer.rpartition(":")[0]).stem if is_file else self.layer.replace(":", "-")
        return f"{layer}-{self.backend}-{what}-{format_length(self.seq)}-{digest[:10]}"

    @property
    def series(self) -> str:
        """What all cases share that differ in the sequence length alone."""
        fields = dataclasses.asdict(self)
        del fields["seq"]
        return json.dumps(fields, sort_keys=True)

    @property
    def label(self) -> str:
        """For people: ``fwpkm eager prefill 4k``."""
        return f"{self.layer} {self.backend} {self.mode or self.workload} {format_length(self.seq)}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was asked for; `cases` says what that comes to.

    ``settings`` maps ``layer.setting`` or ``workload.setting`` to the values to go through.
    """

    name: str = ""
    seq: tuple[int, ...] = parse_lengths("4k..128k")
    layers: tuple[str, ...] = LAYERS
    workloads: tuple[str, ...] = WORKLOADS
    modes: tuple[str, ...] = ("prefill",)
    batch: tuple[int, ...] = (1,)
    dtype: tuple[str, ...] = ("float32",)
    device: str = "cpu"
    backend: tuple[str, ...] = (BEST,)  # those of them that a layer has
    size: str = ""  # empty: laptop on a CPU, paper on a GPU
    seeds: tuple[int, ...] = (0,)
    budget_s: float = 10.0
    timeout_s: float = 900.0
    settings: dict[str, tuple[Value, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.seq or min(self.seq) < 1:
            raise UsageError("seq must name at least one length of at least 1, such as 4k..128k")
        for layer in self.layers:
            catalog.check_layer(layer)
        for workload in self.workloads:
            choose("workload", workload, catalog.workload_names())
        for dtype in self.dtype:
            choose("dtype", dtype, DTYPES)
        if self.device == "gpu":
            object.__setattr__(self, "device", "cuda")
        choose("device", self.device, DEVICES)
        if self.size:
            choose("size", self.size, SIZES)
        for name in ("layers", "workloads", "modes", "batch", "dtype", "backend", "seeds"):
            if not getattr(self, name):
                raise UsageError(f"{name} must name at least one")
        if min(self.batch) < 1:
            raise UsageError(f"batch must be at least 1, got {min(self.batch)}")
        if min(self.seeds) < 0:
            raise UsageError(f"seeds must be at least 0, got {min(self.seeds)}")
        for name in ("budget_s", "timeout_s"):
            if not 0 < getattr(self, name) <= LONGEST_S:
                raise UsageError(
                    f"{name} must be above 0 and at most {LONGEST_S} s, got {getattr(self, name)}"
                )
        if self.name != Path(self.name).name or self.name.startswith("."):
            raise UsageError(
                f"name must be the name of a folder under results/, got {self.name!r}; see --out"
            )
        for name, values in self.settings.items():
            if not values or not all(isinstance(v, (int, float, str)) for v in values):
                raise UsageError(f"{name} must be a number, a string, true, false, or a list of such")

    @property
    def folder_name(self) -> str:
        """The name of the run folder: the sweep's, or one that tells sweeps apart."""
        return self.name or f"sweep-{self.digest[:8]}"

    @property
    def digest(self) -> str:
        """A hash of what is to be measured; the name and the timeout do not count."""
        fields = dataclasses.asdict(self)
        del fields["name"], fields["timeout_s"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def from_toml(path: Path, kind: type[Any] = Sweep) -> dict[str, Any]:
    """The fields of a `Sweep`, or of another dataclass ``kind``, that a file sets.

    Raises:
        UsageError: naming the file and the key.
    """
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    names = [f.name for f in dataclasses.fields(kind)]
    fields: dict[str, Any] = {"name": path.stem}
    for key, value in raw.items():
        choose(f"key of a {kind.__name__.lower()} ({path})", key, names)
        fields[key] = _from_toml_value(kind, path, key, value)
    return fields


def _from_toml_value(owner: type[Any], path: Path, key: str, value: Any) -> Any:
    if key == "seq":
        items = value if isinstance(value, list) else [value]
        return parse_lengths(",".join(str(item) for item in items))
    if key == "settings":
        if not isinstance(value, dict):
            raise UsageError(f"{path}: settings must be a table, such as [settings] 'fwpkm.topk' = [4, 8]")
        flat: dict[str, tuple[Value, ...]] = {}
        for name, entry in value.items():
            inner = entry if isinstance(entry, dict) else {"": entry}
            for setting, values in inner.items():
                full = f"{name}.{setting}" if setting else name
                flat[full] = tuple(values) if isinstance(values, list) else (values,)
        return flat
    default = getattr(owner, key, None)
    kind: type | tuple[type, ...] = type(default[0]) if isinstance(default, tuple) else type(default)
    kind = (int, float) if kind is float else kind
    items = value if isinstance(value, list) and isinstance(default, tuple) else [value]
    for item in items:
        if not isinstance(item, kind) or isinstance(item, bool):
            wanted = "a number" if kind == (int, float) or kind is int else "a string"
            raise UsageError(
                f"{path}: {key} must be {wanted}{' or a list' * isinstance(default, tuple)}, got {item!r}"
            )
    return tuple(items) if isinstance(default, tuple) else value


def parse_setting(text: str) -> tuple[str, tuple[Value, ...]]:
    """``fwpkm.topk=4,8,16`` as ``("fwpkm.topk", (4, 8, 16))``."""
    name, equals, values = text.partition("=")
    if not equals or "." not in name or not values:
        raise UsageError(
            f"{text!r} is no setting; write layer.setting=value[,value...], such as fwpkm.topk=4,8"
        )
    return name.strip(), tuple(_parse_value(v.strip()) for v in values.split(","))


def parse_settings(texts: Iterable[str]) -> dict[str, tuple[Value, ...]]:
    """Several of `parse_setting`; values for one setting add up."""
    found: dict[str, tuple[Value, ...]] = {}
    for name, values in map(parse_setting, texts):
        found[name] = found.get(name, ()) + values
    return found


def _parse_value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def cases(sweep: Sweep) -> list[Case]:
    """The cases of ``sweep``: shorter sequences first, then in the order of the workloads and layers.

    Raises:
        UsageError: for a setting that no chosen layer or workload has, or a value that one refuses.
    """
    workloads = {name: catalog.load_workload(name) for name in sweep.workloads}
    layers = {name: catalog.load_layer(name) for name in sweep.layers}
    _check_setting_names(sweep, {**workloads, **layers})
    modes = {mode for workload in workloads.values() for mode in workload.MODES if mode}
    for mode in sweep.modes:
        choose("mode", mode, sorted(modes) if modes else sweep.modes)
    known_backends = sorted({backend for layer in layers.values() for backend in layer.backends})
    for backend in sweep.backend:
        choose("backend", backend, [BEST, *known_backends])
    if "triton" in sweep.backend and sweep.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError(
            "backend triton needs --device cuda; on a CPU its kernels run only interpreted, "
            "with TRITON_INTERPRET=1 in the environment, for tests"
        )

    size = sweep.size or ("paper" if sweep.device == "cuda" else "laptop")
    found: dict[str, Case] = {}
    axes = itertools.product(sweep.seq, sweep.seeds, sweep.dtype, sweep.batch, workloads, layers)
    for seq, seed, dtype, batch, workload, layer in axes:
        wanted = [mode for mode in workloads[workload].MODES if not mode or mode in sweep.modes]
        for mode, backend, own, extra in itertools.product(
            wanted,
            _backends(sweep, layers[layer], dtype),
            _variants(sweep, layer, layers[layer].sizes.get(size) or layers[layer].Settings()),
            _variants(sweep, workload, workloads[workload].Settings()),
        ):
            case = Case(
                layer=layer,
                backend=backend,
                workload=workload,
                mode=mode,
                seq=seq,
                batch=batch if workloads[workload].BATCHED else 1,
                dtype=dtype,
                device=sweep.device,
                seed=seed,
                budget_s=sweep.budget_s,
                layer_settings=own,
                workload_settings=extra,
            )
            found.setdefault(case.case_id, case)
    return list(found.values())


def _backends(sweep: Sweep, layer: Any, dtype: str) -> list[str]:
    """Those of the sweep's that ``layer`` has, each once; the first where it has none, to be told so."""
    asked = [layer.best_backend(sweep.device, dtype) if name == BEST else name for name in sweep.backend]
    return list(dict.fromkeys(name for name in asked if name in layer.backends)) or asked[:1]


def _check_setting_names(sweep: Sweep, owners: dict[str, Any]) -> None:
    for full in sweep.settings:
        owner, _, setting = full.rpartition(".")
        choose("layer or workload of this sweep", owner, owners)
        choose(f"setting of {owner}", setting, [f.name for f in dataclasses.fields(owners[owner].Settings)])


def _variants(sweep: Sweep, owner: str, base: Any) -> list[dict[str, Value]]:
    """The resolved settings of ``owner``, one for each combination of the swept values."""
    swept = {
        full.rpartition(".")[2]: values
        for full, values in sweep.settings.items()
        if full.rpartition(".")[0] == owner
    }
    variants = []
    for combination in itertools.product(*swept.values()):
        chosen = dict(zip(swept, combination, strict=True))
        for name, value in chosen.items():
            expected = type(getattr(base, name))
            if expected is type(None):
                continue
            if not isinstance(value, (int, float) if expected is float else expected) or (
                isinstance(value, bool) and expected is not bool
            ):
                raise UsageError(f"{owner}.{name} must be of type {expected.__name__}, got {value!r}")
        try:
            resolved = dataclasses.asdict(dataclasses.replace(base, **chosen))
        except ValueError as error:
            raise UsageError(f"{owner}.{error}") from None
        for name, value in resolved.items():
            if not isinstance(value, (int, float, str, type(None))):
                kind = type(value).__name__
                raise UsageError(
                    f"{owner}.{name} is a {kind}; settings must be numbers, strings, true or false"
                )
        variants.append(resolved)
    return variants
