"""The one training loop: what every model shares when it is fitted.

It knows Lightning, optimisers, schedules, early stopping and where results go. It must not know any model, data set or
export. A model joins by subclassing `Training`; see `tasks.py` for what its file offers besides.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from training import checkpoint, curves, distributed
from training.config import Config, ConfigError, Optimiser
from training.data.batches import Batches

LAST = "last.ckpt"
SCORES = "scores.json"


class Training(lightning.LightningModule):
    """A model being fitted: its loss, its scores, its data. Lightning brings devices, precision and many machines."""

    monitor: str = "validation_loss"
    """The score that chooses the weights kept, and that stops the run."""
    monitor_mode: str = "min"
    starts: bool = False
    """Whether the task reads the configuration's `init`."""
    next: str = "python -m export {out} --out models/{task}/1"
    """The command that usually follows."""

    def __init__(self, model: nn.Module, dims: Mapping[str, Any], config: Config) -> None:
        super().__init__()
        self.model = model
        self.dims = dict(dims)
        self.config = config
        self.averaged: AveragedModel | None = None
        if config.run.average:
            decay = config.run.average
            self.averaged = AveragedModel(model, avg_fn=lambda mean, now, _: decay * mean + (1 - decay) * now)
            self.averaged.requires_grad_(False)  # several processes would wait for its gradients
        self._fitted: nn.Module | None = None
        self._train_scores: dict[str, list[Tensor]] = {}
        self._epochs_done = 0

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, a scalar, and further scalars worth logging."""

    @abstractmethod
    def scores(self, batch: Any) -> dict[str, tuple[Tensor, int]]:
        """Validation scores of a batch: a mean and the count it is a mean of, so that the epoch's mean is exact."""

    def validation_end_scores(self) -> dict[str, float]:
        """Scores that need the whole validation set at once (BLEU), computed after its last batch."""
        return {}

    @abstractmethod
    def train_batches(self) -> DataLoader[Any]: ...

    @abstractmethod
    def validation_batches(self) -> DataLoader[Any]: ...

    # What Lightning calls.

    def train_dataloader(self) -> DataLoader[Any]:
        batches = self.train_batches()
        # For the seed that a loader draws each time it is iterated: drawn from torch's own generator, it would come before
        # the epoch's seeding in a resumed run and after it in a whole one.
        batches.generator = torch.Generator().manual_seed(self.config.seed)
        if isinstance(batches.sampler, Batches):
            # Lightning tells the epoch only after a resumed run has already taken its first batch.
            batches.sampler.set_epoch(self._epochs_done)
        world = self.trainer.world_size
        return distributed.dealt(batches, world, self.global_rank) if world > 1 else batches

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["epochs_done"] = self.current_epoch + 1  # only ever saved at an epoch's end

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._epochs_done = int(checkpoint["epochs_done"])

    def val_dataloader(self) -> DataLoader[Any]:
        return self.validation_batches()

    def on_train_epoch_start(self) -> None:
        # Lightning does not keep torch's random state: seeded by epoch, a resumed run drops what the whole one would have.
        torch.manual_seed(hash((self.config.seed, self.current_epoch, self.global_rank)))

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss, extra = self.loss(batch)
        for name, value in {"loss": loss.detach(), **extra}.items():
            self._train_scores.setdefault(f"train_{name}", []).append(value)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=1)
        if self.config.optimiser.l1:
            loss = loss + self.config.optimiser.l1 * sum(p.abs().sum() for p in self.model.parameters() if p.ndim >= 2)
        return loss

    def take_train_scores(self) -> dict[str, float]:
        """Means of what was logged in training since they were last taken; Lightning's own come after the validation."""
        means = {name: float(torch.stack(values).mean()) for name, values in self._train_scores.items()}
        self._train_scores = {}
        return means

    def validation_step(self, batch: Any, index: int) -> None:
        for name, (mean, count) in self.scores(batch).items():
            self.log(f"validation_{name}", mean, on_epoch=True, prog_bar=True, batch_size=count, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        for name, value in self.validation_end_scores().items():
            self.log(f"validation_{name}", value, prog_bar=True, sync_dist=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.averaged is not None and (batch_idx + 1) % self.config.run.accumulate == 0:
            self.averaged.update_parameters(self.model)

    def on_validation_start(self) -> None:
        if self.averaged is not None:
            self._fitted, self.model = self.model, self.averaged.module

    def on_validation_end(self) -> None:
        # Lightning calls its callbacks before this, so the weights they keep are the averaged ones that were scored.
        if self._fitted is not None:
            self.model, self._fitted = self._fitted, None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimiser = make_optimiser(self.config.optimiser, self.model)
        plan = self.config.schedule
        if plan.kind == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimiser, mode="max" if self.monitor_mode == "max" else "min", factor=plan.factor, patience=plan.patience
            )
            # Lightning steps it after every validation that an epoch ends with.
            return {"optimizer": optimiser, "lr_scheduler": {"scheduler": plateau, "monitor": self.monitor, "strict": False}}
        steps = int(self.trainer.estimated_stepping_batches) if plan.kind == "cosine" else 0
        shape = schedule_shape(plan.kind, plan.warmup, steps, plan.floor)
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimiser, shape), "interval": "step"},
        }


