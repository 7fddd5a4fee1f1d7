"""The schedule: `bool[steps, sites]`, True = compute, False = reuse, with what it was made for and how.

The hazard: a schedule that is nearly right - a site less, a row out of order, a first step that reads what no
step wrote - still runs and gives a wrong image. So one is checked when it is made, by whatever way, and
cannot change after.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from harmonica_rt.errors import ScheduleError
from harmonica_rt.schedule import draw, format, hub, interchange, producers, routers
from harmonica_rt.schedule.checks import (
    check_compute,
    check_number,
    check_scores_shape,
    check_sites,
    check_timesteps,
)
from harmonica_rt.schedule.files import write_atomically
from harmonica_rt.schedule.format import ScheduleFileNotFoundError
from harmonica_rt.schedule.provenance import MadeBy, ModelInfo, SamplerInfo
from harmonica_rt.untrusted.text import one_line, quoted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FilePath = str | os.PathLike[str]


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """A static cache schedule. Immutable and hashable; `==` compares everything and gives one bool.

    Attributes:
        compute: bool `[steps, sites]`, True = compute, False = reuse; read-only.
        sites: dotted module paths in execution order.
        model: the model it was made for.
        sampler: the sampler it was made for.
        timesteps: the sampler's timesteps, one per step. Provenance only; a schedule fits by its number of
            steps.
        guidance: the guidance scale it was made for.
        made_by: the method that made it.

    Raises:
        ScheduleError: naming the field, what was expected, what came, and what to do.
    """

    compute: NDArray[np.bool_]
    sites: tuple[str, ...]
    model: ModelInfo | None = None
    sampler: SamplerInfo | None = None
    timesteps: tuple[float, ...] | None = None
    guidance: float | None = None
    made_by: MadeBy | None = None

    def __post_init__(self) -> None:
        compute, sites = check_compute(self.compute), check_sites(self.sites)
        steps = len(compute)
        if compute.shape[1] != len(sites):
            raise ScheduleError(
                f"compute: expected one column a site, got {compute.shape[1]} columns for {len(sites)} sites"
            )
        if not compute[0].all():
            first = [site for site, computes in zip(sites, compute[0], strict=True) if not computes]
            raise ScheduleError(
                f"compute: step 0 reuses {len(first)} of {len(sites)} sites ({quoted(first[0])} first), but "
                f"nothing is stored before it; make every entry of step 0 compute"
            )
        set_ = object.__setattr__
        # frombuffer over bytes: unlike setflags(write=False), nobody can make it writable again
        set_(self, "compute", np.frombuffer(compute.tobytes(), dtype=np.bool_).reshape(compute.shape))
        set_(self, "sites", sites)
        for field, kind in (("model", ModelInfo), ("sampler", SamplerInfo), ("made_by", MadeBy)):
            value = getattr(self, field)
            if value is not None and not isinstance(value, kind):
                raise ScheduleError(f"{field}: expected a {kind.__name__} or None, got {type(value).__name__}")
        if self.timesteps is not None:
            set_(self, "timesteps", check_timesteps(self.timesteps, steps))
        if self.guidance is not None:
            set_(self, "guidance", check_number(self.guidance, "guidance"))
        if self.made_by is not None and self.made_by.scores is not None:
            check_scores_shape(self.made_by.scores, compute.shape)

    @property
    def steps(self) -> int:
        """Number of steps (NFE)."""
        return int(self.compute.shape[0])

    @property
    def cur(self) -> float:
        """Cache utilisation ratio: reused entries / all entries, 0 ... 1."""
        return float(1.0 - self.compute.mean())

    def cur_per_step(self) -> NDArray[np.float64]:
        """CUR of each step, `[steps]`."""
        shares: NDArray[np.float64] = self.compute.mean(axis=1, dtype=np.float64)
        return 1.0 - shares

    def cur_per_kind(self) -> dict[str, float]:
        """CUR of each kind of site (`attn1`, `ff`, ...: the last name in its path), as they first appear."""
        kinds = [producers.site_kind(site) for site in self.sites]
        return {kind: float(1.0 - self.compute[:, [k == kind for k in kinds]].mean()) for kind in dict.fromkeys(kinds)}

    @property
    def patterns(self) -> int:
        """Number of distinct rows, the all-compute row among them."""
        return len(np.unique(self.compute, axis=0))

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Schedule) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[type[Schedule], tuple[object, ...]]:
        # through the constructor, so that copies and unpickled schedules are read-only as well
        return Schedule, (np.array(self.compute), *self._key()[2:])

    def __repr__(self) -> str:
        made = f", made by {one_line(self.made_by.method)}" if self.made_by else ""
        return f"<Schedule {self.steps} steps x {len(self.sites)} sites, CUR {self.cur:.2%}{made}>"

    def _key(self) -> tuple[object, ...]:
        shape, mask = self.compute.shape, self.compute.tobytes()
        rest = (self.sites, self.model, self.sampler, self.timesteps, self.guidance, self.made_by)
        return (shape, mask, *rest)

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
        """From a mask `[steps, sites]` of bools or of 0/1 integers, True or 1 = compute."""
        times = None if timesteps is None else tuple(timesteps)
        return cls(check_compute(mask), check_sites(sites), model, sampler, times, guidance, made_by)

    @classmethod
    def all_compute(cls, *, steps: int, sites: Iterable[str]) -> Schedule:
        """Nothing is reused: the plain model."""
        names = check_sites(sites)
        return cls(producers.every_mask(1, steps, len(names)), names, made_by=MadeBy("all-compute"))

    @classmethod
    def every(cls, k: int, *, steps: int, sites: Iterable[str]) -> Schedule:
        """Computes all sites at steps 0, k, 2k, ... and reuses them in between (FORA, arXiv 2407.01425)."""
        names = check_sites(sites)
        return cls(producers.every_mask(k, steps, len(names)), names, made_by=MadeBy("every", {"k": k}))

    @classmethod
    def from_mask(
        cls, step_mask: producers.StepMask | Mapping[str, producers.StepMask], *, sites: Iterable[str]
    ) -> Schedule:
        """From a mask over steps, 1 = compute: `"1101"`, `[1, 1, 0, 1]`, or one for each pattern of sites.

        In a mapping, `{"attn*": "1010", "*.ff": "1100"}`, a pattern matches a site's whole path or its kind,
        and the first that matches decides. Each site needs one, and each pattern must decide at least one
        site.
        """
        names = check_sites(sites)
        return cls(producers.step_mask(step_mask, names), names, made_by=MadeBy("step-mask"))

    @classmethod
    def random(cls, cur: float, *, steps: int, sites: Iterable[str], seed: int) -> Schedule:
        """Reuses exactly `round(cur * steps * sites)` random entries, none of them at step 0."""
        names = check_sites(sites)
        ratio = check_number(cur, "cur")
        mask = producers.random_mask(ratio, steps, len(names), seed)
        return cls(mask, names, made_by=MadeBy("random", {"cur": ratio, "seed": seed}))

    @classmethod
    def from_router(
        cls,
        path: FilePath,
        *,
        sites: Iterable[str] | None = None,
        steps: int | None = None,
        threshold: float | None = None,
        kind: routers.RouterKind = "auto",
    ) -> Schedule:
        """From a router checkpoint of the released HarmoniCa or Learning-to-Cache code, computed over tau.

        `threshold` is tau; by default 0.1, and 0.9 for U-ViT, as in the released commands.
        `routers.read_router` has the details.
        """
        names = None if sites is None else check_sites(sites)
        return cls(**routers.read_router(path, sites=names, steps=steps, threshold=threshold, kind=kind))

    @classmethod
    def from_smoothcache(
        cls, path: FilePath, *, sites: Iterable[str], components: Mapping[str, str] | None = None
    ) -> Schedule:
        """From a schedule file of SmoothCache (arXiv 2411.10510).

        A site without a list computes at every step, as it does there. `components` renames: `{"attn": "attn1", "mlp":
        "ff"}` where a file made for a model with `attn` and `mlp` is for one whose modules are `attn1` and `ff`.

        Raises:
            ScheduleError: not such a file, or one with lists that decide no site.
        """
        names, source = check_sites(sites), os.fspath(path)
        try:
            lists = format.read_object(format.read_bytes(source), "not a schedule of SmoothCache")
            mask = interchange.smoothcache_mask(lists, names, components or {})
            return cls(mask, names, made_by=MadeBy("smoothcache"))
        except ScheduleFileNotFoundError:
            raise
        except ScheduleError as error:
            raise ScheduleError(f"{source}: {error}") from error

    @classmethod
    def from_pretrained(cls, repo_or_dir: FilePath, *, filename: str = hub.FILE, **download: Any) -> Schedule:
        """From a folder that `save_pretrained` wrote, or a repository of the Hugging Face hub, `owner/name`.

        `download` goes to `huggingface_hub.hf_hub_download`: `revision`, `token`, `cache_dir`, `local_files_only`, ...

        Raises:
            ScheduleFileNotFoundError: no such folder, repository or file; or neither the hub nor its cache has it.
            ScheduleError: the file is malformed.
        """
        return cls.load(hub.find_file(repo_or_dir, filename, **download))

    @classmethod
    def load(cls, path: FilePath) -> Schedule:
        """Read a schedule file (docs/schedule-format.md).

        Raises:
            ScheduleFileNotFoundError: a ScheduleError and a FileNotFoundError.
            ScheduleError: the file is malformed in any way; the message names the file and the field.
        """
        source = os.fspath(path)
        return cls._parsed(format.read_bytes(source), source)

    @classmethod
    def known(cls, name: str) -> Schedule:
        """A schedule that comes with the package; `known_names()` lists them."""
        return cls._parsed(format.read_known(name), name)

    @classmethod
    def _parsed(cls, data: bytes, source: str) -> Schedule:
        try:
            return cls(**format.parse(data))
        except ScheduleError as error:
            raise ScheduleError(f"{source}: {error}") from error

    @staticmethod
    def known_names() -> tuple[str, ...]:
        """Names of the schedules that come with the package."""
        return format.known_names()

    def save(self, path: FilePath) -> None:
        """Write the schedule as JSON (docs/schedule-format.md), whole or not at all."""
        write_atomically(path, format.to_text(self))

    def save_pretrained(self, folder: FilePath, *, base_model: str | None = None) -> None:
        """Write `schedule.json`, a heat map and a card (README.md) to a folder.

        A card of another library, such as a model's, is left as it is. `base_model` is the hub's id of the model.
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
            repo_id: `owner/name`; made if it does not exist. The model's own repository will do.
            base_model: the hub's id of the model, for the card.
            private: of a new repository.
            token: of the hub; by default the one that is logged in.
            revision: the branch.
            message: of the commit.

        Returns:
            The commit's URL.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the hub refuses.
        """
        return hub.push(
            self, repo_id, base_model=base_model, private=private, token=token, revision=revision, message=message
        )

    def save_smoothcache(self, path: FilePath, *, components: Mapping[str, str] | None = None) -> None:
        """Write the schedule as SmoothCache's JSON; `components` as in `from_smoothcache`.

        Raises:
            ScheduleError: two sites of the same name in blocks of the same number are reused differently.
        """
        write_atomically(path, interchange.smoothcache_text(self, components or {}))

    def step_mask(self) -> list[int]:
        """One entry a step, 1 = compute: cache-dit's `steps_computation_mask`; `from_mask` reads it.

        Raises:
            ScheduleError: a step computes some sites and reuses others.
        """
        return interchange.step_mask_of(self)

    def plot(self, path: FilePath | None = None) -> Figure:
        """Steps x sites as a heat map, a panel a kind of site; saved to `path` (PNG, SVG, PDF) if given."""
        return draw.plot(self, path)

    def with_provenance(
        self,
        *,
        model: ModelInfo | None = None,
        sampler: SamplerInfo | None = None,
        timesteps: Sequence[float] | None = None,
        guidance: float | None = None,
        made_by: MadeBy | None = None,
    ) -> Schedule:
        """The same mask and sites with the given provenance; what is None stays as it is."""
        return replace(
            self,
            model=self.model if model is None else model,
            sampler=self.sampler if sampler is None else sampler,
            timesteps=self.timesteps if timesteps is None else check_timesteps(timesteps, self.steps),
            guidance=self.guidance if guidance is None else guidance,
            made_by=self.made_by if made_by is None else made_by,
        )
