"""Speed as a server's users see it: vLLM's server, asked by vLLM's own benchmark (`vllm bench serve`).

All models are served at once and asked in turns, because only ratios between models count. A turn is `batch` requests at the same
time, with the same random prompts for every model; nothing is taken from a prefix cache, and generation runs to its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from components.evaluate.speed import Figures, SpeedOf, figures, free_memory
from components.lib import vllm
from components.lib.errors import Refusal
from components.lib.recipe.schema import Speed
from components.lib.transformer.checkpoint import Checkpoint
from components.lib.transformer.device import best_device

START_SECONDS = 1800.0
"""The time that a server has to load a model."""
PART = {"cuda": 0.9, "cpu": 0.5}
"""The part of the free memory that the servers share."""

_CLIENT = """
import json, sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

told, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    print(json.dumps(main(parser.parse_args(json.loads(line)))), file=told, flush=True)
"""
"""vLLM's benchmark in one process for all turns: to import it takes longer than many a turn."""


@dataclass
class _Turns:
    """The times of one model's requests at one number of concurrent requests."""

    first: list[list[float]] = field(default_factory=list)
    """Seconds to the first token, of each request of each turn."""
    each: list[list[float]] = field(default_factory=list)
    """Seconds for each further token, the mean of a request, of each request of each turn."""
    whole: list[list[float]] = field(default_factory=list)
    """Seconds of each request of each turn."""
    written: list[float] = field(default_factory=list)
    """Generated tokens a second, of each turn."""
    failure: str | None = None

    def add(self, told: Mapping[str, Any]) -> None:
        """Add a turn, as the benchmark tells it."""
        if told["failed"]:
            self.failure = " ".join(str(next(filter(None, told["errors"]), "a request failed")).split())[-300:]
            return
        requests = list(zip(told["ttfts"], told["latencies"], told["output_lens"], strict=True))
        self.first.append([first for first, _, _ in requests])
        self.each.append([(whole - first) / (tokens - 1) for first, whole, tokens in requests if tokens > 1])
        self.whole.append([whole for _, whole, _ in requests])
        self.written.append(told["output_throughput"])


def measure_served(
    models: Mapping[str, Checkpoint], speed: Speed, done: Callable[[int], None] | None = None
) -> dict[str, SpeedOf]:
    """Measure the speed of the models behind vLLM's server, in turns.

    Prefill is the time to the first token, and its throughput the prompts' tokens over the slowest of a turn. Decode is the time for
    each further token, and its throughput one token of every request in the median of these times. Throughput is the generated
    tokens over the duration of a turn, as the benchmark states it, with the latency of a whole request. Without tokens to decode,
    prefill alone is measured.

    Args:
        models: checkpoints by name; the weights keep their type.
        speed: batch sizes as numbers of concurrent requests, prompt, tokens to generate after the first, repetitions; one more is the warm-up.
        done: called after each turn with the number of its tokens, prompt and generated.

    Raises:
        Refusal: vLLM is not installed, or its server does not start for a model.
    """
    python, _ = vllm.installed()
    free_memory()
    results: dict[str, SpeedOf] = {name: {} for name in models}
    with tempfile.TemporaryDirectory(prefix="espalier-served-") as scratch, ExitStack() as stack:
        memory = _memory() / len(models)
        ports = {
            name: stack.enter_context(_serving(python, name, checkpoint, speed, memory, Path(scratch)))
            for name, checkpoint in models.items()
        }
        ask = stack.enter_context(_benchmark(python, Path(scratch)))
        for batch in speed.batches:
            turns = {name: _Turns() for name in models}
            for repetition in range(speed.repeats + 1):
                for name, checkpoint in models.items():
                    if not turns[name].failure:
                        told = ask(_request(checkpoint.folder, name, ports[name], batch, speed, repetition))
                        if repetition or told["failed"]:
                            turns[name].add(told)
                    if done:
                        done(batch * (speed.prompt + speed.generate))
            for name, taken in turns.items():
                for phase, found in _phases(taken, batch, speed).items():
                    results[name].setdefault(phase, {})[str(batch)] = found
    return results


