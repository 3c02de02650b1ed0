"""A tiny release, texts and a home with running services: what an end-to-end run needs, made on the spot."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.services.embedded import Services
from tests import forked
from tests.components.lib.transformer.zoo import VOCABULARY, Specimen, release

EVENT = "@espalier "

RECIPE = """
methods: {trsp: {ratio: 0.25, steps: 2, batch_size: 4, shortlist: 2}}
calibration: {data: TRAIN, samples: 16, length: 32}
regularize: {steps: 6, batch_size: 4, checkpoint_every: 2, learning_rate: 1.0e-3}
recover: {steps: 4, batch_size: 4, evaluate_every: 2}
evaluate:
  perplexity: {test: TEST, other: OTHER}
  controls: [pruned-first, dense-trained]
  speed: {batches: [1], prompt: 16, generate: 4, repeats: 2}
promote:
  rules:
    size: {figure: parameters, bound: 0.99, why: it must be smaller}
    champion: {figure: perplexity, against: champion, bound: 2.0, why: what is in service is not much better}
"""


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    status: int
    printed: str
    told: str
    """Standard error."""

    @property
    def folder(self) -> Path:
        """The run's folder: the command prints its files last."""
        return Path(self.printed.splitlines()[-1]).parent

    @property
    def report(self) -> dict[str, Any]:
        """The run's report.json."""
        return json.loads((self.folder / "report.json").read_text())

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the stages told of this kind, in order, read from the log."""
        lines = (line.strip() for line in (self.folder / "log.txt").read_text().splitlines())
        told = [json.loads(line.removeprefix(EVENT)) for line in lines if line.startswith(EVENT)]
        return [event for event in told if event["event"] == kind]

    def stages(self, kind: str) -> list[str]:
        """The stages that told this."""
        return [event["stage"] for event in self.events(kind)]


@dataclass(frozen=True)
class Bench:
    """A home with running services, a release and a recipe."""

    home: Path
    release: Path
    recipe: Path

    def command(self, *arguments: str) -> list[str]:
        """The command line, as a process of its own runs it."""
        return [sys.executable, "-m", "pipeline.cli.main", *self.arguments(*arguments)]

    def espalier(self, *arguments: str, forks: bool = True) -> Outcome:
        """Run a verb to its end.

        Args:
            arguments: the verb and its options.
            forks: start it and its stages as forks of a process that has loaded the libraries, which saves most of a tiny run's time.
        """
        if not forks:
            done = subprocess.run(self.command(*arguments), capture_output=True, text=True, env=environment())
            return Outcome(done.returncode, done.stdout.strip(), done.stderr)
        with tempfile.TemporaryDirectory() as folder:
            printed, told = Path(folder) / "out", Path(folder) / "err"
            process = forked.start(self.arguments(*arguments), environment(), printed, told)
            process.join()
            return Outcome(process.exitcode or 0, printed.read_text().strip(), told.read_text())

    def arguments(self, *arguments: str) -> list[str]:
        """The verb and its options, with this home."""
        return [*arguments, "--home", str(self.home)]

    def run_arguments(self, name: str, overrides: Sequence[str] = ()) -> list[str]:
        """`run` with this bench's recipe and release."""
        settings = [part for override in overrides for part in ("--set", override)]
        return ["run", str(self.recipe), "--model", str(self.release), "--name", name, *settings]

    def run(self, name: str, *overrides: str, forks: bool = True) -> Outcome:
        """Recompress the release."""
        return self.espalier(*self.run_arguments(name, overrides), forks=forks)


def environment() -> dict[str, str]:
    """This process's environment; one thread a stage, since the tests share the machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A release of eight layers, three texts, and services that run for the whole module."""
    folder = tmp_path_factory.mktemp("bench")
    model = release(Specimen("llama", "llama").model(layers=8), folder / "release")
    draw = random.Random(0)
    recipe = RECIPE
    for name, words in (("TRAIN", 1200), ("TEST", 300), ("OTHER", 300)):
        text = folder / f"{name.lower()}.txt"
        text.write_text(" ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(words)))
        recipe = recipe.replace(name, str(text))
    (folder / "recipe.yaml").write_text(recipe)
    services = Services(folder / "home")
    services.up()
    try:
        yield Bench(folder / "home", model, folder / "recipe.yaml")
    finally:
        services.down()
