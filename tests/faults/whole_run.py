"""Whole tiny runs that are disturbed, and given again until they end: what must be the same as in an undisturbed run."""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from components.lib.errors import Refusal
from components.lib.store.artifacts import Manifest, Reference
from pipeline.services.embedded import Services
from tests import forked
from tests.components.lib.transformer.zoo import VOCABULARY, Specimen, release
from tests.faults.proxy import MLFLOW_FAULTS, Proxy, Schedule
from tests.faults.store_round import opened

TRIES = 6
STEPS = 6
LONGEST = 3600.0
"""Seconds that one command may take; long, for a machine that others use."""

RECIPE = """
methods: {{last: {{ratio: {ratio}}}}}
calibration: {{data: {folder}/train.txt, samples: 8, length: 32}}
regularize: {{steps: {steps}, batch_size: 4, checkpoint_every: 2, learning_rate: 1.0e-3}}
evaluate:
  perplexity: {{test: {folder}/test.txt}}
  controls: []
  speed: {{enabled: false}}
promote:
  rules:
    size: {{figure: parameters, bound: 0.99, why: it must be smaller}}
"""


@dataclass(frozen=True)
class End:
    """What runs left under one name: the digests of the versions, and the aliases."""

    digests: tuple[str, ...]
    aliases: Mapping[str, str]


@dataclass
class Bench:
    """A release, recipes, and services."""

    folder: Path
    services: Services
    environment: Mapping[str, str]
    _undisturbed: dict[str, tuple[str, float]] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def undisturbed(self, recipe: str) -> tuple[str, float]:
        """Return the digest of the checkpoint that an undisturbed run of the recipe registers, and the processor's seconds it took."""
        with self._lock:
            if recipe not in self._undisturbed:
                environment = self.own()
                process = self.start(recipe, environment)
                taken = 0.0
                while process.is_alive():
                    taken = max(taken, seconds_of(process.pid or 0))
                    process.join(0.02)
                assert process.exitcode == 0, self.said(environment)
                [digest] = ended(environment).digests
                self._undisturbed[recipe] = digest, taken
            return self._undisturbed[recipe]

    def own(self) -> dict[str, str]:
        """Return the services' environment, with a prefix, an experiment and a name of this round's own."""
        one = uuid.uuid4().hex
        quiet = {"OMP_NUM_THREADS": "1", "ESPALIER_ROUND": one}
        return {**self.environment, **quiet, "ESPALIER_BUCKET": f"espalier/{one}", "MLFLOW_EXPERIMENT_NAME": one}

    def start(self, recipe: str, environment: Mapping[str, str]) -> forked.ForkServerProcess:
        """Start `espalier run`."""
        home = self.folder / "homes" / environment["ESPALIER_ROUND"]
        home.mkdir(parents=True, exist_ok=True)
        arguments = ["run", str(self.folder / f"{recipe}.yaml"), "--model", str(self.folder / "release")]
        arguments += ["--name", environment["ESPALIER_ROUND"], "--home", str(home)]
        return forked.start(arguments, environment, home / "out.txt")

    def said(self, environment: Mapping[str, str]) -> str:
        """Return what the commands of a round printed."""
        return (self.folder / "homes" / environment["ESPALIER_ROUND"] / "out.txt").read_text(errors="replace")


@contextmanager
def bench() -> Iterator[Bench]:
    """Make the release and two recipes, and start the services."""
    with tempfile.TemporaryDirectory(prefix="espalier-faults-") as made:
        folder = Path(made)
        release(Specimen("llama", "llama").model(layers=4), folder / "release")
        dice = random.Random(0)
        for name, words in (("train", 600), ("test", 200)):
            (folder / f"{name}.txt").write_text(" ".join(f"w{dice.randrange(3, VOCABULARY)}" for _ in range(words)))
        for name, ratio in (("quarter", 0.25), ("half", 0.5)):
            (folder / f"{name}.yaml").write_text(RECIPE.format(ratio=ratio, folder=folder, steps=STEPS))
        services = Services(folder / "home")
        try:
            yield Bench(folder, services, services.up())
        finally:
            services.down()


