"""The tagger: its decoding and loss against every row of labels there is, its words, its data, its batches."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.bundle import Bundle, validate
from contract.chain import NEVER, Chain, forbidden, labelled
from contract.words import FEATURES, Words, shape, vocabulary
from training import tagger
from training.crf import Crf
from training.data import DataError, wnut17
from training.data.wnut17 import Post
from training.tagger import Dims, Tagger

LABELS = ("O", "B-a", "I-a", "B-b", "I-b")


def chain(seed: int) -> Chain:
    random = np.random.default_rng(seed)
    after, first = forbidden(LABELS)
    n = len(LABELS)
    return Chain(
        LABELS, np.where(after, NEVER, random.normal(size=(n, n))), np.where(first, NEVER, random.normal(size=n)), random.normal(size=n)
    )


def every_row(c: Chain, emissions: np.ndarray) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """All rows of labels and the probability of each, by adding up what the chain says."""
    steps = len(emissions)
    rows = list(itertools.product(range(len(LABELS)), repeat=steps))
    scores = np.array(
        [
            c.first[r[0]]
            + c.last[r[-1]]
            + sum(emissions[t, r[t]] for t in range(steps))
            + sum(c.after[a, b] for a, b in itertools.pairwise(r))
            for r in rows
        ]
    )
    weights = np.exp(scores - scores.max())
    return rows, weights / weights.sum()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.floats(0.1, 100))
def test_the_best_row_and_its_spans_are_those_of_trying_all(seed: int, steps: int, scale: float) -> None:
    """Viterbi finds the likeliest of all rows, and a span's score is the probability of the rows that have just that span."""
    c = chain(seed)
    emissions = (np.random.default_rng(seed + 1).normal(size=(steps, len(LABELS))) * scale).astype(np.float32)
    rows, chances = every_row(c, emissions.astype(np.float64))
    best = c.best(emissions)
    assert tuple(best) == rows[int(chances.argmax())]
    found = [labelled([LABELS[i] for i in r]) for r in rows]
    spans = sorted({s for listed in found for s in listed if any(chances[i] > 1e-9 for i, one in enumerate(found) if s in one)})
    wanted = [sum(p for p, listed in zip(chances, found, strict=True) if s in listed) for s in spans]
    np.testing.assert_allclose(c.probabilities(emissions, spans), wanted, rtol=1e-9, atol=1e-12)
    assert [(s.start, s.end, s.label) for s in c.spans(emissions)] == labelled([LABELS[i] for i in best])


def test_the_loss_is_minus_the_log_probability() -> None:
    """Rows of several lengths side by side get the loss that adding up all rows of labels gives, whatever stands in the padding."""
    torch.manual_seed(0)
    crf = Crf(LABELS).double()
    with torch.no_grad():
        for scores in crf.parameters():
            scores.normal_()
    emissions = torch.randn(3, 4, len(LABELS), dtype=torch.float64)
    labels = torch.tensor([[1, 2, 0, 3], [0, 3, 4, 4], [3, 2, 2, 2]])
    lengths = torch.tensor([4, 3, 1])
    losses = crf.loss(emissions, labels, lengths)
    c = crf.chain()
    for row, length in enumerate(lengths.tolist()):
        rows, chances = every_row(c, emissions[row, :length].numpy())
        assert losses[row].item() == pytest.approx(-np.log(chances[rows.index(tuple(labels[row, :length].tolist()))]), rel=1e-9)


def test_a_chain_is_saved_exactly(tmp_path: Path) -> None:
    """What is read back is what was written, to the last bit; a file with a score too few is refused."""
    c = chain(3)
    c.save(tmp_path / "chain.json")
    read = Chain.load(tmp_path / "chain.json")
    assert read.labels == c.labels
    assert all((a == b).all() for a, b in ((read.after, c.after), (read.first, c.first), (read.last, c.last)))
    Chain(LABELS, c.after, c.first[:-1], c.last).save(tmp_path / "chain.json")
    with pytest.raises(ValueError, match="of 5 labels"):
        Chain.load(tmp_path / "chain.json")


def test_iob2_is_kept_to() -> None:
    """I-x is ruled out but after B-x and I-x, also where emissions ask for nothing else; read from tags, it begins a span."""
    after, first = forbidden(LABELS)
    assert after[:, 2].tolist() == [True, False, False, True, True]
    assert first.tolist() == [False, False, True, False, True]
    wish = np.zeros((3, len(LABELS)), np.float32)
    wish[:, 4] = 50
    assert [LABELS[i] for i in chain(1).best(wish)] == ["B-b", "I-b", "I-b"]
    assert labelled(["I-a", "I-a", "I-b", "O", "B-b", "B-b"]) == [(0, 2, "a"), (2, 3, "b"), (4, 5, "b"), (5, 6, "b")]


