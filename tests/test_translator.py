"""What holds for the translator: its training layout and its served parts are one model, its search is exact, its text
comes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from contract.search import Hypothesis, Search
from contract.text import Vocabulary
from training import search
from training.pairs import END_ID, START_ID, ByLength, Pairs, make_vocabulary, reversed_words
from training.repeated import Repeated, smoothed_cross_entropy
from training.translator import Dims, Encode, Step, Translator, as_functions, describe

DIMS = Dims(vocabulary=40, embedding=12, encoder=8, decoder=16, dropout=0.0)


@pytest.fixture(scope="module")
def model() -> Translator:
    torch.manual_seed(3)
    return Translator(DIMS).eval()


def sources(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.cat([torch.randint(4, 40, (n - 1,), generator=generator), torch.tensor([END_ID])]) for n in lengths]


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(r) for r in rows])


def test_padding_changes_nothing_for_the_encoder(model: Translator) -> None:
    """A sentence read in a padded batch gives what it gives alone."""
    rows = sources([5, 2, 9, 1])
    memory, h, c = model.encode(*padded(rows))
    for n, row in enumerate(rows):
        alone, h1, c1 = Encode(model)(row[None])
        torch.testing.assert_close(memory[n : n + 1, : len(row)], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(h[:, n : n + 1], h1, atol=1e-5, rtol=0)
        torch.testing.assert_close(c[:, n : n + 1], c1, atol=1e-5, rtol=0)


def test_training_and_serving_are_the_same_model(model: Translator) -> None:
    """Teacher forcing over padded tensors gives the log probabilities that ragged single steps give."""
    rows = sources([4, 7, 1])
    target = torch.cat([torch.full((3, 1), START_ID), torch.randint(4, 40, (3, 6), generator=torch.Generator().manual_seed(1))], 1)
    step = Step(model)
    together = torch.log_softmax(model.logits(model(*padded(rows), target)) + step.never, dim=2)
    encoded = [Encode(model)(row[None]) for row in rows]
    memory, row = torch.cat([e[0][0] for e in encoded]), torch.arange(3).repeat_interleave(torch.tensor([4, 7, 1]))
    h, c, feed = torch.cat([e[1] for e in encoded], 1), torch.cat([e[2] for e in encoded], 1), torch.zeros(3, DIMS.embedding)
    for place in range(target.shape[1]):
        log_probs, ids, weights, h, c, feed = step(target[:, place : place + 1], memory, row, h, c, feed)
        torch.testing.assert_close(log_probs, together[:, place].gather(1, ids), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.zeros(3).index_put((row,), weights, accumulate=True), torch.ones(3))


def test_a_repeated_matrix_has_the_gradient_of_a_linear_layer() -> None:
    """The one product at the end of the loop is the sum of the products of its steps."""
    torch.manual_seed(0)
    start, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    repeated = Repeated(weight)
    ours = plain = start
    for _ in range(5):
        ours, plain = torch.tanh(repeated(ours)), torch.tanh(plain @ weight.t())
    for a, b in zip(*(torch.autograd.grad(x.sum(), (start, weight)) for x in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_in_parts_is_cross_entropy(smoothing: float) -> None:
    """Value and gradients are torch's, over more tokens than one part holds."""
    torch.manual_seed(0)
    inputs = torch.randn(300, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True), torch.randn(20, requires_grad=True)
    wanted = torch.randint(20, (300,))
    ours = smoothed_cross_entropy(*inputs, wanted, smoothing)
    plain = functional.cross_entropy(inputs[0] @ inputs[1].t() + inputs[2], wanted, label_smoothing=smoothing)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def translated(model: Translator, rows: list[Tensor], beam: int, together: int) -> list[Hypothesis]:
    encode, step = as_functions(model)
    return search.translate(
        encode, step, [r.numpy() for r in rows], start=START_ID, end=END_ID, beam=beam, length_penalty=1.0,
        max_length=12, feed=DIMS.embedding, rows=together,
    )  # fmt: skip


