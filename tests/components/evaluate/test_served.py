"""Served models are asked in turns by vLLM's benchmark, with the same prompts, and each figure is what the benchmark told."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from components.evaluate.served import measure_served
from components.lib.errors import Refusal
from components.lib.recipe.schema import Speed
from components.lib.transformer.checkpoint import Checkpoint
from tests.components.lib.transformer.zoo import SPECIMENS, release

VLLM = os.environ.get("ESPALIER_TEST_VLLM")

STAND_IN = f"""#!{sys.executable}
import http.server, json, pathlib, sys

here = pathlib.Path(__file__).parent
given = sys.argv[1:]
with (here / "calls").open("a") as calls:
    calls.write(json.dumps(given) + "\\n")
if given[0] == "-m":
    name = given[given.index("--served-model-name") + 1]
    if (here / f"broken-{{name}}").exists():
        sys.exit("ValueError: no kernel for this model")
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    http.server.HTTPServer(("127.0.0.1", int(given[given.index("--port") + 1])), Healthy).serve_forever()
elif "bench" not in given[1]:
    print("0.1")
else:
    for line in sys.stdin:
        asked = dict(option.removeprefix("--").partition("=")[::2] for option in json.loads(line))
        with (here / "asked").open("a") as said:
            said.write(json.dumps(asked) + "\\n")
        count, tokens = int(asked["num-prompts"]), int(asked["random-output-len"])
        pace = 1 if asked["model"] == "dense" else 2
        failed = int((here / "failing").exists())
        print(json.dumps({{
            "failed": failed,
            "errors": ["", "out of memory"] if failed else [""] * count,
            "ttfts": [(1 + place) / pace for place in range(count)],
            "latencies": [(1 + place + 0.1 * (tokens - 1)) / pace for place in range(count)],
            "output_lens": [tokens] * count,
            "output_throughput": 10.0 * pace * (1 + int(asked["seed"])),
        }}), flush=True)
"""
"""A program that takes the place of the interpreter that has vLLM, and answers as vLLM's server and its benchmark do."""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-in, which keeps how it was called and what it was asked."""
    program = tmp_path / "python"
    program.write_text(STAND_IN)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("ESPALIER_VLLM_PYTHON", str(program))
    return tmp_path


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Checkpoint]:
    """Two tiny models; vLLM's smallest width of a head is 32."""
    made = {}
    for name, layers in (("dense", 4), ("candidate", 2)):
        model = SPECIMENS[0].model(layers, heads=1, key_value_heads=1, dtype=torch.bfloat16)
        made[name] = Checkpoint.open(release(model, tmp_path / name))
    return made


def settings(**fields: Any) -> Speed:
    return Speed.model_validate(
        {"backend": "vllm", "batches": (1, 2), "prompt": 8, "generate": 3, "repeats": 2} | fields
    )


def figures(found: Any, phase: str) -> list[float]:
    """The dense model's figures of two requests at once: throughput, latencies, and the throughput of each turn."""
    told = found["dense"][phase]["2"]
    return [told["tokens_per_second"], told["latency_ms_p50"], told["latency_ms_p90"], *told["turns"]]


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_phase_has_the_figures_of_its_requests(stand_in: Path, models: dict[str, Checkpoint]) -> None:
    found = measure_served(models, settings())
    assert figures(found, "prefill") == pytest.approx([2 * 8 / 2, 1500, 2000, 8, 8])
    assert figures(found, "decode") == pytest.approx([2 / 0.1, 100, 100, 20, 20])
    assert figures(found, "throughput") == pytest.approx([25, 1800, 2300, 20, 30])
    assert found["candidate"]["prefill"]["1"]["turns"] == [16, 16]
    assert list(found["candidate"]["throughput"]) == ["1", "2"]


def test_models_take_turns_with_the_same_prompts_after_a_warm_up(stand_in: Path, models: dict[str, Checkpoint]) -> None:
    told: list[int] = []
    measure_served(models, settings(batches=(2,)), done=told.append)
    asked = read(stand_in / "asked")
    assert [(one["model"], one["seed"]) for one in asked] == [
        (name, str(turn)) for turn in range(3) for name in ("dense", "candidate")
    ]
    assert {
        (one["num-prompts"], one["max-concurrency"], one["random-input-len"], one["random-output-len"]) for one in asked
    } == {("2", "2", "8", "4")}
    assert told == [2 * (8 + 3)] * 6


def test_servers_keep_the_weights_type_and_no_prefix_and_end_with_the_measurement(
    stand_in: Path, models: dict[str, Checkpoint]
) -> None:
    before = psutil.Process().children(recursive=True)
    measure_served(models, settings())
    served = [call for call in read(stand_in / "calls") if call[0] == "-m"]
    assert len(served) == 2
    for call in served:
        assert {"--dtype=bfloat16", "--max-model-len=12", "--no-enable-prefix-caching"} <= set(call)
        assert call[call.index("--host") + 1] == "127.0.0.1"
    assert psutil.Process().children(recursive=True) == before


def test_without_tokens_to_decode_the_first_one_alone_is_timed(stand_in: Path, models: dict[str, Checkpoint]) -> None:
    assert list(measure_served(models, settings(generate=0))["dense"]) == ["prefill"]


def test_a_batch_with_a_failed_request_has_no_figures_but_a_reason(
    stand_in: Path, models: dict[str, Checkpoint]
) -> None:
    (stand_in / "failing").touch()
    found = measure_served(models, settings(batches=(1,)))["candidate"]
    assert found["decode"]["1"]["tokens_per_second"] is None
    assert found["decode"]["1"]["reason"] == "out of memory"
    assert len(read(stand_in / "asked")) == 2


def test_a_model_that_vllm_does_not_serve_is_refused_with_its_reason(
    stand_in: Path, models: dict[str, Checkpoint]
) -> None:
    before = psutil.Process().children(recursive=True)
    (stand_in / "broken-candidate").touch()
    with pytest.raises(Refusal, match=r"does not serve the model candidate \(ValueError: no kernel for this model\)"):
        measure_served(models, settings())
    assert psutil.Process().children(recursive=True) == before


@pytest.mark.skipif(VLLM is None, reason="set ESPALIER_TEST_VLLM to an interpreter that has vLLM")
def test_vllm_itself_measures_two_models(models: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_VLLM_PYTHON", str(VLLM))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    found = measure_served(models, settings(batches=(2,)))
    for model in models:
        for phase in ("prefill", "decode", "throughput"):
            assert found[model][phase]["2"]["tokens_per_second"] > 0, found
            assert len(found[model][phase]["2"]["turns"]) == 2
