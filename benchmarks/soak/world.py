"""Worlds, runs and events as data: what a seed describes, what a fault prints, and what `shrink` cuts down."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """What one run asks the pipeline for.

    Attributes:
        seed: seed of latents and noise.
        batch: number of images.
        size: index of the image size; each subject has two.
        guided: True if the run starts with guidance.
        prompt: index of the prompt that the run starts with.
        first: step that the run starts with.
    """

    seed: int
    batch: int = 1
    size: int = 0
    guided: bool = False
    prompt: int = 0
    first: int = 0


@dataclass(frozen=True)
class Event:
    """Something that happens after a step of a run.

    Attributes:
        after: the step, counted from the first one that runs.
        kind: "change", "prompt", "prompt in place", "guidance", "raise", "stop", "outside", "gradient" or "collect".
        name: name of the change.
        value: new value of the change, or index of the new prompt.
    """

    after: int
    kind: str
    name: str = ""
    value: int = 0


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        request: what the pipeline is asked for.
        interrupted_at: Ctrl-C comes when this many lines of the package have run; 0 for never.
        state: changes in force when the run starts, as (name, value).
        parameters: index of the values of the parameters.
        before: what happens right before the run: "save and load", "compile again", "another scheduler", "collect",
            "outside" or "gradient".
        events: what happens during the run.
    """

    request: Request
    interrupted_at: int = 0
    state: tuple[tuple[str, int], ...] = ()
    parameters: int = 0
    before: tuple[str, ...] = ()
    events: tuple[Event, ...] = ()


@dataclass(frozen=True)
class World:
    """A pipeline that is compiled once, and its runs in order.

    Attributes:
        seed: seed of its parameters and its schedule.
        subject: name of the pipeline in `SUBJECTS`.
        interface: how it is compiled: "compile" (the pipeline), "model" (the denoiser alone), "reference" or
            "torch.compile".
        lowering: see `harmonica_rt.compile`.
        sampler: name of its scheduler in `SAMPLERS`.
        inference_steps: `num_inference_steps` of every run; some samplers evaluate the denoiser more often.
        variant: selects how the subject's loop is written, and options of `compile`.
        runs: the runs, in order.
    """

    seed: int
    subject: str
    interface: str = "compile"
    lowering: str = "plain"
    sampler: str = "DDIM"
    inference_steps: int = 6
    variant: int = 0
    runs: tuple[Run, ...] = ()
