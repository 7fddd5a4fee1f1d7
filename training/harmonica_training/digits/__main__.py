"""Command line: `python -m harmonica_training.digits` trains, saves and measures the model.

The default folders are those of the checkout, relative to the current directory.
"""

import argparse
import dataclasses
import json
import logging
import shlex
from pathlib import Path

from harmonica_training.digits.config import DigitsConfig, EvaluationConfig
from harmonica_training.digits.data import load_split
from harmonica_training.digits.evaluate import evaluate, save_grid
from harmonica_training.digits.files import read_json
from harmonica_training.digits.run import train_and_save

BUNDLED = Path("harmonica_rt/demo/digits-dit")
WORK = Path("build/digits-work")


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    defaults, measured = DigitsConfig(), EvaluationConfig()
    result = argparse.ArgumentParser(prog="python -m harmonica_training.digits", description=__doc__)
    result.add_argument("--out", type=Path, default=BUNDLED, help="directory of the model (%(default)s)")
    result.add_argument("--work", type=Path, default=WORK, help="directory that keeps finished stages (%(default)s)")
    result.add_argument("--seed", type=int, default=defaults.seed)
    result.add_argument("--denoiser-steps", type=int, default=defaults.denoiser_steps)
    result.add_argument("--guidance-scale", type=float, default=measured.guidance_scale)
    result.add_argument("--steps", type=int, default=measured.steps, help="sampler steps for the measurement")
    result.add_argument("--images", type=int, default=measured.images, help="images to generate for the measurement")
    result.add_argument("--quick", action="store_true", help="a run of a few seconds, to check that it works")
    result.add_argument("--no-finish", action="store_true", help="save and measure the last checkpoint as it is")
    result.add_argument("--evaluate", action="store_true", help="only measure the model in --out; writes nothing")
    result.add_argument("--grid", type=Path, help="with --evaluate: PNG of the first 100 images")
    return result


def main(argv: list[str] | None = None) -> None:
    """Run the command line, and print the figures as JSON."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parser().parse_args(argv)
    measured = EvaluationConfig(options.images, options.steps, options.guidance_scale)
    if options.evaluate:
        image_size = read_json(options.out / "vae" / "config.json")["sample_size"]
        result, images = evaluate(options.out, load_split(image_size), measured)
        if options.grid is not None:
            save_grid(images[:100], options.grid)
    else:
        if options.quick:
            config = DigitsConfig.quick(options.seed)
        else:
            config = DigitsConfig(seed=options.seed, denoiser_steps=options.denoiser_steps)
        result = train_and_save(
            config, measured, options.out, options.work, command(options), finish=not options.no_finish
        )
    print(json.dumps(dataclasses.asdict(result), indent=2))


def command(options: argparse.Namespace) -> str:
    """The command that repeats this run, without the folders of this machine."""
    out = options.out.name if options.out.is_absolute() else str(options.out)
    words = ["python", "-m", "harmonica_training.digits", "--out", out, "--seed", str(options.seed)]
    if options.quick:
        words.append("--quick")
    else:
        words += ["--denoiser-steps", str(options.denoiser_steps)]
    words += ["--guidance-scale", str(options.guidance_scale)]
    words += ["--steps", str(options.steps), "--images", str(options.images)]
    return shlex.join(words)


if __name__ == "__main__":
    main()
