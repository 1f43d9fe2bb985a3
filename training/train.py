"""The training loop: data → augmentation → step → validation → checkpoint, readable from top to bottom in `train`.

Everything random is a function of (seed, epoch) or (seed, step), and everything else that a step depends on is in the
training checkpoint. A run that is killed and resumed therefore ends with the same weights as one that was not.

Two files appear in the output folder: `last.safetensors`, from which the run resumes, and at the end
`model.safetensors`, the released checkpoint (the averaged weights, when averaging is on).
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from model.architectures import Network, build_network
from model.convmixer import ConvMixer, count_parameters
from training.augment import Augmentation
from training.calibrate import calibrate
from training.config import TrainConfig
from training.data import ImageSet, split_validation
from training.distill import Distillation
from training.distributed import join, local_device
from training.ema import MovingAverage
from training.errors import ConfigError, DataError, DivergenceError, ResumeError, Stopped, StorageError
from training.evaluate import compute_logits
from training.fused import use_cpu_kernels
from training.muon import Muon, hidden_matrices
from training.runtime import Runtime, autocast
from training.state import Progress, TrainingState

CHECKPOINT_INTERVAL_S = 300.0
"""A kill costs at most this much work; a checkpoint of 0.7 M parameters takes some milliseconds."""


def train(  # noqa: PLR0912, PLR0915 - one loop, read from top to bottom
    config: TrainConfig,
    data: ImageSet,
    output: Path,
    runtime: Runtime,
    *,
    init: Path | None = None,
    teachers: Sequence[Path] = (),
    resume: bool = False,
    finish: bool = False,
    deadline: float = math.inf,
) -> Path:
    """Trains one network.

    Args:
        config: the run; `config.model.num_classes` is replaced by the number of classes in `data`.
        data: training images of side `config.image_size`; a validation slice is held out of them.
        output: folder for checkpoints and logs.
        runtime: device, precision, compilation and layout.
        init: a released checkpoint whose weights the run begins with (fine-tuning, or one more cycle of the schedule as
            in arXiv 1608.03983); a resumed run must have begun with it.
        teachers: released checkpoints whose answers to the same pictures, or the mean of them, the network learns to give.
        resume: continue from `output/last.safetensors`.
        finish: with `resume`, take no further step and release what the run has come to.
        deadline: value of `time.monotonic()` after which the run stops as if asked to by a signal.

    Returns:
        Path of the released checkpoint, `output/model.safetensors`. If that of a finished run is there it is left as it is, since
        it may have been calibrated anew.

    Raises:
        DataError: fewer images than one batch.
        ConfigError: `init` holds another network, a teacher other classes, the batch does not divide by the processes, or the
            run's one step would have a learning rate of 0.
        CheckpointError: `init` or a teacher is not a released checkpoint.
        ResumeError: there is nothing to resume, or it belongs to another run; or a new run would overwrite one.
        DivergenceError: the loss became NaN or infinite.
        StorageError: a checkpoint could not be written.
        Stopped: SIGTERM or SIGINT came, or the deadline; a checkpoint was written first.
    """
    config = replace(config, model=replace(config.model, num_classes=len(data.classes)))
    training, validation = split_validation(data, config.val_fraction)
    steps_per_epoch = len(training) // config.batch_size
    if steps_per_epoch == 0:
        raise DataError(
            f"{len(training)} training images do not fill one batch of {config.batch_size}; give --set "
            f"batch_size={len(training)} or less"
        )
    total_steps = config.epochs * steps_per_epoch
    if total_steps == 1 and config.schedule == "one-cycle":
        raise ConfigError(
            "the run has one step, and the one-cycle schedule ends with a learning rate of 0: it would learn nothing; "
            "give more --epochs or a smaller batch_size"
        )

    device = torch.device(local_device(runtime.device))
    images, labels = training.images.to(device), training.labels.to(device)
    validation = replace(validation, images=validation.images.to(device))  # once, and not after each epoch
    torch.backends.cudnn.benchmark = device.type == "cuda"  # images have few sizes, so trying kernels pays
    torch.manual_seed(config.seed)
    model = build_network(config.model).to(device).to(memory_format=runtime.memory_format)
    ema = MovingAverage(model, config.ema_decay)
    optimizer = _build_optimizer(config, model, runtime.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=runtime.precision == "fp16")
    augment = Augmentation(config, len(data.classes), device)
    distill = Distillation(teachers, config, data, device, runtime.memory_format) if teachers else None
    origins = distill.teachers if distill else []
    state = TrainingState(config, data, origins, output / "last.safetensors", model, ema, optimizer, scaler)

    if not resume and state.path.exists():
        raise ResumeError(
            f"{output} holds a run already; go on with it (--resume), remove {state.path}, or give another --output"
        )
    if not resume and state.released_path.exists():
        raise ResumeError(f"{output} holds a model already; remove {state.released_path} to replace it, or give another --output")
    progress = state.load() if resume else Progress(init=state.start_from(init) if init else None)
    if resume and init:
        state.check_start(init, progress)
    if progress.step == total_steps and state.has_released(progress):
        kept = state.released_path
        print(f"{output} holds a finished run; {kept} is left as it is (remove it to have it made again)", file=sys.stderr)
        return kept
    if finish and not progress.history:
        raise ResumeError(f"{state.path} is from before the end of the first epoch; there is nothing to release yet")
    last_step = progress.step if finish else total_steps
    # a GPU asked for a number first finishes all that it has queued
    check_interval = 1 if device.type == "cpu" else 16

    with contextlib.ExitStack() as stack:
        group = stack.enter_context(join(device))
        share = group.share(config.batch_size)
        if isinstance(model, ConvMixer) and device.type == "cpu":
            use_cpu_kernels(model, group.size)
        network: Callable[[Tensor], Tensor] = group.wrap(model, device)
        if runtime.compile:
            network = torch.compile(network, dynamic=False)  # of few sizes, and faster than one for any
            if distill:
                distill.compile()
        events = stack.enter_context(_summary_writer(output) if runtime.tensorboard and group.leads else contextlib.nullcontext())
        bar = stack.enter_context(_progress_bar(config, model, runtime, progress.step, total_steps, shown=group.leads))
        termination = stack.enter_context(_termination_requested())
        loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=device)
        released: Network = ema.module if config.ema_decay else model
        started = time.monotonic() - progress.seconds
        begun = saved_at = time.monotonic()
        first_step = rated_from = progress.step

        for step in range(first_step, last_step):
            epoch, position = divmod(step, steps_per_epoch)
            if position == 0 or step == first_step:
                order = torch.randperm(len(training), generator=_generator(config.seed, epoch)).to(device)
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(config, step, total_steps)

            torch.manual_seed(_mix_seed(config.seed, step))
            batch = order[position * config.batch_size : (position + 1) * config.batch_size]
            size = image_size_at(config, step, total_steps)
            mix = step < config.augment.mix_until * total_steps
            pictures, targets = augment(images[batch], labels[batch], size, mix=mix)
            pictures, targets = pictures[share].contiguous(memory_format=runtime.memory_format), targets[share]

            model.train()
            with autocast(device, runtime.precision):
                logits = network(pictures).float()
                loss = F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
                if distill:
                    loss = config.distill_weight * distill(pictures, logits) + (1 - config.distill_weight) * loss
            scaler.scale(loss).backward()
            if config.clip_norm:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            ema.update(step)
            loss_sum += group.mean(loss.detach())

            progress.step = step + 1
            bar.update()
            epoch_ends = position == steps_per_epoch - 1
            if not (epoch_ends or progress.step % check_interval == 0 or step == last_step - 1):
                continue
            progress.loss_sum = loss_sum.item()
            progress.seconds = time.monotonic() - started  # now that a GPU has done what was asked
            if not math.isfinite(progress.loss_sum):
                raise _divergence(f"loss is {progress.loss_sum} at step {step} (epoch {epoch + 1})", config, state.path)
            rate = config.batch_size * (progress.step - rated_from) / (time.monotonic() - begun)
            mean_loss = progress.loss_sum / (position + 1)
            bar.set_postfix_str(f"epoch {epoch + 1}/{config.epochs} {size}px {rate:.0f} img/s loss {mean_loss:.3f}", False)

            if epoch_ends:
                val_logits = compute_logits(released, validation, config, device, layout=runtime.memory_format)
                val_accuracy = float((val_logits.argmax(1) == validation.labels).float().mean())
                row = {
                    "epoch": epoch + 1,
                    "train_loss": mean_loss,
                    "val_loss": float(F.cross_entropy(val_logits, validation.labels)),
                    "val_accuracy": val_accuracy,
                    "lr": learning_rate(config, step, total_steps),
                    "image_size": size,
                    "seconds": progress.seconds,
                }
                progress.history.append(row)
                progress.loss_sum = 0.0
                loss_sum.zero_()
                if group.leads:
                    tqdm.write(f"epoch {epoch + 1:3d}  loss {mean_loss:.4f}  validation {val_accuracy:.2%}", file=sys.stderr)
                if not math.isfinite(row["val_loss"]):
                    raise _divergence(
                        f"validation loss is {row['val_loss']} at step {step} (epoch {epoch + 1})", config, state.path
                    )
                if events:
                    for name, value in row.items():
                        events.add_scalar(name, value, epoch + 1)
            stop = group.any(bool(termination) or time.monotonic() > deadline, device)
            if group.leads and (epoch_ends or stop or time.monotonic() - saved_at > CHECKPOINT_INTERVAL_S):
                state.save(progress)
                saved_at = time.monotonic()
            if epoch_ends:  # the first has had compilation and trials in it
                begun, rated_from = time.monotonic(), progress.step
            if stop:
                reason = "by a signal" if termination else "at its deadline"
                number = termination[0] if termination else None
                raise Stopped(f"stopped at step {step + 1} {reason}; continue with --resume", number)
        if group.leads:
            calibration = calibrate(released, training, validation, config, device, runtime.memory_format)
            state.release(released, progress, calibration, len(training), len(validation), runtime)
    return state.released_path


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step.

    Args:
        config: peak, schedule and warm-up.
        step: from 0.
        total_steps: of the run.
    """
    if config.schedule == "constant":
        return config.lr
    done = (step + 1) / total_steps
    if done < config.warmup:
        return config.lr * done / config.warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup)))