TEXTS = {
    "It's in St. Louis-area, @bob! #win https://t.co/x?a=1": "It ' s in St . Louis-area , @bob ! #win https://t.co/x?a=1",
    " 30,000 people... U.S. 😀é ": "30,000 people ... U.S . 😀 é",
    "": "",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_split(text: str) -> None:
    """Words are cut where the data cut them, with offsets in characters, and spaces are no word's."""
    words = Words(vocabulary([]), 64)
    assert [text[a:b] for a, b in words.split(text)] == TEXTS[text].split()


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6))
def test_any_word_has_numbers(given_words: list[str]) -> None:
    """Whatever the letters, a word's numbers are within the tables', and depend on the word alone."""
    words = Words(vocabulary(["the", "<user>"]), 97)
    ids, features = words.ids(given_words), words.features(given_words)
    assert features.shape == (len(given_words), len(FEATURES))
    assert 0 <= ids.min() <= ids.max() < words.size
    assert 0 <= features.min() <= features.max() < 97
    assert (features[-1:] == words.features(given_words[-1:])).all()


def test_numbers_of_words_stay() -> None:
    """Features are the same in every release, or shipped bundles would read other words; normal forms meet in one place."""
    words = Words(vocabulary(["the", "<user>", "<url>", "000"]), 16_384)
    assert words.ids(["The", "@bob", "https://x.y", "123", "THE", "never"]).tolist() == [1, 2, 3, 4, 1, 0]
    assert shape("McDonald's42") == "XxXxxxxx'x00"
    assert words.features(["McDonald"]).tolist() == [[9485, 9008, 13971, 824, 14304, 3880, 2778, 8020, 15248]]
    assert words.features([]).shape == (0, len(FEATURES))


def small() -> Tagger:
    torch.manual_seed(0)
    return Tagger(Dims(vocabulary=30, words=5, buckets=40, features=3, hidden=7)).eval()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 2**31))
def test_posts_side_by_side_are_posts_alone(lengths: list[int], seed: int) -> None:
    """The emissions of padded posts of any lengths are those of each read alone, as it is served."""
    random = torch.Generator().manual_seed(seed)
    rows, time = len(lengths), max(lengths)
    words = torch.randint(30, (rows, time), generator=random)
    features = torch.randint(40, (rows, time, len(FEATURES)), generator=random)
    model = small()
    with torch.no_grad():
        together = model(words, features, torch.tensor(lengths))
        for row, length in enumerate(lengths):
            alone = model(words[row : row + 1, :length], features[row : row + 1, :length])
            torch.testing.assert_close(together[row : row + 1, :length], alone, atol=1e-5, rtol=1e-4)


def test_what_it_promises_is_sound(tmp_path: Path) -> None:
    """Its contract has no fault, and its graph runs whole: the LSTM that reads backwards begins at the end."""
    model = small()
    graphs = tagger.describe(model)
    assert validate(Bundle("tagger", graphs, "read", {**tagger.task(model, tmp_path)})) == []
    assert not graphs["read"].cut


def conll(posts: list[Post], blank: str = "") -> str:
    return "".join("".join(f"{w}\t{t}\n" for w, t in zip(p.words, p.tags, strict=True)) + blank + "\n" for p in posts)


def test_the_data_are_checked(tmp_path: Path) -> None:
    """A file that is not the published one is refused, with what to do."""
    (tmp_path / "wnut17").mkdir()
    (tmp_path / "wnut17" / "emerging.dev.conll").write_text(conll([Post(("a",), ("O",))]))
    with pytest.raises(DataError, match="fetch it again"):
        wnut17.read("dev", tmp_path)


def test_the_data_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Posts end at empty lines and at lines with a lone tab, as the published files have them."""
    posts = [Post(("Bo", "x"), ("B-person", "O")), Post(("y",), ("O",))]
    text = conll(posts[:1], "\t") + conll(posts[1:])
    file = tmp_path / "some.conll"
    file.write_text(text)
    monkeypatch.setattr(wnut17, "fetch", lambda source, directory, folder: file)
    monkeypatch.setitem(wnut17._FILES, "dev", ("some.conll", "", 2))
    assert list(wnut17.read("dev", tmp_path)) == posts
    monkeypatch.setitem(wnut17._FILES, "dev", ("some.conll", "", 3))
    with pytest.raises(DataError, match="2 posts, not 3"):
        wnut17.read("dev", tmp_path)


def test_scores() -> None:
    """An entity counts once per place, a surface form once in all; a wrong type or end is wrong."""
    posts = [Post(("Bo", "met", "Al", "B"), ("B-person", "O", "B-person", "I-person")), Post(("Bo", "!"), ("B-person", "O"))]
    truth = [labelled(p.tags) for p in posts]
    found = [[(0, 1, "person"), (2, 3, "person")], [(0, 1, "group")]]
    entities = wnut17.entity_score(truth, found)
    assert (entities.precision, entities.recall) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    surface = wnut17.surface_score(posts, found)
    assert (surface.precision, surface.recall, surface.f1) == (pytest.approx(1 / 3), pytest.approx(1 / 2), pytest.approx(2 / 5))
    assert wnut17.entity_score(truth, truth).f1 == wnut17.surface_score(posts, truth).f1 == 1
    assert wnut17.entity_score(truth, [[], []]).f1 == 0


def test_training_posts_are_split_as_texts_are() -> None:
    """A word that the server would cut is cut for training too; its entity stays one."""
    words = Words(vocabulary([]), 8)
    post = tagger.split_alike(Post(("I'm", "at", "Macy's"), ("O", "O", "B-corporation")), words)
    assert post.words == ("I", "'", "m", "at", "Macy", "'", "s")
    assert labelled(post.tags) == [(4, 7, "corporation")]
