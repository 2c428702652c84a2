"""The training framework: configuration, checkpoint, loop, data sources, batches."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from training import __main__ as command
from training import checkpoint, config, curves, loop
from training.data import DataError, Source, cache, fetch, fetch_any
from training.data.batches import Batches
from training.layers import SequenceDropout, remember

EVERY = [(f.stem.partition("-")[0], f) for f in sorted(config.CONFIGS.glob("*.toml"))]


@pytest.mark.parametrize(("task", "file"), EVERY, ids=[f.stem for _, f in EVERY])
def test_every_shipped_configuration_is_accepted(task: str, file: Path) -> None:
    """Each TOML file that ships parses, for the task that its name begins with."""
    assert config.load(task, file).task == task


def test_a_configuration_survives_being_written_and_read(tmp_path: Path) -> None:
    """The TOML copied beside a result says the same as the configuration that ran."""
    first = config.load("sentiment", "toy", ["run.epochs=7", 'run.devices="auto"', "optimiser.betas=[0.8, 0.9]"])
    (tmp_path / "config.toml").write_text(first.to_toml(), encoding="utf-8")
    assert config.load("sentiment", tmp_path / "config.toml") == first
    assert config.parse(first.plain()) == first


def test_settings_change_single_values() -> None:
    """--set reaches into sections; a bare word is text; a whole number will do for a float."""
    changed = config.load("sentiment", "toy", ["seed=9", "optimiser.kind=adamw", "optimiser.lr=1", "model.hidden=8"])
    assert (changed.seed, changed.optimiser.kind, changed.optimiser.lr, changed.model["hidden"]) == (9, "adamw", 1.0, 8)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("run.epoch=3", "known are epochs"),
        ("run.epochs=many", "must be int"),
        ("run.epochs", "key=value"),
        ("speed=3", "unknown speed"),
        ("task=forecaster", "for 'forecaster'"),
        ("seed.of=3", "not a section"),
        ("run.epochs=0", "run.epochs: must be at least 1, got 0"),
        ("run.workers=-1", "run.workers: must be at least 0, got -1"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_allowed(setting: str, said: str) -> None:
    """Unknown keys, wrong types and malformed settings are errors that name the key."""
    with pytest.raises(config.ConfigError, match=said):
        config.load("sentiment", "toy", [setting])


@pytest.mark.parametrize(
    ("setting", "said"),
    [("model.hidden=-3", "at least 1, got -3"), ("model.dropout=1.5", "below 1, got 1.5"), ("data.rows=0", "at least 1, got 0")],
)
def test_a_number_that_no_model_can_have(setting: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told in a line, before anything is trained, with the key and what is allowed."""
    assert command.main(["sentiment", "--config", "toy", "--set", setting, "--out", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"seqserve train: {setting.partition('=')[0]}: must be")
    assert said in err


@pytest.mark.parametrize("setting", ["seed=0", "run.patience=0", "schedule.patience=0"])
def test_what_may_be_nothing(setting: str) -> None:
    """Some numbers are 0 only where somebody says so."""
    config.load("sentiment", "toy", [setting])


@pytest.mark.parametrize("text", [b"[[", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_refused_by_name(tmp_path: Path, text: bytes) -> None:
    """A configuration that can't be read says which file it is."""
    (tmp_path / "bad.toml").write_bytes(text)
    with pytest.raises(config.ConfigError, match=r"bad\.toml is not TOML"):
        config.load("sentiment", tmp_path / "bad.toml")


def test_a_directory_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--out below a plain file is a line that names it."""
    (tmp_path / "afile").write_text("")
    assert command.main(["sentiment", "--config", "toy", "--out", str(tmp_path / "afile" / "x")]) == 1
    assert capsys.readouterr().err == f"seqserve train: [Errno 20] Not a directory: '{tmp_path / 'afile' / 'x'}'\n"


def test_an_unknown_variant_is_refused_naming_those_there_are() -> None:
    """--config with a name that is neither a file nor a variant lists the variants."""
    with pytest.raises(config.ConfigError, match="toy"):
        config.load("sentiment", "huge")


@pytest.mark.parametrize("kind", ["adam", "adamw", "rmsprop", "adagrad", "nesterov"])
def test_every_optimiser_lowers_a_loss_and_leaves_biases_undecayed(kind: str) -> None:
    """Each optimiser that a configuration may name fits a line; weight decay is for matrices."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimiser = loop.make_optimiser(config.Optimiser(kind=kind, lr=0.01, weight_decay=0.1), model)
    assert [g["weight_decay"] for g in optimiser.param_groups] == [0.1, 0.0]
    x = torch.randn(64, 3)
    y = x.sum(1, keepdim=True)
    losses = []
    for _ in range(30):
        loss = (model(x) - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_an_unknown_optimiser_or_schedule_is_refused() -> None:
    """The error lists what a configuration may name."""
    with pytest.raises(config.ConfigError, match="nesterov"):
        loop.make_optimiser(config.Optimiser(kind="magic"), nn.Linear(1, 1))
    with pytest.raises(config.ConfigError, match="cosine"):
        loop.schedule_shape("magic", 0, 10, 0.0)


def test_schedules_rise_then_stay_or_fall() -> None:
    """The learning rate rises linearly through the warm-up; a cosine then falls to its floor and never below."""
    constant, cosine = loop.schedule_shape("constant", 4, 20, 0.0), loop.schedule_shape("cosine", 4, 20, 0.1)
    assert [constant(i) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    falling = [cosine(i) for i in range(4, 30)]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == 1.0
    assert falling[-1] == pytest.approx(0.1)


def test_forget_gates_start_open_once() -> None:
    """torch's LSTM adds two biases: together they are the bias asked for in the forget gate and zero elsewhere."""
    lstm = remember(nn.LSTM(3, 5, num_layers=2), bias=1.0)
    for layer in range(2):
        whole = getattr(lstm, f"bias_ih_l{layer}") + getattr(lstm, f"bias_hh_l{layer}")
        assert whole.tolist() == [0.0] * 5 + [1.0] * 5 + [0.0] * 10


def test_sequence_dropout_uses_one_mask_per_sequence() -> None:
    """Every step of a sequence loses the same features; in evaluation none does."""
    torch.manual_seed(0)
    layer = SequenceDropout(0.5)
    dropped = layer(torch.ones(4, 6, 8))
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    layer.eval()
    assert torch.equal(layer(torch.ones(4, 6, 8)), torch.ones(4, 6, 8))


def test_a_checkpoint_is_plain_data_that_rebuilds_the_model(tmp_path: Path) -> None:
    """What is saved is read back without executing anything, and the former file stays whole if writing fails."""
    model = nn.Linear(2, 3)
    kept = checkpoint.Checkpoint("t", {"a": 2}, model.state_dict(), {"validation_loss": 0.5}, {"seed": 1}, 0, 10, "do it", None)
    checkpoint.save(kept, tmp_path / checkpoint.FILE)
    found = checkpoint.load(tmp_path)
    again = nn.Linear(2, 3)
    again.load_state_dict(dict(found.weights))
    assert torch.equal(again.weight, model.weight)
    assert (found.dims, found.scores, found.command, found.parameters) == ({"a": 2}, {"validation_loss": 0.5}, "do it", 9)
    assert [f.name for f in tmp_path.iterdir()] == [checkpoint.FILE]


def test_a_foreign_file_is_no_checkpoint(tmp_path: Path) -> None:
    """A torch file of another make is refused by name."""
    torch.save({"weights": {}}, tmp_path / checkpoint.FILE)
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 200])
def test_a_checkpoint_cut_short_is_refused_by_name(tmp_path: Path, size: int) -> None:
    """Whatever is left of it."""
    kept = checkpoint.Checkpoint("t", {"a": 2}, nn.Linear(2, 3).state_dict(), {"validation_loss": 0.5}, {"seed": 1}, 0, 10, "do it", None)
    checkpoint.save(kept, tmp_path / checkpoint.FILE)
    (tmp_path / checkpoint.FILE).write_bytes((tmp_path / checkpoint.FILE).read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"{checkpoint.FILE} is cut short, damaged"):
        checkpoint.load(tmp_path)


def test_history_drops_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    """Validations at or after the step that is written again are replaced, and the picture can be drawn from them."""
    for step, loss in ((10, 3.0), (20, 2.0), (30, 1.0), (20, 1.5)):
        curves.append(tmp_path, {"step": step, "epoch": step / 10, "lr": 0.1, "seconds": 1.0, "validation_loss": loss})
    assert [(r["step"], r["validation_loss"]) for r in curves.read(tmp_path)] == [(10, 3.0), (20, 1.5)]
    assert curves.draw(tmp_path, "t", "validation_loss", highest=False).stat().st_size > 1000


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 9), st.integers(0, 200), st.integers(0, 3))
def test_batches_hold_every_row_once_within_the_limits(lengths: list[int], rows: int, cells: int, epoch: int) -> None:
    """Whatever the lengths, an epoch has each row in one batch, and no batch of several rows is over a limit."""
    batches = Batches(lengths, rows, cells=cells, seed=3)
    batches.set_epoch(epoch)
    found = list(batches)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert len(batches) == len(found)
    assert all(0 < len(b) <= rows for b in found)
    assert not cells or all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= cells for b in found)