def _phases(turns: _Turns, batch: int, speed: Speed) -> dict[str, Figures]:
    """Return the figures of each phase."""
    read = [batch * speed.prompt / max(first) for first in turns.first]
    found = {"prefill": figures(turns.first, read, turns.failure)}
    if speed.generate:
        step = [batch / statistics.median(each) for each in turns.each]
        found["decode"] = figures(turns.each, step, turns.failure)
        found["throughput"] = figures(turns.whole, turns.written, turns.failure)
    return found


def _request(model: Path, name: str, port: int, batch: int, speed: Speed, seed: int) -> list[str]:
    """Return the arguments of the benchmark for one turn."""
    options = {
        "host": vllm.LOOPBACK,
        "port": port,
        "model": name,
        "tokenizer": model,
        "dataset-name": "random",
        "random-input-len": speed.prompt,
        "random-output-len": speed.generate + 1,
        "num-prompts": batch,
        "max-concurrency": batch,
        "seed": seed,
        "temperature": 0,
    }
    return [*(f"--{option}={value}" for option, value in options.items()), "--disable-tqdm", "--save-detailed"]


@contextmanager
def _serving(
    python: str, name: str, checkpoint: Checkpoint, speed: Speed, memory: float, scratch: Path
) -> Iterator[int]:
    """Serve a checkpoint for the block in a part of the machine's memory, and yield the port. Raises Refusal if the server does not start."""
    with socket.socket() as free:
        free.bind((vllm.LOOPBACK, 0))
        port = int(free.getsockname()[1])
    options = [
        f"--max-model-len={speed.length}",
        f"--dtype={checkpoint.dtype}",
        f"--gpu-memory-utilization={memory:.3f}",  # for a processor too, despite its name
        "--no-enable-prefix-caching",
    ]
    if best_device().type != "cuda":
        options.append("--enforce-eager")  # to compile for a processor takes minutes
    command = vllm.server_command(python, checkpoint.folder, name, port, options)
    with _process(command, scratch / f"{name}.log") as process:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Refusal(
                    f"vLLM does not serve the model {name} ({_reason(scratch / f'{name}.log')}): see whether vLLM supports it"
                )
            time.sleep(0.5)
        yield port


@contextmanager
def _benchmark(python: str, scratch: Path) -> Iterator[Callable[[list[str]], dict[str, Any]]]:
    """Yield a function that runs vLLM's benchmark with arguments and returns its result. Raises Refusal if it ends."""
    log = scratch / "benchmark.log"
    with _process([python, "-c", _CLIENT], log, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        given, told = process.stdin, process.stdout

        def ask(arguments: list[str]) -> dict[str, Any]:
            given.write(json.dumps(arguments) + "\n")
            given.flush()
            answer = told.readline()
            if not answer:
                raise Refusal(
                    f"vLLM's benchmark ended ({_reason(log)}): see whether this version of vLLM has `bench serve`"
                )
            return dict(json.loads(answer))

        yield ask


@contextmanager
def _process(command: Any, log: Path, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Run a program for the block, and end it with all that it started."""
    with log.open("w") as said:
        environment = {**os.environ, **vllm.ENVIRONMENT}
        process = subprocess.Popen(list(command), stderr=said, env=environment, **({"stdout": said} | options))
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            _, alive = psutil.wait_procs([*started, psutil.Process(process.pid)], timeout=30)
            for one in alive:
                one.kill()
        process.wait()


def _memory() -> float:
    """Return the part of the device's memory that the servers may take together."""
    device = best_device().type
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
    else:
        free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    return PART[device] * free / total


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{vllm.LOOPBACK}:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def _reason(log: Path) -> str:
    """Return the first exception in a log: those after it follow from it."""
    lines = (line for line in log.read_text(errors="replace").splitlines() if "WARNING" not in line)
    found = (re.search(r"\b\w*(?:Error|Exception): .*", line) for line in lines)
    return next((one[0][:300] for one in found if one), "it says no reason")
