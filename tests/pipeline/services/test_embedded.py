"""The embedded services: really started, really stopped. MLflow takes seconds to start, so one test has it, and S3 the rest."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import load_text

from components.lib.errors import Refusal
from components.lib.store.store import Store
from pipeline.services import embedded as local
from pipeline.services.embedded import Services, services


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home whose MLflow is named by the environment, so that S3 alone is started."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    yield tmp_path / "home"
    Services(tmp_path / "home").down()


def running(home: Path) -> list[str]:
    return [service.name for service in Services(home).status() if service.running]


def pid(home: Path, name: str = "s3") -> int:
    return next(service.pid or 0 for service in Services(home).status() if service.name == name)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def user(home: Path, then: str) -> subprocess.Popen[str]:
    """Another command: it enters `services`, says so, and does what it is told."""
    program = f"""
        import sys, time
        from pathlib import Path
        from pipeline.services.embedded import services
        with services(Path({str(home)!r})) as environment:
            print(environment["AWS_ENDPOINT_URL_S3"], flush=True)
            {then}
    """
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def test_both_servers_serve_and_end_with_their_command(servers: dict[str, str], environment: dict[str, str]) -> None:
    """MLflow keeps artifacts on the S3, and a client needs no key of it for them."""
    client = MlflowClient(servers["MLFLOW_TRACKING_URI"])
    run = client.create_run(client.create_experiment(environment["MLFLOW_EXPERIMENT_NAME"]))
    client.log_text(run.info.run_id, "found on S3", "note.txt")
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert load_text(f"{run.info.artifact_uri}/note.txt") == "found on S3"
    kept = Store("espalier", "mlflow").listing("s3://espalier/mlflow")
    assert any(key.endswith(f"{run.info.run_id}/artifacts/note.txt") for key, *_ in kept)


def test_services_end_with_the_block(home: Path) -> None:
    with services(home) as environment:
        assert running(home) == ["s3"]
        assert environment["ESPALIER_BUCKET"] == "espalier"
        assert "MLFLOW_TRACKING_URI" not in environment
    assert running(home) == []


def test_an_inner_user_does_not_stop_them(home: Path) -> None:
    with services(home) as outer:
        with services(home) as inner:
            assert inner == outer
        assert running(home) == ["s3"]
    assert running(home) == []


def test_up_keeps_them_until_down(home: Path) -> None:
    environment = Services(home).up()
    assert Services(home).up() == environment
    with services(home) as used:
        assert used == environment
    assert running(home) == ["s3"]
    Services(home).down()
    assert running(home) == []


def test_the_next_time_has_the_same_address_keys_and_data(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for expected in (None, "written the first time"):
        with services(home) as environment, monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            store = Store.from_environment()
            store.check()
            assert store.read_text("note") == expected
            store.write_text("note", "written the first time")
    with services(home) as again:
        assert again == environment


def test_a_port_that_was_taken_since_is_given_up(home: Path) -> None:
    with services(home) as first:
        pass
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(first["AWS_ENDPOINT_URL_S3"].rsplit(":")[-1])))
        other.listen()
        with services(home) as second:
            assert second["AWS_ENDPOINT_URL_S3"] != first["AWS_ENDPOINT_URL_S3"]
            assert running(home) == ["s3"]


def test_two_commands_at_once_share_one_server(home: Path) -> None:
    commands = [user(home, "sys.stdin.readline()") for _ in range(2)]
    addresses = [command.stdout.readline() for command in commands if command.stdout]
    assert addresses[0] == addresses[1]
    commands[0].communicate("\n")
    assert running(home) == ["s3"], "the first to leave may not stop it under the other"
    commands[1].communicate("\n")
    assert running(home) == []


def test_after_a_killed_command_the_next_one_takes_over(home: Path) -> None:
    killed = user(home, "time.sleep(600)")
    assert killed.stdout
    address = killed.stdout.readline().strip()
    killed.kill()
    killed.wait()
    killed.stdout.close()
    assert running(home) == ["s3"]
    with services(home) as environment:
        assert environment["AWS_ENDPOINT_URL_S3"] == address
    assert running(home) == []


def test_a_dead_server_is_started_again(home: Path) -> None:
    Services(home).up()
    os.kill(pid(home), signal.SIGKILL)
    wait_until(lambda: not running(home))
    with services(home):
        assert running(home) == ["s3"]


def test_a_hanging_server_is_replaced(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Services(home).up()
    hanging = pid(home)
    os.kill(hanging, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(hanging).status() == psutil.STATUS_STOPPED)
    monkeypatch.setattr(local, "_PATIENCE", 0.2)
    monkeypatch.setattr(local, "_STOP_SECONDS", 0.2)
    Services(home).up()
    assert pid(home) != hanging
    assert running(home) == ["s3"]


def test_a_pid_that_names_another_process_now_is_left_alone(home: Path) -> None:
    Services(home).up()
    Services(home).down()
    path = home / "services.json"
    path.write_text(path.read_text().replace(f'"pid": {pid(home)}', f'"pid": {os.getpid()}'))
    assert pid(home) == os.getpid()
    Services(home).down()
    with services(home):
        assert pid(home) != os.getpid()


def test_the_keys_are_the_owners_alone(home: Path) -> None:
    with services(home) as environment:
        assert stat.S_IMODE((home / "services.json").stat().st_mode) == 0o600
        command = " ".join(psutil.Process(pid(home)).cmdline())
        assert environment["AWS_SECRET_ACCESS_KEY"] not in command


def test_no_proxy_is_asked_for_loopback(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "internal.example")
    with services(home) as environment, monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        assert environment["no_proxy"] == "internal.example,127.0.0.1,localhost"
        Store.from_environment().check()


def test_what_the_environment_names_is_not_started(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_BUCKET", "elsewhere")
    with services(home) as environment:
        assert set(environment) == {"no_proxy", "NO_PROXY"}
        assert Services(home).status() == []


def test_half_an_s3_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://minio:9000")
    with pytest.raises(Refusal, match=r"http://minio:9000 but ESPALIER_BUCKET is not set"), services(home):
        pass


def test_without_rclone_the_cure_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(Refusal, match=r"espalier\[local\]"), services(home):
        pass


def test_a_server_that_ends_at_its_start_tells_its_last_words(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = home.parent / "rclone"
    program.write_text("#!/bin/sh\necho the disk is on fire >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(local, "_find_rclone", lambda: str(program))
    with pytest.raises(Refusal, match=r"s3 server exited during its start \(the disk is on fire\): see .*s3\.log"):
        Services(home).up()
    assert running(home) == []


def test_a_damaged_record_is_refused(home: Path) -> None:
    home.mkdir()
    (home / "services.json").write_text("{")
    with pytest.raises(Refusal, match=r"services\.json is not what this program wrote"):
        Services(home).up()
    (home / "services.json").unlink()


def test_a_home_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match=r"cannot be written to .*--home"), services(tmp_path / "file" / "home"):
        pass


def test_mlflow_on_another_s3_is_not_taken_for_this_one(
    servers: dict[str, str], servers_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPALIER_BUCKET", "another")
    with pytest.raises(Refusal, match="not with AWS/another: stop it"), services(servers_home):
        pass
    assert "mlflow" in running(servers_home)
