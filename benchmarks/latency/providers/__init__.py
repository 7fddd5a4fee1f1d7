"""The providers that are compared, by name.

In: a `Task` (case and schedule). Out: a `Runner`, which runs its steps in the provider's way. Hazard: hooks and patches
of one provider must not reach another, so each gets its own module tree and removes in `close` what it changed.

Reading order: `base` (what a provider is, and step masks for equal work), `plain` (no cache), `hooks` (as in released
code), `diffusers_caches` and `cache_dit` (peers), `ours`.
"""

from __future__ import annotations

from benchmarks.latency.providers.base import Provider
from benchmarks.latency.providers.cache_dit import CacheDit
from benchmarks.latency.providers.diffusers_caches import (
    DiffusersCache,
    FirstBlockRunner,
    PyramidRunner,
    TaylorSeerRunner,
)
from benchmarks.latency.providers.hooks import Hooks
from benchmarks.latency.providers.ours import Backend, Lowered
from benchmarks.latency.providers.plain import Compiled, Eager

PROVIDERS: dict[str, Provider] = {
    "eager": Eager(),
    "compile": Compiled("torch.compile", None),
    "reduce-overhead": Compiled("torch.compile, reduce-overhead", "reduce-overhead"),
    "hooks": Hooks(),
    "first-block": DiffusersCache("FirstBlockCache", FirstBlockRunner),
    "taylorseer": DiffusersCache("TaylorSeer, lite", TaylorSeerRunner),
    "pab": DiffusersCache("Pyramid Attention Broadcast", PyramidRunner),
    "cache-dit-mask": CacheDit("static", compiled=False),
    "cache-dit-mask-compile": CacheDit("static", compiled=True),
    "cache-dit-dbcache": CacheDit("dynamic", compiled=False),
    "cache-dit-dbcache-compile": CacheDit("dynamic", compiled=True),
    "plain": Lowered("plain"),
    "fused": Lowered("fused"),
    "inductor": Lowered("inductor"),
    "backend": Backend(),
}
