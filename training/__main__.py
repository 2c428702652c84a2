"""`python -m training TASK --out DIR`, also `seqserve train`: from a configuration to a checkpoint.

It knows the command line; the loop and the models know the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

EPILOG = """
examples:
  python -m training sentiment --config toy --out runs/toy        under a minute, needs no data set
  python -m training sentiment --data DIR --out runs/sentiment    minutes to hours; data from DIR
  python -m training sentiment --out runs/sentiment               the same; data are downloaded once
  python -m training sentiment --out runs/sentiment --resume      go on where it was interrupted
  python -m training sentiment --out runs/small --set model.hidden=64 --set run.epochs=2

Then: python -m export runs/sentiment --out models/sentiment/1
"""


def parser() -> argparse.ArgumentParser:
    from training.tasks import TASKS

    words = argparse.ArgumentParser(
        prog="seqserve train", description="Train a model that can be exported and served.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    words.add_argument("task", choices=list(TASKS), help="what to train")
    words.add_argument("--out", type=Path, help="directory for the result (default: runs/TASK)")
    words.add_argument("--data", type=Path, help="directory with the data sets (default: download once into a cache)")
    words.add_argument("--config", help="a TOML file, or a variant of the task's own such as 'toy'")
    words.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of the configuration")
    words.add_argument("--resume", action="store_true", help="go on from the last whole epoch found in --out")
    words.add_argument("--no-progress", action="store_true", help="no progress bar")
    return words


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0 when done, 1 when it can't start (the reason is printed), 130 when interrupted."""
    from training import config as configs

    given = list(sys.argv[1:] if arguments is None else arguments)
    asked = parser().parse_args(given)
    out: Path = asked.out or Path("runs") / asked.task
    try:
        config = configs.load(asked.task, asked.config, asked.set)
    except (configs.ConfigError, OSError) as e:
        print(f"seqserve train: {e}", file=sys.stderr)
        return 1

    import lightning  # seconds to import: not before the command line is known to be right

    from training import distributed, loop, tasks
    from training.data import DataError

    last = out / loop.LAST
    if asked.resume and not last.is_file():
        print(f"seqserve train: nothing to resume in {out}; start without --resume", file=sys.stderr)
        return 1
    resume = asked.resume or (last.is_file() and distributed.goes_on(out))
    if last.is_file() and not resume and distributed.first():
        print(f"note: {out} holds an earlier run, which is replaced; --resume would have gone on with it", file=sys.stderr)
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        training = tasks.find(asked.task).prepare(config, asked.data, out)
        summary = loop.fit(training, out, resume=resume, command=_command(given), progress=False if asked.no_progress else None)
    except (configs.ConfigError, DataError, OSError) as e:
        print(f"seqserve train: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; go on with --resume --out {out}", file=sys.stderr)
        return 130
    if training.global_rank:  # on several devices every process comes by here
        return 0
    scores = ", ".join(f"{name} {value:.4f}" for name, value in summary["scores"].items())
    print(f"{asked.task}: best at epoch {summary['epoch']:g} of {config.run.epochs}: {scores}")
    print("next: " + training.next.format(out=out, task=asked.task))
    return 0


def _command(given: Sequence[str]) -> str:
    """The command for the record. Directories of one machine mean nothing on another: --data becomes DIR, and of other
    absolute paths the last part stays."""
    from training import config as configs

    kept: list[str] = []
    for word in _words(given):
        before = kept[-1] if kept else ""
        if before == "--data":
            word = "DIR"
        elif before == "--out" and Path(word).is_absolute():
            word = f"runs/{Path(word).name}"
        elif before == "--config" and Path(word).is_absolute():
            word = Path(word).name
        elif before == "--set" and word.startswith("init."):
            key, _, path = word.partition("=")
            word = f"{key}={configs.portable(path)}"
        kept.append(word)
    return " ".join(["python -m training", *(w for w in kept if w not in ("--resume", "--no-progress"))])


def _words(given: Sequence[str]) -> Iterator[str]:
    for word in given:
        if word.startswith(("--data=", "--out=", "--config=")):
            yield from word.split("=", 1)
        else:
            yield word


if __name__ == "__main__":
    sys.exit(main())
