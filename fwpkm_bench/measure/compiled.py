"""What Triton makes of the kernels for a GPU, on a machine that need not have one.

A process of its own interprets the kernels on small inputs and notes the types of what they are called with;
this one then compiles each for the GPU asked for and reads its registers, spills and shared memory.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fwpkm_bench.errors import UsageError
from fwpkm_bench.kernels.triton_support import GPU_BLOCKS_VARIABLE
from fwpkm_bench.measurement import Compiled

TYPES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
TYPES |= {"int64": "i64", "int32": "i32", "bool": "i1"}
INTERPRETED_FOR_A_GPU = {"TRITON_INTERPRET": "1", GPU_BLOCKS_VARIABLE: "1"}
OPTIONS = ("num_warps", "num_stages")


def note_calls(run: Callable[[], None]) -> list[dict[str, Any]]:
    """The distinct calls of kernels that ``run`` makes in this process, where they must be interpreted."""
    from triton.runtime.interpreter import InterpretedFunction

    found: dict[str, dict[str, Any]] = {}
    original = InterpretedFunction.run

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        call = _describe(self, args, kwargs)
        found.setdefault(json.dumps(call, sort_keys=True), call)
        return original(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = noted
    try:
        run()
    finally:
        InterpretedFunction.run = original
    return list(found.values())


def _describe(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The types and constants that Triton would compile this call of ``kernel`` for."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: list[int] = []
    free = set(kernel.kwargs.get("do_not_specialize") or ())
    constexprs = {n for n, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    for index, name in enumerate(kernel.arg_names):
        value = given[name]
        if name in constexprs:
            signature[name], constants[name] = "constexpr", value
        elif hasattr(value, "data_ptr"):
            signature[name] = "*" + TYPES[str(value.dtype).removeprefix("torch.")]
            aligned.append(index)  # as torch allocates
        elif value == 1 and name not in free:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0 and name not in free:
                aligned.append(index)
    return {
        "module": kernel.fn.__module__,
        "kernel": kernel.fn.__name__,
        "signature": signature,
        "constants": constants,
        "aligned": aligned,
        "options": {name: given[name] for name in OPTIONS if name in given},
    }


def compile_call(call: dict[str, Any], capability: int) -> Compiled:
    """Compile what `note_calls` noted for an NVIDIA GPU of ``capability``, such as 90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(call["module"]), call["kernel"])
    attributes = {(index,): [["tt.divisibility", 16]] for index in call["aligned"]}
    source = ASTSource(kernel, call["signature"], call["constants"], attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=call["options"])
    registers, spilled = _registers(made.asm["ptx"], capability)
    own = {name: value for name, value in call["constants"].items() if call["signature"][name] == "constexpr"}
    shown = {name: value for name, value in own.items() if name.startswith("BLOCK") or name == "topk"}
    return Compiled(
        kernel=call["kernel"],
        constants=" ".join(f"{name}={value}" for name, value in shown.items()),
        warps=made.metadata.num_warps,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=made.metadata.shared,
    )


def _registers(ptx: str, capability: int) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, by the assembler that comes with Triton."""
    import triton

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        suffix = "a" if capability >= 90 else ""
        done = subprocess.run(
            [
                assembler,
                "-v",
                f"--gpu-name=sm_{capability}{suffix}",
                source,
                "-o",
                Path(folder) / "kernel.cubin",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    return int(registers[1]) if registers else 0, int(spilled[1]) if spilled else 0


def report(layers: list[str], capability: int = 90) -> list[Compiled]:
    """Every kernel of the Triton backends of ``layers``, at the paper's sizes, compiled for a GPU."""
    return [compile_call(call, capability) for call in note(layers)]


def note(layers: list[str]) -> list[dict[str, Any]]:
    """How the Triton backends of ``layers`` call their kernels at the paper's sizes.

    Raises:
        UsageError: the kernels could not be interpreted; the message is what the process said last.
    """
    command = [sys.executable, "-m", "fwpkm_bench.measure.kernel_calls", *layers]
    child = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | INTERPRETED_FOR_A_GPU, check=False
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines() or ["no message"]
        raise UsageError(f"the kernels could not be interpreted: {lines[-1]}")
    return list(json.loads(child.stdout))
