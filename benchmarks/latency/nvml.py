"""What the GPU was doing around a run, told by NVML: clocks, temperature, throttle reasons, energy."""

from __future__ import annotations

from collections.abc import Callable
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
        joules: consumed since the driver was loaded.

    Each is None where NVML does not tell it: a slice of a GPU has no clocks, older devices count no energy, and a
    container may not be allowed to ask.
    """

    sm_mhz: int | None
    memory_mhz: int | None
    celsius: int | None
    throttled: tuple[str, ...] | None
    joules: float | None


@dataclass(frozen=True)
class Conditions:
    """The snapshots before and after one run."""

    before: Snapshot
    after: Snapshot

    @property
    def throttled(self) -> tuple[str, ...]:
        """Reasons seen at either end; a run with any is spoiled."""
        return tuple(dict.fromkeys((*(self.before.throttled or ()), *(self.after.throttled or ()))))

    @property
    def known(self) -> bool:
        """Whether it is known at both ends if clocks were throttled."""
        return self.before.throttled is not None and self.after.throttled is not None

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
        bits = self._asked(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        millijoules = self._asked(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        return Snapshot(
            sm_mhz=self._asked(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            memory_mhz=self._asked(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
            celsius=self._asked(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            throttled=None if bits is None else tuple(reason for bit, reason in self._reasons.items() if bits & bit),
            joules=None if millijoules is None else millijoules / MILLIJOULES,
        )

    def _asked(self, question: Callable[..., int], *arguments: Any) -> int | None:
        """What NVML answers; None where it does not."""
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return None


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
        return Sensor(pynvml, _handle_of(pynvml, str(torch.cuda.get_device_properties(device).uuid))), ""
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"


def _handle_of(nvml: Any, uuid: str) -> Any:
    """By UUID, because NVML numbers the GPUs of the machine and torch those that CUDA_VISIBLE_DEVICES leaves."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")  # a slice of one


def summary(conditions: list[Conditions]) -> dict[str, Any]:
    """Lowest clock and highest temperature at ends of runs, all reasons, how many runs were throttled; JSON-ready.

    None for what NVML did not tell.
    """
    looks = [look for one in conditions for look in (one.before, one.after)]
    known = all(one.known for one in conditions)
    return {
        "sm_mhz_min": min((look.sm_mhz for look in looks if look.sm_mhz is not None), default=None),
        "memory_mhz_min": min((look.memory_mhz for look in looks if look.memory_mhz is not None), default=None),
        "celsius_max": max((look.celsius for look in looks if look.celsius is not None), default=None),
        "throttled": sorted({reason for one in conditions for reason in one.throttled}) if known else None,
        "throttled_runs": sum(bool(one.throttled) for one in conditions) if known else None,
    }
