"""All engines: bundles on disk → models that can be called; names and versions → one of them.

A bundle is checked in full before it serves: its description, its files, its graphs against its description, its task,
and a first run of every graph; on a GPU, that it answers as on the CPU (loading.py). A damaged one is refused with every fault listed,
and the others serve on. A model has an engine for each device.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contract import bundle as contract
from contract.bundle import Bundle, BundleError, Graph
from server import dropin, probes
from server.devices import Placement
from server.engine import Engine, Spent, Watch
from server.errors import NotFound, listed
from server.loading import Loader, Trials
from server.rounds import Limits
from server.sequence import Sequence
from server.tasks.classify import Classifier
from server.tasks.forecast import Forecaster
from server.tasks.generate import Generator
from server.tasks.tag import Tagger
from server.tasks.tensors import Tensors
from server.tasks.translate import Translator
from server.workers import Workers

log = logging.getLogger(__name__)

READABLE = "let the user that the server runs as read it"

Task = Classifier | Translator | Forecaster | Tagger | Generator


@dataclass(frozen=True, slots=True)
class Kind:
    """What a task needs of its bundle: a maker, and (graph, inputs, outputs); "" stands for the main graph."""

    make: Callable[[Engine, Path], Task]
    needs: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]


KINDS: Mapping[str, Kind] = {
    "classify": Kind(Classifier, (("", ("tokens",), ("probabilities",)),)),
    "forecast": Kind(Forecaster, (("", (), ("mean", "quantiles")),)),
    "generate": Kind(Generator, (("", ("tokens",), ("logits",)),)),
    "tag": Kind(Tagger, (("", ("words", "features"), ("emissions",)),)),
    "translate": Kind(Translator, (("encode", ("tokens",), ("memory",)), ("", ("tokens", "memory"), ("log_probs", "ids", "attention")))),
}


@dataclass(frozen=True, slots=True)
class Model:
    """One version of a model, ready to be called."""

    name: str
    version: str
    bundle: Bundle
    engine: Engine
    tensors: Tensors
    task: Task | None
    noted: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)  # what its callers' handlers find out once


class Catalog:
    """The models of one directory: NAME/VERSION/bundle.json, versions being whole numbers, the highest the default.

    Where there is no bundle.json but one ONNX file, its contract is proposed from the file itself (dropin.py).
    """

    def __init__(
        self,
        workers: Workers,
        limits: Limits,
        watch: Watch,
        most_rows: int,
        placement: Placement | None = None,
        trials: Trials | None = None,
    ) -> None:
        self._workers = workers
        self._loader = Loader(placement or Placement(), trials or Trials(limits.rows, limits.chunk), limits)
        self._watch = watch
        self._most_rows = most_rows
        self._directory = Path()
        self._models: dict[str, dict[int, Model]] = {}  # replaced, never changed: readers need no lock
        self._exact: dict[tuple[str, str], Model] = {}  # the same, by name and version; "" is the newest
        self.refused: dict[str, list[str]] = {}  # "name/version", or "name" where versions can't be read → its faults

    def scan(self, directory: Path) -> None:
        """Load every bundle found; what can't be served is kept in `refused`, with its faults, and logged. Raises OSError where the
        directory itself can't be read."""
        self._directory = directory
        for model in sorted(directory.iterdir()):
            try:
                found = _versions(model)
            except BundleError as e:
                self._refuse(model, model.name, e)
                continue
            for version in found:
                try:
                    self.load(version)
                except BundleError as e:
                    self._refuse(version, f"{model.name}/{version.name}", e)

    def _refuse(self, found: Path, place: str, error: BundleError) -> None:
        self.refused[place] = error.faults
        log.error("refused %s:%s", found, "".join(f"\n  - {fault}" for fault in error.faults))

    def load(self, directory: Path) -> Model:
        """Check, load and warm up the bundle in NAME/VERSION. Raises BundleError with every fault found."""
        try:
            return self._load(directory)
        except Exception as e:  # files from outside: what nobody thought of refuses this bundle, neither the server nor its others
            for lost in filter(None, map(probes.lost, self._loader.placement.devices)):
                self._workers.lost(lost)
            if isinstance(e, BundleError):
                raise
            todo = READABLE if isinstance(e, PermissionError) else "export the model again"
            raise BundleError(str(directory), [f"it can't be loaded ({type(e).__name__}: {e}): {todo}"[:300]]) from e

    def _load(self, directory: Path) -> Model:
        name, version = directory.parent.name, directory.name
        if not version.isdecimal() or int(version) < 1:
            raise BundleError(str(directory), [f"version {version!r} must be a whole number from 1: rename the directory"])
        bundle = dropin.bundle(directory, name) if dropin.is_one(directory) else contract.load(directory)
        if bundle.name != name:
            raise BundleError(str(directory), [f"the bundle is named {bundle.name!r}: rename the directory or export it anew"])
        engine = self._engine(bundle, version, directory)
        try:
            task = KINDS[bundle.kind].make(engine, directory) if bundle.kind in KINDS else None
        except Exception as e:  # a vocabulary file that is none, a number that is none: the tokenizers library raises bare Exception
            for made in engine.engines:
                self._workers.remove(made)
            fault = f"task {bundle.kind!r} can't be set up ({type(e).__name__}: {e}): export the model again"
            raise BundleError(str(directory), [fault]) from None
        model = Model(name, version, bundle, engine, Tensors(engine, self._most_rows), task)
        before = self._models.get(name, {}).get(int(version))
        self._models = {**self._models, name: {**self._models.get(name, {}), int(version): model}}
        self._index()
        self.refused.pop(f"{name}/{version}", None)
        if before is not None:
            before.engine.retire()
        log.info("ready: %s version %s (%s)", name, version, bundle.kind)
        return model

    def _engine(self, bundle: Bundle, version: str, directory: Path) -> Engine:
        """The engines of a model, one for each device; the first of them, which knows the others."""
        faults = _task_faults(bundle)
        loaded = []
        for device in self._loader.placement.devices:
            try:
                loaded.append(self._loader.load(bundle, directory, device))
            except BundleError as e:
                raise BundleError(str(directory), faults + e.faults) from None
        if faults:
            raise BundleError(str(directory), faults)
        engines: list[Engine] = []
        for found in loaded:
            watch = _For(engines[0], self._watch) if engines else self._watch
            engine = Engine(bundle, version, found.graphs, self._workers, found.limits, watch)
            engine.measured = found.measured
            for which, rows, seconds in found.ran:
                engine.costs.learn(which, rows, 1, seconds)
            engines.append(engine)
        engines[0].others = tuple(engines[1:])
        return engines[0]

    def update(self, name: str) -> list[Model]:
        """Make what is served of a model what is on disk: new and changed versions are loaded, ones that went are unloaded.
        Calls under way finish on the version they began with. Raises NotFound where there is nothing of that name,
        BundleError with the faults of all versions that can't be served; the others are."""
        try:
            found = {p.name: p for p in _versions(self._directory / name)} if _plain(name) else {}
        except BundleError as e:
            self.refused[name] = e.faults
            raise
        self.refused.pop(name, None)
        if not found:
            known = listed(sorted({p.parent.name for p in self._directory.glob("*/*/")}))
            message = f"there is no model {name!r} in the models' directory; there are: {known}"
            raise NotFound("UNKNOWN_MODEL", message, model=name, known=known)
        faults: list[str] = []
        loaded = []
        for version, directory in found.items():
            here = self._models.get(name, {}).get(int(version)) if version.isdecimal() else None
            try:
                if here is None or not _same(here, directory):
                    loaded.append(self.load(directory))
            except BundleError as e:
                self.refused[f"{name}/{version}"] = e.faults
                faults += [f"version {version}: {fault}" for fault in e.faults]
        for number in self._models.get(name, {}).keys() - {int(v) for v in found if v.isdecimal()}:
            self.unload(name, str(number))
        if faults:
            raise BundleError(name, faults)
        return loaded

    def places(self) -> list[str]:
        """NAME/VERSION of everything in the models' directory, whether it is served or not."""
        found: list[str] = []
        for model in self._directory.iterdir():
            with contextlib.suppress(BundleError):  # what can't be read is refused, by its own name
                found += [f"{model.name}/{version.name}" for version in _versions(model)]
        return sorted(found)

    def unload(self, name: str, version: str = "") -> list[Model]:
        """Serve a model, or one version of it, no more; calls under way finish. Raises NotFound where it isn't served."""
        gone = [self.find(name, version)] if version else [m for m in self.models() if m.name == name] or [self.find(name)]
        kept = {number: m for number, m in self._models[name].items() if m not in gone}
        self._models = {key: versions for key, versions in {**self._models, name: kept}.items() if versions}
        self._index()
        for model in gone:
            model.engine.retire()
            log.info("unloaded: %s version %s", model.name, model.version)
        return gone

    def exact(self, name: str, version: str) -> Model | None:
        """The same, where both are spelled as in the catalog."""
        return self._exact.get((name, version))

    def _index(self) -> None:
        every = {(m.name, m.version): m for m in self.models()}
        self._exact = every | {(name, ""): versions[max(versions)] for name, versions in self._models.items()}

    def find(self, name: str, version: str = "") -> Model:
        """The model of that name, its newest version where none is given. Raises NotFound naming what exists."""
        found = self._exact.get((name, version))
        if found is not None:
            return found
        versions = self._models.get(name)
        if not versions:
            if any(key.split("/")[0] == name for key in list(self.refused)):
                raise NotFound("MODEL_REFUSED", f"model {name!r} could not be loaded; the server's log lists its faults", model=name)
            known = listed(sorted(self._models))
            message = f"Request for unknown model: there is no model {name!r}; there are: {known}"
            raise NotFound("UNKNOWN_MODEL", message, model=name, known=known)
        if not version:
            return versions[max(versions)]
        model = versions.get(int(version)) if version.isdecimal() and len(version) < 20 else None
        if model is None:
            known = listed(sorted(versions))
            message = f"model {name!r} has no version {version!r}; it has: {known}"
            if not version.isdecimal():  # in words that published clients look for
                message = f"failed to get model version from specified version string {version!r}: {message}"
            raise NotFound("UNKNOWN_VERSION", message, model=name, version=version, known=known)
        return model

    def models(self) -> list[Model]:
        """Every version of every model, by name."""
        models = self._models  # as it is now: another thread may exchange it
        return [models[name][version] for name in sorted(models) for version in sorted(models[name])]

    def newest(self, kind: str) -> list[Model]:
        """The newest version of each model of a task."""
        models = self._models
        return [m for m in (models[name][max(models[name])] for name in sorted(models)) if m.bundle.kind == kind]


