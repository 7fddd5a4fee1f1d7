"""The denoiser: a `DiTTransformer2DModel` trained to predict velocity on cached latents.

Hazards: in diffusers' DiT every block has its own class table and, in training mode, drops labels independently. So the
model is trained in evaluation mode (it has no other dropout), and labels are dropped here. The tables have 1,001 rows,
of which 11 are used; the others start at zero, get neither gradient nor decay, and stay zero.
"""

import dataclasses
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn
from tqdm import tqdm

from harmonica_rt.untrusted.text import one_line
from harmonica_training.digits.autoencoder import DOWNSAMPLING, LATENT_CHANNELS
from harmonica_training.digits.config import NULL_CLASS, NUM_CLASSES, DigitsConfig
from harmonica_training.digits.data import batches
from harmonica_training.digits.files import read_torch
from harmonica_training.digits.noisy_batch import backward, noisy_batch
from harmonica_training.digits.optim import AveragedParameters, learning_rate, set_learning_rate
from harmonica_training.errors import TrainingError

logger = logging.getLogger(__name__)
STATE = ("model", "averages", "optimizer", "generator", "step", "losses", "seconds", "resumed")  # of a checkpoint
LOSS_WINDOW = 100  # steps over which a reported loss is averaged


@dataclasses.dataclass(frozen=True)
class DenoiserTraining:
    """A denoiser with averaged parameters, in evaluation mode.

    Attributes:
        model: the denoiser.
        steps: training steps done.
        losses: mean loss of each 100 steps in turn.
        seconds: wall time of all training runs that led here, seconds.
        resumed: steps at which training resumed after a break.
    """

    model: DiTTransformer2DModel
    steps: int
    losses: list[float]
    seconds: float
    resumed: list[int]


def build_scheduler() -> DDIMScheduler:
    """DiT's noise schedule (Peebles and Xie, arXiv 2212.09748), linear over 1,000 steps, but with velocity prediction.

    DiT predicts noise, whose error hardly counts at high noise, where the digit is decided: after 1,400 steps with
    min-SNR weights 12 of 40 images were recognised. With velocity (Salimans and Ho, arXiv 2202.00512) it was 40 of
    40 after 1,000.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type="v_prediction",
    )


def build_denoiser(config: DigitsConfig) -> DiTTransformer2DModel:
    """A denoiser for latents [B, 4, S, S] with the initial parameters of DiT, in evaluation mode."""
    model = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=config.layers,
        sample_size=config.image_size // DOWNSAMPLING,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
        norm_type="ada_norm_zero",
    )
    initialise(model)
    return model.eval()


@torch.no_grad()
def initialise(model: DiTTransformer2DModel) -> None:
    """Set DiT's initial parameters: blocks are the identity, the output and unused class rows are zero. In place."""
    initialise_linear(model, model.pos_embed.proj)
    for block in model.transformer_blocks:
        embedder = block.norm1.emb
        nn.init.normal_(embedder.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.timestep_embedder.linear_2.weight, std=0.02)
        table = embedder.class_embedder.embedding_table.weight  # [1001, D]
        nn.init.zeros_(table)
        nn.init.normal_(table[:NUM_CLASSES], std=0.02)
        nn.init.normal_(table[NULL_CLASS:], std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)


@torch.no_grad()
def initialise_linear(model: nn.Module, patch: nn.Conv2d) -> None:
    """Set the linear layers of a transformer and its patch embedding to DiT's initial values, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(patch.weight.view(len(patch.weight), -1))
    if patch.bias is not None:
        nn.init.zeros_(patch.bias)


def train_denoiser(config: DigitsConfig, latents: Tensor, labels: Tensor, checkpoint: Path) -> DenoiserTraining:
    """Train on cached latents; resume from `checkpoint` if it exists, and write it every few minutes.

    Args:
        config: the caller ensures that a checkpoint comes from the same one.
        latents: [N, 4, S, S], mean 0 and deviation 1.
        labels: int64 [N], 0 to 9.
        checkpoint: file of the model, averages, optimiser, generator and step.

    Raises:
        TrainingError: the checkpoint is damaged, or of another model.

    Returns:
        the denoiser with averaged parameters. A resumed run shuffles the latents again, so it does not equal an
        uninterrupted run bit for bit.
    """
    torch.manual_seed(config.seed)
    model = build_denoiser(config)
    averages = AveragedParameters(model, config.ema_decay)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    alphas_cumprod = build_scheduler().alphas_cumprod
    first, losses, earlier, resumed = 0, list[float](), 0.0, list[int]()
    if checkpoint.exists():
        state = read_torch(checkpoint, STATE)
        try:
            model.load_state_dict(state["model"])
            averages.restore(state["averages"], state["step"])
            optimizer.load_state_dict(state["optimizer"])
            generator.set_state(state["generator"])
            first, losses, earlier = int(state["step"]), list(state["losses"]), float(state["seconds"])
            resumed = [*state["resumed"], first] if first < config.denoiser_steps else list(state["resumed"])
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise TrainingError(f"{checkpoint} is of another model, or damaged: {one_line(error, 300)}") from error
        logger.info("resuming from step %d of %s", first, checkpoint.name)
    workers = torch.get_num_threads()
    torch.set_num_threads(1)  # inside operators, until this is done: the workers are the threads
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    order = batches(len(latents), config.denoiser_batch, generator)
    started = saved = time.monotonic()
    window: list[float] = []
    progress = tqdm(
        range(first, config.denoiser_steps), desc="denoiser", unit="step", mininterval=10.0,
        initial=first, total=config.denoiser_steps,
    )  # fmt: skip
    for step in progress:
        index = next(order)
        batch = noisy_batch(alphas_cumprod, latents[index], labels[index], config.label_dropout, generator)
        loss = backward(model, batch, pool, workers)
        set_learning_rate(optimizer, learning_rate(step, config.denoiser_steps, config.denoiser_lr))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averages.update(model)
        window.append(loss)
        last = step + 1 == config.denoiser_steps
        if len(window) == LOSS_WINDOW or last:
            losses.append(sum(window) / len(window))
            window.clear()
            progress.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
        now = time.monotonic()
        # only at the end of a window, so that the loss curve has no gap
        if (not window and now - saved > config.checkpoint_seconds) or last:
            state = {
                "model": model.state_dict(),
                "averages": averages.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "step": step + 1,
                "losses": losses,
                "seconds": earlier + now - started,
                "resumed": resumed,
            }
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)
            saved = now
    pool.shutdown()
    torch.set_num_threads(workers)
    return load_averaged(config, checkpoint)


def load_averaged(config: DigitsConfig, checkpoint: Path) -> DenoiserTraining:
    """The averaged denoiser of a checkpoint, finished or not.

    Raises:
        FileNotFoundError: there is no checkpoint.
        TrainingError: it is damaged, or of another model.
    """
    state = read_torch(checkpoint, STATE)
    model = build_denoiser(config)
    try:
        model.load_state_dict(state["averages"])  # parameters only: the position table is not persistent
    except (RuntimeError, TypeError, AttributeError) as error:
        raise TrainingError(f"{checkpoint} is of another model, or damaged: {one_line(error, 300)}") from error
    return DenoiserTraining(model, state["step"], state["losses"], state["seconds"], state["resumed"])
