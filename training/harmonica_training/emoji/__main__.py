"""Command line: `python -m harmonica_training.emoji train | export | evaluate`.

`train` goes on until its last step, SIGTERM or Ctrl-C; the same command then resumes. A process that is killed loses
two minutes at most. `export` writes and measures what the run has so far, in --out; `evaluate` measures what is there.
The default folders are those of the checkout, relative to the current directory.
"""

import argparse
import logging
import shlex
import signal
import sys
import threading
from pathlib import Path

from harmonica_rt.schedule.files import write_atomically
from harmonica_training.emoji.config import EmojiConfig, EvaluationConfig
from harmonica_training.emoji.evaluate import Evaluation, evaluate, load_prompts
from harmonica_training.emoji.export import export
from harmonica_training.emoji.glyphs import Glyphs, find_font, load_glyphs
from harmonica_training.emoji.run import train, trained_so_far
from harmonica_training.emoji.sampling import threads
from harmonica_training.emoji.scenes import SIZES
from harmonica_training.emoji.sheet import save_sheet
from harmonica_training.emoji.training import StoppedError, Workers

BUNDLED = Path("harmonica_rt/demo/emoji-pixart")
WORK = Path("build/emoji-work")
STEPS = 24_000  # of the denoiser


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    defaults, measured = EmojiConfig(), EvaluationConfig()
    result = argparse.ArgumentParser(
        prog="python -m harmonica_training.emoji", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    result.add_argument("command", choices=("train", "export", "evaluate"))
    result.add_argument("--out", type=Path, default=BUNDLED, help="directory of the model (%(default)s)")
    result.add_argument("--work", type=Path, default=WORK, help="directory of the checkpoints (%(default)s)")
    result.add_argument("--font", type=Path, help="the file NotoColorEmoji.ttf, if it is in no usual folder")
    result.add_argument("--threads", type=int, default=2, help="threads of the work (%(default)s)")
    result.add_argument("--seed", type=int, default=defaults.seed)
    result.add_argument("--emoji", type=int, default=defaults.emoji, help="how many are drawn (%(default)s)")
    result.add_argument("--denoiser-steps", type=int, default=STEPS, help="may change on resuming (%(default)s)")
    result.add_argument("--prompts", type=int, default=measured.prompts, help="to measure with (%(default)s)")
    result.add_argument("--steps", type=int, default=measured.steps, help="sampler steps to measure with (%(default)s)")
    result.add_argument("--guidance-scale", type=float, default=measured.guidance_scale)
    result.add_argument("--sheet", type=Path, help="with evaluate: PNG of the first pictures, prompts beside it")
    result.add_argument("--quick", action="store_true", help="a run of a few seconds, to check that it works")
    return result


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    options = parser().parse_args(argv)
    if options.quick:
        config, steps = EmojiConfig.quick(options.seed), 4
    else:
        config, steps = EmojiConfig(seed=options.seed, emoji=options.emoji), options.denoiser_steps
    glyphs = load_glyphs(find_font(options.font), config.emoji, SIZES)
    measured = EvaluationConfig(options.prompts, options.steps, options.guidance_scale)
    if options.command == "train":
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        try:
            train(config, steps, glyphs, options.work, Workers(options.threads, stop))
        except StoppedError as stopped:
            sys.exit(f"{stopped}; the same command resumes")
        return
    with threads(options.threads):
        if options.command == "export":
            trained = trained_so_far(config, glyphs, options.work)
            result = export(trained, glyphs, config, measured, options.out, command(options))
        else:
            result = _evaluate(options, glyphs, measured)
    print("\n".join(result.lines()))


def _evaluate(options: argparse.Namespace, glyphs: Glyphs, measured: EvaluationConfig) -> Evaluation:
    scenes = load_prompts(options.out)[: measured.prompts]
    result, images = evaluate(options.out, glyphs, measured, scenes)
    if options.sheet is not None:
        save_sheet(images[:96], options.sheet, columns=min(12, len(images)))
        text = "\n".join(scene.prompt for scene in scenes[:96]) + "\n"
        write_atomically(options.sheet.with_suffix(".txt"), text)
    return result


def command(options: argparse.Namespace) -> str:
    """The commands that repeat this run, without the folders of this machine."""
    words = ["python", "-m", "harmonica_training.emoji", "train", "--seed", str(options.seed)]
    if options.quick:
        words.append("--quick")
    else:
        words += ["--emoji", str(options.emoji), "--denoiser-steps", str(options.denoiser_steps)]
    return shlex.join(words)


if __name__ == "__main__":
    main()
