"""Evaluate measures every model on the same texts, and leaves nothing unsaid of a number that could not be had."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoConfig, PreTrainedTokenizerFast

from components.evaluate import evaluate as module
from components.evaluate import stage
from components.evaluate.evaluate import evaluate
from components.lib.errors import Refusal
from components.lib.recipe.schema import Evaluate, Speed
from components.lib.stage.declaration import Job
from components.lib.tasks.files import collect
from components.lib.training.journal import Silent
from components.lib.transformer.checkpoint import Checkpoint, load_model
from components.lib.transformer.device import computable
from components.lib.transformer.perplexity import perplexity
from components.lib.transformer.selection import Channels
from components.lib.transformer.surgery import cut_checkpoint
from components.lib.transformer.text import consecutive_windows, read_documents, token_stream
from tests.components.given import SeveralKept
from tests.components.lib.recipe.smallest import recipe
from tests.components.lib.transformer import zoo
from tests.components.lib.transformer.packed import FORMATS, quantise

LLAMA = zoo.SPECIMENS[0]
LENGTH = 16


class Recorded(Silent):
    """A journal that keeps what it is told."""

    def __init__(self) -> None:
        self.done: list[tuple[int, int]] = []
        self.values: dict[str, float] = {}

    def progress(self, done: int, total: int, **shown: float) -> None:
        self.done.append((done, total))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.values |= values


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, layers in {"dense": 4, "candidate": 3}.items():
        zoo.release(LLAMA.model(layers, dtype=torch.bfloat16), folder / name / "model")
    return {name: folder / name for name in ("dense", "candidate")}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, factor in {"home": 1, "away": 7}.items():
        (folder / name).mkdir()
        words = (f"w{3 + factor * number * number % 90}" for number in range(200))
        (folder / name / "a.txt").write_text(" ".join(words))
    return {name: folder / name for name in ("home", "away")}


def settings(**fields: Any) -> Evaluate:
    speed = {"batches": (1, 3), "prompt": 8, "generate": 2, "repeats": 2}
    texts = {"home": "home.txt", "away": "away.txt"}
    return Evaluate.model_validate({"perplexity": texts, "length": LENGTH, "speed": speed} | fields)


QUICK = {"speed": {"enabled": False}}


def measure(models: Mapping[str, Path], texts: Mapping[str, Path], out: Path, **given: Any) -> dict[str, Any]:
    journal = given.pop("journal", Silent())
    digests = {name: given.pop(name) for name in ("model_digests", "text_digests") if name in given}
    evaluate(models, texts, evaluate=settings(**given), out=out, journal=journal, **digests)
    return json.loads((out / "evaluation.json").read_text())


def test_a_narrower_model_is_measured_at_its_widths(models: dict, texts: dict, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    narrow = Channels(ffn=((0, 2, 5, 7, 8, 9, 10, 11),) * 4, heads=((1,),) * 4)
    cut_checkpoint(models["dense"] / "model", tmp_path / "candidate" / "model", channels=narrow)
    found = measure(models | {"candidate": tmp_path / "candidate"}, texts, tmp_path / "out", **QUICK)["models"]
    config = load_model(models["dense"] / "model").config
    assert found["dense"]["widths"]["ffn"] - found["candidate"]["widths"]["ffn"] == 8
    assert found["dense"]["widths"]["groups"] - found["candidate"]["widths"]["groups"] == 1
    assert found["dense"]["widths"]["hidden"] == found["candidate"]["widths"]["hidden"] == config.hidden_size


def test_every_model_is_measured_on_every_text_at_every_batch(models: dict, texts: dict, tmp_path: Path) -> None:
    journal = Recorded()
    found = measure(models, texts, tmp_path, journal=journal)
    assert list(found["models"]) == ["dense", "candidate"]
    for name, layers in {"dense": 4, "candidate": 3}.items():
        this = found["models"][name]
        model = load_model(models[name] / "model")
        assert this["layers"] == layers
        assert this["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert this["bytes"] == 2 * this["parameters"]
        assert this["dtype"] == "bfloat16"
        for text, folder in texts.items():
            stream = token_stream(read_documents(folder / "a.txt"), zoo.tokenizer())
            with computable(model):
                expected = perplexity(model, consecutive_windows(stream, LENGTH))
            assert this["perplexity"][text] == pytest.approx(expected, rel=1e-6)
            assert journal.values[f"{name}.perplexity.{text}"] == this["perplexity"][text]
        for phase in ("prefill", "decode"):
            assert set(this["speed"][phase]) == {"1", "3"}
            assert all(figures["tokens_per_second"] > 0 for figures in this["speed"][phase].values())
        assert this["notes"] == []
    assert found["models"]["dense"]["prefill_flops"] > found["models"]["candidate"]["prefill_flops"] > 0


def test_a_champion_of_a_family_that_cannot_be_pruned_is_measured_too(
    models: dict, texts: dict, tmp_path: Path
) -> None:
    config = GPTNeoConfig(
        vocab_size=zoo.VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    )
    neo = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    zoo.release(neo, tmp_path / "neo/model")
    found = measure(models | {"champion": tmp_path / "neo"}, texts, tmp_path)["models"]["champion"]
    assert (found["layers"], found["widths"], found["parameters"]) == (2, None, neo.num_parameters())
    for text, folder in texts.items():
        stream = token_stream(read_documents(folder / "a.txt"), zoo.tokenizer())
        assert found["perplexity"][text] == pytest.approx(
            perplexity(neo, consecutive_windows(stream, LENGTH)), rel=1e-5
        )
    assert found["speed"]["decode"]["1"]["tokens_per_second"] > 0
    assert found["prefill_flops"] > 0


def test_a_quantised_champion_is_measured_too(models: dict, texts: dict, tmp_path: Path) -> None:
    """FP8 is the format that transformers reads by itself."""
    folder = zoo.release(LLAMA.model(2, dtype=torch.bfloat16), tmp_path / "fp8/model")
    full = Checkpoint.open(folder)
    quantise(folder, *FORMATS["fp8"])
    found = measure(models | {"champion": tmp_path / "fp8"}, texts, tmp_path, **QUICK)["models"]["champion"]
    assert (found["layers"], found["parameters"]) == (2, full.parameters)
    assert found["bytes"] < full.bytes
    assert all(1 < value < math.inf for value in found["perplexity"].values())
    assert found["notes"] == []


def test_a_champion_whose_parameters_cannot_be_counted_is_refused_before_anything_is_measured(
    models: dict, texts: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    folder = zoo.release(LLAMA.model(2), tmp_path / "packed/model")
    packed = {"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 48, dtype=torch.int32)}
    save_file(load_file(folder / "model.safetensors") | packed, folder / "model.safetensors")
    with pytest.raises(Refusal, match=r"the weights of model\.layers\.0\.mlp\.up_proj are packed"):
        measure(models | {"champion": tmp_path / "packed"}, texts, tmp_path)


def test_progress_rises_to_its_end_exactly(models: dict, texts: dict, tmp_path: Path) -> None:
    journal = Recorded()
    measure(models, texts, tmp_path, journal=journal)
    done, totals = zip(*journal.done, strict=True)
    assert list(done) == sorted(done)
    assert {done[-1]} == set(totals)


def test_the_context_goes_with_the_numbers(models: dict, texts: dict, tmp_path: Path) -> None:
    context = measure(models, texts, tmp_path, text_digests={"home": "abc"})["context"]
    assert context["length"] == LENGTH
    assert context["tokens"] == {"home": 192, "away": 192}  # 200 tokens: 12 windows of 16
    assert context["digests"] == {"home": "abc"}
    assert context["speed"] == {
        "enabled": True, "backend": "transformers", "protocol": None, "batches": [1, 3], "prompt": 8, "generate": 2, "repeats": 2, "interleaved": True,
    }  # fmt: skip
    assert context["versions"]["torch"] == torch.__version__
    assert {"device", "cpu", "gpu", "threads", "seed", "batch_size", "task_limit"} <= set(context)


def test_models_too_large_to_hold_together_are_timed_one_after_the_other(
    models: dict, texts: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOGETHER", 0.0)
    found = measure(models, texts, tmp_path)
    assert found["context"]["speed"]["interleaved"] is False
    assert all(model["speed"]["decode"]["3"]["tokens_per_second"] > 0 for model in found["models"].values())


def test_speed_behind_a_server_is_measured_of_the_same_checkpoints_and_its_version_is_kept(
    models: dict, texts: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def served(asked: Mapping[str, Checkpoint], speed: Speed, done: Any) -> dict[str, Any]:
        return {name: {"prefill": {"1": {"tokens_per_second": one.layers}}} for name, one in asked.items()}

    monkeypatch.setattr(module, "measure_served", served)
    monkeypatch.setattr(module.vllm, "installed", lambda: ("python", "1.2.3"))
    found = measure(models, texts, tmp_path, speed={"backend": "vllm", "batches": (1,), "prompt": 8, "generate": 2})
    assert {name: model["speed"]["prefill"]["1"]["tokens_per_second"] for name, model in found["models"].items()} == {
        "dense": 4,
        "candidate": 3,
    }
    assert found["models"]["dense"]["prefill_flops"] > found["models"]["candidate"]["prefill_flops"]
    assert found["context"]["versions"]["vllm"] == "1.2.3"


def test_the_same_digest_is_measured_once_and_told_twice(models: dict, texts: dict, tmp_path: Path) -> None:
    journal = Recorded()
    champion = {"champion": tmp_path / "never opened"}
    same = {"dense": "d", "candidate": "c", "champion": "d"}
    (tmp_path / "out").mkdir()
    found = measure(models | champion, texts, tmp_path / "out", model_digests=same, journal=journal, **QUICK)["models"]
    assert found["champion"] == found["dense"]
    assert "champion.perplexity.home" not in journal.values


def test_a_nan_is_null_and_said(models: dict, texts: dict, tmp_path: Path) -> None:
    model = LLAMA.model(layers=2)
    model.get_input_embeddings().weight.data.fill_(math.nan)
    broken = {"candidate": tmp_path / "broken"}
    zoo.release(model, tmp_path / "broken/model")
    found = measure(models | broken, texts, tmp_path, **QUICK)["models"]["candidate"]
    assert found["perplexity"] == {"home": None, "away": None}
    assert found["notes"] == ["perplexity on home is nan", "perplexity on away is nan"]


def test_perplexity_over_other_tokens_is_not_compared(models: dict, texts: dict, tmp_path: Path) -> None:
    zoo.release(LLAMA.model(layers=2), tmp_path / "other/model")
    inner = json.loads((tmp_path / "other/model/tokenizer.json").read_text())
    vocabulary = inner["model"]["vocab"]
    vocabulary["w3"], vocabulary["w4"] = vocabulary["w4"], vocabulary["w3"]
    (tmp_path / "other/model/tokenizer.json").write_text(json.dumps(inner))
    found = measure(models | {"champion": tmp_path / "other"}, texts, tmp_path)["models"]["champion"]
    assert found["perplexity"] == {"home": None, "away": None}
    assert "not comparable" in found["notes"][0]
    assert found["speed"]["prefill"]["1"]["tokens_per_second"] > 0


def test_a_champion_that_reads_fewer_tokens_is_not_compared(models: dict, texts: dict, tmp_path: Path) -> None:
    """The recipe's lengths were checked against the release; a champion may be of another one."""
    shutil.copytree(models["dense"], tmp_path / "short")
    config = json.loads((tmp_path / "short/model/config.json").read_text())
    (tmp_path / "short/model/config.json").write_text(json.dumps(config | {"max_position_embeddings": LENGTH - 4}))
    journal = Recorded()
    speed = {"batches": (1,), "prompt": LENGTH - 4, "generate": 1, "repeats": 1}
    found = measure(models | {"champion": tmp_path / "short"}, texts, tmp_path, journal=journal, speed=speed)["models"]
    assert found["champion"]["perplexity"] == {"home": None, "away": None}
    assert found["champion"]["notes"][0] == (
        "perplexity on home is not comparable: the model reads 12 tokens at most, and a window has 16"
    )
    assert found["champion"]["speed"] == {"prefill": {}, "decode": {}}
    assert found["dense"]["perplexity"]["home"] > 0
    assert found["dense"]["speed"]["prefill"]["1"]["tokens_per_second"] > 0
    assert journal.done[-1][0] == journal.done[-1][1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"length": None}, "evaluate.length is not set"),
        ({"length": 48, "perplexity": {"short": "s.txt"}}, "2 tokens, which gives no window of 48"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    models: dict, texts: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict, said: str
) -> None:
    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "s.txt").write_text("w3 w4")
    texts = {"short": tmp_path / "s.txt"} if "perplexity" in fields else texts
    with pytest.raises(Refusal, match=said):
        measure(models, texts, tmp_path, **fields)


