"""The command `seqserve` against a fake server: what each command prints, its exit code, and what it says to bad input."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import seqserve
from protos import seqserve_pb2 as pb
from protos import sessions_pb2 as live
from seqserve import cli, commands, demo, errors, inputs, samples, show, tensors
from tests import fakes
from tests.fakes import CHANNELS, Fake, failure
from tests.process import ROOT

Code = grpc.StatusCode
COMMANDS = ("classify", "tag", "generate", "translate", "forecast", "session", "sessions", "models", "infer", "demo")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    with fakes.serving() as fake:
        monkeypatch.setenv("SEQSERVE_SERVER", fake.target)
        yield fake


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """A CSV of 120 hours with dates, its channels in another order than the model's."""
    lines = ["date," + ",".join(reversed(CHANNELS))]
    for hour, row in enumerate(samples.observations(120)):
        lines.append(f"2026-01-{hour // 24 + 1:02} {hour % 24:02}:00," + ",".join(f"{v:.3f}" for v in reversed(row)))
    file = tmp_path / "series.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What argparse or the command says to input that it refuses with exit code 2."""
    try:
        code = cli.main(argv)
    except SystemExit as e:
        code = int(e.code or 0)
    assert code == 2
    return capsys.readouterr().err


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command's help has an example of itself."""
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert f"  seqserve {command}" in capsys.readouterr().out.split("example")[1]


def test_main_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a command the help is printed, with those of other rooms, and that is a fault of use."""
    said = usage([], capsys)
    for command in (*COMMANDS, "serve", "train", "export"):
        assert f"\n    {command} " in said


def test_python_m_seqserve() -> None:
    """`python -m seqserve` is the same command."""
    done = subprocess.run([sys.executable, "-m", "seqserve", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("seqserve ")


# Rooms


class Entry:
    """An entry point, as importlib.metadata gives them."""

    def __init__(self, name: str, missing: str = "", late: bool = False, fails: Exception | None = None) -> None:
        self.name, self._missing, self._late, self._fails = name, missing, late, fails

    def load(self) -> object:
        if self._missing and not self._late:
            raise ModuleNotFoundError(name=self._missing)
        return self.run

    def run(self, argv: list[str]) -> int:
        if self._missing:
            raise ModuleNotFoundError(name=self._missing)
        if self._fails is not None:
            raise self._fails
        print(f"{self.name} ran with {argv}")
        return 7


def test_a_room_gets_its_arguments_untouched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All that follows the name of a room's command is the room's, help too, and so is the exit code."""
    monkeypatch.setattr(metadata, "entry_points", lambda group: [Entry("serve"), Entry("extra")])
    assert cli.main(["serve", "--help", "--server", "x"]) == 7
    assert cli.main(["extra"]) == 7
    assert capsys.readouterr().out == "serve ran with ['--help', '--server', 'x']\nextra ran with []\n"


@pytest.mark.parametrize("entries", [[], [Entry("train", "torch")], [Entry("train", "torch", late=True)]])
def test_a_room_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], entries: list[Entry]) -> None:
    """The extra to install is named, whether the room or something it needs is missing."""
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries)
    assert "pip install 'seqserve[train]'" in usage(["train", "sentiment"], capsys)


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (NotADirectoryError(20, "Not a directory", "afile/1"), "afile/1: Not a directory"),
        (PermissionError(13, "Permission denied", "locked"), "locked: Permission denied"),
        (OSError("no room"), "no room"),
    ],
)
def test_what_the_system_refuses_a_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refusal: OSError, said: str
) -> None:
    """A directory that can't be written is one line with its name."""
    monkeypatch.setattr(metadata, "entry_points", lambda group: [Entry("adapt", fails=refusal)])
    assert usage(["adapt"], capsys) == f"seqserve adapt: {said}\n"


def test_a_fault_of_a_room_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no refusal of the system's is a bug, and is not hidden."""
    monkeypatch.setattr(metadata, "entry_points", lambda group: [Entry("adapt", fails=ValueError("a bug"))])
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["adapt"])


def test_client_options_before_a_room(capsys: pytest.CaptureFixture[str]) -> None:
    """The client's options do not belong to a server's start, and it says so."""
    assert "seqserve serve --help" in usage(["--timeout", "3", "serve"], capsys)


# Commands


