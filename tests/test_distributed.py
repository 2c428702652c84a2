"""Training as several processes: the same losses as one, going on after a kill, local SGD."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from tests.process import ROOT
from training import __main__ as command
from training import checkpoint, config, curves, distributed, loop
from training.data.batches import Batches
from training.distributed import Dealt, dealt
from training.lanes import Lanes

pytestmark = pytest.mark.timeout(300)  # seconds when the machine is idle; three processes import PyTorch twice

# two epochs of ten steps of sixteen rows on two processes, and of thirty-two on one
SMALL = [
    "sentiment", "--config", "toy", "--no-progress", "--set", "run.epochs=2", "--set", "run.patience=9", "--set", "data.train=320",
    "--set", "data.rows=16", "--set", "data.validation=64", "--set", "model.dropout=0", "--set", "model.embedding_dropout=0",
    "--set", "model.word_dropout=0", "--set", "run.average=0.5",
]  # fmt: skip


def torchrun(*words: str, restarts: int = 0) -> str:
    """Two processes on this machine, over gloo; what they said."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", distributed.OWN_STORE: "1"}
    with subprocess.Popen(
        [*launch, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=240)
        finally:
            process.terminate()  # it ends its workers
    assert process.returncode == 0, said
    return said


def told(out: Path) -> list[dict[str, Any]]:
    """The history but for the time it took."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in curves.read(out)]


@dataclass(frozen=True, slots=True)
class Pair:
    """What two processes made: a run on averaged gradients, and after it one of local SGD."""

    run: Path
    local: Path
    said: str


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Both runs by one start of the processes, which takes longer than the runs."""
    run, local = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("local")
    alone = ["--set", "run.local_steps=4", "--set", "run.epochs=1"]
    return Pair(run, local, torchrun("tests/apart.py", *SMALL, "--out", str(run), "--then", *SMALL, *alone, "--out", str(local)))


def test_two_processes_train_as_one_with_the_same_global_batch(two: Pair, tmp_path: Path) -> None:
    """Losses, scores and weights of two gloo processes are those of one that takes two of their batches a step."""
    assert command.main([*SMALL, "--set", "run.accumulate=2", "--out", str(tmp_path)]) == 0
    pair, alone = told(two.run), told(tmp_path)
    assert [row["step"] for row in pair] == [row["step"] for row in alone] == [10, 20]
    for one, other in zip(pair, alone, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    weights, wanted = checkpoint.load(two.run).weights, checkpoint.load(tmp_path).weights
    assert two.said.count("sentiment: best at epoch") == 2, "one of two processes tells each result"
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-3)


def test_a_killed_worker_is_started_again_and_goes_on(two: Pair, tmp_path: Path) -> None:
    """After SIGKILL of one process in its second epoch both go on from the first's end, to what the undisturbed run gives."""
    said = torchrun("tests/killed.py", *SMALL, "--out", str(tmp_path), restarts=1)
    assert "exitcode: -9" in said
    assert told(tmp_path) == told(two.run)
    weights, wanted = checkpoint.load(tmp_path).weights, checkpoint.load(two.run).weights
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_local_sgd_steps_alone_and_averages(two: Pair) -> None:
    """With run.local_steps=4 the processes' weights are equal after every fourth step and differ in between; what is scored
    and kept is one model."""
    every, local = (line for line in two.said.splitlines() if "equal after" in line)
    assert every.endswith("equal after step 1 2 3 4 5 6 7 8 9 10")
    assert local.endswith("equal after step 1 5 9")
    assert [row["step"] for row in curves.read(two.local)] == [10]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_processes_together_read_what_one_would(world: int) -> None:
    """At each step the processes' batches are, together, the next rows of the one order; all make equally many steps."""
    one = list(DataLoader(range(40), 4 * world, sampler=SequentialSampler(range(40))))
    parts = [list(dealt(DataLoader(range(40), 4, sampler=SequentialSampler(range(40))), world, rank)) for rank in range(world)]
    assert len({len(p) for p in parts}) == 1
    for step, together in enumerate(one[: 40 // (4 * world)]):
        assert sorted(torch.cat([p[step] for p in parts]).tolist()) == together.tolist()
    batches = Batches([5] * 30, 3, seed=1)
    hands = [list(Dealt(batches, world, rank)) for rank in range(world)]
    assert [item for hand in zip(*hands, strict=True) for item in hand] == list(batches)[: len(batches) // world * world]


def test_lanes_are_shared_and_not_dealt() -> None:
    """Each process keeps its own lanes of a text from chunk to chunk: state stays with the lane it belongs to."""
    lanes = Lanes([0, 30], 96, 4, 8, seed=1)
    parts = [list(Dealt(lanes, 2, rank)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(lanes)
    for whole, a, b in zip(lanes, *parts, strict=True):
        assert [a[0], b[0]] == [whole[0], whole[0]]
        assert [a[1], b[1], a[2], b[2]] == whole[1:]


def test_what_can_not_be_dealt_is_refused() -> None:
    """A batch sampler of a task's own, lanes that don't divide, and a negative period are configuration errors."""

    class Own(BatchSampler):
        pass

    with pytest.raises(config.ConfigError, match="one process"):
        dealt(DataLoader(range(4), batch_sampler=Own(RandomSampler(range(4)), 2, False)), 2, 0)
    with pytest.raises(config.ConfigError, match="3 lanes"):
        next(iter(Dealt(Lanes([0], 90, 3, 8), 2, 0)))
    with pytest.raises(config.ConfigError, match="local_steps"):
        distributed.layout(config.Run(local_steps=-1))


def test_a_restart_is_known_by_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process goes on where torchrun counts a restart, or where the same job began; another job begins anew."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "monday")
    assert not distributed.goes_on(tmp_path)
    distributed.begin(tmp_path)
    assert distributed.goes_on(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tuesday")
    assert not distributed.goes_on(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert distributed.goes_on(tmp_path)


def test_a_new_run_forgets_what_an_earlier_one_could_go_on_from(tmp_path: Path) -> None:
    """A fresh start removes the last checkpoint of an earlier run, so that a restart can't take it up."""
    (tmp_path / loop.LAST).write_bytes(b"an earlier run's")
    assert command.main([*SMALL, "--set", "run.epochs=1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / loop.LAST).read_bytes() != b"an earlier run's"