def image_size_at(config: TrainConfig, step: int, total_steps: int) -> int:
    """Side in pixels of the training images at a step: a multiple of 4 on the way from `start_size` to `train_size`.

    Args:
        config: both sizes.
        step: from 0.
        total_steps: of the run.
    """
    done, largest = step / (0.7 * total_steps), config.largest_size
    if not config.start_size or done >= 1:
        return largest
    size = config.start_size + done * (largest - config.start_size)
    return max(config.start_size, min(largest, round(size / 4) * 4))


def _build_optimizer(config: TrainConfig, model: nn.Module, precision: str) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    settings: dict[str, Any] = {"lr": config.lr, "eps": config.adam_eps, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "muon":
        settings |= {"ratio": config.muon_lr / config.lr, "momentum": config.muon_momentum}
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return Muon(parameters, hidden_matrices(model), dtype=dtype, **settings)
    return (torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam)(parameters, **settings)


def _progress_bar(config: TrainConfig, model: nn.Module, runtime: Runtime, done: int, total: int, *, shown: bool) -> tqdm[Any]:
    return tqdm(
        total=total,
        initial=done,
        unit="step",
        mininterval=1 if sys.stderr.isatty() else 30,
        desc=f"{config.model.name} {count_parameters(model):,} parameters, {runtime.device} {runtime.precision}",
        disable=not shown,
    )


def _mix_seed(seed: int, counter: int) -> int:
    return seed * 1_000_000_007 + counter


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(_mix_seed(seed, epoch))


def _divergence(what: str, config: TrainConfig, path: Path) -> DivergenceError:
    kept = f"{path} is from before it" if path.exists() else "nothing was saved before it"
    smaller = f"--set lr={config.lr / 2:g}"
    if config.optimizer == "muon":
        smaller += f" --set muon_lr={config.muon_lr / 2:g}"
    return DivergenceError(f"{what}; {kept}. Start anew in another --output with a smaller learning rate, e.g. {smaller}")


@contextlib.contextmanager
def _termination_requested() -> Iterator[list[int]]:
    """A list that holds the signal's number once SIGTERM or SIGINT has come, so that a step ends before the run does."""
    received: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: received.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _summary_writer(output: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed; no event files are written", file=sys.stderr)
        return contextlib.nullcontext()
    try:
        return SummaryWriter(os.fspath(output / "tensorboard"))
    except OSError as error:
        raise StorageError(f"{output} cannot be written: {error}") from error


if __name__ == "__main__":  # `python -m training.train …`, as many repositories have it, is `convmixer-train train …`
    from training.cli import main

    sys.argv.insert(1, "train")
    main()
