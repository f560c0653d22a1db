"""What the memory itself can hold, without training.

T random pairs are written in order, the way the layer writes; then 1,024 of the keys are asked for,
spread evenly over age. An answer is right when, of all T written values, the right one is nearest to it
by cosine.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwpkm_bench import catalog
from fwpkm_bench.kernels.slots import slot_use
from fwpkm_bench.measurement import DivergedError, Measurement, UnsupportedError
from fwpkm_bench.spec import Case
from fwpkm_bench.stats import wilson_interval

MODES = ("",)
BATCHED = False

DECILES = 10
BLOCK = 128  # queries compared with all T values at once


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        key_dim, value_dim: features of the pairs, the same for every layer.
        passes: how often the pairs are written (2 is one iteration of the paper's iterated reading).
        noise: standard deviation of what is added to a key before it is asked for.
        queries: how many keys are asked for.
    """

    key_dim: int = 128
    value_dim: int = 128
    passes: int = 1
    noise: float = 0.0
    queries: int = 1024

    def __post_init__(self) -> None:
        for name in ("key_dim", "value_dim", "passes", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.key_dim % 2:
            raise ValueError(f"key_dim must be even (product keys split it), got {self.key_dim}")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be a finite number of at least 0, got {self.noise}")


def run(case: Case) -> Measurement:
    """Measure one case in this process."""
    settings = Settings(**case.workload_settings)  # type: ignore[arg-type]
    layer = catalog.load_layer(case.layer)
    if layer.memory_core is None:
        raise UnsupportedError(f"{case.layer} offers no memory core")
    if case.backend not in layer.backends:
        raise UnsupportedError(f"{case.layer} has no backend {case.backend!r}: {', '.join(layer.backends)}")
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(case.seed)
    # The pairs are rounded to the case's type; the memories themselves are float32, as fast weights are.
    keys = torch.randn(case.seq, settings.key_dim, generator=generator).to(dtype).to(case.device).float()
    values = torch.randn(case.seq, settings.value_dim, generator=generator).to(dtype).to(case.device).float()
    asked = spread_over_age(case.seq, settings.queries).to(case.device)
    noise = settings.noise * torch.randn(len(asked), settings.key_dim, generator=generator)
    queries = keys[asked] + noise.to(keys)

    core = layer.memory_core(
        layer.Settings(**case.layer_settings),
        key_dim=settings.key_dim,
        value_dim=settings.value_dim,
        backend=case.backend,
        generator=torch.Generator(case.device).manual_seed(case.seed + 1),
    )
    state = core.init_state()
    for _ in range(settings.passes):
        state = core.write(state, keys, values)
    answers = core.read(state, queries)
    if not bool(torch.isfinite(answers).all()):
        raise DivergedError("the answers have NaN or infinity where the pairs have none")
    right, cosine = score(answers, values, asked)
    low, high = wilson_interval(int(right.sum()), len(asked))
    columns: dict[str, Any] = {
        "queries": len(asked),
        "right": int(right.sum()),
        "recall": float(right.float().mean()),
        "recall_lo": low,
        "recall_hi": high,
        "cosine": float(cosine.mean()),
    }
    columns |= by_age(right, asked, case.seq)
    writes = core.slot_writes(state)
    columns |= {} if writes is None else slot_use(writes)
    return Measurement(columns)


def spread_over_age(pairs: int, queries: int) -> Tensor:
    """The pairs to ask for: all, or ``queries`` of them at even steps from the first to the last."""
    count = min(pairs, queries)
    return torch.linspace(0, pairs - 1, count, dtype=torch.float64).round().long()


def score(answers: Tensor, values: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each answer ``[Q, d]`` is nearest to its own of ``values [T, d]``, and its cosine to it."""
    directions = F.normalize(values, dim=-1)
    right, cosine = [], []
    for block, own in zip(answers.split(BLOCK), asked.split(BLOCK), strict=True):
        similarity = F.normalize(block, dim=-1) @ directions.T  # [Q, T]
        mine = similarity.gather(1, own.unsqueeze(1)).squeeze(1)
        right.append(similarity.argmax(1) == own)
        cosine.append(mine)
    return torch.cat(right), torch.cat(cosine)


def by_age(right: Tensor, asked: Tensor, pairs: int) -> dict[str, float | None]:
    """Recall of each tenth of the written pairs, from ``recall_age_1``, the newest, to ``recall_age_10``."""
    tenth = (pairs - 1 - asked) * DECILES // pairs
    columns: dict[str, float | None] = {}
    for decile in range(DECILES):
        mine = right[tenth == decile]
        columns[f"recall_age_{decile + 1}"] = float(mine.float().mean()) if len(mine) else None
    return columns
