"""How fast the FwPKM memory alone is at the paper's sizes: ``python examples/memory_speed.py``.

Prints tokens a second of `fwpkm` (512/512, 512 x 512 slots, k 8, chunk 512, B 1, float32, no gradients),
and its share of what its matrix products alone (scores and key gradient as dense products, 1.05 MFLOP a
token) would take at the speed of a matrix product timed in the same process.
"""

import argparse

import torch

from fwpkm_bench.layers.fwpkm import FwPKM, fwpkm
from fwpkm_bench.measure.ceilings import measure_ceilings
from fwpkm_bench.measure.memory import keep_freed_memory
from fwpkm_bench.measure.timing import measure
from fwpkm_bench.stats import timing_columns

DENSE_FLOPS = 2 * 2 * 512 * 512  # a token: scores of 2 * 512 sub-keys of 256 features, and their gradient


def main(tokens: int) -> None:
    """Time the memory on ``tokens`` tokens."""
    torch.manual_seed(0)
    layer = FwPKM()
    query, target = torch.randn(1, tokens, 512), torch.randn(1, tokens, 512)
    gate = torch.rand(1, tokens)
    keep_freed_memory("cpu")

    @torch.no_grad()
    def call(_index: int) -> object:
        return fwpkm(query, target, gate, layer.keys, layer.values, topk=8, chunk_size=512)

    found = timing_columns(measure(call, device="cpu", budget_s=10.0).samples_ms, tokens)
    speed, low, high = (found[name] or 0.0 for name in ("tokens_per_s", "tokens_per_s_lo", "tokens_per_s_hi"))
    bound = measure_ceilings("cpu", torch.float32).flops / DENSE_FLOPS
    print(f"{speed:,.0f} tokens/s ({low:,.0f} to {high:,.0f}), {speed / bound:.0%} of the products' bound")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    main(parser.parse_args().tokens)