def test_batches_differ_between_epochs_and_not_between_runs() -> None:
    """The order is a function of seed and epoch alone, so that a resumed run goes on as the whole one would."""
    lengths = np.random.default_rng(0).integers(1, 50, 100).tolist()
    first, again = Batches(lengths, 8, seed=1), Batches(lengths, 8, seed=1)
    orders = []
    for epoch in (0, 1):
        first.set_epoch(epoch)
        orders.append(list(first))
    again.set_epoch(1)
    assert list(again) == orders[1] != orders[0]


def test_data_are_found_in_the_named_directory_and_checked(tmp_path: Path) -> None:
    """A file is taken from DIR or DIR/folder, and refused where its checksum differs."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.txt").write_bytes(b"words")
    right = Source("a.txt", None, "sha256:" + hashlib.sha256(b"words").hexdigest())
    assert fetch(right, tmp_path, "set").read_bytes() == b"words"
    assert fetch(right, tmp_path / "set", "set") == tmp_path / "set" / "a.txt"
    with pytest.raises(DataError, match="damaged"):
        fetch(Source("a.txt", None, "md5:0"), tmp_path, "set")
    with pytest.raises(DataError, match="leave --data out"):
        fetch(Source("b.txt", None), tmp_path, "set")
    assert fetch_any((Source("b.txt", None), right), tmp_path, "set").name == "a.txt"


def test_a_download_is_kept_once_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives is checked before it gets its name in the cache, and is not fetched twice."""
    monkeypatch.setenv("SEQSERVE_DATA", str(tmp_path / "cache"))
    origin = tmp_path / "origin.txt"
    origin.write_bytes(b"words")
    wanted = "sha256:" + hashlib.sha256(b"words").hexdigest()
    with pytest.raises(DataError, match="damaged"):
        fetch(Source("a.txt", origin.as_uri(), "sha256:0"), None, "set")
    assert not (cache() / "set" / "a.txt").exists()
    assert fetch(Source("a.txt", origin.as_uri(), wanted), None, "set").read_bytes() == b"words"
    origin.unlink()
    assert fetch(Source("a.txt", origin.as_uri(), wanted), None, "set").is_file()
    with pytest.raises(DataError, match="--data"):
        fetch(Source("b.txt", origin.as_uri(), wanted), None, "set")