def make_optimiser(settings: Optimiser, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that the configuration names. Raises ConfigError where there is no such."""
    fitted = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in fitted if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in fitted if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    lr, (first, second) = settings.lr, settings.betas
    made: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adam": lambda: torch.optim.Adam(groups, lr, betas=(first, second)),
        "adamw": lambda: torch.optim.AdamW(groups, lr, betas=(first, second)),
        "rmsprop": lambda: torch.optim.RMSprop(groups, lr, momentum=settings.momentum),
        "adagrad": lambda: torch.optim.Adagrad(groups, lr),
        "nesterov": lambda: torch.optim.SGD(groups, lr, momentum=settings.momentum, nesterov=True),
    }
    if settings.kind not in made:
        raise ConfigError(f"optimiser.kind {settings.kind!r}: one of {', '.join(made)}")
    return made[settings.kind]()


def schedule_shape(kind: str, warmup: int, steps: int, floor: float) -> Callable[[int], float]:
    """The learning rate's factor at an optimiser step: a linear rise, then constant or half a cosine down to `floor`."""
    if kind not in ("constant", "cosine"):
        raise ConfigError(f"schedule.kind {kind!r}: one of constant, cosine, plateau")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if kind == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


class _Keep(Callback):
    """Writes history and picture after each validation, and the checkpoint where the validation was the best so far."""

    def __init__(self, out: Path, command: str) -> None:
        self.out, self.command, self.revision = out, command, checkpoint.revision()
        self.best: float | None = None
        self.seconds = 0.0
        self._since = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "seconds": self.seconds + time.monotonic() - self._since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.seconds = state_dict["best"], state_dict["seconds"]

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Training)
        trained = distributed.mean(pl_module.take_train_scores())
        if not trainer.is_global_zero:
            return
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("validation_")}
        row = {
            "step": trainer.global_step,
            "epoch": round(_epochs_done(trainer), 3),
            "seconds": round(self.seconds + time.monotonic() - self._since, 1),
            "lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            **trained,
            **found,
        }
        curves.append(self.out, row)
        score = found[pl_module.monitor]
        highest = pl_module.monitor_mode == "max"
        if self.best is None or (score > self.best if highest else score < self.best):
            self.best = score
            kept = checkpoint.Checkpoint(
                task=pl_module.config.task, dims=pl_module.dims, weights=pl_module.model.state_dict(), scores=found,
                config=pl_module.config.plain(), epoch=trainer.current_epoch, step=trainer.global_step,
                command=self.command, revision=self.revision,
            )  # fmt: skip
            checkpoint.save(kept, self.out / checkpoint.FILE)
            (self.out / SCORES).write_text(json.dumps(_summary(kept, row), indent=1) + "\n", encoding="utf-8")
        curves.draw(self.out, pl_module.config.task, pl_module.monitor, highest)


