"""What torch's own operators leave for FwPKM's eager backend: ``python examples/torch_floor.py``.

Times, alone and warm, the operators that a chunk of 512 tokens cannot do without at the paper's sizes
(512/512, 512 x 512 slots, k 8, float32, no gradients), and those of one decoded token; their sum is a floor
for a backend that is made of them, however little stands between.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, SLOTS, SUBKEYS, TOPK, CHUNK = 512, 512**2, 512, 8, 512
REPEATS = 50


def milliseconds(call: Callable[[], object]) -> float:
    """The median over `REPEATS` calls after ten to warm up."""
    for _ in range(10):
        call()
    samples = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        samples.append((time.perf_counter() - started) * 1e3)
    return statistics.median(samples)


def operators(tokens: int) -> dict[str, Callable[[], object]]:
    """The operators of the memory for ``tokens`` tokens, by name."""
    reads = tokens * TOPK
    query = torch.randn(2, tokens, WIDTH // 2)
    keys = torch.randn(2, SUBKEYS, WIDTH // 2)
    norms, scores = torch.randn(2, 1, SUBKEYS), torch.randn(2, tokens, SUBKEYS)
    sums = torch.randn(tokens, 20)
    table = torch.randn(SLOTS, WIDTH)
    slots = torch.randperm(SLOTS)[:reads]
    weights, change = torch.rand(tokens, TOPK), torch.randn(reads, WIDTH)
    places = torch.randint(2 * SUBKEYS, (2 * reads,))
    found: dict[str, Callable[[], object]] = {
        "scores": lambda: torch.baddbmm(norms, query, keys.transpose(1, 2), alpha=-2),
        "top-k of the halves": lambda: scores.topk(TOPK),
        "top-k of the pairs": lambda: sums.topk(TOPK),
        "read": lambda: F.embedding_bag(slots.view(-1, TOPK), table, mode="sum", per_sample_weights=weights),
    }
    if tokens == 1:
        return found
    errors, rates = torch.randn(tokens, WIDTH), torch.rand(reads)
    owner, starts = torch.randint(tokens, (reads,)), torch.arange(reads)
    rows: Tensor = slots.unsqueeze(-1).expand(-1, WIDTH)
    half_queries, pulls = torch.randn(2 * tokens, WIDTH // 2), torch.rand(2 * reads)
    members, firsts = torch.randint(2 * tokens, (2 * reads,)), torch.arange(0, 2 * reads, TOPK)
    return found | {
        "sort of the reads": lambda: slots.sort(stable=True),
        "rows into the overlay": lambda: table.index_select(0, slots),
        "errors by slot": lambda: F.embedding_bag(
            owner, errors, starts, mode="sum", per_sample_weights=rates
        ),
        "write": lambda: table.scatter_add_(0, rows, change),
        "sort of the sub-keys": lambda: places.sort(),
        "queries by sub-key": lambda: F.embedding_bag(
            members, half_queries, firsts, mode="sum", per_sample_weights=pulls
        ),
    }


@torch.no_grad()
def main() -> None:
    """Print each operator's time, and the floors that they come to."""
    torch.manual_seed(0)
    for tokens, what in ((CHUNK, f"a chunk of {CHUNK} tokens"), (1, "one token")):
        x, weight = torch.randn(tokens, WIDTH), torch.randn(WIDTH, WIDTH)
        memory = {name: milliseconds(call) for name, call in operators(tokens).items()}
        projections = 3 * milliseconds(lambda x=x, weight=weight: F.linear(x, weight))
        print(f"{what}, milliseconds")
        for name, time_ms in {**memory, "three projections": projections}.items():
            print(f"  {name:<24} {time_ms:7.3f}")
        alone = sum(memory.values())
        whole = alone + projections
        if tokens > 1:
            print(f"  memory alone: at most {tokens / alone * 1e3:,.0f} tokens/s")
            print(f"  with projections: at most {tokens / whole * 1e3:,.0f} tokens/s")
        else:
            print(f"  a token: at least {whole:.3f} ms")


if __name__ == "__main__":
    main()