def test_wrong_command_lines_say_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad setting and a resume of nothing are told in one line, with exit status 1."""
    assert command.main(["sentiment", "--config", "toy", "--set", "run.epoch=1", "--out", str(tmp_path)]) == 1
    assert "known are epochs" in capsys.readouterr().err
    assert command.main(["sentiment", "--config", "toy", "--resume", "--out", str(tmp_path / "none")]) == 1
    assert "start without --resume" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_to_the_result_of_the_whole_one(tmp_path: Path) -> None:
    """Two epochs, then --resume to four, end with the weights and history of four epochs at one go."""
    small = ["sentiment", "--config", "toy", "--no-progress", "--set", "run.patience=9", "--set", "data.train=640"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert command.main([*small, "--set", "run.epochs=4", "--out", str(whole)]) == 0
    assert command.main([*small, "--set", "run.epochs=2", "--out", str(parted)]) == 0
    assert command.main([*small, "--set", "run.epochs=4", "--out", str(parted), "--resume"]) == 0
    one, other = checkpoint.load(whole), checkpoint.load(parted)
    assert one.step == other.step
    assert all(torch.equal(one.weights[n], other.weights[n]) for n in one.weights)
    told = [[{k: v for k, v in r.items() if k != "seconds"} for r in curves.read(out)] for out in (whole, parted)]
    assert told[0] == told[1]
    summary = json.loads((parted / loop.SCORES).read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(summary)
    assert summary["scores"]["validation_accuracy"] > 0.5


def test_averaged_weights_are_what_is_scored_and_kept(tmp_path: Path) -> None:
    """With run.average the checkpoint holds the moving average, under the model's own names."""
    small = ["sentiment", "--config", "toy", "--no-progress", "--set", "data.train=320", "--set", "run.epochs=1"]
    assert command.main([*small, "--out", str(tmp_path / "plain")]) == 0
    assert command.main([*small, "--set", "run.average=0.9", "--out", str(tmp_path / "mean")]) == 0
    plain, mean = checkpoint.load(tmp_path / "plain"), checkpoint.load(tmp_path / "mean")
    assert plain.weights.keys() == mean.weights.keys()
    assert any(not torch.equal(plain.weights[n], mean.weights[n]) for n in plain.weights)
    last = torch.load(tmp_path / "mean" / loop.LAST, map_location="cpu", weights_only=False)["state_dict"]
    assert torch.equal(mean.weights["head.weight"], last["averaged.module.head.weight"])
