"""What each command of `seqserve` does with a client: asks, prints. Options are in `cli`, looks in `show`."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqserve import errors, inputs, results, show
from seqserve.client import Client

TEXTS = 256  # the server takes so many at once


def classify(client: Client, options: argparse.Namespace) -> None:
    texts = inputs.texts(options.text)
    while batch := list(itertools.islice(texts, TEXTS)):
        for text, c in zip(batch, client.classify(batch, options.model, options.model_version), strict=True):
            if options.json:
                scores = {label: round(score, 6) for label, score in c.scores.items()}
                _json({"text": text, "label": c.label, "score": round(c.score, 6), "scores": scores, "tokens": c.tokens})
            else:
                print(f"{c.label}  {c.score:6.1%}  {text}")


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
            print(f"{name}  {array.dtype}{list(array.shape)}\n{np.array2string(array, precision=5, suppress_small=True)}")


def _json(value: Mapping[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))


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
