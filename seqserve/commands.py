"""What each command of `seqserve` does with a client: asks, prints. Options are in `cli`, looks in `show`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqserve import errors, inputs, results, show
from seqserve.client import Client
from seqserve.session import Session
from seqserve.turns import Piece

TEXTS = 256  # the server takes so many at once


def classify(client: Client, options: argparse.Namespace) -> None:
    texts = inputs.texts(options.text)
    while batch := list(itertools.islice(texts, TEXTS)):
        for text, c in zip(batch, client.classify(batch, options.model, options.model_version), strict=True):
            if options.json:
                _json(_labelled(text, c))
            else:
                print(f"{c.label}  {c.score:6.1%}  {text}")


def _labelled(text: str, c: results.Classification) -> dict[str, Any]:
    scores = {label: round(score, 6) for label, score in c.scores.items()}
    return {"text": text, "label": c.label, "score": round(c.score, 6), "scores": scores, "tokens": c.tokens}


def tag(client: Client, options: argparse.Namespace) -> None:
    colour = options.color == "always" or (options.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    texts = inputs.texts(options.text)
    while batch := list(itertools.islice(texts, TEXTS)):
        given: list[str] | list[list[str]] = [text.split() for text in batch] if options.words else batch
        for found in client.tag(given, options.model, options.model_version):
            if options.json:
                spans = [
                    {"label": s.label, "text": s.text, "start": s.start, "end": s.end, "score": round(s.score, 6)} for s in found.spans
                ]
                _json({"text": found.text, "spans": spans})
            else:
                print(show.tagging(found, colour))


def generate(client: Client, options: argparse.Namespace) -> None:
    text = options.text if options.text is not None else inputs.stdin()
    stop = [s.replace("\\n", "\n") for s in options.stop or ()]
    wishes = (options.temperature, options.top_k, options.seed, options.max_symbols, stop)
    model, version = options.model, options.model_version
    if options.json:
        g = client.generate(text, *wishes, model, version)
        _json({"text": text, "generated": g.text, "seed": g.seed, "ended": g.ended, "symbols": len(g.symbols), "unknown": g.unknown})
        return
    sys.stdout.write(text)
    for piece in client.generate_stream(text, *wishes, model, version):
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        if piece.done is not None:
            print()
            unknown = f", {piece.done.unknown} symbols of the text not known to the model" if piece.done.unknown else ""
            print(f"seed {piece.done.seed}, ended by {piece.done.ended}{unknown}", file=sys.stderr)


def translate(client: Client, options: argparse.Namespace) -> None:
    wanted = options.attention or options.attention_png is not None
    if options.attention_png is not None:
        _pyplot()  # before any work, so that nothing is lost where it is missing
    answer: results.Translation | None = None
    for text in inputs.texts(options.text):
        ask = (text, options.source, options.target, options.beam, options.max_tokens, wanted)
        if options.stream:
            answer = _stream(client.translate_stream(*ask, options.model, options.model_version), options.json)
        else:
            answer = client.translate(*ask, options.model, options.model_version)
        if options.json:
            found = {"source": text, "text": answer.text, "score": answer.score, "ended": answer.ended}
            _json({**found, **({"attention": answer.attention.tolist()} if wanted else {})})
        elif not options.stream:
            print(answer.text)
        if not answer.ended:
            print("seqserve translate: cut at the token limit: allow more with --max-tokens", file=sys.stderr)
        if options.attention and not options.json:
            print("\n" + "\n".join(show.attention(answer)) + "\n")
    if options.attention_png is not None and answer is not None:
        _draw_attention(answer, options.attention_png)


def _stream(pieces: Iterable[results.TranslationPiece], as_json: bool) -> results.Translation:
    whole = None
    try:
        for piece in pieces:
            whole = piece.done
            if as_json and piece.token is not None:
                _json({"text": piece.text, "piece": piece.token.piece, "log_probability": piece.token.log_probability})
            elif not as_json:
                print(piece.text, end="", flush=True)
    finally:
        if not as_json:
            print()  # also where it broke off, so that the error has a line of its own
    if whole is None:
        raise errors.bad_reply("the stream ended without its last message")
    return whole


def health(client: Client, options: argparse.Namespace) -> None:
    status = client.health(options.service)
    if status != "SERVING":
        raise errors.Unavailable(f"it says {status}", status="UNAVAILABLE")
    print(status)


def forecast(client: Client, options: argparse.Namespace) -> None:
    kept = _forecaster(client.models(), options.model, options.model_version)
    text = inputs.stdin() if options.csv == "-" else inputs.read(Path(options.csv))
    names, rows = inputs.read_csv(text, options.columns, [c for c in kept.get("channels", "").split(",") if c])
    lookback = kept.get("lookback", "")
    rows = rows[-int(lookback) :] if lookback.isdecimal() and int(lookback) else rows
    answer = client.forecast(rows, options.horizon, options.quantiles, options.model, options.model_version)
    if options.json:
        quantiles = {f"{q:g}": values.tolist() for q, values in answer.quantiles.items()}
        _json({"channels": answer.channels, "mean": answer.mean.tolist(), "quantiles": quantiles})
    else:
        print("\n".join(show.forecast(rows, answer, names)))


def _forecaster(models: Sequence[results.Model], name: str, version: str) -> Mapping[str, str]:
    """What is known of the model that the server will choose; nothing where the choice is not clear."""
    fit = [m for m in models if m.kind == "forecast" and name in ("", m.name) and version in ("", m.version)]
    return fit[-1].facts if len({m.name for m in fit}) == 1 else {}


def models(client: Client, options: argparse.Namespace) -> None:
    found = client.models()
    if options.json:
        for m in found:
            known = {"name": m.name, "version": m.version, "kind": m.kind, "ready": m.ready}
            _json({**known, "facts": dict(m.facts), "fingerprint": m.fingerprint})
    elif not found:
        print("The server has no models: put bundles where it looks for them, see seqserve serve --help", file=sys.stderr)
    else:
        facts = ("; ".join(f"{name} {value}" for name, value in sorted(m.facts.items())) for m in found)
        rows = [[m.name, m.version, m.kind, "ready" if m.ready else "not ready", f] for m, f in zip(found, facts, strict=True)]
        print("\n".join(show.table([["model", "version", "kind", "state", "facts"], *rows])))


def infer(client: Client, options: argparse.Namespace) -> None:
    described = client.model_metadata(options.model, options.model_version)
    if not options.input:
        rows = [["", "name", "datatype", "shape"]]
        for kind, listed in (("input", described.inputs), ("output", described.outputs)):
            rows += [[kind, t.name, t.datatype, str(list(t.shape))] for t in listed]
        print("\n".join(show.table(rows)))
        return
    datatypes = {t.name: t.datatype for t in described.inputs}
    sent = dict(inputs.tensor(item, datatypes) for item in options.input)
    answer = client.infer(options.model, sent, options.output, options.model_version)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, array in answer.outputs.items():
            np.save(options.out / (name.replace("/", "_") + ".npy"), array.astype("S") if array.dtype == object else array)
    if options.json:
        _json({name: _plain(array) for name, array in answer.outputs.items()})
    else:
        for name, array in answer.outputs.items():
            print("\n".join(show.tensor(name, array)))


def session(client: Client, options: argparse.Namespace) -> None:
    """Each line, or row, of standard input is a turn, answered before the next is read."""
    if not (options.model or options.resume):
        raise inputs.Usage("name a MODEL, or a session with --resume ID")
    close = not options.keep
    if options.resume:
        s = client.resume(options.resume, close=close)
    else:
        s = client.session(options.model, options.model_version, options.id, options.ttl, close=close)
    with s:
        if options.model not in ("", s.model):
            s.detach()  # it is not what was meant: leave it alone
            raise inputs.Usage(f"session {s.id} is of model {s.model}, not of {options.model}")
        pieces, show_turn = _kind(client, s, options)
        for said, piece in pieces:
            try:
                answer = s.send(piece)
            except errors.InvalidInput as e:
                if not sys.stdin.isatty():
                    raise
                print(f"seqserve session: {' '.join(str(e).split())}", file=sys.stderr)  # who types may try again
                continue
            show_turn(said, answer)
    if options.keep:
        print(f"seqserve session: kept after turn {s.turn}; go on with: seqserve session --resume {s.id}", file=sys.stderr)


def _kind(client: Client, s: Session, options: argparse.Namespace) -> tuple[Iterator[tuple[str, Any]], Callable[[str, Any], None]]:
    """What the turns of a model are: where they come from, each as text and as a piece, and how an answer is shown."""
    found = next((m for m in client.models() if (m.name, m.version) == (s.model, s.version)), None)
    kind, facts = (found.kind, found.facts) if found is not None else ("tensors", {})
    pieces: Iterator[tuple[str, Piece]]
    if kind == "classify":
        pieces, what = ((line.rstrip("\r\n"), line) for line in inputs.lines() if line.strip()), "One piece of text a line"
    elif kind == "forecast":
        channels = [c for c in facts.get("channels", "").split(",") if c]
        pieces = (("", row) for row in inputs.observations(options.columns, channels))
        what = f"One observation a line, as CSV ({','.join(channels)})"
    else:
        datatypes = {t.name: t.datatype for t in client.model_metadata(s.model, s.version).inputs}
        pieces = ((line.rstrip("\r\n"), inputs.tensors_of(line, datatypes)) for line in inputs.lines() if line.strip())
        what = f"One JSON object a line, tensors by name ({', '.join(datatypes)})"
    if sys.stdin.isatty():
        print(f"Session {s.id} of {s.model} {s.version}. {what}, Ctrl-D to end:", file=sys.stderr)

    def show_turn(said: str, answer: results.Answer) -> None:
        if options.json:
            _json({"session": s.id, "turn": s.turn, **_found(said, answer)})
        else:
            print("\n".join(show.turn(said, answer)), flush=True)

    return pieces, show_turn


def _found(said: str, answer: results.Answer) -> dict[str, Any]:
    match answer:
        case results.Classification():
            return _labelled(said, answer)
        case results.Forecast():
            quantiles = {f"{q:g}": values[0].tolist() for q, values in answer.quantiles.items()}
            return {"channels": answer.channels, "mean": answer.mean[0].tolist(), "quantiles": quantiles}
        case results.Generation():
            return {"text": said, "generated": answer.text, "seed": answer.seed, "ended": answer.ended}
        case _:
            return {"outputs": {name: _plain(array) for name, array in answer.items()}}


def sessions(client: Client, options: argparse.Namespace) -> None:
    after, total = "", 0
    heading: Sequence[Sequence[str]] = [["session", "model", "version", "turn", "lives for"]]
    while page := client.sessions(after=after):
        if options.json:
            for i in page:
                _json({"session": i.id, "model": i.model, "version": i.version, "turn": i.turn, "ttl": i.ttl})
        else:
            rows = [[i.id, i.model, i.version, str(i.turn), f"{i.ttl:g} s"] for i in page]
            print("\n".join(show.table([*heading, *rows], right=(3, 4))))
        heading, after, total = [], page[-1].id, total + len(page)
    if not total and not options.json:
        print("No session is open: open one with seqserve session MODEL", file=sys.stderr)


def _json(value: Mapping[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)


def _plain(array: NDArray[Any]) -> Any:
    if array.dtype == object:
        array = np.vectorize(lambda element: element.decode(errors="replace"), otypes=[object])(array)
    return array.tolist()


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise inputs.Usage("--attention-png needs matplotlib: pip install matplotlib; --attention prints it instead") from None
    return pyplot


def _draw_attention(answer: results.Translation, file: Path) -> None:
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(1 + 0.4 * len(answer.source_tokens), 1 + 0.3 * len(answer.tokens)))
    axes.imshow(answer.attention, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(answer.source_tokens)), answer.source_tokens, rotation=90)
    axes.set_yticks(range(len(answer.tokens)), [token.piece for token in answer.tokens])
    figure.tight_layout()
    try:
        figure.savefig(file)
    except (OSError, ValueError) as e:
        raise inputs.Usage(f"{file}: {e}") from None
    finally:
        pyplot.close(figure)
