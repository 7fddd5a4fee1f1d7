"""The schedule: ways to make, read, draw and write one. Its content is checked in `data`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from harmonica_rt.schedule import bundled, format, heat_map, hub, producers
from harmonica_rt.schedule.checks import check_compute, check_number, check_sites, check_timesteps
from harmonica_rt.schedule.exchanged import ExchangedSchedule, FilePath
from harmonica_rt.schedule.provenance import MadeBy, ModelInfo, SamplerInfo
from harmonica_rt.schedule.writing import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Schedule(ExchangedSchedule):
    """A static cache schedule. Immutable and hashable; `==` compares all fields and returns a single bool.

    Attributes:
        compute: bool `[steps, sites]`, True = compute, False = reuse; read-only.
        sites: dotted module paths in execution order.
        model: the model it was made for.
        sampler: the sampler it was made for.
        timesteps: the sampler's timesteps, one per step. Provenance only: whether a schedule fits depends on its number
            of steps.
        guidance: the guidance scale it was made for.
        made_by: the method that made it.
        weights: what the latest computed values are multiplied by, newest first, where an entry reuses: float64
            `[steps, order]`, shared by the sites of a step, or `[steps, sites, order]`; read-only. None: plain reuse of
            the latest value, weights `[1]`.
        weights_by: the method that made the weights; None if unknown or if there are none.

    Raises:
        ScheduleError: a field is invalid. The message names the field, what was expected, what was given, and what to
            do.
    """

    @classmethod
    def from_array(
        cls,
        mask: ArrayLike,
        sites: Iterable[str],
        *,
        model: ModelInfo | None = None,
        sampler: SamplerInfo | None = None,
        timesteps: Sequence[float] | None = None,
        guidance: float | None = None,
        made_by: MadeBy | None = None,
    ) -> Schedule:
        """Make a schedule from a mask `[steps, sites]` of bools or 0/1 integers, True or 1 = compute."""
        times = None if timesteps is None else tuple(timesteps)
        return cls(check_compute(mask), check_sites(sites), model, sampler, times, guidance, made_by)

    @classmethod
    def all_compute(cls, *, steps: int, sites: Iterable[str]) -> Schedule:
        """Make a schedule that reuses nothing: the plain model."""
        names = check_sites(sites)
        return cls(producers.every_mask(1, steps, len(names)), names, made_by=MadeBy("all-compute"))

    @classmethod
    def every(cls, k: int, *, steps: int, sites: Iterable[str]) -> Schedule:
        """Compute all sites at steps 0, k, 2k, ... and reuse them in between (FORA, arXiv 2407.01425)."""
        names = check_sites(sites)
        return cls(producers.every_mask(k, steps, len(names)), names, made_by=MadeBy("every", {"k": k}))

    @classmethod
    def from_mask(
        cls, step_mask: producers.StepMask | Mapping[str, producers.StepMask], *, sites: Iterable[str]
    ) -> Schedule:
        """Make a schedule from a mask over steps, 1 = compute: `"1101"`, `[1, 1, 0, 1]`, or one per site pattern.

        In a mapping such as `{"attn*": "1010", "*.ff": "1100"}`, a pattern matches a site's whole path or its kind, and
        the first match decides. Each site needs a match, and each pattern must decide at least one site.
        """
        names = check_sites(sites)
        return cls(producers.step_mask(step_mask, names), names, made_by=MadeBy("step-mask"))

    @classmethod
    def random(cls, cur: float, *, steps: int, sites: Iterable[str], seed: int) -> Schedule:
        """Reuse exactly `round(cur * steps * sites)` random entries, none of them at step 0."""
        names = check_sites(sites)
        ratio = check_number(cur, "cur")
        mask = producers.random_mask(ratio, steps, len(names), seed)
        return cls(mask, names, made_by=MadeBy("random", {"cur": ratio, "seed": seed}))

    @classmethod
    def from_pretrained(cls, repo_or_dir: FilePath, *, filename: str = hub.FILE, **download: Any) -> Schedule:
        """Read a folder that `save_pretrained` wrote, or a repository of the Hugging Face hub, `owner/name`.

        `download` is passed to `huggingface_hub.hf_hub_download`: `revision`, `token`, `cache_dir`,
        `local_files_only`, ...

        Raises:
            ScheduleFileNotFoundError: there is no such folder, repository or file; or neither the hub nor its cache has
                it.
            ScheduleError: the file is malformed.
        """
        return cls.load(hub.find_file(repo_or_dir, filename, **download))

    @classmethod
    def load(cls, path: FilePath) -> Schedule:
        """Read a schedule file (docs/schedule-format.md).

        Raises:
            ScheduleFileNotFoundError: there is no such file (both a ScheduleError and a FileNotFoundError).
            ScheduleError: the file is malformed in any way; the message names the file and the field.
        """
        source = os.fspath(path)
        return cls._parsed(format.read_bytes(source), source)

    @classmethod
    def known(cls, name: str) -> Schedule:
        """A schedule bundled with the package; `known_names()` lists them."""
        return cls._parsed(bundled.read_known(name), name)

    @classmethod
    def _parsed(cls, data: bytes, source: str) -> Schedule:
        with format.named_errors(source):
            return cls(**format.parse(data))

    @staticmethod
    def known_names() -> tuple[str, ...]:
        """Names of the bundled schedules."""
        return bundled.known_names()

    def save(self, path: FilePath) -> None:
        """Write the schedule as JSON (docs/schedule-format.md), completely or not at all.

        Raises:
            ScheduleWriteError: the file cannot be written (both a ScheduleError and an OSError).
        """
        write_file(path, format.to_text(self))

    def save_pretrained(self, folder: FilePath, *, base_model: str | None = None) -> None:
        """Write `schedule.json`, a heat map and a card (README.md) to a folder.

        A card of another library, such as a model's, is left unchanged. `base_model` is the hub's id of the model.
        """
        hub.write_folder(self, folder, base_model)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        message: str = "Add a cache schedule",
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub, in one commit.

        Args:
            repo_id: `owner/name`; created if it does not exist. The model's own repository will do.
            base_model: the hub's id of the model, for the card.
            private: whether a new repository is private.
            token: the hub token; by default that of the logged-in user.
            revision: the branch.
            message: the commit message.

        Returns:
            The commit's URL.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the hub refuses the request.
        """
        return hub.push(
            self, repo_id, base_model=base_model, private=private, token=token, revision=revision, message=message
        )

    def plot(self, path: FilePath | None = None) -> Figure:
        """Steps x sites as a heat map, with one panel per kind of site; saved to `path` (PNG, SVG, PDF) if given."""
        return heat_map.plot(self, path)

    def with_provenance(
        self,
        *,
        model: ModelInfo | None = None,
        sampler: SamplerInfo | None = None,
        timesteps: Sequence[float] | None = None,
        guidance: float | None = None,
        made_by: MadeBy | None = None,
    ) -> Schedule:
        """A copy with the given provenance and the same mask and sites; arguments that are None change nothing."""
        return replace(
            self,
            model=self.model if model is None else model,
            sampler=self.sampler if sampler is None else sampler,
            timesteps=self.timesteps if timesteps is None else check_timesteps(timesteps, self.steps),
            guidance=self.guidance if guidance is None else guidance,
            made_by=self.made_by if made_by is None else made_by,
        )