def test_classify(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each text: label, probability, text."""
    assert cli.main(["classify", "a good film", "a bad film"]) == 0
    assert capsys.readouterr().out == "positive   93.8%  a good film\nnegative   93.8%  a bad film\n"


def test_classify_lines(fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of standard input, blank ones left out, go in batches that the server takes; JSON comes one object a line."""
    stdin(monkeypatch, "\n".join(["gut é", "", *["bad"] * 300]).encode())
    assert cli.main(["classify", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[0] == {
        "text": "gut é",
        "label": "positive",
        "score": 0.9375,
        "scores": {"negative": 0.0625, "positive": 0.9375},
        "tokens": 2,
    }
    assert [f["label"] for f in found[1:]] == ["negative"] * 300
    assert [len(r.texts) for r in fake.requests if isinstance(r, pb.ClassifyRequest)] == [commands.TEXTS, 301 - commands.TEXTS]


def test_options_stand_before_or_after_the_command(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """--server and --timeout are understood in both places, and win over the environment."""
    monkeypatch.setenv("SEQSERVE_SERVER", "127.0.0.1:1")
    assert cli.main(["--server", fake.target, "--timeout", "100", "models"]) == 0
    assert cli.main(["models", "--server", fake.target, "--timeout", "100"]) == 0
    assert all(left is not None and left <= 101 for left in fake.left)


def test_translate(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option reaches the server; a translation that was cut is told on stderr."""
    argv = ["translate", "a dog runs", "--source", "en", "--target", "de", "--beam", "5", "--max-tokens", "2", "--model", "m"]
    assert cli.main([*argv, "--model-version", "1"]) == 0
    out, err = capsys.readouterr()
    assert (out, "--max-tokens" in err) == ("A DOG\n", True)
    model = pb.Model(name="m", version="1")
    assert fake.requests == [pb.TranslateRequest(model=model, text="a dog runs", source="en", target="de", beam=5, max_tokens=2)]


@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_attention_is_drawn(fake: Fake, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    """Source tokens stand upright over the columns, tokens before the rows, the diagonal is dark."""
    assert cli.main(["translate", "ab c", "--attention", *options]) == 0
    assert capsys.readouterr().out == "AB C\n\n   a c\n   b\nAB ██\n C   ██\n\n"


def test_attention_as_a_picture(fake: Fake, tmp_path: Path) -> None:
    """--attention-png writes a PNG."""
    assert cli.main(["translate", "a dog", "--attention-png", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_streamed_translation(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """Streamed or not, the same text is printed; as JSON, the pieces and then the whole."""
    assert cli.main(["translate", "--stream", "a dog", "a cat"]) == 0
    assert capsys.readouterr().out == "A DOG\nA CAT\n"
    assert cli.main(["translate", "--stream", "--json", "--attention", "a dog"]) == 0
    *pieces, whole = map(json.loads, capsys.readouterr().out.splitlines())
    assert "".join(p["text"] for p in pieces) == whole["text"]
    assert whole["attention"] == [[1, 0], [0, 1]]


def test_forecast(fake: Fake, capsys: pytest.CaptureFixture[str], series: Path) -> None:
    """The last look-back rows of the model's channels, in its order, are sent; each gets a row and a sparkline."""
    assert cli.main(["forecast", str(series), "--horizon", "12"]) == 0
    request = fake.requests[-1]
    assert isinstance(request, pb.ForecastRequest)
    sent = np.array(request.observations.values).reshape(-1, len(CHANNELS))
    assert sent == pytest.approx(samples.observations(120)[-96:], abs=1e-3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["last", "+1", "+6", "+12", "80%", "interval", "at", "+12"]
    assert [line.split()[0] for line in lines[1:8]] == list(CHANNELS)
    assert all("│" in line for line in lines[-7:])


def test_forecast_from_standard_input(fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` reads the CSV from standard input; columns and quantiles are those that were named; JSON has all of it."""
    stdin(monkeypatch, b"\xef\xbb\xbfa,b,c\n1,2,3\n4,5,6\n")
    assert cli.main(["forecast", "-", "--columns", "c,a", "--quantiles", "0.25,0.75", "--horizon", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mean"] == [[6, 4], [6, 4]]
    assert found["quantiles"] == {"0.25": [[5.75, 3.75]] * 2, "0.75": [[6.25, 4.25]] * 2}


def test_models(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """A table for people, one object a line for programs."""
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "version", "kind", "state", "facts"]
    assert lines[1].split(maxsplit=4) == ["sentiment", "1", "classify", "ready", "labels negative,positive"]
    assert cli.main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fingerprint"] == "sha256:0"


def test_no_models(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """A server without models is no error, but it is said."""
    fake.replies["Models"] = pb.ModelsReply(models=[]).SerializeToString() or b"\x12\x00"
    assert cli.main(["models"]) == 0
    assert "no models" in capsys.readouterr().err


def test_infer(fake: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Tensors come from JSON, in the model's datatype, and from files; outputs are printed or saved."""
    np.save(tmp_path / "x.npy", np.eye(2, dtype=np.float32))
    (tmp_path / "y.json").write_text("[1.5]")
    argv = ["infer", "m", "tokens=[[1, 2]]", 'words=["ä"]', f"x=@{tmp_path / 'x.npy'}", f"y=@{tmp_path / 'y.json'}"]
    assert cli.main([*argv, "--json", "--out", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out) == {"tokens": [[1, 2]], "words": ["ä"], "x": [[1, 0], [0, 1]], "y": [1.5]}
    assert np.load(tmp_path / "out" / "tokens.npy").dtype == np.int64
    assert np.load(tmp_path / "out" / "words.npy").tolist() == ["ä".encode()]
    assert cli.main([*argv, "--output", "tokens"]) == 0
    assert capsys.readouterr().out == "tokens  int64[1, 2]\n[[1 2]]\n"


def test_infer_into_what_is_no_directory(fake: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Where outputs can't be written, it is told which file is in the way."""
    (tmp_path / "afile").write_text("")
    said = usage(["infer", "m", "tokens=[[1, 2]]", "--out", str(tmp_path / "afile" / "x")], capsys)
    assert said == f"seqserve infer: {tmp_path / 'afile' / 'x'}: Not a directory\n"


@pytest.mark.parametrize(("datatype", "number"), [("FP16", "1e9"), ("FP32", "1e300"), ("UINT8", "300")])
def test_numbers_beyond_a_datatype(datatype: str, number: str) -> None:
    """They are refused by name, and do not become infinite; infinity itself is a number to send."""
    with pytest.raises(inputs.Usage, match=f"x: not {datatype}"):
        inputs.tensor(f"x=[[{number}, 1]]", {"x": datatype})
    assert inputs.tensor("x=[Infinity]", {"x": "FP16"})[1].tolist() == [float("inf")]


def test_infer_without_inputs_tells_what_it_takes(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """The model's tensors are listed, and nothing is run."""
    assert cli.main(["infer", "m"]) == 0
    assert ["input", "tokens", "INT64", "[-1,", "-1]"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert fake.calls == ["ModelMetadata"]


# Sessions


def test_session_of_lines(fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line that is not blank is a turn, answered for all so far; in the end the session is closed."""
    stdin(monkeypatch, b"a good film\n\nwith a bad end\n")
    assert cli.main(["session", "sentiment"]) == 0
    assert capsys.readouterr().out == "positive   93.8%  a good film\nnegative   93.8%  with a bad end\n"
    assert fake.calls == ["Open", "Models", "Turn", "Turn", "Close"]
    assert [r.text for r in fake.requests if isinstance(r, live.TurnRequest)] == ["a good film\n", "with a bad end\n"]


def test_session_kept_and_resumed(fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that is kept tells how to go on, goes on where it was, and is closed when it is not kept any more."""
    stdin(monkeypatch, b"a bad film\n")
    assert cli.main(["session", "sentiment", "--id", "mine", "--ttl", "60", "--model-version", "1", "--keep"]) == 0
    assert "seqserve session --resume mine" in capsys.readouterr().err
    assert fake.requests[0] == live.OpenRequest(session="mine", model=pb.Model(name="sentiment", version="1"), ttl=60)
    stdin(monkeypatch, b"or not\n")
    assert cli.main(["session", "sentiment", "--resume", "mine", "--json", "--keep"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["session"], found["turn"], found["label"], found["text"]) == ("mine", 2, "negative", "or not")
    assert "is of model sentiment" in usage(["session", "ett", "--resume", "mine"], capsys)
    assert list(fake.sessions) == ["mine"]
    stdin(monkeypatch, b"")
    assert cli.main(["session", "--resume", "mine"]) == 0
    assert fake.sessions == {}


def test_session_of_observations(fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row of a CSV is an observation; the next step of each channel is printed, with its interval."""
    stdin(monkeypatch, b"\xef\xbb\xbfdate,b,a\nmonday,2,1\ntuesday,4,3\n")
    assert cli.main(["session", "ett", "--columns", "a,b"]) == 0
    assert capsys.readouterr().out == "c0 1.00 (0.60 … 1.40)  c1 2.00 (1.60 … 2.40)\nc0 3.00 (2.60 … 3.40)  c1 4.00 (3.60 … 4.40)\n"
    stdin(monkeypatch, b"1,2,3,4,5,6,7\n2,3,4,5,6,7,8\n")
    assert cli.main(["session", "ett", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(f["turn"], f["mean"]) for f in found] == [(1, [1, 2, 3, 4, 5, 6, 7]), (2, [2, 3, 4, 5, 6, 7, 8])]
    assert found[0]["channels"] == list(CHANNELS)
    assert found[0]["quantiles"]["0.1"] == pytest.approx([n - 0.4 for n in range(1, 8)])
    stdin(monkeypatch, b"")
    assert cli.main(["session", "ett"]) == 0


def test_session_of_tensors(fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other model takes a JSON object of tensors a line, in the datatypes that it names."""
    stdin(monkeypatch, b'{"tokens": [[1, 2]]}\n{"tokens": [[3]]}\n')
    assert cli.main(["session", "m", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [f["outputs"] for f in found] == [{"tokens": [[1, 2]]}, {"tokens": [[3]]}]
    stdin(monkeypatch, b'{"tokens": [[1, 2]]}\n')
    assert cli.main(["session", "m"]) == 0
    assert capsys.readouterr().out == "tokens  int64[1, 2]\n[[1 2]]\n"


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_session_at_a_terminal(fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who types is told what a line is, and may go on after a line that was refused; elsewhere that is the end."""
    turn = fake.turn

    def strict(request: live.TurnRequest) -> live.TurnReply:
        if request.text.startswith("?"):
            raise fakes.Refused(failure(Code.INVALID_ARGUMENT, "the text has no words", "EMPTY_TEXT"))
        return turn(request)

    monkeypatch.setattr(fake, "turn", strict)
    lines = b"?\ngood\n"
    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO(lines)))
    assert cli.main(["session", "sentiment"]) == 0
    out, err = capsys.readouterr()
    assert out == "positive   93.8%  good\n"
    assert "of sentiment 1. One piece of text a line" in err
    assert "no words" in err
    stdin(monkeypatch, lines)
    assert "no words" in usage(["session", "sentiment"], capsys)
    assert fake.sessions == {}


def test_sessions(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """Open sessions as a table, or as JSON; that there is none is said."""
    assert cli.main(["sessions"]) == 0
    assert "No session is open" in capsys.readouterr().err
    for n in range(3):
        fake.open(live.OpenRequest(session=f"s{n}", model=pb.Model(name="sentiment"), ttl=60))
    assert cli.main(["sessions"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["session", "model", "version", "turn", "lives", "for"]
    assert lines[1:] == [[f"s{n}", "sentiment", "1", "0", "60", "s"] for n in range(3)]
    assert cli.main(["sessions", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[2] == {"session": "s2", "model": "sentiment", "version": "1", "turn": 0, "ttl": 60}


@pytest.mark.parametrize(
    ("argv", "lines", "said"),
    [
        ([], b"", "name a MODEL"),
        (["--resume", "nobody"], b"", "no session 'nobody'"),
        (["ett"], b"1,2\n3,4\n", "must name the columns"),
        (["ett"], b"1,2,3,4,5,6,7\n1,2,3,4,5,6\n", "row 2 of the CSV, column OT"),
        (["m"], b"[1]\n", '{"tokens": …, "words": …}'),
        (["m"], b"tokens\n", "not JSON"),
        (["m"], b'{"tokens": "a"}\n', "tokens: not INT64"),
    ],
)
def test_bad_turns(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], lines: bytes, said: str
) -> None:
    """Input that is no turn ends the command with exit code 2 and says why, and the session is closed."""
    stdin(monkeypatch, lines)
    assert said in usage(["session", *argv], capsys)
    assert fake.sessions == {}


# What can go wrong


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nonsense"], "invalid choice"),
        (["models", "--timeout", "soon"], "number of seconds"),
        (["models", "--timeout", "-1"], "number of seconds"),
        (["forecast", "x.csv", "--quantiles", "half"], "0.1,0.9"),
        (["forecast", "nowhere.csv"], "nowhere.csv: No such file"),
        (["translate", "x", "--beam", "-1"], "beam is -1"),
        (["classify", "\udcff"], "not Unicode"),
        (["infer", "m", "tokens"], "NAME=JSON"),
        (["infer", "m", "tokens=[1"], "not JSON"),
        (["infer", "m", "tokens=[[1],[2,3]]"], "not INT64"),
        (["infer", "m", 'tokens=["a"]'], "not INT64"),
        (["infer", "m", "tokens=@nowhere.npy"], "nowhere.npy"),
        (["infer", "m", f"tokens=@{__file__}"], "numpy.save"),
    ],
)
def test_bad_usage(fake: Fake, capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    """Input that can't be used ends with exit code 2 and says which and why."""
    assert said in usage(argv, capsys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "heading"),
        ("a,b\n", "heading"),
        ("1,2\n3,4\n", "must name the columns"),
        ("a,b\nx,y\n", "no column of the CSV has numbers"),
        ("a,b\n1,2\n3,x\n", "row 2 of the CSV, column b: 'x'"),
        ("a,b\n1,2\n3\n", "row 2 of the CSV, column b: ''"),
        ("a,b\n1,2\n3,1e300\n", "row 2 of the CSV, column b: '1e300'"),
    ],
)
def test_bad_csv(fake: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, said: str) -> None:
    """A CSV that is no series names the row and column at fault."""
    (tmp_path / "bad.csv").write_text(text)
    assert said in usage(["forecast", str(tmp_path / "bad.csv")], capsys)


def test_a_column_that_is_not_there(series: Path, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """The columns that exist are named."""
    assert "no column load in the CSV: it has date, OT" in usage(["forecast", str(series), "--columns", "load,OT"], capsys)


def test_text_that_is_not_utf8(fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bytes of another encoding name the line, or the file."""
    stdin(monkeypatch, b"good\ncaf\xe9\n")
    assert "line 2: not UTF-8" in usage(["classify"], capsys)
    (tmp_path / "latin.csv").write_bytes(b"a\xe9\n1\n")
    assert "latin.csv: not UTF-8" in usage(["forecast", str(tmp_path / "latin.csv")], capsys)


@pytest.mark.parametrize(
    ("refusal", "code", "said"),
    [
        (failure(Code.NOT_FOUND, "no model 'x'; there are: a,\n b", "UNKNOWN_MODEL"), 2, "no model 'x'; there are: a, b"),
        (failure(Code.INVALID_ARGUMENT, "horizon 500; allowed are 1 to 96", "BAD_HORIZON"), 2, "allowed are 1 to 96"),
        (failure(Code.UNAUTHENTICATED, "a token, please"), 2, "a token, please"),
        (failure(Code.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry=1000.0), 1, "try again in 1000 s"),
        (failure(Code.DEADLINE_EXCEEDED, "too late"), 1, "--timeout"),
        (failure(Code.UNIMPLEMENTED, "no such method"), 1, "of this release"),
        (failure(Code.INTERNAL, "bug"), 1, "its log says more"),
    ],
)
def test_a_refusal_is_one_line(fake: Fake, capsys: pytest.CaptureFixture[str], refusal: fakes.Failure, code: int, said: str) -> None:
    """What the server refuses is printed on one line that says what to do; the exit code says whose turn it is."""
    fake.failures = [refusal]
    assert cli.main(["models"]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("seqserve models: ")
    assert said in err


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody listens, the command to start a server is named."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        assert cli.main(["models", "--server", f"127.0.0.1:{held.getsockname()[1]}"]) == 1
    err = capsys.readouterr().err
    assert "seqserve serve" in err
    assert err.count("\n") == 1


def test_a_stream_that_breaks_off(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """What came is kept on a line of its own; the error follows."""
    assert cli.main(["translate", "--stream", fakes.BREAK + " it"]) == 1
    out, err = capsys.readouterr()
    assert (out, "gone" in err) == ("BREAK\n", True)


@pytest.mark.parametrize("argv", [["models"], ["inspect", "models/sentiment/1/step.onnx"]])
def test_a_reader_that_leaves(fake: Fake, argv: list[str]) -> None:
    """With `| head`, the command ends without a traceback, a room's too."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "seqserve", *argv]
    with os.fdopen(write, "wb") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "")


# Looks


@given(st.lists(st.lists(st.text("aé日́ ", max_size=5), min_size=2, max_size=2), min_size=1))
def test_columns_are_aligned(rows: list[list[str]]) -> None:
    """The second column begins at the same place of the terminal in every line, wide and combining characters too."""
    rows = [[a, "|" + b.strip()] for a, b in rows]
    assert len({show.width(line[: line.index("|")]) for line in show.table(rows)}) == 1


@given(st.lists(st.floats(-10, 10, width=32), max_size=200), st.integers(1, 50))
def test_sparklines_fit(values: list[float], cells: int) -> None:
    """A sparkline has a bar for each value, but never more than there is room for."""
    assert len(show.sparkline(np.array(values, np.float32), -10, 10, cells)) == min(cells, len(values))


def test_sparklines_rise() -> None:
    """The lowest value has the lowest bar, the highest the highest; a flat line is in the middle."""
    assert show.sparkline(np.arange(8, dtype=np.float32), 0, 7, 8) == "▁▂▃▄▅▆▇█"
    assert show.sparkline(np.ones(3, np.float32), 1, 1, 8) == "▅▅▅"


def test_every_error_is_explained() -> None:
    """Each class of the tree has a line and an exit code."""
    kinds = {kind for name in seqserve.__all__ if isinstance(kind := getattr(seqserve, name), type) and issubclass(kind, errors.Error)}
    for kind in kinds:
        line, code = cli.explain(kind("why", retry_after=1.0), "here", 1.0)
        assert line
        theirs = (errors.InvalidInput, errors.NotFound, errors.FailedPrecondition, errors.Denied)
        assert code == (2 if issubclass(kind, theirs) else 1)


def test_csv_with_quotes_and_blank_lines() -> None:
    """Quoted names, blank lines and Windows line ends are what they are elsewhere."""
    names, values = inputs.read_csv('"load, total" , b\r\n1,2\r\n\r\n3,4\r\n', None, [])
    assert (names, values.tolist()) == (["load, total", "b"], [[1, 2], [3, 4]])


# The demo


def test_demo_with_a_server(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of answer is shown."""
    assert cli.main(["demo", "--server", fake.target]) == 0
    out = capsys.readouterr().out
    for title in ("Classify", "Translate, token by token", "Translate: beam 5", "Forecast", "A session that remembers", "Plain tensors"):
        assert f"\n{title}" in out
    assert set(fake.calls) == set(ASKED)
    assert fake.sessions == {}


ASKED = (
    "Models", "Classify", "TranslateStream", "Translate", "Forecast", "ModelMetadata", "ModelInfer", "Open", "Turn", "Fork", "Close",
)  # fmt: skip


@pytest.mark.parametrize("method", ASKED)
def test_demo_fails_with_any_step(method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever call fails, the demo does not end well."""
    with fakes.serving() as fake:
        note = fake.note

        def failing(called: str, request: object, context: grpc.ServicerContext) -> None:
            fake.failures = [failure(Code.INTERNAL, f"{method} is broken")] if called == method else []
            note(called, request, context)  # type: ignore[arg-type]

        monkeypatch.setattr(fake, "note", failing)
        assert demo.run(fake.target) == 1
    assert f"{method} is broken" in capsys.readouterr().err


def command(*extra: str) -> list[str]:
    return [sys.executable, "-m", "tests.fakes", *extra]


def test_demo_starts_and_stops_a_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without a server one is started with the bundles, asked, and drained."""
    assert "--models" in demo.server_command(tmp_path)
    monkeypatch.setattr(demo, "server_command", lambda models: command("--models", str(models)))
    assert cli.main(["demo", "--models", str(tmp_path)]) == 0
    assert "drained and stopped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "said"), [("--refuse", "exit code 3; the end of its log:\n  no bundles here"), ("--exit=4", "exit code 4")]
)
def test_demo_with_a_server_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], extra: str, said: str) -> None:
    """A server that does not start, or does not stop cleanly, makes the demo fail, with the end of its log."""
    monkeypatch.setattr(demo, "server_command", lambda models: command(extra))
    assert demo.run() == 1
    assert said in capsys.readouterr().err


def test_example_tensors() -> None:
    """What varies gets one row and twelve steps, in every datatype."""
    for datatype in (*tensors.DATATYPES, "BYTES"):
        assert tensors.pack("x", samples.example(datatype, (-1, -1)))[:2] == (datatype, (1, 12))
    assert samples.example("FP32", (-1, -1, 7)).shape == (1, 12, 7)
