"""Locust's entry: users in a closed loop, arrivals in an open one, load over time, thresholds, a summary.

locust -f loadtests/locustfile.py Mix --host 127.0.0.1:8001 --users 16 --run-time 2m --headless --html load.html
locust -f loadtests/locustfile.py Arrivals --rate 5 --shape spikes --users 40 …
"""

from __future__ import annotations

import os
import random
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import gevent
import grpc.experimental.gevent
from gevent.pool import Pool
from locust import User, events, stats, task
from locust.env import Environment
from locust.exception import StopUser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # locust is started with a file, not a package

import seqserve
from loadtests import calls, inputs, report
from loadtests.shapes import Shape as Shape  # locust looks for a shape in here

grpc.experimental.gevent.init_gevent()  # or a waiting call would hold all greenlets
stats.PERCENTILES_TO_CHART = [0.5, 0.95, 0.99]
stats.PERCENTILES_TO_STATISTICS = [0.95, 0.99]

IN_FLIGHT = 2_000  # of one arrivals' user: further arrivals count as failed, since nobody would wait behind so many


@events.init_command_line_parser.add_listener
def _options(parser: Any) -> None:
    group = parser.add_argument_group("seqserve")
    group.add_argument(
        "--data", default="", help="directory of test sets (imdb, multi30k, ett); none: made-up texts", env_var="SEQSERVE_DATA"
    )
    group.add_argument("--rate", type=float, default=5.0, help="arrivals a second of one user of the open loop")
    group.add_argument("--of", default="mixed", choices=["mixed", *(c.__name__ for c in calls.EVERY)], help="what arrives in the open loop")
    group.add_argument("--pause", type=float, default=0.0, help="mean seconds a user of the closed loop rests between calls")
    group.add_argument("--retries", type=int, default=0, help="tries after the first; 0 shows every refusal")
    group.add_argument("--patience", type=float, default=30.0, help="seconds that a caller waits")
    group.add_argument("--most-failures", type=float, default=0.0, help="share of failed requests at which the run has failed")
    group.add_argument("--most-p99", type=float, default=0.0, help="milliseconds of any request's p99 at which the run has failed; 0: any")
    group.add_argument("--summary", default="", help="write a summary in Markdown into this file")
    Shape.options(group)


@events.init.add_listener
def _read(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    assert options is not None
    Caller.inputs = inputs.read(Path(options.data) if options.data else None)


@events.quitting.add_listener
def _judge(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    if options is None or options.worker:
        return
    faults = report.faults(environment.stats, options.most_failures, options.most_p99)
    for fault in faults:
        print(f"threshold missed: {fault}", file=sys.stderr)
    if options.summary:
        Path(options.summary).write_text(report.markdown(environment.stats, Caller.inputs.source, faults))
    environment.process_exit_code = 1 if faults else 0


class Caller(User):
    """Someone who calls: a connection, dice, and requests that are timed."""

    abstract = True
    host = "127.0.0.1:8001"
    inputs: ClassVar[inputs.Inputs]

    def on_start(self) -> None:
        self.dice = random.Random(f"{os.getpid()}-{id(self)}")
        self.options: Namespace = self.environment.parsed_options or Namespace()
        self.client = seqserve.Client(self.host or "", timeout=self.options.patience, retries=self.options.retries)
        self.client.live()  # connects: that is no request of anybody's

    def on_stop(self) -> None:
        self.client.close()

    def wait_time(self) -> float:
        mean = self.options.pause
        return self.dice.expovariate(1 / mean) if mean else 0.0

    def do(self, what: calls.Calls, due: float | None = None) -> None:
        """Make the requests of `what`, each reported; the first is timed from when it was due."""
        steps = what(self.client, Caller.inputs, self.dice)
        name = next(steps)
        began = time.perf_counter() if due is None else due
        following: str | None = name
        while following is not None:
            name = following
            fault: Exception | None = None
            try:
                following = next(steps, None)
            except (seqserve.Error, calls.Wrong) as e:
                fault, following = e, None
            ended = time.perf_counter()
            self.environment.events.request.fire(
                request_type="gRPC", name=name, response_time=(ended - began) * 1e3, response_length=0, context={},
                exception=fault and report.Named(report.spelled(fault)),
            )  # fmt: skip
            began = ended


class Classify(Caller):
    """Whole reviews, one after another."""

    @task
    def call(self) -> None:
        self.do(calls.classify)


class Translate(Caller):
    """Captions, streamed."""

    @task
    def call(self) -> None:
        self.do(calls.translate)


class Live(Caller):
    """Sessions: a review in pieces, or a series hour by hour."""

    @task
    def text(self) -> None:
        self.do(calls.live_review)

    @task
    def series(self) -> None:
        self.do(calls.live_series)


class Tensors(Caller):
    """Tensor calls of the Open Inference Protocol."""

    @task
    def call(self) -> None:
        self.do(calls.tensors)


class Mix(Caller):
    """All of these."""

    @task
    def call(self) -> None:
        self.do(calls.mixed)


class Arrivals(Caller):
    """An open loop: calls arrive at `--rate` a second whether or not earlier ones were answered, and are timed from when they were
    due. So a server that falls behind is seen to queue, where users who wait for it would only ask less."""

    @task
    def arrive(self) -> None:
        what = getattr(calls, self.options.of)
        pool = Pool(IN_FLIGHT)
        try:
            for due in self._dues():
                gevent.sleep(max(0.0, due - time.perf_counter()))
                if pool.free_count():
                    pool.spawn(self.do, what, due)
                else:
                    fault = report.Named(f"{IN_FLIGHT} calls were waiting")
                    self.environment.events.request.fire(
                        request_type="gRPC", name="arrival", response_time=0, response_length=0, context={}, exception=fault
                    )
        finally:
            pool.kill()

    def _dues(self) -> Iterator[float]:
        due = time.perf_counter()
        while self.options.rate > 0:
            due += self.dice.expovariate(self.options.rate)
            yield due
        raise StopUser
