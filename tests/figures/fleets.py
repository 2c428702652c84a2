"""A fleet to be disturbed: three replicas, a balancer and a shared store, in containers or as plain processes.

Containers are those of docker-compose.yml, by `docker compose` where an engine answers, else by podman-compose. Processes are of
this checkout, beside haproxy and redis-server of this machine: quicker, and the same configuration but for addresses.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tests.process import ROOT

REPLICAS = 3
PROJECT = "seqserve-compose-test"
_OWNERS = (
    "local r={} for _,k in ipairs(redis.call('KEYS','seqserve:session:*')) do r[#r+1]=k r[#r+1]=redis.call('HGET',k,'owner') end return r"
)
"""A script for the store: every session and the replica that has it."""


class Fleet(Protocol):
    address: str

    def start(self) -> None:
        """Everything up; replicas may still be loading."""
        ...

    def kill(self, replica: int) -> None:
        """SIGKILL."""
        ...

    def drain(self, replica: int) -> None:
        """SIGTERM, and wait for its end."""
        ...

    def back(self, replica: int) -> None: ...

    def owners(self) -> Mapping[str, str]:
        """Which replica has each session, as the store has it."""
        ...

    def said(self) -> str:
        """What the fleet is made of, for the summary."""
        ...

    def close(self) -> None: ...


def _ran(command: Sequence[str], seconds: float = 120.0, cwd: Path = ROOT) -> str:
    """Its standard output. Raises RuntimeError with what it wrote where it fails."""
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=seconds)
    if ran.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:6])} …: {ran.stderr.strip()[-2000:]}")
    return ran.stdout


def _pairs(lines: list[str]) -> dict[str, str]:
    return dict(zip(lines[::2], lines[1::2], strict=False))


class Containers:
    """The `fleet` profile of docker-compose.yml. `base` builds every image from that one, the balancer's and the store's from its
    Debian packages: for machines that reach no image registry."""

    address = "localhost:8010"

    def __init__(self, base: str = "") -> None:
        docker = shutil.which("docker") is not None and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
        self._engine = "docker" if docker else "podman"
        beside = Path(sys.executable).with_name("podman-compose")
        self._compose = ["docker", "compose"] if docker else [str(beside) if beside.exists() else "podman-compose"]
        self._base = base
        self._scratch = tempfile.TemporaryDirectory()
        self._files = [str(ROOT / "docker-compose.yml")]
        self._size = ""

    def start(self) -> None:
        self._build()
        self._down()
        self._composed("up", "-d", "--no-build", "--scale", f"replica={REPLICAS}", "balancer")

    def kill(self, replica: int) -> None:
        _ran([self._engine, "kill", "--signal", "KILL", self._name("replica", replica + 1)])

    def drain(self, replica: int) -> None:
        _ran([self._engine, "stop", "--time", "40", self._name("replica", replica + 1)])

    def back(self, replica: int) -> None:
        _ran([self._engine, "start", self._name("replica", replica + 1)])

    def owners(self) -> Mapping[str, str]:
        client = "redis-cli" if self._base else "valkey-cli"
        return _pairs(_ran([self._engine, "exec", self._name("store", 1), client, "EVAL", _OWNERS, "0"]).split())

    def said(self) -> str:
        return f"{self._engine}, {REPLICAS} replicas, image {self._size}"

    def close(self) -> None:
        self._down()
        self._scratch.cleanup()

    def _composed(self, *arguments: str) -> None:
        files = [part for file in self._files for part in ("-f", file)]
        _ran([*self._compose, "-p", PROJECT, *files, "--profile", "fleet", *arguments], 300.0)

    def _down(self) -> None:
        # podman-compose's "down" leaves replicas beyond the first, and podman leaves what others depend on: gone over again.
        more = ["--depend", "--ignore"] if self._engine == "podman" else []
        for _ in range(REPLICAS):
            left = _ran([self._engine, "ps", "--all", "--quiet", "--filter", f"name={PROJECT}"]).split()
            if not left:
                break
            _ran([self._engine, "rm", "--force", "--volumes", *more, *left])
        self._composed("down", "--volumes", "--timeout", "5")

    def _name(self, service: str, number: int) -> str:
        between = "-" if self._engine == "docker" else "_"
        return between.join((PROJECT, service, str(number)))

    def _build(self) -> None:
        options: list[str] = []
        if self._base:
            options = ["--build-arg", f"BASE={self._base}"]
            scratch = Path(self._scratch.name)
            (scratch / "Dockerfile").write_text(
                f"FROM {self._base}\nRUN apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server haproxy\n"
                "RUN install -d -m 777 /data\n"
            )
            _ran([self._engine, "build", *self._mounts(), "--tag", "localhost/seqserve-parts", str(scratch)], 300.0)
            command = ["redis-server", "--dir", "/data", "--appendonly", "yes", "--save", "", "--bind", "0.0.0.0", "--protected-mode", "no"]
            override = {
                "replica": {"image": "localhost/seqserve:test"},
                "balancer": {"image": "localhost/seqserve-parts"},
                "store": {"image": "localhost/seqserve-parts", "user": "", "command": command},
            }
        else:
            override = {"replica": {"image": "localhost/seqserve:test"}}
        _ran([self._engine, "build", *options, *self._mounts(), "--target", "server", "--tag", "localhost/seqserve:test", "."], 600.0)
        size = int(_ran([self._engine, "image", "inspect", "--format", "{{.Size}}", "localhost/seqserve:test"]))
        base = int(_ran([self._engine, "image", "inspect", "--format", "{{.Size}}", self._base])) if self._base else 0
        self._size = f"{size / 1e6:.0f} MB" + (f", {base / 1e6:.0f} of them its base" if base else "")
        written = Path(self._scratch.name, "override.yml")
        written.write_text(json.dumps({"services": override}))  # JSON is YAML
        self._files.append(str(written))

    def _mounts(self) -> list[str]:
        """This machine's pip settings, local wheels and certificates, for podman's builds: what pip needs here it needs there."""
        if self._engine == "docker":
            return []
        found = {Path("/etc/ssl/certs")}
        settings = _ran([sys.executable, "-m", "pip", "config", "debug"])
        found |= {Path(path) for path in re.findall(r"(\S+), exists: True", settings)}
        for value in re.findall(r"'([^']*)'", _ran([sys.executable, "-m", "pip", "config", "list"])):
            for word in value.split():
                path = Path(word.removeprefix("file://"))
                if path.is_absolute() and path.exists():
                    found.add(path.parent if path.name == "simple" else path)  # an index names files that lie beside it
        mounts = [part for path in sorted(found) if path.exists() for part in ("--volume", f"{path}:{path}:ro")]
        return ["--isolation", "chroot", *mounts]


class Processes:
    """Three servers on addresses of their own, haproxy and redis-server, as processes of this machine."""

    def __init__(self, metrics: bool = False) -> None:
        """With `metrics`, servers have a port for them."""
        self._scratch = tempfile.TemporaryDirectory()
        self._every: list[subprocess.Popen[bytes]] = []
        self._replicas: dict[int, subprocess.Popen[bytes]] = {}
        self._port, self._redis, self._balancer, balanced, served = free(5)
        self.address = f"127.0.0.1:{self._balancer}"
        self._metrics = served if metrics else -1
        self.balancer_metrics = f"127.0.0.1:{balanced}"
        self.metrics = [f"{_host(r)}:{served}" for r in range(REPLICAS)]

    def start(self) -> None:
        self._run("redis-server", "--port", str(self._redis), "--save", "", "--appendonly", "no", "--dir", self._scratch.name)
        for replica in range(REPLICAS):
            self.back(replica)
        text = (ROOT / "deploy/haproxy/haproxy.cfg").read_text()
        before, _, after = text.partition("resolvers names\n")
        text = before + after[after.index("frontend") :].replace("init-addr none resolvers names", "")
        servers = "\n".join(f"    server replica{r} {_host(r)}:{self._port}" for r in range(REPLICAS))
        text = re.sub(r"(?m)^ *server-template.*$", servers, text)
        text = text.replace("${BALANCER_PORT}", str(self._balancer)).replace(":8404", self.balancer_metrics)
        config = Path(self._scratch.name, "haproxy.cfg")
        config.write_text(text)
        self._run("haproxy", "-db", "-f", str(config))

    def kill(self, replica: int) -> None:
        self._replicas[replica].kill()
        self._replicas[replica].wait()

    def drain(self, replica: int) -> None:
        self._replicas[replica].send_signal(signal.SIGTERM)
        self._replicas[replica].wait(60)

    def back(self, replica: int) -> None:
        self._replicas[replica] = self._run(
            sys.executable, "-m", "server", "--models", "models", "--host", _host(replica), "--port", str(self._port),
            "--metrics-port", str(self._metrics), "--workers", "1", "--store", f"redis://127.0.0.1:{self._redis}",
        )  # fmt: skip

    def owners(self) -> Mapping[str, str]:
        return _pairs(_ran(["redis-cli", "-p", str(self._redis), "EVAL", _OWNERS, "0"]).split())

    def said(self) -> str:
        return f"{REPLICAS} processes"

    def close(self) -> None:
        for process in reversed(self._every):
            if process.poll() is None:
                process.terminate()
        for process in self._every:
            process.wait(60)
        self._scratch.cleanup()

    def _run(self, *command: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._every.append(process)
        return process


def _host(replica: int) -> str:
    return f"127.0.0.{2 + replica}"


def free(count: int) -> list[int]:
    """Ports that nobody listens on."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports
