"""A whole run with secrets in its environment leaves none of them anywhere: files, logs, MLflow, store, command lines."""

from __future__ import annotations

import base64
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.components.lib.provenance.keys import write_key
from tests.components.lib.transformer.zoo import VOCABULARY, Specimen, release

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

NAMES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "KF_PIPELINES_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "ESPALIER_SIGNING_PASSWORD",
)
CANARIES = {name: f"canary-{name.lower()}-5f2c9e71d0b84a36" for name in NAMES}

RECIPE = """
methods: {{last: {{ratio: 0.25}}}}
calibration: {{data: {folder}/text.txt, samples: 4, length: 16}}
regularize: {{steps: 2, batch_size: 2, checkpoint_every: 1, learning_rate: 1.0e-3}}
evaluate: {{perplexity: {{test: {folder}/text.txt}}, controls: [], speed: {{enabled: false}}}}
promote: {{rules: {{size: {{figure: parameters, bound: 0.99, why: it must be smaller}}}}}}
"""


def written(secrets: Mapping[str, str]) -> dict[bytes, str]:
    """Return the secrets as they might be written, plain or in base64 at any of the three places in a group, with their names."""
    forms = {secret.encode(): name for name, secret in secrets.items()}
    for name, secret in secrets.items():
        for before in range(3):
            forms[base64.b64encode(b"x" * before + secret.encode())[4:-4]] = f"{name} in base64"
    return forms


@contextmanager
def command_lines(forms: Mapping[bytes, str]) -> Iterator[set[str]]:
    """Look at the command lines of all processes, often; yield what was found."""
    found: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    line = process.read_bytes()
                    found.update(f"{name} in a command line" for form, name in forms.items() if form in line)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def left(folder: Path, forms: Mapping[bytes, str]) -> list[str]:
    """Return the files below the folder that hold a secret, with its name."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    return [f"{name} in {path}" for path in files for form, name in forms.items() if form in path.read_bytes()]


def test_a_whole_run_leaves_no_secret_behind(tmp_path: Path) -> None:
    release(Specimen("llama", "llama").model(layers=4), tmp_path / "release")
    dice = random.Random(0)
    (tmp_path / "text.txt").write_text(" ".join(f"w{dice.randrange(3, VOCABULARY)}" for _ in range(400)))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    write_key(tmp_path, "key", CANARIES["ESPALIER_SIGNING_PASSWORD"])
    (tmp_path / "temporary").mkdir()
    given = {
        **os.environ,
        **CANARIES,
        "AWS_ACCESS_KEY_ID": "someone",
        "MLFLOW_TRACKING_USERNAME": "someone",
        "ESPALIER_SIGNING_METHOD": "key",
        "ESPALIER_SIGNING_KEY": str(tmp_path / "key.pem"),
        "ESPALIER_SIGNING_PUBLIC_KEY": str(tmp_path / "key.pub"),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path / "temporary"),
    }
    command = [sys.executable, "-m", "pipeline.cli.main", "run", str(tmp_path / "recipe.yaml"), "--name", "m"]
    command += ["--model", str(tmp_path / "release"), "--home", str(tmp_path / "home")]
    forms = written(CANARIES)
    with command_lines(forms) as shown:
        done = subprocess.run(command, capture_output=True, text=True, env=given)
    assert done.returncode == 0, done.stderr
    assert "signed by key" in Path(done.stdout.split()[-1]).read_text()  # the password was used
    assert not shown
    assert not [name for form, name in forms.items() if form in (done.stdout + done.stderr).encode()]
    assert not left(tmp_path, forms)
    # The embedded S3 server's own key is kept in one file, which others cannot read.
    state = tmp_path / "home" / "services.json"
    assert state.stat().st_mode & 0o077 == 0
    secret = state.read_text().partition('"secret_key": "')[2].partition('"')[0]
    assert len(secret) == 40
    state.unlink()
    assert not left(tmp_path, {secret.encode(): "the key of the embedded S3 server"})
