"""Named entities: a post read in both directions, a label for every word, the labels scored as a row (BiLSTM-CRF).

It knows the model, its data and how it is cut for serving. It must not know the server, or torch.onnx.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, Dataset

from contract import bundle
from contract.chain import Chain, labelled
from contract.words import FEATURES, Words, vocabulary
from training import checkpoint
from training.config import Config, section
from training.crf import Crf
from training.data import wnut17
from training.data.batches import Batches
from training.data.wnut17 import Post
from training.layers import remember
from training.loop import Training
from training.tasks import About

VOCABULARY, CHAIN = "words.json", "chain.json"

ABOUT = About(
    title="Named entities in English posts",
    use="Finds people, places, companies, groups, products and creative works in short English posts from the net. A first look, "
    "not a reliable extractor: it misses more than half of what is there.",
    data="WNUT-17 emerging and rare entities (Derczynski et al., 2017): 3,394 posts to train on, 1,009 to choose the model by, 1,287 "
    "for the final figure only. Most entities of the test are in neither of the others: that is the task's point.",
    licence="The data set is CC BY 4.0, to be cited as Derczynski et al. 2017.",
    design="For each word: a vector of its own and nine of its first and last letters and its shape, hashed into one table; two "
    "LSTMs, one from each end; a linear layer; and the scores of one label after another (a linear-chain CRF), with which the "
    "server decodes. No vectors or texts from elsewhere. Sentences share rounds, of different lengths too; a word's "
    "length never makes a tensor longer.",
    limits="Published systems on this test reach 42 to 50 F1 with word vectors learnt from billions of words; from these "
    "3,394 posts alone the model knows few words, and goes by capitals, endings and neighbours. Lower-cased names are mostly missed.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dims:
    vocabulary: int
    labels: tuple[str, ...] = wnut17.LABELS
    words: int = 100  # length of a word's own vector
    buckets: int = 16_384
    features: int = 24  # of each feature's vector
    hidden: int = 128  # in each direction
    layers: int = 1
    input_dropout: float = 0.5
    dropout: float = 0.5


@dataclass(frozen=True, slots=True)
class Data:
    """The `data` section of the configuration."""

    kind: str = "wnut17"  # or toy: posts of the code's own making
    least: int = 1  # words seen less often are unknown
    forget: float = 0.25  # a word seen n times is read as unknown in this / (this + n) of all cases while training
    rows: int = 16


class Tagger(nn.Module):
    """Emissions of whole posts; the chain that makes labels of them is `crf`."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims
        self.words = nn.Embedding(dims.vocabulary, dims.words)
        self.features = nn.Embedding(dims.buckets, dims.features)
        for table in (self.words, self.features):
            nn.init.normal_(table.weight, std=0.1)
        self.input_dropout = nn.Dropout(dims.input_dropout)
        wide = dims.words + len(FEATURES) * dims.features
        self.lstm = remember(nn.LSTM(wide, dims.hidden, dims.layers, batch_first=True, bidirectional=True))
        self.dropout = nn.Dropout(dims.dropout)
        self.head = nn.Linear(2 * dims.hidden, len(dims.labels))
        self.crf = Crf(dims.labels)

    def forward(self, words: Tensor, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """words [rows, time], features [rows, time, 9], right-padded where `lengths` [rows] is given → emissions [rows, time, labels]."""
        rows, time = words.shape
        looks = self.features(features).reshape(rows, time, len(FEATURES) * self.dims.features)
        read = self.input_dropout(torch.cat([self.words(words), looks], -1))
        if lengths is None:
            read, _ = self.lstm(read)
        else:  # packed, or the backward LSTM would begin in the padding
            packed = pack_padded_sequence(read, lengths.cpu(), batch_first=True, enforce_sorted=False)
            read, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=time)
        emissions: Tensor = self.head(self.dropout(read))
        return emissions


class Batch(NamedTuple):
    """Posts side by side, right-padded: words [rows, time], features [rows, time, 9], labels [rows, time], lengths [rows]."""

    words: Tensor
    features: Tensor
    labels: Tensor
    lengths: Tensor