def test_the_stage_hands_models_and_texts_on_under_their_names(models: dict, texts: dict, tmp_path: Path) -> None:
    digests = {"models": {"dense": "a", "candidate": "a"}, "texts": {"home": "t", "away": "u"}}
    job = Job(tmp_path, Silent(), SeveralKept(tmp_path), "", {}, digests)
    made = recipe(calibration__length=LENGTH).model_copy(update={"evaluate": settings(**QUICK)})
    stage.work(stage.Inputs(models=models, texts=texts, tasks={}), made, job)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["models"]["dense"] == found["models"]["candidate"]
    assert found["context"]["digests"] == {"home": "t", "away": "u"}


def test_tasks_of_files_and_of_the_texts_are_asked_of_every_model(models: dict, texts: dict, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    own = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "test_split": "test"}
    own |= {"task": "own", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}"}
    for name in ("source", "collected", "long", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "source" / "own.yaml").write_text(json.dumps(own | {"doc_to_choice": ["w20", "w30"]}))
    (tmp_path / "source" / "rows.jsonl").write_text('{"q": "w10 w9", "a": 0}\n{"q": "w11 w9", "a": 1}\n')
    collect(tmp_path / "source", tmp_path / "collected")
    long = tmp_path / "long" / "a.txt"
    long.write_text(" ".join(f"w{3 + number * number % 90}" for number in range(900)))

    journal = Recorded()
    made = settings(**QUICK, perplexity={"home": "home.txt"}, tasks=["own.yaml"], continuations=25, task_limit=22)
    tasks = {"0": tmp_path / "collected"}
    evaluate(models, {"home": long}, tasks, evaluate=made, out=tmp_path / "out", journal=journal)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"]
    for name in ("dense", "candidate"):
        assert list(found[name]["tasks"]) == ["own", "continue_home"]
        assert set(found[name]["tasks"]["continue_home"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
        assert 22 * found[name]["tasks"]["continue_home"]["acc"] == pytest.approx(
            round(22 * found[name]["tasks"]["continue_home"]["acc"])
        )
        assert journal.values[f"{name}.own.acc"] == found[name]["tasks"]["own"]["acc"]
    assert journal.done[-1][0] == journal.done[-1][1]


def test_two_exports_of_a_tokenizer_tokenize_alike() -> None:
    """The probe compares tokens, not files: an export may write tokenizer.json anew."""
    text = module.TokenizedText("w3 w4", torch.zeros(1, 2), torch.tensor([3, 4]))
    again = PreTrainedTokenizerFast(tokenizer_object=zoo.tokenizer().backend_tokenizer)
    assert text.is_tokenized_alike_by(again)