@pytest.mark.parametrize("beam", [1, 4])
def test_sentences_searched_together_are_as_alone(model: Translator, beam: int) -> None:
    """A search does not see the searches beside it."""
    rows = sources([3, 6, 2, 8, 5], seed=4)
    assert [h.tokens for h in translated(model, rows, beam, 1000)] == [h.tokens for h in translated(model, rows, beam, 1)]


def test_beam_one_is_greedy(model: Translator) -> None:
    """With one hypothesis the most likely token is taken at each step."""
    (row,) = sources([6], seed=2)
    encode, step = as_functions(model)
    memory, h, c = encode(row.numpy()[None])
    token, feed = np.array([[START_ID]]), np.zeros((1, DIMS.embedding), np.float32)
    tokens: list[int] = []
    while len(tokens) < 12:
        _, ids, _, h, c, feed = step(token, memory[0], np.zeros(len(row), np.int64), h, c, feed)
        if ids[0, 0] == END_ID:
            break
        token = ids[:, :1]
        tokens.append(int(ids[0, 0]))
    assert translated(model, [row], 1, 1)[0].tokens == tuple(tokens)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4))
def test_a_wide_enough_beam_finds_the_best(seed: int, limit: int) -> None:
    """Where the beam holds every hypothesis there is, and no length penalty makes longer ones rise again, the answer is
    the most likely sequence of at most `limit` tokens."""
    rng = np.random.default_rng(seed)
    end, size = 0, 3
    table: dict[tuple[int, ...], search.Array] = {}

    def log_probs(tokens: tuple[int, ...]) -> search.Array:
        if tokens not in table:
            table[tokens] = np.log(rng.dirichlet(np.ones(size)) + 1e-9).astype(np.float32)
        return table[tokens]

    found = Search(end, size ** (limit + 1), 0.0, limit)
    while not found.done:
        rows = [log_probs(h.tokens) for h in found.live]
        order = [np.argsort(-r, kind="stable") for r in rows]
        found.advance(np.stack([r[o] for r, o in zip(rows, order, strict=True)]), np.stack(order))
    best = -np.inf
    stack: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    while stack:
        tokens, score = stack.pop()
        best = max(best, score + float(log_probs(tokens)[end]))
        if len(tokens) + 1 < limit:
            stack += [((*tokens, t), score + float(log_probs(tokens)[t])) for t in range(1, size)]
    assert found.best[0] == pytest.approx(best)


def test_text_comes_back() -> None:
    """Decoding the pieces of a text gives the text, whatever its punctuation."""
    lines = ["Ein Mann (mit Hut) sagt: „Guten Tag!“", "A man's well-dressed dog, running; 3 of 4.", "Zwölf Boxkämpfer"]
    vocabulary = Vocabulary(make_vocabulary(lines, 120))
    assert [vocabulary.decode(vocabulary.encode(line).tolist()) for line in lines] == lines
    assert vocabulary.decode(vocabulary.encode("  Ein  Mann ").tolist()) == "Ein Mann"


def test_every_sentence_is_in_one_batch_of_an_epoch() -> None:
    """Batches by length hold each sentence once, and epochs differ."""
    made, back = reversed_words(50, 1)
    pairs = Pairs([[4] * len(s) for s in made], [[4] * len(s) for s in back])
    batches = ByLength(pairs, 8, seed=1)
    first = list(batches)
    batches.set_epoch(1)
    assert sorted(n for b in first for n in b) == list(range(50))
    assert first != list(batches)
    assert len(first) == len(batches)


def test_the_contract_can_be_served(model: Translator) -> None:
    """bundle.py finds no fault in the described graphs."""
    from contract.bundle import Bundle, validate

    assert validate(Bundle("translator", describe(model), "step", {"kind": "translate"})) == []
