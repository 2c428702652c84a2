"""Load over time: steady, in steps, with spikes. One shape for both loops, since a user of the open loop is a rate."""

from __future__ import annotations

from typing import Any

from locust import LoadTestShape

STEPS = 5
SPIKES = 3
SPIKE = 4  # times the load between spikes


def users(shape: str, most: int, at: float) -> int:
    """Users at `at`, a share of the run in [0, 1): `steps` climb to `most` in five; `spikes` are three tenths of the run long
    together and stand out of a quarter of the load."""
    if shape == "steps":
        return max(1, most * (1 + int(at * STEPS)) // STEPS)
    if shape == "spikes":
        return most if (at * SPIKES) % 1 > 0.7 else max(1, most // SPIKE)
    return most


class Shape(LoadTestShape):
    """What locust asks, once a second."""

    use_common_options = True  # --users, --spawn-rate and --run-time are ours to read

    @staticmethod
    def options(group: Any) -> None:
        group.add_argument("--shape", default="steady", choices=["steady", "steps", "spikes"], help="load over the run's time")

    def tick(self) -> tuple[int, float] | None:
        runner = self.runner
        options = runner.environment.parsed_options if runner else None
        assert options is not None
        length = float(options.run_time or 0) or float("inf")
        now = self.get_run_time()
        if now >= length:
            return None
        most = options.num_users or 1
        return users(options.shape, most, now / length), max(options.spawn_rate or 0, most)