class Posts(Dataset[Batch]):
    """Posts as numbers; asked for a list of places it gives the batch of them."""

    def __init__(self, posts: Sequence[Post], words: Words, labels: Sequence[str]) -> None:
        self.posts = posts
        places = {label: i for i, label in enumerate(labels)}
        self._words = [torch.from_numpy(words.ids(p.words)) for p in posts]
        self._features = [torch.from_numpy(words.features(p.words)) for p in posts]
        self._labels = [torch.tensor([places[tag] for tag in p.tags]) for p in posts]

    @property
    def lengths(self) -> list[int]:
        return [len(p.words) for p in self.posts]

    def __len__(self) -> int:
        return len(self.posts)

    def __getitem__(self, places: list[int]) -> Batch:
        pad = torch.nn.utils.rnn.pad_sequence
        words, features, labels = ([rows[i] for i in places] for rows in (self._words, self._features, self._labels))
        return Batch(
            pad(words, batch_first=True), pad(features, batch_first=True), pad(labels, batch_first=True),
            torch.tensor([len(w) for w in words]),
        )  # fmt: skip


class TaggerTraining(Training):
    """The log loss of whole rows of labels; entity F1 on the development posts decides."""

    monitor = "validation_f1"
    monitor_mode = "max"

    def __init__(self, model: Tagger, config: Config, data: Data, words: Words, train: Sequence[Post], dev: Sequence[Post]) -> None:
        super().__init__(model, asdict(model.dims), config)
        self.settings, self.unknown = data, words.unknown
        self.train_posts, self.dev_posts = (Posts(posts, words, model.dims.labels) for posts in (train, dev))
        seen = np.bincount(np.concatenate([words.ids(p.words) for p in train]), minlength=words.size)
        self.forgotten: Tensor
        self.register_buffer("forgotten", torch.from_numpy(data.forget / (data.forget + seen)).float(), persistent=False)
        self._emissions: list[np.ndarray[Any, Any]] = []

    def _losses(self, batch: Batch, words: Tensor) -> Tensor:
        model = self.model
        assert isinstance(model, Tagger)
        return model.crf.loss(model(words, batch.features, batch.lengths), batch.labels, batch.lengths)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        forget = torch.rand(batch.words.shape, device=batch.words.device) < self.forgotten[batch.words]
        return self._losses(batch, batch.words.masked_fill(forget, self.unknown)).sum() / batch.lengths.sum(), {}

    def scores(self, batch: Batch) -> dict[str, tuple[Tensor, int]]:
        model = self.model
        assert isinstance(model, Tagger)
        emissions = model(batch.words, batch.features, batch.lengths)
        self._emissions += [e[:n].cpu().numpy() for e, n in zip(emissions, batch.lengths.tolist(), strict=True)]
        words = int(batch.lengths.sum())
        return {"loss": (model.crf.loss(emissions, batch.labels, batch.lengths).sum() / words, words)}

    def validation_end_scores(self) -> dict[str, float]:
        emissions, self._emissions = self._emissions, []
        model = self.model
        assert isinstance(model, Tagger)
        chain = model.crf.chain()
        found = [labelled([chain.labels[at] for at in chain.best(e)]) for e in emissions]
        order = [place for batch in self._dev_order() for place in batch]
        score = wnut17.entity_score([labelled(self.dev_posts.posts[place].tags) for place in order], found)
        return {"f1": score.f1, "precision": score.precision, "recall": score.recall}

    def _dev_order(self) -> Batches:
        return Batches(self.dev_posts.lengths, self.settings.rows, shuffle=False)

    def train_batches(self) -> DataLoader[Batch]:
        order = Batches(self.train_posts.lengths, self.settings.rows, seed=self.config.seed)
        return DataLoader(self.train_posts, sampler=order, batch_size=None, num_workers=self.config.run.workers)

    def validation_batches(self) -> DataLoader[Batch]:
        return DataLoader(self.dev_posts, sampler=self._dev_order(), batch_size=None)


def learn_vocabulary(posts: Sequence[Post], least: int, buckets: int) -> Words:
    """The words of posts in their normal form, those first that are seen most."""
    empty = Words(vocabulary([]), buckets)
    seen = Counter(empty.normal(word) for post in posts for word in post.words)
    return Words(vocabulary([w for w, n in seen.most_common() if n >= least and w]), buckets)


