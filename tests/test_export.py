"""Export: the files are bare, the proof finds what differs, and a bundle is whole or not there."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from contract import bundle
from contract.bundle import Graph, State
from export import __main__ as command
from export import bundling, card, draw, to_onnx, verify
from export.verify import VerifyError
from server.graph import OnnxGraph
from training import __main__ as train


class Reader(nn.Module):
    """The smallest model that has everything: inputs along time, an output along time, one at the end, states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 4)
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, tokens: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        read, (h, c) = self.lstm(self.embedding(tokens), (h, c))
        return read, h[0] * 2, h, c


READER = Graph(
    "reader.onnx",
    (bundle.Tensor("tokens", "int64", ("batch", "time"), low=0, high=10),),
    (bundle.Tensor("each", "float32", ("batch", "time", 5)), bundle.Tensor("end", "float32", ("batch", 5))),
    (State("h", "next_h", "float32", (1, "batch", 5)), State("c", "next_c", "float32", (1, "batch", 5))),
)


class Look(nn.Module):
    """Attention over ragged memory: each row has cells of its own, laid end to end."""

    def forward(self, query: Tensor, memory: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        score = (query[row] * memory).sum(-1)  # [cells]
        top = torch.full((query.shape[0],), -1e30).scatter_reduce(0, row, score, "amax")
        weight = torch.exp(score - top[row])
        weight = weight / torch.zeros(query.shape[0]).index_put((row,), weight, accumulate=True)[row]
        seen = torch.zeros_like(query).index_put((row,), weight[:, None] * memory, accumulate=True)
        return seen, weight


LOOK = Graph(
    "look.onnx",
    (
        bundle.Tensor("query", "float32", ("batch", 3)),
        bundle.Tensor("memory", "float32", ("batch*source", 3)),
        bundle.Tensor("row", "int64", ("batch*source",), role="row"),
    ),
    (bundle.Tensor("seen", "float32", ("batch", 3)), bundle.Tensor("weight", "float32", ("batch*source",))),
)


def made(graph: Graph, module: nn.Module, directory: Path) -> OnnxGraph:
    to_onnx.write(graph, module, directory / graph.file)
    return OnnxGraph(graph, directory / graph.file)


@pytest.mark.parametrize(("graph", "module"), [(READER, Reader()), (LOOK, Look())], ids=["recurrent", "ragged"])
def test_a_right_export_is_proved_bit_for_bit(graph: Graph, module: nn.Module, tmp_path: Path) -> None:
    """ONNX is PyTorch within rounding; rows run together and cut are the rows alone and whole, bit for bit."""
    proof = verify.verify("it", graph, module, made(graph, module, tmp_path))
    assert proof.cases == (len(verify.ROWS) * len(verify.TIMES) + 1 if graph is READER else len(verify.ROWS))
    assert proof.batched_is_alone
    assert proof.cut_is_whole is (True if graph is READER else None)
    assert proof.error < verify.ABSOLUTE
    assert verify.settled(graph, proof).shared


class Weekly(nn.Module):
    """Each step's output is the input of 168 steps before."""

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return nn.functional.pad(x, (0, 0, 168, 0))[:, : x.shape[1]], h + x.sum(1)


def test_what_looks_far_back_is_refused(tmp_path: Path) -> None:
    """A look-back longer than all short trials is found by the long one: a graph that is said to be cut must stand it."""
    graph = Graph(
        "weekly.onnx", (bundle.Tensor("x", "float32", ("batch", "time", 3)),), (bundle.Tensor("each", "float32", ("batch", "time", 3)),),
        (bundle.State("h", "next_h", "float32", ("batch", 3)),),
    )  # fmt: skip
    with pytest.raises(VerifyError, match=r"1 rows, 513 steps, cut at .* each "):
        verify.verify("weekly", graph, Weekly(), made(graph, Weekly(), tmp_path))


def test_nothing_of_the_machine_is_left_in_a_file(tmp_path: Path) -> None:
    """No path, stack trace, doc string or note of the exporter's stays; what is exported is the same each time."""
    made(READER, Reader(), tmp_path)
    content = (tmp_path / "reader.onnx").read_bytes()
    text = " ".join(m.decode() for m in re.findall(rb"[\x20-\x7e]{4,}", content))
    for trace in (str(Path(__file__).parent.parent), ".py", "site-packages", "stack_trace", "Traceback"):
        assert trace not in text
    graph = onnx.load(tmp_path / "reader.onnx").graph
    assert not any(n.doc_string or n.metadata_props for n in graph.node)
    made(READER, Reader(), tmp_path)
    assert (tmp_path / "reader.onnx").read_bytes() == content


def test_a_wrong_export_is_refused_with_a_table(tmp_path: Path) -> None:
    """Weights that are not the module's are found in every tensor they reach, each with its error and what is allowed."""
    runner = made(READER, Reader(), tmp_path)
    other = Reader()
    with torch.no_grad():
        dict(other.lstm.named_parameters())["bias_ih_l0"][0] += 0.01
    with pytest.raises(VerifyError) as refused:
        verify.verify("reader", READER, other, runner)
    lines = str(refused.value).splitlines()
    assert lines[0].split("  ")[0] == "graph"
    assert {d.name for d in refused.value.differences} == {"each", "end", "next_h", "next_c"}
    assert all(d.error > d.allowed for d in refused.value.differences)


def test_a_row_that_depends_on_its_mates_is_never_shared(tmp_path: Path) -> None:
    """Where batching alters an answer the proof says so, and the contract it settles on keeps callers apart."""

    class Crowd(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (x - x.mean(0, keepdim=True),)

    graph = Graph("crowd.onnx", (bundle.Tensor("x", "float32", ("batch", 4)),), (bundle.Tensor("y", "float32", ("batch", 4)),))
    proof = verify.verify("crowd", graph, Crowd(), made(graph, Crowd(), tmp_path))
    assert not proof.batched_is_alone
    assert not verify.settled(graph, proof).shared
    assert "rows run together" in proof.notes[0]


def test_a_state_that_forgets_is_found_by_cutting(tmp_path: Path) -> None:
    """A model whose state loses something gives another answer when cut: the export is refused."""

    class Forgetful(Reader):
        def forward(self, tokens: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            each, end, h, c = super().forward(tokens, h, c)
            return each, end, h, c * 0.5

    with pytest.raises(VerifyError, match="cut at"):
        verify.verify("reader", READER, Forgetful(), made(READER, Forgetful(), tmp_path))


def test_whole_numbers_must_agree_exactly() -> None:
    """A token id that is off by one is a difference, however small it looks beside its size."""
    proof = verify.Proof("g")
    graph = Graph("g.onnx", (), (bundle.Tensor("ids", "int64", ("batch",)),))
    verify._near(proof, graph, [{"ids": np.array([1000])}], [{"ids": np.array([1001])}], "here")
    assert [(d.name, d.error, d.allowed) for d in proof.differences] == [("ids", 1.0, 0.0)]


def test_nan_is_a_difference() -> None:
    """Not-a-number on one side alone is infinitely far."""
    proof = verify.Proof("g")
    graph = Graph("g.onnx", (), (bundle.Tensor("y", "float32", ("batch",)),))
    verify._near(proof, graph, [{"y": np.array([np.nan], "f")}], [{"y": np.array([1.0], "f")}], "here")
    assert proof.differences[0].error == float("inf")


def test_drawn_values_are_what_the_contract_allows() -> None:
    """Ids lie between low and high, both reached; rows of a round share every length but time's ragged ones."""
    random = np.random.default_rng(0)
    drawn = draw.row(READER, draw.Sizes(500), random)["tokens"]
    assert (drawn.min(), drawn.max(), drawn.dtype) == (0, 10, np.int64)
    rows = [draw.row(LOOK, s, random) for s in draw.sizes(LOOK, 6, 1, random)]
    feeds = draw.stack(LOOK, rows, [1] * 6)
    cells = [len(r["memory"]) for r in rows]
    assert len(set(cells)) > 1
    assert np.bincount(feeds["row"]).tolist() == cells
    parts = draw.split(LOOK, rows, [feeds["query"], feeds["row"]])
    assert [p["weight"].tolist() for p in parts] == [[i] * n for i, n in enumerate(cells)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run of the sentiment model."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    assert train.main(["sentiment", "--config", "toy", "--no-progress", "--set", "run.epochs=1", "--out", str(out)]) == 0
    return out


def test_a_run_becomes_a_bundle_that_loads(run: Path, tmp_path: Path) -> None:
    """The command writes a bundle that the contract accepts, with its proof, its origin and its card."""
    out = tmp_path / "mood" / "1"
    assert command.main([str(run), "--out", str(out)]) == 0
    found = bundle.load(out)
    assert (found.name, found.kind, found.main) == ("mood", "classify", "step")
    assert found.verified["step"]["batched_is_alone"]
    assert found.verified["step"]["cut_is_whole"]
    assert found.made_from["command"].startswith("python -m training sentiment --config toy")
    described = (out / bundle.FILE).read_text() + (out / card.FILE).read_text()
    assert str(tmp_path) not in described
    assert str(run) not in described
    assert {f.name for f in out.iterdir()} == {"bundle.json", "README.md", "curves.png", "step.onnx", "tokenizer.json"}
    assert [f.name for f in out.parent.iterdir()] == ["1"]


def test_the_same_run_gives_the_same_bundle(run: Path, tmp_path: Path) -> None:
    """Exporting again replaces the bundle with one of the same fingerprint."""
    first = bundling.export(run, tmp_path / "1")
    assert bundling.export(run, tmp_path / "1").fingerprint == first.fingerprint


def test_a_failed_export_leaves_what_was_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the proof fails the command prints the table, exits 1, and an earlier bundle is still whole."""
    out = tmp_path / "mood" / "1"
    first = bundling.export(run, out)
    monkeypatch.setattr(verify, "ABSOLUTE", 0.0)
    monkeypatch.setattr(verify, "RELATIVE", 0.0)
    assert command.main([str(run), "--out", str(out)]) == 1
    assert "largest error" in capsys.readouterr().err
    assert bundle.load(out).fingerprint == first.fingerprint


def test_test_figures_reach_the_card(run: Path, tmp_path: Path) -> None:
    """The rows of the quality command's JSON that are this model's stand in its card."""
    rows = [
        {"model": "mood", "data": "25,000 test reviews", "metric": "accuracy", "value": 0.875, "low": 0.5, "high": None},
        {"model": "other", "data": "x", "metric": "BLEU", "value": 1.0, "low": None, "high": None},
    ]
    (tmp_path / "quality.json").write_text(json.dumps(rows))
    assert command.main([str(run), "--out", str(tmp_path / "mood" / "1"), "--scores", str(tmp_path / "quality.json")]) == 0
    text = (tmp_path / "mood" / "1" / card.FILE).read_text()
    assert "| 25,000 test reviews | accuracy | 0.875 | at least 0.5 |" in text
    assert "BLEU" not in text


def test_what_was_measured_on_a_bundle_stays_in_its_card(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exported again, the same bundle keeps its test figures and its other precisions; another one keeps neither and says so."""
    out = tmp_path / "mood" / "1"
    row = {"model": "mood", "data": "test", "metric": "accuracy", "value": 0.875, "low": 0.5, "high": None}
    (tmp_path / "quality.json").write_text(json.dumps([row]))
    bundling.export(run, out, "mood", tmp_path / "quality.json")
    file = out / card.FILE
    file.write_text(card.with_section(file.read_text(), card.PRECISIONS, "| float16 | half |"))
    before = file.read_text()
    assert before.index("## Figures") < before.index("| float16 | half |") < before.index("## Data and licence")
    bundling.export(run, out, "mood")
    assert file.read_text() == before
    assert capsys.readouterr().err == ""
    bundling.export(run, out, "mood", precision="float16-weights")
    assert "| test |" not in file.read_text()
    assert card.section(file.read_text(), card.PRECISIONS) == ""
    assert "left out" in capsys.readouterr().err


def test_a_section_of_a_card_is_replaced() -> None:
    """A section takes the place of that of the same heading, whole, and touches no other."""
    text = "# A\n\n## Figures\n\nf\n\n## Data and licence\n\nd\n"
    one = card.with_section(text, "Other", "1\n\n1")
    assert card.section(one, "Other") == "1\n\n1"
    assert card.with_section(one, "Other", "2") == card.with_section(text, "Other", "2")
    assert card.section(text, "Other") == ""


def test_a_missing_run_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exporting what was never trained exits 1 and says to train."""
    assert command.main([str(tmp_path), "--out", str(tmp_path / "1")]) == 1
    assert "train first" in capsys.readouterr().err


def test_a_damaged_run_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint that was cut short is named, and nothing is written."""
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 and no more")
    assert command.main([str(tmp_path), "--out", str(tmp_path / "out" / "1")]) == 1
    assert f"seqserve export: {tmp_path / 'checkpoint.pt'} is cut short, damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_a_file_is_told_in_a_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--out below a plain file."""
    (tmp_path / "afile").write_text("")
    assert command.main([str(run), "--out", str(tmp_path / "afile" / "1")]) == 1
    assert capsys.readouterr().err == f"seqserve export: [Errno 17] File exists: '{tmp_path / 'afile'}'\n"


def test_a_contract_that_the_module_does_not_keep_is_refused(tmp_path: Path) -> None:
    """An output described with another dtype is found when the server's runner loads the file."""
    wrong = replace(READER, outputs=(bundle.Tensor("each", "int64", ("batch", "time", 5)), READER.outputs[1]))
    with pytest.raises(bundle.BundleError, match="'each' is float32 in the file"):
        made(wrong, Reader(), tmp_path)


def test_a_run_is_exported_in_another_precision(run: Path, tmp_path: Path) -> None:
    """The same graphs, proved against PyTorch first, then made smaller and compared with themselves; the card says so."""
    plain = bundling.export(run, tmp_path / "mood" / "1")
    assert command.main([str(run), "--out", str(tmp_path / "mood" / "2"), "--precision", "float16-weights"]) == 0
    made = bundle.load(tmp_path / "mood" / "2")
    assert (made.precision, made.graph, made.task) == ("float16-weights", plain.graph, plain.task)
    assert made.verified["step"]["float32"] == plain.verified["step"]
    assert made.verified["step"]["as_rounded"]
    assert (tmp_path / "mood" / "2" / "step.onnx").stat().st_size < 0.7 * (tmp_path / "mood" / "1" / "step.onnx").stat().st_size
    assert "**Precision float16-weights.**" in (tmp_path / "mood" / "2" / card.FILE).read_text()