def _summary(kept: checkpoint.Checkpoint, row: Mapping[str, float]) -> dict[str, Any]:
    return {
        "task": kept.task, "scores": kept.scores, "epoch": row["epoch"], "step": kept.step, "seconds": row["seconds"],
        "parameters": kept.parameters, "seed": kept.config["seed"], "command": kept.command, "revision": kept.revision,
    }  # fmt: skip


def rescore(out: Path, scores: Mapping[str, float]) -> None:
    """Put other scores into a run's summary, for a model that is finished after its fit."""
    summary = json.loads((out / SCORES).read_text(encoding="utf-8"))
    (out / SCORES).write_text(json.dumps({**summary, "scores": dict(scores)}, indent=1) + "\n", encoding="utf-8")


def _epochs_done(trainer: lightning.Trainer) -> float:
    batches = trainer.num_training_batches
    part = trainer.fit_loop.epoch_loop.batch_progress.current.ready / batches if batches else 0.0
    return trainer.current_epoch + min(1.0, float(part))


def fit(training: Training, out: Path, *, resume: bool, command: str, progress: bool | None = None) -> Mapping[str, Any]:
    """Fit a model and return the summary also written to `out`/scores.json.

    `out` receives config.toml, checkpoint.pt (the best weights), last.ckpt (to resume from), history.jsonl, curves.png.
    """
    config, run = training.config, training.config.run
    if training.config.init and not training.starts:
        raise ConfigError(f"init: {training.config.task} always starts from random weights")
    if run.gradient_clip_by not in ("norm", "value"):
        raise ConfigError(f"run.gradient_clip_by {run.gradient_clip_by!r}: one of norm, value")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    if not resume and distributed.first():
        (out / curves.FILE).unlink(missing_ok=True)
        (out / LAST).unlink(missing_ok=True)  # or a restart before the first epoch's end would take up an earlier run's
        distributed.begin(out)
    if run.threads:
        torch.set_num_threads(run.threads)
    laid = distributed.layout(run)
    show = sys.stderr.isatty() if progress is None else progress
    callbacks: list[Callback] = [
        _Keep(out, command),
        EarlyStopping(training.monitor, mode=training.monitor_mode, patience=run.patience, check_on_train_epoch_end=False),
        # At the end of an epoch and not in a validation, where averaged weights stand in for the fitted ones.
        ModelCheckpoint(out, "last", save_top_k=1, every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False),
    ]
    if run.local_steps:
        callbacks.insert(0, distributed.AverageFirst())
    if show:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    with warnings.catch_warnings():
        # Advice about loader processes: here loading costs nothing beside the recurrent layers.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 against torch 2.13's newer way
        logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
        trainer = lightning.Trainer(
            accelerator=run.accelerator,
            devices=laid.devices,
            num_nodes=laid.num_nodes,
            strategy=laid.strategy,
            use_distributed_sampler=False,  # training batches are dealt out above; each process validates on the whole set
            precision=run.precision,  # type: ignore[arg-type]  # Lightning lists its literals and checks them itself
            max_epochs=run.epochs,
            max_time=timedelta(minutes=run.max_minutes) if run.max_minutes else None,
            gradient_clip_val=run.gradient_clip or None,
            gradient_clip_algorithm=run.gradient_clip_by,
            accumulate_grad_batches=run.accumulate,
            val_check_interval=run.validate_every if run.validate_every < 1 else None,
            check_val_every_n_epoch=max(1, round(run.validate_every)),
            num_sanity_val_steps=0,
            logger=False,
            callbacks=callbacks,
            enable_progress_bar=show,
            enable_model_summary=False,
        )
        trainer.fit(training, ckpt_path=str(out / LAST) if resume else None)
    if not trainer.is_global_zero:
        return {}
    summary: Mapping[str, Any] = json.loads((out / SCORES).read_text(encoding="utf-8"))
    return summary
