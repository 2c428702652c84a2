"""The models' directory as it is found: what can't be read is told, and harms nothing else."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from contract.bundle import BundleError
from server.catalog import Catalog
from server.metrics import Metrics
from server.rounds import Limits
from server.workers import Workers
from tests import models


@pytest.fixture
def library(tmp_path: Path) -> Path:
    models.reader(tmp_path / "reader" / "1", "reader")
    shutil.copytree(tmp_path / "reader" / "1", tmp_path / "reader" / "2")
    return tmp_path


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a directory one that can't be listed, nor anything in it opened, for the user that runs the tests whoever that is."""
    locked: list[Path] = []
    listed, exists = Path.iterdir, Path.exists

    def check(path: Path) -> None:
        if path in locked:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def listing(path: Path) -> Iterator[Path]:
        check(path)
        return listed(path)

    def there(path: Path) -> bool:
        check(path.parent)
        return exists(path)

    monkeypatch.setattr(Path, "iterdir", listing)
    monkeypatch.setattr(Path, "exists", there)
    return locked.append


def catalog() -> Catalog:
    return Catalog(Workers(0), Limits(), Metrics(), 256)


def test_a_model_that_cannot_be_read(library: Path, lock: Callable[[Path], None], caplog: pytest.LogCaptureFixture) -> None:
    """It is refused by its name, logged, and listed; once it can be read it is served as if nothing had been."""
    shutil.copytree(library / "reader", library / "shut")
    made = catalog()
    lock(library / "shut")
    made.scan(library)
    assert [(m.name, m.version) for m in made.models()] == [("reader", "1"), ("reader", "2")]
    assert list(made.refused) == ["shut"]
    assert f"refused {library / 'shut'}" in caplog.text
    assert "let the user that the server runs as read it" in caplog.text
    assert made.places() == ["reader/1", "reader/2"]
    with pytest.raises(BundleError, match="Permission denied"):
        made.update("shut")


def test_a_model_that_can_be_read_again(library: Path, lock: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A load takes up what a scan could not read, and it is refused no more."""
    made = catalog()
    lock(library / "reader")
    made.scan(library)
    assert (made.models(), list(made.refused)) == ([], ["reader"])
    monkeypatch.undo()
    assert len(made.update("reader")) == 2
    assert made.refused == {}


def test_a_version_that_cannot_be_read(library: Path, lock: Callable[[Path], None]) -> None:
    """It is refused with what to do about it, which is not to export the model again; the other version is served."""
    made = catalog()
    lock(library / "reader" / "1")
    made.scan(library)
    assert [m.version for m in made.models()] == ["2"]
    (fault,) = made.refused["reader/1"]
    assert "Permission denied" in fault
    assert fault.endswith("let the user that the server runs as read it")


def test_a_directory_that_cannot_be_read(library: Path, lock: Callable[[Path], None]) -> None:
    """Where not even the models' names can be read nothing is served in silence."""
    lock(library)
    with pytest.raises(PermissionError):
        catalog().scan(library)


def test_a_list_of_models_is_of_one_moment(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model is unloaded by another thread while the list is made, as it was before."""
    made = catalog()
    made.scan(library)
    names: list[str] = []

    def late(what: Iterable[Any]) -> list[Any]:
        ordered = sorted(what)
        if not names:
            names.append("unloaded")
            made.unload("reader")
        return ordered

    monkeypatch.setattr("server.catalog.sorted", late, raising=False)
    listed = made.models()
    assert [(m.name, m.version) for m in listed] == [("reader", "1"), ("reader", "2")]
    assert made.models() == []
    made.scan(library)
    names.clear()
    assert [m.version for m in made.newest(listed[0].bundle.kind)] == ["2"]
