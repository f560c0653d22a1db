"""What the driver says of a GPU while it works: memory of this process, power, clocks, temperature."""

import os
from collections.abc import Callable
from typing import Any

import torch


class GPU:
    """The current device, by NVML; what it does not answer is None."""

    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        self._handle: Any = None
        self._ask(pynvml.nvmlInit)
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        # By its identity: NVML counts devices that CUDA_VISIBLE_DEVICES hides.
        self._handle = self._ask(pynvml.nvmlDeviceGetHandleByUUID, f"GPU-{properties.uuid}")

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return None

    def read(self) -> dict[str, Any]:
        """One answer to each question."""
        nvml, handle = self._nvml, self._handle
        if handle is None:
            return {}
        power = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        processes = self._ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
        own = [p.usedGpuMemory for p in processes if p.pid == os.getpid()]
        return {
            "process_bytes": own[0] if own else None,
            "power_w": None if power is None else power / 1e3,
            "sm_clock_mhz": self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
            "temperature_c": self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        }
