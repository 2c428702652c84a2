"""Training as one of several processes, on torch.distributed: what torchrun started, who reads which batches, local SGD.

Gradients are averaged by DistributedDataParallel at each step; with `run.local_steps` every process steps by itself and the
weights are averaged now and then (local SGD: Stich 2018, arXiv 1805.09767), by what torch ships for it. It must not know any
model or data set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.utils import average_parameters
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, Sampler

from training.config import ConfigError, Run

JOB = "job.txt"
NO_ID = "none"  # torchrun's, where --rdzv-id was not given

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""torchrun's processes meet in a store. By default one store outlives restarts, with the addresses of the dead in it: seen here,
a restarted gloo process connected to them and failed. Set to 1 for torchrun, each start has a store of its own."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What Lightning is told of the processes."""

    devices: int | str
    num_nodes: int
    strategy: str | Strategy


def layout(run: Run) -> Layout:
    """As torchrun started us, whatever the configuration says; as the configuration says where it did not. Raises ConfigError."""
    if run.local_steps < 0:
        raise ConfigError(f"run.local_steps {run.local_steps}: steps between averages of the weights, or 0 to average gradients")
    devices, nodes, strategy = run.devices, run.num_nodes, run.strategy
    if launched():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        devices, nodes = local, int(os.environ["WORLD_SIZE"]) // local
    if strategy == "auto" and launched():
        strategy = "ddp"
    return Layout(devices, nodes, LocalSgd(run.local_steps) if run.local_steps else strategy)


def launched() -> bool:
    """Whether torchrun started this process."""
    return distributed.is_available() and distributed.is_torchelastic_launched()


def goes_on(out: Path) -> bool:
    """Whether torchrun started this process again after one failed, so that it should go on from `out`'s last checkpoint.

    On several machines only the agent whose process failed counts a restart; so what tells is the job's id, if it has one,
    which `begin` left there."""
    if not launched():
        return False
    job = os.environ["TORCHELASTIC_RUN_ID"]
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return again or (job != NO_ID and (out / JOB).is_file() and (out / JOB).read_text(encoding="utf-8") == job)


def begin(out: Path) -> None:
    """Leave the job's id for `goes_on`; call it when nothing to go on from is left in `out`."""
    if launched():
        (out / JOB).write_text(os.environ["TORCHELASTIC_RUN_ID"], encoding="utf-8")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
            print(f"warning: a restart may meet the dead process's address: set {OWN_STORE}=1 before torchrun", file=sys.stderr)


def first() -> bool:
    """Whether this process is the one that writes, before there is a process group to ask."""
    return int(os.environ.get("RANK", "0")) == 0


# Who reads what.


@runtime_checkable
class Shared(Protocol):
    """A sampler whose every item is for all processes, each of which takes its part of it."""

    def share(self, item: Any, world: int, rank: int) -> Any: ...


class Dealt(Sampler[Any]):
    """Of what a sampler yields, the part of one process: every `world`-th item, the incomplete last hand left out; or a part
    of every item, where the sampler can share. All together read at each step what one process with so many times the
    rows would."""

    def __init__(self, of: Iterable[Any], world: int, rank: int) -> None:
        self.of, self.world, self.rank = of, world, rank

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this."""
        if hasattr(self.of, "set_epoch"):
            self.of.set_epoch(epoch)

    def __len__(self) -> int:
        count = len(self.of)  # type: ignore[arg-type]  # every sampler here has a length
        return count if isinstance(self.of, Shared) else count // self.world

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.of, Shared):
            yield from (self.of.share(item, self.world, self.rank) for item in self.of)
            return
        for place, item in enumerate(self.of):
            if place // self.world == len(self):
                return
            if place % self.world == self.rank:
                yield item


def dealt(loader: DataLoader[Any], world: int, rank: int) -> DataLoader[Any]:
    """The loader of one process out of `world`; its sampler is dealt. Raises ConfigError where it can't be."""
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        raise ConfigError("batches of this task can't be dealt out: train it in one process")
    return DataLoader(
        loader.dataset, loader.batch_size, sampler=Dealt(loader.sampler, world, rank), num_workers=loader.num_workers,
        collate_fn=loader.collate_fn, drop_last=loader.drop_last, generator=loader.generator,
    )  # fmt: skip


def mean(scores: Mapping[str, float]) -> dict[str, float]:
    """The mean over all processes; each calls it with the same names, in the same order."""
    if not (distributed.is_initialized() and scores):
        return dict(scores)
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    values = torch.tensor(list(scores.values()), dtype=torch.float64, device=device)
    distributed.all_reduce(values)
    return dict(zip(scores, (values / distributed.get_world_size()).tolist(), strict=True))


# Local SGD.


class LocalSgd(DDPStrategy):
    """Each process steps on gradients of its own; at the first step and at every `period`-th after it the weights are averaged."""

    def __init__(self, period: int) -> None:
        state = PostLocalSGDState(None, None, start_localSGD_iter=0, post_local_gradient_allreduce=False)  # type: ignore[no-untyped-call]  # torch's
        super().__init__(ddp_comm_state=state, ddp_comm_hook=post_localSGD_hook, model_averaging_period=period)

    def configure_ddp(self) -> None:
        super().configure_ddp()
        if self.root_device.type != "cuda":  # Lightning registers hooks on GPUs only; gloo has long had them too
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(self._ddp_comm_state, post_localSGD_hook)


class AverageFirst(Callback):
    """Before a validation all processes take the mean of their weights: what is scored and kept is one model."""

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        everyone = distributed.group.WORLD
        if everyone is not None:
            average_parameters(pl_module.parameters(), everyone)
