"""`harmonica_rt.schedule` needs numpy alone until someone draws or imports a router."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "triton", "yaml", "diffusers", "matplotlib", "rich", "harmonica_kernels", "harmonica_training")


def test_import_and_use_stay_light() -> None:
    code = (
        "import sys\n"
        "from harmonica_rt.schedule import Schedule\n"
        "Schedule.known(Schedule.known_names()[0]).cur_per_kind()\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
