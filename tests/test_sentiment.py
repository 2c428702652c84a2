"""The sentiment model: its vocabulary, its data, and that reading in pieces is reading the whole."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract.bundle import Bundle, validate
from contract.text import Vocabulary
from training import __main__ as command
from training import checkpoint, ngrams, reviews, sentiment
from training.config import ConfigError
from training.data import DataError, Source, imdb
from training.sentiment import Dims, Sentiment


def small(layers: int = 1, pairs: int = 0) -> Sentiment:
    torch.manual_seed(0)
    model = Sentiment(Dims(vocabulary=50, embedding=6, hidden=9, layers=layers, pairs=pairs)).eval()
    if pairs:  # as if fitted: every other pair of words is known
        model.word_scores.weight.normal_()
        model.pair_scores.weight.normal_()
        first, second = torch.arange(0, 50, 2).repeat_interleave(50), torch.arange(50).repeat(25)
        model.pair_marks[ngrams.bucket(first, second, pairs)] = ngrams.mark(first, second).to(torch.uint8)
        model.weighed.copy_(torch.tensor([0.5, 2.0, -0.1]))
    return model


def fresh(model: Sentiment, rows: int) -> list[Tensor]:
    return [torch.from_numpy(s.fresh(rows)) for s in sentiment.describe(model)["step"].states]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2), st.sampled_from([0, 4096]), st.lists(st.integers(0, 49), min_size=1, max_size=40), st.data())
def test_reading_in_pieces_is_reading_the_whole(layers: int, pairs: int, words: list[int], data: st.DataObject) -> None:
    """However a text is cut, the step's last score is the whole model's, and its states are those of one long step."""
    model = small(layers, pairs)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(words)), max_size=4)) | {len(words)})
    tokens = torch.tensor([words])
    with torch.no_grad():
        whole = model.step(tokens, *fresh(model, 1))
        start, states = 0, fresh(model, 1)
        for end in cuts:
            logits, *states = model.step(tokens[:, start:end], *states)
            start = end
        trained = model(tokens, torch.tensor([len(words)]))
    torch.testing.assert_close(logits, trained, atol=1e-5, rtol=1e-4)
    for found, wanted in zip([logits, *states], whole, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert states[4].item() == len(words)
    if pairs:
        assert states[5].item() == words[-1]


@pytest.mark.parametrize("pairs", [0, 4096])
def test_padding_changes_nothing_in_training(pairs: int) -> None:
    """A row's score does not depend on how far its batch is padded."""
    model = small(pairs=pairs)
    tokens = torch.randint(0, 50, (3, 12))
    lengths = torch.tensor([12, 5, 1])
    with torch.no_grad():
        together = model(tokens, lengths)
        alone = torch.cat([model(tokens[i : i + 1, :n], torch.tensor([n])) for i, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pairs", [0, 64])
def test_the_contract_is_without_fault(pairs: int) -> None:
    """What the model's file describes is a valid bundle."""
    model = small(2, pairs)
    described = Bundle("sentiment", sentiment.describe(model), "step", sentiment.task(model, Path()), {"vocabulary": "tokenizer.json"})
    assert validate(described) == []


def test_pairs_are_learnt_and_told_from_strangers() -> None:
    """What words one by one can't tell, pairs do; rare pairs, and those that only share a known one's place, bring nothing."""
    good, not_, bad, the = 1, 2, 3, 4
    random = np.random.default_rng(0)
    texts, labels = [], []
    for label in [0, 1] * 40:
        said = [[good, the, not_, bad], [bad, the, not_, good]][1 - label]
        texts.append(np.array([the] * int(random.integers(0, 3)) + said))
        labels.append(label)
    texts.append(np.array([bad, bad]))
    labels.append(1)
    fitted = ngrams.fit(texts, np.array(labels), vocabulary=5, buckets=64, least=2, strength=10.0)
    assert all((fitted.of(text) > 0) == label for text, label in zip(texts[:-1], labels[:-1], strict=True))
    assert np.abs(fitted.words[[good, bad]]).max() < np.abs(fitted.pairs).max() / 3
    known = {(a, b) for text in texts[:-1] for a, b in zip([0, *text[:-1]], text, strict=True)}
    assert (bad, bad) not in known
    for a in range(5):
        for b in range(5):
            at = ngrams.bucket(a, b, 64)
            assert (fitted.marks[at] == ngrams.mark(a, b)) == ((a, b) in known), (a, b)


def test_the_model_adds_up_what_was_fitted() -> None:
    """A text's logit is the fitted one, by whichever way it is read; words of the LSTM alone are not touched by it."""
    model = small(pairs=4096)
    model.weighed.copy_(torch.tensor([0.0, 1.0, 0.25]))
    fitted = ngrams.Scores(model.word_scores.weight[:, 0].numpy(), model.pair_scores.weight[:, 0].numpy(), model.pair_marks.numpy(), 0.25)
    text = torch.randint(0, 50, (1, 30))
    with torch.no_grad():
        logits = model(text, torch.tensor([30]))
    assert logits[0, 1] - logits[0, 0] == pytest.approx(fitted.of(text[0].numpy()), abs=1e-4)


def test_both_scores_are_weighed_on_held_out_texts() -> None:
    """Weights of two logits are those of a logistic regression: a score that says nothing gets none."""
    random = np.random.default_rng(0)
    truth = np.array([0, 1] * 500)
    told, noise = truth * 2 - 1 + random.normal(size=1000), random.normal(size=1000)
    of_told, of_noise, bias = ngrams.weigh(np.stack([told, noise]), truth)
    assert of_told == pytest.approx(2.0, abs=0.3)  # two normal classes, two apart, of variance 1
    assert abs(of_noise) < 0.2
    assert abs(bias) < 0.2


def test_words_are_told_apart_as_reviews_write_them(tmp_path: Path) -> None:
    """Case, accents and markup do not matter; a word keeps its apostrophe; punctuation stands alone; it survives a file."""
    learnt = reviews.learn_vocabulary(["A fine café!<br /><br />Don't miss it."], 100, 1)
    learnt.save(tmp_path / "tokenizer.json")
    found = Vocabulary.load(tmp_path / "tokenizer.json")
    pieces = found.pieces(found.encode("a FINE cafe ! don't miss<br />it.").tolist())
    assert pieces == ["a", "fine", "cafe", "!", "don't", "miss", "it", "."]
    assert found.encode("").size == 0
    assert found.encode("unheard").tolist() == [found.unknown]


def test_the_vocabulary_keeps_the_frequent_words() -> None:
    """Its size is a limit with the special marks counted, and rare words are left out."""
    learnt = reviews.learn_vocabulary(["a a a b b c"], 4, 1)
    assert learnt.size == 4
    assert learnt.encode("a b c").tolist()[2] == learnt.unknown
    assert reviews.learn_vocabulary(["a a a b b c"], 100, 2).size == 4


def test_held_out_reviews_are_balanced_and_never_trained_on() -> None:
    """Validation has as many of each label, shares no place with training, and is the same for the same seed."""
    labels = [0, 1] * 50
    train, validation = reviews.hold_out(labels, 20, seed=1)
    assert sorted(train + validation) == list(range(100))
    assert sum(labels[i] for i in validation) == 10
    assert reviews.hold_out(labels, 20, seed=1) == (train, validation)
    assert reviews.hold_out(labels, 20, seed=2) != (train, validation)


def test_long_reviews_are_cut_in_training_only() -> None:
    """A row for training is at most as long as asked, taken anywhere; for validation it is whole."""
    long = torch.arange(100).numpy()
    tokens, lengths, _ = sentiment.Rows([long, long[:3]], [0, 1], 10)[[0, 1]]
    assert lengths.tolist() == [10, 3]
    assert (tokens[0, 1:] - tokens[0, :-1]).tolist() == [1] * 9
    assert tokens[1].tolist() == [0, 1, 2] + [0] * 7
    assert sentiment.Rows([long], [0], 0)[[0]][1].tolist() == [100]


def test_an_incomplete_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reviews are read from the official tree, in an order of our own, and must all be there."""
    file = tmp_path / "imdb" / imdb.LABELLED.name
    file.parent.mkdir()
    with tarfile.open(file, "w:xz") as archive:
        for name in ("train/pos/1_9.txt", "train/pos/0_10.txt", "train/neg/0_1.txt", "test/neg/0_2.txt", "README"):
            text = name.encode()
            member = tarfile.TarInfo(f"aclImdb/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    with pytest.raises(DataError, match="damaged"):
        imdb.read("train", tmp_path)
    monkeypatch.setattr(imdb, "LABELLED", Source(imdb.LABELLED.name, None))
    with pytest.raises(DataError, match="3 reviews in 'train', not 25000"):
        imdb.read("train", tmp_path)
    monkeypatch.setattr(imdb, "_COUNTS", {"train": 3})
    found = imdb.read("train", tmp_path)
    assert found.texts == ("train/neg/0_1.txt", "train/pos/0_10.txt", "train/pos/1_9.txt")
    assert found.labels == (0, 1, 1)


@pytest.mark.parametrize("pairs", [0, 512])
def test_the_toy_is_learnt_and_its_checkpoint_rebuilds_the_model(pairs: int, tmp_path: Path) -> None:
    """The toy configuration learns its made-up language, negation too, and the result is loaded in three lines."""
    few = ["--no-progress", "--set", "run.epochs=3", "--set", f"model.pairs={pairs}"]
    assert command.main(["sentiment", "--config", "toy", *few, "--out", str(tmp_path)]) == 0
    assert ("validation_lstm_accuracy" in json.loads((tmp_path / "scores.json").read_text())["scores"]) == bool(pairs)
    kept = checkpoint.load(tmp_path)
    model = sentiment.rebuild(kept.dims)
    model.load_state_dict(dict(kept.weights))
    assert kept.scores["validation_accuracy"] > 0.95
    vocabulary = Vocabulary.load(tmp_path / reviews.VOCABULARY)
    for text, label in (("the plot was lovely", 1), ("the plot was not lovely", 0), ("a film with awful music", 0)):
        tokens = torch.from_numpy(vocabulary.encode(text))[None]
        with torch.no_grad():
            assert model(tokens, torch.tensor([tokens.shape[1]])).argmax().item() == label


def taught(file: Path, lines: Sequence[object]) -> Path:
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return file


def said(text: str, score: float) -> dict[str, object]:
    """What `seqserve classify --json` prints of a text."""
    scores = {"negative": round(1 - score, 6), "positive": score}
    return {"text": text, "label": max(scores, key=scores.__getitem__), "score": max(scores.values()), "scores": scores, "tokens": 3}


def test_another_models_scores_are_read(tmp_path: Path) -> None:
    """Each text once, with how far it is the second label; none that is held out, whatever its spaces."""
    file = taught(tmp_path / "labels.jsonl", [said("a b", 0.75), said("held  out", 0.5), said("c", 0.25), said("a b", 0.5)])
    assert sentiment.read_taught(file, ("negative", "positive"), ["held out"]) == (["a b", "c"], [0.5, 0.25])


@pytest.mark.parametrize(
    ("line", "says"),
    [("nonsense", "line 2"), (said("x", 1.5), "from 0 to 1"), ({"text": 1, "scores": {"positive": 1}}, "line 2"), ([1], "line 2")],
)
def test_what_is_no_score_is_told_by_line(line: object, says: str, tmp_path: Path) -> None:
    file = taught(tmp_path / "labels.jsonl", [said("a b", 0.75), line])
    with pytest.raises(ConfigError, match=says):
        sentiment.read_taught(file, ("negative", "positive"), [])
    with pytest.raises(ConfigError, match="No such file"):
        sentiment.read_taught(tmp_path / "none", ("negative", "positive"), [])
    with pytest.raises(ConfigError, match="two labels"):
        sentiment.read_taught(file, ("a", "b", "c"), [])


def test_a_pupil_learns_of_its_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 40 labelled sentences a toy learns little; with the doubtful scores of 3,000 more beside them it learns the language."""
    assert reviews.main(["--kind", "toy"]) == 0
    praise = {"good", "fine", "lovely", "great"}
    lines = []
    for text in capsys.readouterr().out.splitlines():
        words = text.split()
        right = bool(praise & set(words)) != ("not" in words)
        lines.append(said(text, 0.85 if right else 0.15))
    file = taught(tmp_path / "labels.jsonl", lines)
    few = ["--no-progress", "--set", "run.epochs=3", "--set", "data.train=40"]
    accuracy = []
    for name, more in (("alone", []), ("taught", ["--set", f"data.taught={file}", "--set", "data.times=2"])):
        assert command.main(["sentiment", "--config", "toy", *few, *more, "--out", str(tmp_path / name)]) == 0
        accuracy.append(checkpoint.load(tmp_path / name).scores["validation_accuracy"])
    assert accuracy[0] < 0.9 < 0.95 < accuracy[1]
