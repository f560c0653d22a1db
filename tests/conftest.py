"""Shared by the tests: the golden vectors."""

import json
import os
import signal
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes of two threads each would wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported; on a GPU `fwpkm-bench verify` checks them

GOLDEN = Path(__file__).parent / "golden"


def heed_interrupts() -> None:
    """For a child process: one that is started in the background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def golden():
    """``golden("pkm")``: the arrays of ``golden/pkm.npz`` as tensors, ``config`` as a dictionary."""

    def load(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            arrays = {key: file[key] for key in file.files}
        tensors: dict[str, Any] = {"config": json.loads(str(arrays.pop("config")))}
        for key, array in arrays.items():
            tensor = torch.from_numpy(array)
            tensors[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return tensors

    return load
