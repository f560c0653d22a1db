"""Print as JSON how the kernels of layers are called: ``python -m fwpkm_bench.measure.kernel_calls pkm``.

Interpreted (TRITON_INTERPRET=1), at the paper's sizes but for a few tokens and a small chunk.
"""

import json
import sys
from dataclasses import fields, replace

import torch

from fwpkm_bench import catalog
from fwpkm_bench.measure.compiled import note_calls

TOKENS, CHUNK = 20, 16  # one whole chunk and a rest


def exercise(name: str) -> None:
    """One forward and one backward pass of the layer ``name`` through its Triton backend."""
    layer_class = catalog.load_layer(name)
    settings = layer_class.sizes["paper"]
    if "chunk_size" in {f.name for f in fields(settings)}:
        settings = replace(settings, chunk_size=CHUNK)
    layer = layer_class(settings, backend="triton")
    x = torch.randn(1, TOKENS, settings.width)
    with torch.no_grad():
        layer(x)
    y, _ = layer(x.requires_grad_())
    y.sum().backward()


if __name__ == "__main__":
    torch.manual_seed(0)

    def exercise_all() -> None:
        for name in sys.argv[1:]:
            exercise(name)

    print(json.dumps(note_calls(exercise_all)))
