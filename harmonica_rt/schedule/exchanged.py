"""Schedules from other tools and for them: the methods of `Schedule` that read and write theirs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from harmonica_rt.schedule import cache_dit, diffusers_caches, format, interchange, invardiff, routers
from harmonica_rt.schedule.checks import check_sites
from harmonica_rt.schedule.provenance import MadeBy
from harmonica_rt.schedule.weighted import WeightedSchedule
from harmonica_rt.schedule.weights import same_weights
from harmonica_rt.schedule.writing import write_file

FilePath = str | os.PathLike[str]


@dataclass(frozen=True, eq=False, repr=False)
class ExchangedSchedule(WeightedSchedule):
    """A schedule that can be read from and written for other tools; `Schedule` documents it."""

    @classmethod
    def from_router(
        cls,
        path: FilePath,
        *,
        sites: Iterable[str] | None = None,
        steps: int | None = None,
        threshold: float | None = None,
        kind: routers.RouterKind = "auto",
    ) -> Self:
        """Read a router checkpoint of the released HarmoniCa or Learning-to-Cache code; scores above tau compute.

        `threshold` is tau; by default 0.1, or 0.9 for U-ViT, as in the released commands. See `routers.read_router` for
        details.
        """
        names = None if sites is None else check_sites(sites)
        return cls(**routers.read_router(path, sites=names, steps=steps, threshold=threshold, kind=kind))

    @classmethod
    def from_smoothcache(
        cls, path: FilePath, *, sites: Iterable[str], components: Mapping[str, str] | None = None
    ) -> Self:
        """Read a schedule file of SmoothCache (arXiv 2411.10510).

        A site without a list computes at every step, as in SmoothCache. `components` renames: `{"attn": "attn1", "mlp":
        "ff"}` applies a file made for a model with `attn` and `mlp` to one whose modules are `attn1` and `ff`.

        Raises:
            ScheduleError: the file is not of this format, or has lists that decide no site.
        """
        names, source = check_sites(sites), os.fspath(path)
        with format.named_errors(source):
            mask = interchange.read_smoothcache(source, names, components or {})
            return cls(mask, names, made_by=MadeBy("smoothcache"))

    @classmethod
    def from_cache_dit(cls, settings: FilePath | Mapping[str, object], *, sites: Iterable[str]) -> Self:
        """Read the settings of cache-dit: a step mask, blocks that always compute, TaylorSeer.

        Args:
            settings: the path of a file of its options (YAML), or their mapping; with or without `cache_config` around
                them.
            sites: dotted module paths. A reused step computes those in the first `Fn_compute_blocks` and the last
                `Bn_compute_blocks` blocks, and reuses the others.

        Raises:
            ScheduleFileNotFoundError: there is no such file.
            ScheduleError: the settings do not define a static schedule: there is no mask, the policy is `dynamic` (the
                default), or another calibrator than TaylorSeer is on; or a setting is unknown or has a wrong value.
        """
        names = check_sites(sites)
        if not isinstance(settings, Mapping):
            source = os.fspath(settings)
            with format.named_errors(source):
                return cls.from_cache_dit(cache_dit.read_settings(source), sites=names)
        found = cache_dit.settings_of(settings)
        made_by = MadeBy("cache-dit", {"Fn_compute_blocks": found.first, "Bn_compute_blocks": found.last})
        made = cls(found.mask(names), names, made_by=made_by)
        return made.with_taylor(found.order, since=cache_dit.SINCE) if found.order else made

    def save_cache_dit(self, path: FilePath) -> None:
        """Write the settings of cache-dit (YAML) that `from_cache_dit` reads: a static step mask, and TaylorSeer.

        Raises:
            ScheduleWriteError: the file cannot be written.
            ScheduleError: a step computes other sites than the first and last blocks do, or the weights are not those
                of `with_taylor(order, since=2)`.
        """
        write_file(path, cache_dit.text_of(self, self._cache_dit_order()))

    def _cache_dit_order(self) -> int:
        """The order of TaylorSeer that gives these weights in cache-dit; 0 for plain reuse."""
        if self.weights is None:
            return 0
        for order in cache_dit.ORDERS:
            if same_weights(self.with_taylor(order, since=cache_dit.SINCE).weights, self.weights):
                return order
        raise cache_dit.other_weights()

    @classmethod
    def from_taylorseer(cls, config: object, *, steps: int, sites: Iterable[str]) -> Self:
        """The schedule of a `TaylorSeerCacheConfig` of diffusers: its computed steps, and Taylor weights.

        Args:
            config: the config, or a mapping of its fields `cache_interval`, `disable_cache_before_step`,
                `disable_cache_after_step` and `max_order`; those that are left out have the defaults of diffusers.
            steps: number of steps of a run.
            sites: dotted module paths of what the config caches. Its own patterns of modules are not read.
        """
        names = check_sites(sites)
        found = diffusers_caches.taylorseer(config)
        made_by = MadeBy("taylorseer", found.plain())
        return cls(found.mask(steps, len(names)), names, made_by=made_by).with_taylor(found.max_order)

    @classmethod
    def from_magcache(
        cls,
        ratios: Sequence[float],
        *,
        steps: int,
        sites: Iterable[str],
        threshold: float = 0.06,
        max_skip_steps: int = 3,
        retention_ratio: float = 0.2,
    ) -> Self:
        """The schedule that MagCache (arXiv 2506.09045) follows for these magnitude ratios; see `with_ratios` as well.

        MagCache decides by the ratios alone, so its decisions are known before a run. It reuses residuals unscaled.

        Args:
            ratios: measured magnitude ratios, one per step, beginning with 1; for another number of steps the nearest
                are taken, as MagCache does. A list with two ratios per step, one for each half of guidance, must be
                split before.
            steps: number of steps of a run.
            sites: dotted module paths.
            threshold: the accumulated error up to which a step is skipped.
            max_skip_steps: how many steps in a row may be skipped.
            retention_ratio: the share of steps at the beginning that are never skipped.
        """
        names = check_sites(sites)
        found = diffusers_caches.MagCache(steps, threshold, max_skip_steps, retention_ratio)
        own = found.ratios(ratios)
        made_by = MadeBy("magcache", {**found.plain(), "ratios": own})
        return cls(found.mask(own, len(names)), names, made_by=made_by)

    @classmethod
    def from_computed_steps(cls, computed: Iterable[int], *, steps: int, sites: Iterable[str]) -> Self:
        """The schedule of a trace of decisions, such as one of TeaCache or First Block Cache: the steps it computed.

        Raises:
            ScheduleError: a step occurs twice, is not one of 0 ... steps - 1, or step 0 is missing.
        """
        names = check_sites(sites)
        return cls(interchange.mask_of_steps(computed, steps, len(names)), names, made_by=MadeBy("computed-steps"))

    def computed_steps(self) -> list[int]:
        """The steps that are computed: the trace that `from_computed_steps` reads.

        Raises:
            ScheduleError: as for `step_mask`.
        """
        return [step for step, computed in enumerate(self.step_mask()) if computed]

    @classmethod
    def from_invardiff(cls, path: FilePath, *, sites: Iterable[str]) -> Self:
        """Read the books of InvarDiff (arXiv 2512.05134), JSON: reused steps and, in the others, reused modules.

        Args:
            path: the file, for DiT or for Flux.
            sites: dotted module paths in diffusers' model. A site without a book computes in every step that is not
                reused. A reused step reuses all sites. InvarDiff then takes over the last hidden state of the blocks:
                exactly that if the last block is the only site, and nearly that if the modules inside the blocks are.

        Raises:
            ScheduleFileNotFoundError: there is no such file.
            ScheduleError: a book is missing, unknown or of another shape than its sites, or reuses what is no site.
        """
        names, source = check_sites(sites), os.fspath(path)
        with format.named_errors(source):
            mask = invardiff.mask_of_books(invardiff.read_books(source), names)
            return cls(mask, names, made_by=MadeBy("invardiff"))

    def save_invardiff(self, path: FilePath) -> None:
        """Write the books of InvarDiff, which `from_invardiff` reads, for the sites of DiT or of Flux.

        Raises:
            ScheduleWriteError: the file cannot be written.
            ScheduleError: the schedule has weights, or sites that InvarDiff has no book for.
        """
        write_file(path, invardiff.text_of_books(self))

    def save_smoothcache(self, path: FilePath, *, components: Mapping[str, str] | None = None) -> None:
        """Write the schedule in SmoothCache's JSON format; `components` is as in `from_smoothcache`.

        Raises:
            ScheduleWriteError: the file cannot be written.
            ScheduleError: two sites of the same name, in blocks of the same number, are reused differently; or the
                schedule has weights, which the format lacks.
        """
        write_file(path, interchange.smoothcache_text(self, components or {}))

    def step_mask(self) -> list[int]:
        """One entry per step, 1 = compute: cache-dit's `steps_computation_mask`; `from_mask` reads it.

        Raises:
            ScheduleError: a step computes some sites and reuses others, or the schedule has weights, which
                `save_cache_dit` can write.
        """
        return interchange.step_mask_of(self)