def kill_round(seed: int, bench: Bench, victim: str) -> dict[str, Any]:
    """Kill the victim (`stage`, `runner`, `s3` or `mlflow`) with SIGKILL at a moment that the seed draws, and give the command again.

    The moment is one of the processor's time that the run takes, which does not depend on what else the machine does.
    """
    moment = random.Random(f"{seed} {victim}").uniform(0, bench.undisturbed("quarter")[1])
    environment = bench.own()
    process = bench.start("quarter", environment)
    while process.is_alive() and seconds_of(process.pid or 0) < moment:
        time.sleep(0.02)
    killed = False
    while process.is_alive() and not killed:
        killed = _kill(victim, process.pid or 0, bench)
    return again(bench, environment, ["quarter"], [process], faults=int(killed))


def seconds_of(pid: int) -> float:
    """Return the seconds of the processor that a command and its stages took so far."""
    with suppress(psutil.NoSuchProcess):
        runner = psutil.Process(pid)
        own = runner.cpu_times()
        taken = own.user + own.system + own.children_user + own.children_system
        for stage in runner.children():
            with suppress(psutil.NoSuchProcess):
                taken += sum(stage.cpu_times()[:2])
        return taken
    return 0.0


def _kill(victim: str, runner: int, bench: Bench) -> bool:
    """Kill one process; return False if a stage is to be killed and none runs just now."""
    with suppress(psutil.NoSuchProcess):
        if victim == "runner":
            psutil.Process(runner).kill()
            return True
        if victim == "stage":
            time.sleep(0.02)
            children = psutil.Process(runner).children()
            for child in children:
                child.kill()
            return bool(children)
        for service in bench.services.status():
            if service.name == victim and service.pid:
                psutil.Process(service.pid).kill()
                return True
    return False


def faults_round(seed: int, bench: Bench, of: str, rate: float = 0.05) -> dict[str, Any]:
    """Run through a proxy before S3 or MLflow that breaks requests in every try."""
    environment = bench.own()
    with ExitStack() as stack:
        if of == "s3":
            proxy = stack.enter_context(Proxy(environment["AWS_ENDPOINT_URL_S3"], Schedule(seed, rate)))
            environment["AWS_ENDPOINT_URL_S3"] = proxy.address
        else:
            proxy = stack.enter_context(Proxy(environment["MLFLOW_TRACKING_URI"], Schedule(seed, rate, MLFLOW_FAULTS)))
            environment["MLFLOW_TRACKING_URI"] = proxy.address
        figures = again(bench, environment, ["quarter"], [bench.start("quarter", environment)])
        return figures | {"faults": len(proxy.broken)}


def together_round(seed: int, bench: Bench, recipes: Sequence[str]) -> dict[str, Any]:
    """Start a run of each recipe at once, under one name."""
    environment = bench.own()
    dice = random.Random(seed)
    processes = []
    for recipe in recipes:
        processes.append(bench.start(recipe, environment))
        time.sleep(dice.uniform(0, 1))
    return again(bench, environment, recipes, processes)