def _versions(model: Path) -> list[Path]:
    """The directories of a model's versions, in order; none where it is no directory. Raises BundleError where they can't be read."""
    try:
        return sorted(p for p in model.iterdir() if p.is_dir() and not p.name.startswith(".")) if model.is_dir() else []
    except OSError as e:
        raise BundleError(str(model), [f"it can't be read ({e.strerror or e}): {READABLE}"]) from None


def _plain(name: str) -> bool:
    fits = 0 < len(name.encode()) <= 255 and name.isprintable()  # or the file system would refuse to look for it
    return fits and Path(name).name == name and not name.startswith(".") and not set(name) & set("*?[")


def _same(model: Model, directory: Path) -> bool:
    """Whether what is served is what is there. A bare ONNX file without a bundle.json is read anew to be sure."""
    return not dropin.is_one(directory) and contract.load(directory).fingerprint == model.bundle.fingerprint


def _task_faults(bundle: Bundle) -> list[str]:
    """What the task needs and the bundle lacks."""
    kind = KINDS.get(bundle.kind)
    faults: list[str] = []
    for where, inputs, outputs in kind.needs if kind else ():
        graph = bundle.graphs.get(where or bundle.main)
        if graph is None:
            faults.append(f"task {bundle.kind!r} needs a graph {where!r}")
            continue
        faults += [f"task {bundle.kind!r} needs input {n!r} of graph {where or bundle.main!r}" for n in inputs if graph.input(n) is None]
        faults += [f"task {bundle.kind!r} needs output {n!r} of graph {where or bundle.main!r}" for n in outputs if graph.output(n) is None]
    return faults


class _For:
    """Reports an engine's rounds and sequences as the first's of its model, which it must not keep from being freed: banks on a device go
    with their engine. Satisfies engine.Watch."""

    def __init__(self, first: Engine, watch: Watch) -> None:
        self._first = weakref.ref(first)
        self._watch = watch

    def round(self, engine: Engine, graph: str, tickets: int, rows: int, steps: int, row_steps: int, spent: Spent) -> None:
        self._watch.round(self._first() or engine, graph, tickets, rows, steps, row_steps, spent)

    def told(self, engine: Engine, rows: int, sequences: int, seconds: float) -> None:
        self._watch.told(self._first() or engine, rows, sequences, seconds)

    def left(self, engine: Engine, sequences: Listed[Sequence], reason: str) -> None:
        self._watch.left(self._first() or engine, sequences, reason)


__all__ = ["Catalog", "Graph", "Model", "Trials"]
