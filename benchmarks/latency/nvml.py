"""Reads the state of the GPU before and after a run from NVML: clocks, temperature, throttle reasons, energy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MILLIJOULES = 1000.0


@dataclass(frozen=True)
class Snapshot:
    """The state of the device at one time.

    Each attribute is None if NVML does not report it: a slice of a GPU has no clocks, older devices do not count
    energy, and a container may lack the permission.

    Attributes:
        sm_mhz: clock of the multiprocessors, MHz.
        memory_mhz: clock of the memory, MHz.
        celsius: temperature.
        throttled: why clocks are reduced; being idle and clocks that a user set do not count.
        joules: energy consumed since the driver was loaded.
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
        """Throttle reasons before or after the run; a run with any is spoiled."""
        return tuple(dict.fromkeys((*(self.before.throttled or ()), *(self.after.throttled or ()))))

    @property
    def known(self) -> bool:
        """True if throttle reasons are known both before and after the run."""
        return self.before.throttled is not None and self.after.throttled is not None

    @property
    def joules(self) -> float | None:
        """Energy consumed in the run, in joules; None if unknown."""
        if self.before.joules is None or self.after.joules is None:
            return None
        return self.after.joules - self.before.joules


class Sensor:
    """Reads one device.

    Args:
        nvml: the initialised `pynvml` module, or a stand-in for it.
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
        """Read the current state."""
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
        """NVML's answer; None if it refuses."""
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return None


def open_sensor(device: torch.device) -> tuple[Sensor | None, str]:
    """The sensor of a device and an empty reason, or None and the reason."""
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
    """NVML's handle, by UUID: NVML numbers all GPUs of the machine, torch only those in CUDA_VISIBLE_DEVICES."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")  # a slice of a GPU


def summary(conditions: list[Conditions]) -> dict[str, Any]:
    """Lowest clocks, highest temperature, all throttle reasons and the number of throttled runs, as values for JSON.

    A value is None if NVML does not report it.
    """
    snapshots = [snapshot for one in conditions for snapshot in (one.before, one.after)]
    known = all(one.known for one in conditions)
    return {
        "sm_mhz_min": min((one.sm_mhz for one in snapshots if one.sm_mhz is not None), default=None),
        "memory_mhz_min": min((one.memory_mhz for one in snapshots if one.memory_mhz is not None), default=None),
        "celsius_max": max((one.celsius for one in snapshots if one.celsius is not None), default=None),
        "throttled": sorted({reason for one in conditions for reason in one.throttled}) if known else None,
        "throttled_runs": sum(bool(one.throttled) for one in conditions) if known else None,
    }