def again(
    bench: Bench,
    environment: Mapping[str, str],
    recipes: Sequence[str],
    processes: Sequence[forked.ForkServerProcess],
    **more: Any,
) -> dict[str, Any]:
    """Wait for the commands; give those that failed again until they end well; then check what they left."""
    tries = 1
    left = list(zip(recipes, processes, strict=True))
    wrong = ""
    while not wrong:
        for _, process in left:
            process.join(LONGEST)
        if any(process.is_alive() for _, process in left):
            wrong = f"a command ran longer than {LONGEST:.0f} s"
        left = [(recipe, process) for recipe, process in left if process.exitcode != 0]
        if not left or wrong:
            break
        if tries == TRIES:
            wrong = f"{TRIES} tries were not enough: {bench.said(environment).strip().splitlines()[-1:]}"
            break
        bench.services.up()
        left = [(recipe, bench.start(recipe, environment)) for recipe, _ in left]
        tries += 1
    said = bench.said(environment)
    if not wrong and "Traceback (most recent call last)" in said:
        wrong = "the command printed a traceback: " + said[said.rindex("Traceback") :].strip().splitlines()[-1]
    wrong = wrong or differs(bench, environment, recipes)
    return {"held": not wrong, "tries": tries, "wrong": wrong, **more}


def ended(environment: Mapping[str, str]) -> End:
    """Read what the registry holds under the round's name, asking the servers directly.

    A version's digest is that of its weights and its config: the model card beside them names the store, which is each round's own.
    """
    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    name = environment["ESPALIER_ROUND"]
    store = opened(environment, environment["AWS_ENDPOINT_URL_S3"], environment["ESPALIER_BUCKET"].partition("/")[2])
    digests = []
    for version in client.search_model_versions(f"name = '{name}'"):
        files = store.manifest(Reference.parse(version.tags["espalier.reference"])).files
        kept = tuple(file for file in files if file.name.endswith((".safetensors", "/config.json")))
        digests.append(Manifest(files=kept).digest)
    return End(tuple(digests), client.get_registered_model(name).aliases)


def differs(bench: Bench, environment: Mapping[str, str], recipes: Sequence[str]) -> str:
    """Return what is not as an undisturbed run leaves it; nothing if all is. The servers are asked directly."""
    direct = {**environment, **bench.environment, "ESPALIER_BUCKET": environment["ESPALIER_BUCKET"]}
    end = ended(direct)
    expected = sorted(bench.undisturbed(recipe)[0] for recipe in set(recipes))
    if sorted(end.digests) != expected:
        return f"the versions have the digests {sorted(end.digests)}, the undisturbed ones {expected}"
    if set(end.aliases) != {"challenger"}:
        return f"the aliases are {end.aliases}, not challenger alone"
    return damaged(direct) or curves(direct)


def damaged(environment: Mapping[str, str]) -> str:
    """Return which artifact of the round's store has a manifest and is not whole."""
    store = opened(environment, environment["AWS_ENDPOINT_URL_S3"], environment["ESPALIER_BUCKET"].partition("/")[2])
    for stage in store.folders("stages"):
        for prefix in store.newest(f"stages/{stage}"):
            try:
                store.verify(_found(store.find(prefix)))
            except Refusal as refusal:
                return str(refusal)
    return ""


def curves(environment: Mapping[str, str]) -> str:
    """Return which step's loss is missing, or there twice, in the curves of a training or in its run in MLflow."""
    store = opened(environment, environment["AWS_ENDPOINT_URL_S3"], environment["ESPALIER_BUCKET"].partition("/")[2])
    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    for prefix in store.newest("stages/regularize"):
        reference = _found(store.find(prefix))
        with tempfile.TemporaryDirectory() as scratch:
            text = (store.get(reference, Path(scratch) / "x", ["metrics.jsonl"]) / "metrics.jsonl").read_text()
        lines = map(json.loads, text.splitlines())
        steps = [line["step"] for line in lines if "loss" in line]
        if steps != list(range(1, STEPS + 1)):
            return f"metrics.jsonl of {prefix} has losses of the steps {steps}"
        run = store.manifest(reference).metadata["mlflow_run_id"]
        logged = sorted({metric.step for metric in client.get_metric_history(run, "loss")})
        if logged != list(range(1, STEPS + 1)):
            return f"MLflow's run {run} has losses of the steps {logged}"
    return ""


def _found(reference: Reference | None) -> Reference:
    if reference is None:
        raise Refusal("an artifact that was listed is not there")
    return reference
