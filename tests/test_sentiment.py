"""The sentiment model: its vocabulary, its data, and that reading in pieces is reading the whole."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract.bundle import Bundle, validate
from contract.text import Vocabulary
from training import __main__ as command
from training import checkpoint, reviews, sentiment
from training.data import DataError, Source, imdb
from training.sentiment import Dims, Sentiment


def small(layers: int = 1) -> Sentiment:
    torch.manual_seed(0)
    return Sentiment(Dims(vocabulary=50, embedding=6, hidden=9, layers=layers)).eval()


def fresh(model: Sentiment, rows: int) -> list[Tensor]:
    return [torch.from_numpy(s.fresh(rows)) for s in sentiment.describe(model)["step"].states]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2), st.lists(st.integers(0, 49), min_size=1, max_size=40), st.data())
def test_reading_in_pieces_is_reading_the_whole(layers: int, words: list[int], data: st.DataObject) -> None:
    """However a text is cut, the step's last score is the whole model's, and its states are those of one long step."""
    model = small(layers)
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
    assert states[-1].item() == len(words)


def test_padding_changes_nothing_in_training() -> None:
    """A row's score does not depend on how far its batch is padded."""
    model = small()
    tokens = torch.randint(0, 50, (3, 12))
    lengths = torch.tensor([12, 5, 1])
    with torch.no_grad():
        together = model(tokens, lengths)
        alone = torch.cat([model(tokens[i : i + 1, :n], torch.tensor([n])) for i, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_the_contract_is_without_fault() -> None:
    """What the model's file describes is a valid bundle."""
    model = small(2)
    described = Bundle("sentiment", sentiment.describe(model), "step", sentiment.task(model, Path()), {"vocabulary": "tokenizer.json"})
    assert validate(described) == []


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


def test_the_toy_is_learnt_and_its_checkpoint_rebuilds_the_model(tmp_path: Path) -> None:
    """The toy configuration learns its made-up language, negation too, and the result is loaded in three lines."""
    assert command.main(["sentiment", "--config", "toy", "--no-progress", "--set", "run.epochs=3", "--out", str(tmp_path)]) == 0
    kept = checkpoint.load(tmp_path)
    model = sentiment.rebuild(kept.dims)
    model.load_state_dict(dict(kept.weights))
    assert kept.scores["validation_accuracy"] > 0.95
    vocabulary = Vocabulary.load(tmp_path / reviews.VOCABULARY)
    for text, label in (("the plot was lovely", 1), ("the plot was not lovely", 0), ("a film with awful music", 0)):
        tokens = torch.from_numpy(vocabulary.encode(text))[None]
        with torch.no_grad():
            assert model(tokens, torch.tensor([tokens.shape[1]])).argmax().item() == label
