"""What memories compute in: float32 at least, whatever type their inputs have.

Eight bits do not tell 512 sub-keys apart: scores in half precision tie, and the wrong slots are read.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide_type(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for the rest."""
    return torch.promote_types(tensor.dtype, torch.float32)


def full_precision(device: str) -> AbstractContextManager[object]:
    """Autocast off, where it is on."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