def split_alike(post: Post, words: Words) -> Post:
    """A post split as the server splits texts: the training part keeps "I'm" and ":)" whole, development and test do not."""
    found: list[str] = []
    tags: list[str] = []
    for word, tag in zip(post.words, post.tags, strict=True):
        pieces = [word[a:b] for a, b in words.split(word)] or [word]
        found += pieces
        tags += [tag, *[tag.replace("B-", "I-")] * (len(pieces) - 1)]
    return Post(tuple(found), tuple(tags))


def toy(seed: int) -> list[Post]:
    """Made-up posts: after "in" a place, after "met" a person of one or two words, all of them capitalised letters at random."""
    random = np.random.default_rng(seed)
    posts = []
    for _ in range(1_000):
        words: list[str] = []
        tags: list[str] = []
        for _ in range(int(random.integers(1, 4))):
            opening = str(random.choice(["we met", "it rained in", "he ate", "they left"]))
            words += opening.split()
            tags += ["O"] * len(opening.split())
            kind = {"met": "person", "in": "location"}.get(words[-1])
            for at in range(int(random.integers(1, 3)) if kind == "person" else 1 if kind else 0):
                words.append("".join(random.choice(list("aeioklmnrst"), 5)).capitalize())
                tags.append(f"{'I' if at else 'B'}-{kind}")
            words.append(str(random.choice([".", "and", "today"])))
            tags.append("O")
        posts.append(Post(tuple(words), tuple(tags)))
    return posts


# How it is served.


def prepare(config: Config, data: Path | None, out: Path) -> TaggerTraining:
    """Read the posts, learn the vocabulary from the training part alone and save it, build the model."""
    settings = section(Data, config.data, "data")
    if settings.kind == "toy":
        posts = toy(config.seed)
        train, dev = posts[:800], posts[800:]
    else:
        train, dev = list(wnut17.read("train", data)), list(wnut17.read("dev", data))
    made = section(Dims, {"vocabulary": 0, **config.model}, "model")
    train = [split_alike(post, Words(vocabulary([]), made.buckets)) for post in train]
    words = learn_vocabulary(train, settings.least, made.buckets)
    words.save(out / VOCABULARY)
    dims = section(Dims, {"vocabulary": words.size, **config.model}, "model")
    return TaggerTraining(Tagger(dims), config, settings, words, train, dev)


def rebuild(dims: Mapping[str, Any]) -> Tagger:
    return Tagger(Dims(**dims)).eval()


LONGEST = 1_000  # words of one text: a page; ten times the longest post


def describe(model: nn.Module) -> dict[str, bundle.Graph]:
    """One graph, run over whole texts: the second LSTM begins at the end."""
    assert isinstance(model, Tagger)
    dims = model.dims
    rows = (bundle.BATCH, bundle.TIME)
    words = bundle.Tensor("words", "int64", rows, "places in the vocabulary", low=0, high=dims.vocabulary - 1)
    features = bundle.Tensor("features", "int64", (*rows, len(FEATURES)), ", ".join(FEATURES), low=0, high=dims.buckets - 1)
    emissions = bundle.Tensor("emissions", "float32", (*rows, len(dims.labels)), "scores of each label, before the chain")
    return {"read": bundle.Graph("read.onnx", (words, features), (emissions,), cut=False, max_time=LONGEST)}


def parts(model: nn.Module) -> dict[str, nn.Module]:
    assert isinstance(model, Tagger)
    return {"read": _Read(model).eval()}


class _Read(nn.Module):
    def __init__(self, model: Tagger) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor, features: Tensor) -> tuple[Tensor]:
        return (self.model(words, features),)


def task(model: nn.Module, run: Path) -> dict[str, Any]:
    assert isinstance(model, Tagger)
    return {"kind": "tag", "vocabulary": "vocabulary", "chain": "chain", "buckets": model.dims.buckets}


def resources(run: Path) -> dict[str, Path]:
    """The vocabulary, and the chain of the weights that were kept, written beside it."""
    kept = checkpoint.load(run)
    model = rebuild(kept.dims)
    model.load_state_dict(dict(kept.weights))
    chain: Chain = model.crf.chain()
    chain.save(run / CHAIN)
    return {"vocabulary": run / VOCABULARY, "chain": run / CHAIN}
