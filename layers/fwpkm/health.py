"""What to watch while a model with a fast-weight memory trains."""

import torch
from torch import Tensor

from fwpkm_bench.kernels.slots import slot_use

from .functional import FwPKMOutput


def health(output: FwPKMOutput, slots: int, gate: Tensor | None = None) -> dict[str, float]:
    """Metrics of one call: see `fwpkm_bench.kernels.slots.slot_use` for the first three.

    Args:
        output: what `fwpkm` or `FwPKM.forward_detailed` returned.
        slots: ``n_subkeys ** 2``.
        gate: ``[B, T]``, where there is one.

    Returns:
        ``coverage``, ``collision_ratio``, ``slot_kl``; ``memory_loss``, the mean of the written pairs' losses
        (nothing where none was written); ``addressing_loss``; ``mean_gate``.
    """
    counts = torch.bincount(output.indices.flatten(), minlength=slots)
    found = slot_use(counts) | {"addressing_loss": float(output.addressing_loss.detach())}
    if output.losses.numel():
        found["memory_loss"] = float(output.losses.detach().mean())
    if gate is not None:
        found["mean_gate"] = float(gate.detach().mean())
    return found
