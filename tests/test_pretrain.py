"""What the sentiment model can start from: the language model's loss and lanes, and that its weights, or vectors of words, are
really taken over."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from contract.text import Vocabulary
from export import __main__ as export
from training import __main__ as command
from training import checkpoint, config, pretrain, reviews, sentiment, start, word2vec
from training.config import ConfigError
from training.pretrain import Dims, ReviewModel

FEW = ["--no-progress", "--set", "data.validation=100"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy pre-training run."""
    out = tmp_path_factory.mktemp("runs") / "pretrain"
    assert command.main(["pretrain", "--config", "toy", *FEW, "--set", "run.epochs=1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy word2vec vectors, as text."""
    file = tmp_path_factory.mktemp("vectors") / "toy.txt"
    assert word2vec.main(["--kind", "toy", "--size", "16", "--least", "1", "--epochs", "1", "--out", str(file)]) == 0
    return file


def begun(out: Path, *settings: str) -> sentiment.SentimentTraining:
    """A toy sentiment run as it stands before its first step."""
    out.mkdir(exist_ok=True)
    torch.manual_seed(5)
    return sentiment.prepare(config.load("sentiment", "toy", ["data.validation=100", *settings]), None, out)


def test_pretrained_weights_are_taken_over_bit_for_bit(run: Path, tmp_path: Path) -> None:
    """Embedding and LSTM are the run's, the rest is not; the vocabulary is the run's file."""
    ours = begun(tmp_path, f"init.from={run}").model.state_dict()
    theirs = checkpoint.load(run).weights
    shared = {name for name in ours if name.startswith(start.SHARED)}
    assert shared == {"embedding.weight"} | {f"lstm.{n}_l0" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    for name in shared:
        assert torch.equal(ours[name], theirs[name]), name
    assert (tmp_path / reviews.VOCABULARY).read_bytes() == (run / reviews.VOCABULARY).read_bytes()
    random = begun(tmp_path).model.state_dict()
    assert all(not torch.equal(random[name], ours[name]) for name in ("embedding.weight", "lstm.weight_hh_l0"))


def test_training_goes_on_from_pretrained_weights(run: Path, tmp_path: Path) -> None:
    """Steps too small to matter leave them where they were: nothing is drawn anew on the way to the checkpoint. Its
    record names the run."""
    arguments = ["sentiment", "--config", "toy", *FEW, "--set", f"init.from={run}", "--set", "optimiser.lr=1e-9", "--set", "run.epochs=1"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    kept, before = checkpoint.load(tmp_path), checkpoint.load(run).weights
    for name in ("embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"):
        torch.testing.assert_close(kept.weights[name], before[name], atol=1e-5, rtol=0)
    assert kept.config["init"] == {"from": "runs/pretrain"}  # where it lay on this machine is nobody's business
    assert "init.from=runs/pretrain" in kept.command
    assert str(run) not in kept.command
    model = sentiment.rebuild(kept.dims)
    model.load_state_dict(dict(kept.weights))


def test_pretraining_learns_and_helps_a_toy(run: Path, tmp_path: Path) -> None:
    """The language model is better than guessing by frequency, and what starts from it is soon right on the toy."""
    assert checkpoint.load(run).scores["validation_loss"] < 2.75  # 3.0 by frequency alone
    assert begun(tmp_path).config.init == {}
    arguments = ["sentiment", "--config", "toy", *FEW, "--set", f"init.from={run}", "--set", "run.epochs=2"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    assert checkpoint.load(tmp_path).scores["validation_accuracy"] > 0.9


def test_word2vec_vectors_are_taken_over(vectors: Path, tmp_path: Path) -> None:
    """Every word with a vector gets it, all scaled by one number to the spread of random ones; marks keep their own."""
    training = begun(tmp_path, f"init.word2vec={vectors}")
    random = begun(tmp_path).model.state_dict()["embedding.weight"]
    ours = training.model.state_dict()["embedding.weight"]
    lines = [line.split() for line in vectors.read_text().splitlines()[1:]]
    given = {word: torch.tensor([float(n) for n in numbers]) for word, *numbers in lines}
    pieces = Vocabulary.load(tmp_path / reviews.VOCABULARY).pieces(range(len(ours)))
    known = [i for i, piece in enumerate(pieces) if piece in given]
    assert len(known) == len(ours) - 2
    wanted = torch.stack([given[pieces[i]] for i in known])
    torch.testing.assert_close(ours[known], wanted * (random.std() / wanted.std()), rtol=1e-5, atol=1e-7)
    assert torch.equal(ours[:2], random[:2])


def test_word2vec_vectors_are_the_same_each_time_and_in_both_forms(vectors: Path, tmp_path: Path) -> None:
    """The same seed gives the same file; the binary form says the same."""
    again, binary = tmp_path / "again.txt", tmp_path / "again.bin"
    for file in (again, binary):
        assert word2vec.main(["--kind", "toy", "--size", "16", "--least", "1", "--epochs", "1", "--out", str(file)]) == 0
    assert again.read_bytes() == vectors.read_bytes()
    one, other = (begun(tmp_path, f"init.word2vec={f}").model.state_dict()["embedding.weight"] for f in (again, binary))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_what_does_not_fit_is_told_before_training(run: Path, vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other sizes, other reviews held out, files that are not there or no vectors, other tasks: each with what to do."""
    broken = tmp_path / "broken.txt"
    broken.write_text("no vectors\n")
    short = tmp_path / "short.txt"
    short.write_text("1 3\ngood 1 2 3\n")
    strange = tmp_path / "strange.txt"
    strange.write_text(f"1 16\nunheard {' '.join('1' * 16)}\n")
    for settings, said in (
        ((f"init.from={run}", "model.hidden=25"), "set model.embedding, hidden and layers as there"),
        ((f"init.from={run}", "seed=2"), "seed: 2 here and 1 in"),
        ((f"init.from={run}", "data.validation=200"), "data.validation: 200 here and 100"),
        ((f"init.from={tmp_path}",), "holds no checkpoint.pt"),
        ((f"init.from={run}", f"init.word2vec={vectors}"), "not both"),
        (("init.form=x",), "init: unknown form; known are from, word2vec"),
        (("init.from=3",), "must be a path"),
        (("init.word2vec=nowhere.bin",), "no file nowhere.bin"),
        ((f"init.word2vec={broken}",), "not in word2vec's format"),
        ((f"init.word2vec={short}",), "16 here, but the vectors of"),
        ((f"init.word2vec={strange}",), "no word of the vocabulary"),
    ):
        with pytest.raises(ConfigError, match=said):
            begun(tmp_path / "out", *settings)
    assert command.main(["pretrain", "--config", "toy", "--set", f"init.from={run}", "--out", str(tmp_path / "p")]) == 1
    assert "init: pretrain always starts from random weights" in capsys.readouterr().err
    assert command.main(["sentiment", "--config", "toy", *FEW, "--set", "run.epochs=1", "--out", str(tmp_path / "s")]) == 0
    with pytest.raises(ConfigError, match="is a run of sentiment, not of pretrain"):
        begun(tmp_path / "out", f"init.from={tmp_path / 's'}")


def test_a_pretraining_run_is_no_bundle(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exporting it says what to do in its place."""
    assert export.main([str(run), "--out", str(tmp_path / "no" / "1")]) == 1
    assert "train sentiment with --set init.from=RUN" in capsys.readouterr().err
    assert not (tmp_path / "no" / "1").exists()


def test_held_out_reviews_are_read_by_nobody() -> None:
    """What pre-training reads and what the sentiment run of the same seed validates on share no text."""
    texts, labels = reviews.labelled("toy", 1, None)
    _, held = reviews.hold_out(labels, 100, 1)
    read, kept = reviews.without_held("toy", 100, 1, None)
    assert kept == [texts[i] for i in held]
    assert len(read) > 5_000
    assert not set(read) & set(kept)


def test_the_sampled_loss_tends_to_the_whole_one() -> None:
    """With many words drawn it is the cross entropy over the whole vocabulary, and so is its gradient."""
    torch.manual_seed(0)
    model = ReviewModel(Dims(vocabulary=40, embedding=8, hidden=8)).eval()
    torch.nn.init.normal_(model.embedding.weight)
    torch.nn.init.normal_(model.bias)
    looked = torch.randn(20, 8, requires_grad=True)
    wanted = torch.randint(0, 40, (20,))
    whole = functional.cross_entropy(model.logits(looked), wanted)
    sampled = model.sampled(looked, wanted, pretrain.draw(100_000, 40, torch.device("cpu")))
    assert sampled.item() == pytest.approx(whole.item(), abs=0.03)
    (one,), (other,) = torch.autograd.grad(whole, looked), torch.autograd.grad(sampled, looked)
    torch.testing.assert_close(other, one, atol=2e-3, rtol=0.05)


def test_words_are_drawn_as_often_as_said() -> None:
    """The likelihoods sum to one and are what is drawn."""
    every = torch.arange(50)
    likely = pretrain.likelihood(every, 50)
    assert likely.sum().item() == pytest.approx(1, abs=1e-5)
    torch.manual_seed(0)
    counted = torch.bincount(pretrain.draw(200_000, 50, torch.device("cpu")), minlength=50) / 200_000
    torch.testing.assert_close(counted, likely, atol=3e-3, rtol=0)


def test_reviews_are_joined_with_a_mark_between() -> None:
    """Each document begins with the mark and every review ends with it: the model is asked for the first word and the end."""
    found = pretrain.joined([np.array(r) for r in ([5, 6], [7], [8, 9])], 2)
    assert found.given.tolist() == [0, 5, 6, 0, 7, 0, 8, 9]
    assert found.wanted.tolist() == [5, 6, 0, 7, 0, 8, 9, 0]
    assert found.begins.tolist() == [0, 5]


def test_the_state_goes_on_from_chunk_to_chunk(run: Path, tmp_path: Path) -> None:
    """Reading in chunks gives what one long chunk gives, and a document's begin forgets the row alone."""
    tmp_path.mkdir(exist_ok=True)
    training = pretrain.prepare(config.load("pretrain", "toy", ["data.validation=100"]), None, tmp_path)
    training.model.eval()
    tokens, old = torch.randint(2, 20, (2, 9)), torch.zeros(2, dtype=torch.bool)

    def read(*pieces: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        training._state = None
        with torch.no_grad():
            return torch.cat([training._read(given, fresh) for given, fresh in pieces], 1)

    whole = read((tokens, ~old))
    torch.testing.assert_close(read((tokens[:, :4], ~old), (tokens[:, 4:], old)), whole)
    half = read((tokens[:, :4], ~old), (tokens[:, 4:], torch.tensor([True, False])))
    torch.testing.assert_close(half[1], whole[1])
    torch.testing.assert_close(half[0, 4:], read((tokens[:, 4:], ~old))[0])


def test_a_run_without_init_says_nothing_of_it() -> None:
    """Cards and records of other models stay as they were; those with it can be read again."""
    plain = config.load("sentiment", "toy").plain()
    assert "init" not in plain
    asked = config.load("sentiment", "toy", ["init.from=runs/some"])
    assert json.loads(json.dumps(asked.plain()))["init"] == {"from": "runs/some"}
    again: dict[str, Any] = tomllib.loads(asked.to_toml())
    assert config.parse(again) == asked


@pytest.mark.parametrize("name", ["pretrained", "gpu"])
def test_configurations_that_follow_each_other_fit(name: str) -> None:
    """Size, seed and hold-out of each sentiment configuration are those of the pre-training that it names."""
    after = config.load("sentiment", name)
    before = config.load("pretrain", Path(str(after.init["from"])).name.removeprefix("pretrain").lstrip("-") or None)
    one, other = (
        config.section(Dims, {"vocabulary": 9, **before.model}, "model"),
        config.section(sentiment.Dims, {"vocabulary": 9, **after.model}, "model"),
    )
    assert (one.embedding, one.hidden, one.layers) == (other.embedding, other.hidden, other.layers)
    first, second = config.section(pretrain.Data, before.data, "data"), config.section(sentiment.Data, after.data, "data")
    assert (before.seed, first.kind, first.validation) == (after.seed, second.kind, second.validation)
