"""Where the kernels of flash-linear-attention (package ``fla-core``) can run."""

import torch


def require_fla(device: torch.device) -> None:
    """Refuse a machine without them.

    Raises:
        NotImplementedError: the device is no GPU, or fla-core is not installed.
    """
    if device.type != "cuda":
        raise NotImplementedError(f"backend 'fla' runs on a CUDA device, not on {device.type}")
    try:
        import fla.ops  # noqa: F401
    except ImportError:
        raise NotImplementedError("backend 'fla' needs fla-core: pip install 'fwpkm-bench[gpu]'") from None
