"""What the GPU was doing around a run, told by NVML: clocks, temperature, throttle reasons, energy."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

MILLIJOULES = 1000.0


@dataclass(frozen=True)
class Snapshot:
    """One look at the device.

    Attributes:
        sm_mhz, memory_mhz: clocks.
        celsius: temperature.
        throttled: reasons for which the clocks are below what was asked, without idleness and clocks that were set.
        joules: consumed since the driver was loaded; None where the device does not count.
    """

    sm_mhz: int
    memory_mhz: int
    celsius: int
    throttled: tuple[str, ...]
    joules: float | None


@dataclass(frozen=True)
class Conditions:
    """The snapshots before and after one run."""

    before: Snapshot
    after: Snapshot

    @property
    def throttled(self) -> tuple[str, ...]:
        """Reasons seen at either end; a run with any is spoiled."""
        return tuple(dict.fromkeys((*self.before.throttled, *self.after.throttled)))

    @property
    def joules(self) -> float | None:
        """Consumed in the run."""
        if self.before.joules is None or self.after.joules is None:
            return None
        return self.after.joules - self.before.joules


class Sensor:
    """Reads one device.

    Args:
        nvml: the `pynvml` module, initialised (or what stands in for it).
        handle: NVML's handle of the device.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        self._reasons = {
            nvml.nvmlClocksThrottleReasonSwPowerCap: "power cap",
            nvml.nvmlClocksThrottleReasonHwSlowdown: "hardware slowdown",
            nvml.nvmlClocksThrottleReasonSwThermalSlowdown: "thermal, software",
            nvml.nvmlClocksThrottleReasonHwThermalSlowdown: "thermal, hardware",
            nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "power brake",
        }

    def snapshot(self) -> Snapshot:
        """Look now."""
        nvml, handle = self._nvml, self._handle
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        joules = None
        with contextlib.suppress(nvml.NVMLError):  # older devices have no counter
            joules = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / MILLIJOULES
        return Snapshot(
            sm_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            memory_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            celsius=nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            throttled=tuple(reason for bit, reason in self._reasons.items() if bits & bit),
            joules=joules,
        )


def open_sensor(device: torch.device) -> tuple[Sensor | None, str]:
    """The sensor of a device, or None and why."""
    if device.type != "cuda":
        return None, "not a GPU"
    try:
        import pynvml
    except ImportError:
        return None, "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return Sensor(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")), ""
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"


def summary(conditions: list[Conditions]) -> dict[str, Any]:
    """Lowest clock and highest temperature at ends of runs, all reasons, how many runs were throttled; JSON-ready."""
    looks = [dataclasses.astuple(look)[:3] for one in conditions for look in (one.before, one.after)]
    return {
        "sm_mhz_min": min(look[0] for look in looks),
        "memory_mhz_min": min(look[1] for look in looks),
        "celsius_max": max(look[2] for look in looks),
        "throttled": sorted({reason for one in conditions for reason in one.throttled}),
        "throttled_runs": sum(bool(one.throttled) for one in conditions),
    }
