"""`seqserve demo`: a server with the bundles at hand, one of everything asked of it, answers and times, a clean stop.

The server is a process of its own, as users start it; this file must not import it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from seqserve import errors, samples, show
from seqserve.client import Client
from seqserve.results import Model

ROOT = Path(__file__).resolve().parent.parent
START = 30.0  # seconds that a server may take until it serves
STOP = 15.0  # seconds that it may take to drain; nothing is in flight then


class Failed(Exception):
    """A step of the demo went wrong; the message says how."""


def run(server: str | None = None, models: Path | None = None, shown: Mapping[str, Any] | None = None) -> int:
    """Show everything once and return the exit code: 0 where every step went well, else 1.

    `server` is one that runs already, and is shown what `shown` says (access.chosen); without it one is started on a free port
    with the bundles in `models`.
    """
    began = time.monotonic()
    try:
        if server is not None:
            with Client(server, **(shown or {})) as client:
                show_all(client)
        else:
            with started(server_command(models or _models())) as port, Client(f"127.0.0.1:{port}") as client:
                _title("Server", f"ready on port {port} after {time.monotonic() - began:.1f} s")
                show_all(client)
            print("\nThe server drained and stopped.")
    except (Failed, errors.Error) as e:
        print(f"\nseqserve demo failed: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"Everything took {time.monotonic() - began:.1f} s.")
    return 0


def _models() -> Path:
    return ROOT / "models" if (ROOT / "models").is_dir() else Path("models").resolve()


def server_command(models: Path) -> list[str]:
    """The command that starts a server on free ports; `started` adds where to write the one that is called."""
    return [sys.executable, "-m", "server", "--models", str(models), "--port", "0", "--metrics-port", "0"]


@contextmanager
def started(command: Sequence[str]) -> Iterator[int]:
    """A server that runs while the block does; gives its port. On the way out it is told to drain (SIGTERM).

    The server writes its port to the file after `--port-file`, by rename, once it serves. Raises Failed, with the end
    of its log, where it stops before that or does not stop cleanly after.
    """
    with tempfile.TemporaryDirectory(prefix="seqserve-demo-") as directory:
        port_file, log = Path(directory, "port"), Path(directory, "log")
        # In front of what is there already: the rooms of this tree, for a checkout that is not installed.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, "--port-file", str(port_file)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
            )
        try:
            deadline = time.monotonic() + START
            while not port_file.exists():
                if process.poll() is not None:
                    raise Failed(f"the server stopped with exit code {process.returncode}{_tail(log)}")
                if time.monotonic() > deadline:
                    raise Failed(f"the server was not ready within {START:g} s{_tail(log)}")
                time.sleep(0.02)
            yield int(port_file.read_text())
            process.terminate()
            try:
                code = process.wait(STOP)
            except subprocess.TimeoutExpired:
                raise Failed(f"the server did not stop within {STOP:g} s{_tail(log)}") from None
            if code != 0:
                raise Failed(f"the server stopped with exit code {code}{_tail(log)}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()[-20:]
    return "; the end of its log:\n  " + "\n  ".join(lines) if lines else ", without a word"


def show_all(client: Client) -> None:
    """Ask for one of everything; raises Failed or Error at the first step that goes wrong."""
    models = [m for m in client.models() if m.ready]
    for model in models:
        print(f"  {model.name} {model.version}: {model.kind}")
    of: dict[str, Model] = {}  # of each kind the first by name, its newest version
    for model in models:
        if model.kind not in of or of[model.kind].name == model.name:
            of[model.kind] = model
    if not of:
        raise Failed("the server has no model that is ready")
    for kind, steps in SHOWN.items():
        if kind in of:
            for step in steps:
                step(client, of[kind])
    if digits := next((m for m in models if m.name == "digits"), None):
        show_digits(client, digits)
    show_tensors(client, of.get("classify", models[0]))


def show_classify(client: Client, model: Model) -> None:
    began = time.perf_counter()
    answers = client.classify(list(samples.REVIEWS), model.name)
    _title("Classify", f"{len(samples.REVIEWS)} reviews in {_ms(began)}")
    for text, answer in zip(samples.REVIEWS, answers, strict=True):
        if not answer.label or abs(sum(answer.scores.values()) - 1) > 1e-3:
            raise Failed(f"the scores of {text!r} do not sum to 1: {answer.scores}")
        print(f"  {answer.label:8}  {answer.score:6.1%}  {text}")


def show_stream(client: Client, model: Model) -> None:
    _title("Translate, token by token", samples.CAPTION)
    began = time.perf_counter()
    first, text, whole = "", "", None
    print("  ", end="")
    for piece in client.translate_stream(samples.CAPTION, model=model.name):
        first = first or _ms(began)
        text += piece.text
        whole = piece.done
        print(piece.text, end="", flush=True)
    print(f"\n  first token after {first}, all after {_ms(began)}")
    if whole is None or not text or text != whole.text:
        raise Failed(f"the pieces are not the translation: {text!r}, {whole}")


def show_beam(client: Client, model: Model) -> None:
    _title("Translate", "beam 5")
    for caption in samples.CAPTIONS:
        began = time.perf_counter()
        answer = client.translate(caption, beam=5, model=model.name)
        if not answer.text:
            raise Failed(f"{caption!r} was translated to nothing")
        print(f"  {caption}\n  → {answer.text}  ({_ms(began)})")


def show_forecast(client: Client, model: Model) -> None:
    observed = samples.observations()
    began = time.perf_counter()
    answer = client.forecast(observed, model=model.name)
    _title("Forecast", f"{len(answer.mean)} hours of {len(answer.channels)} channels in {_ms(began)}")
    if not np.isfinite(answer.mean).all() or not len(answer.mean):
        raise Failed(f"the forecast is not a series of numbers: {answer}")
    print("\n".join(f"  {line}".rstrip() for line in show.forecast(observed, answer, samples.CHANNELS)))


def show_session(client: Client, model: Model) -> None:
    """A text read piece by piece; its fork, before the last piece, ends otherwise. Both end as the whole text is read."""
    began = time.perf_counter()
    with client.session(model.name, model.version) as s:
        lines = [(piece, s.send(piece)) for piece in samples.PIECES[:-1]]
        with s.fork() as fork:
            lines += [(samples.PIECES[-1], s.send(samples.PIECES[-1])), ("… or: " + samples.OTHERWISE, fork.send(samples.OTHERWISE))]
    _title("A session that remembers", f"{len(lines)} turns and a fork in {_ms(began)}")
    for piece, answer in lines:
        print(f"  {answer.label:8}  {answer.score:6.1%}  {piece}")
    for last, (_, answer) in zip((samples.PIECES[-1], samples.OTHERWISE), lines[-2:], strict=True):
        whole = client.classify("".join(samples.PIECES[:-1]) + last, model.name, model.version)
        if (answer.label, answer.score) != (whole.label, whole.score):
            raise Failed(f"read in pieces the text is {answer}, whole it is {whole}")


def show_tag(client: Client, model: Model) -> None:
    began = time.perf_counter()
    answer = client.tag(samples.POST, model.name)
    _title("Tag", f"{len(answer.spans)} names in {_ms(began)}")
    print(f"  {show.tagging(answer, colour=False)}")
    for span in answer.spans:
        if samples.POST[span.start : span.end] != span.text:
            raise Failed(f"{span} is not where it is said to be")


def show_generate(client: Client, model: Model) -> None:
    began = time.perf_counter()
    _title("Generate, symbol by symbol", "seed 1")
    print("  " + samples.OPENING.replace("\n", "\n  "), end="")
    text, whole = "", None
    for piece in client.generate_stream(samples.OPENING, 0.7, seed=1, max_symbols=120, model=model.name):
        text += piece.text
        whole = piece.done
        print(piece.text.replace("\n", "\n  "), end="", flush=True)
    if whole is None or text != whole.text:
        raise Failed(f"the pieces are not the text: {text!r}, {whole}")
    print(f"\n  {len(whole.symbols)} symbols in {_ms(began)}")


def show_digits(client: Client, model: Model) -> None:
    """An image sent as it is drawn, four of its rows a turn; in the end the answer is that of the whole image, to the bit."""
    image = samples.seven()
    began = time.perf_counter()
    with client.session(model.name, model.version) as s:
        answers = [s.send({"rows": rows[None]})["probabilities"][0] for rows in image.reshape(7, 4, 28)]
    _title("A digit while it is drawn", f"{len(answers)} turns in {_ms(began)}")
    for line, chances in zip(show.picture(image > 96), answers, strict=True):
        print(f"  {line}  {int(chances.argmax())}  {chances.max():6.1%}")
    if not np.array_equal(client.infer(model.name, {"rows": image[None]})["probabilities"][0], answers[-1]):
        raise Failed("read row by row the image is another than whole")


def show_tensors(client: Client, model: Model) -> None:
    described = client.model_metadata(model.name)
    wanted = [t for t in described.inputs if t.name != "TEXT"] or described.inputs  # texts stand in place of the tensors
    inputs = {t.name: samples.example(t.datatype, t.shape) for t in wanted}
    began = time.perf_counter()
    answer = client.infer(model.name, inputs)
    _title("Plain tensors (Open Inference Protocol)", f"{model.name} in {_ms(began)}, {answer.timing.rounds} rounds")
    for arrays, kind in ((inputs, "in "), (answer.outputs, "out")):
        for name, array in arrays.items():
            print(f"  {kind}  {name}  {array.dtype}{list(array.shape)}  {np.array2string(array, precision=3, threshold=16)}")
    if not answer.outputs:
        raise Failed("the model gave no outputs")


SHOWN: Mapping[str, tuple[Callable[[Client, Model], None], ...]] = {
    "classify": (show_classify, show_session),
    "translate": (show_stream, show_beam),
    "tag": (show_tag,),
    "generate": (show_generate,),
    "forecast": (show_forecast,),
}
"""What is asked, by what a model is for."""


def _title(title: str, note: str) -> None:
    print(f"\n{title}: {note}", flush=True)


def _ms(began: float) -> str:
    return f"{(time.perf_counter() - began) * 1e3:.0f} ms"
