"""Fits the weights of a schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from harmonica_rt.api.subject import model_to_compile
from harmonica_rt.arguments import check_pipeline_arguments, check_schedule, check_seed, list_of_calls
from harmonica_rt.errors import ArgumentError
from harmonica_rt.fitting.fit import fit_model, fit_pipeline
from harmonica_rt.fitting.moment_table import FitOptions
from harmonica_rt.options import check_flags, check_whole_number
from harmonica_rt.pipelines.fit import check_fit, warn_about_sampler
from harmonica_rt.schedule import Schedule
from harmonica_rt.schedule.weights import MOST_WEIGHTS


def fit(
    model_or_pipeline: Any,
    schedule: Schedule,
    calls: Iterable[Mapping[str, Any]],
    *,
    order: int = 2,
    per_site: bool = False,
    seed: int = 0,
) -> Schedule:
    """A copy of a schedule with weights that are fitted to a model by least squares, in about the time of two runs.

    At each step that reuses sites, the plain model runs the call first, and the weights `w` of the step are those of
    the least sum of squares `|v - sum_j w[j] v_j|^2` over the elements of all reused sites, all calls so far and both
    halves of guidance. `v` is what a site returns there, `v_j` what it returned when it was the j-th last time
    computed. The step is then run with these weights and the run goes on from its result, so that later steps are
    fitted to inputs as they will meet them. The schedule takes the weights that follow from all calls. Sums are in
    float64, of differences of the values; an entry that has fewer than `order` earlier values takes all it has.

    The rules of TaylorSeer (arXiv 2503.06923), HiCache (2508.16984) and Spectrum (2603.01623) make such weights
    without looking at the model: `Schedule.with_taylor`, `with_hermite`, `with_chebyshev`.

    Args:
        model_or_pipeline: a pipeline, or a model by itself. It is left as it was, compiled or not, also if the fit
            fails or is interrupted. The plain model runs, eagerly.
        schedule: says what is reused; its weights are replaced.
        calls: for a pipeline, the keyword arguments of its calls, one dict per call: different prompts or classes,
            with as many steps as the schedule has. For a model, the keyword arguments of one call per step, for one run
            or for several, one after the other. One call of a few images is enough for weights that sites share.
        order: the most weights per entry, 1 ... 4; the first belongs to the latest value.
        per_site: fit weights for each site of a step instead of weights that its sites share. That takes more samples;
            on the bundled model it gave worse images (docs/quality.md).
        seed: call k of a pipeline draws its noise with `seed + k`, unless its arguments have a generator.

    Returns:
        The schedule with weights `[steps, order]`, or `[steps, sites, order]` if sites of a step differ, and with
        `weights_by`: the method `least-squares`, the options, the number of calls, `samples` (the rows of the
        denoiser's batches, over all calls) and `relative_error`, the root mean square error of the reused values
        divided by that of plain reuse, in the fitted calls. If it names no model or sampler, these are recorded.
        Entries that no call reached (image-to-image begins late) keep their weights.

    Raises:
        ArgumentError: the schedule reuses nothing, `order` is not 1 ... 4, there are no calls, a call is no dict, or
            the pipeline cannot be called so.
        ScheduleMismatchError: the schedule is for another model, or a call has another number of steps.
        HarmonicaError: no call reaches a step that reuses a site, a site returns NaN or infinity, or the model is
            compiled by torch.compile with this package's backend.
    """
    check_schedule(schedule)
    if not isinstance(schedule, Schedule):
        raise ArgumentError("fit takes one schedule; fit each schedule of a set, with calls of its number of steps")
    check_flags(per_site=per_site)
    check_seed(seed)
    check_whole_number("order", order, 1)
    if order > MOST_WEIGHTS:
        raise ArgumentError(f"order must be at most {MOST_WEIGHTS}, the most weights of an entry, got {order}")
    if schedule.compute.all():
        raise ArgumentError("the schedule reuses nothing, so it has no weights to fit")
    model = model_to_compile(model_or_pipeline)
    check_fit(model, schedule)
    options = FitOptions(order, per_site)
    if isinstance(model_or_pipeline, nn.Module):
        return fit_model(model, schedule, _runs_of_model(calls, schedule.steps), options)
    given = list_of_calls(calls, "calls=[{...}, ...] holds the keyword arguments of the pipeline's calls, as dicts")
    if not given:
        raise ArgumentError("calls is empty; pass the keyword arguments of at least one call of the pipeline")
    for call in given:
        check_pipeline_arguments(model_or_pipeline, call, "fit")
    warn_about_sampler(model_or_pipeline, schedule)
    return fit_pipeline(model_or_pipeline, schedule, given, options, seed)


def _runs_of_model(calls: object, steps: int) -> list[Mapping[str, Any]]:
    given = list_of_calls(calls, "calls=[{...}, ...] holds the keyword arguments of one call per step, as dicts")
    if not given or len(given) % steps:
        raise ArgumentError(
            f"calls holds {len(given)} calls, the schedule has {steps} steps: pass one call per step, for one run or "
            "for several, one after the other"
        )
    return given
