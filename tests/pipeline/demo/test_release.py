"""The demonstration's release: a real checkpoint, made once, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from components.lib.methods.trsp import Trsp
from components.lib.recipe.loading import load_recipe
from components.lib.training.journal import Silent
from components.lib.transformer.checkpoint import Checkpoint, load_model, load_tokenizer
from components.lib.transformer.perplexity import perplexity
from components.lib.transformer.text import consecutive_windows, draw_windows, read_documents, token_stream
from pipeline.demo import release as demo
from pipeline.demo import text as demo_text

STEPS = 8
TRSP = Path(demo.__file__).parents[1] / "recipes" / "trsp.yaml"


class Watching(Silent):
    """Remembers how far the training came."""

    def __init__(self) -> None:
        self.done = 0

    def progress(self, done: int, total: int, **shown: float) -> None:
        self.done = done


class Killed(Silent):
    """Ends the work in the middle of the training."""

    def progress(self, done: int, total: int, **shown: float) -> None:
        if done == STEPS // 2:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    whole = demo_text.texts(100_000, seed=0)
    return whole | {"test": whole["test"][:30_000]}


@pytest.fixture(scope="module", autouse=True)
def _short(texts: dict[str, str]) -> object:
    """Less of the real text, gathered once, and a few steps of the real training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "texts", lambda characters, seed: texts)
        patch.setattr(demo, "TRAINING", demo.TRAINING.model_copy(update={"steps": STEPS}))
        yield


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> demo.DemoRelease:
    return demo.make_release(tmp_path_factory.mktemp("demo") / "release", journal=Silent())


def test_the_release_is_a_plain_checkpoint_of_its_own_tokens(release: demo.DemoRelease) -> None:
    checkpoint = Checkpoint.open(release.model)
    tokenizer = load_tokenizer(release.model)
    assert (checkpoint.layers, checkpoint.dtype) == (demo.SHAPE["num_hidden_layers"], "bfloat16")
    assert len(tokenizer) == checkpoint.config["vocab_size"] == demo.VOCABULARY
    for token in ("bos", "eos", "pad"):
        assert checkpoint.config[f"{token}_token_id"] == getattr(tokenizer, f"{token}_token_id") is not None


def test_the_tokenizer_gives_every_text_back(release: demo.DemoRelease) -> None:
    tokenizer = load_tokenizer(release.model)
    text = "  Ein Spalier, 樹牆 🌳\n\n\tdef f(x): return x\r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    english = "The function returns a list of the names in the current module."
    assert len(tokenizer(english)["input_ids"]) < len(english) / 3


def test_the_perplexity_said_is_that_of_the_files_and_better_than_knowing_nothing(release: demo.DemoRelease) -> None:
    stream = token_stream(read_documents(release.text("test")), load_tokenizer(release.model))
    found = perplexity(load_model(release.model), consecutive_windows(stream, demo.WINDOW))
    assert found == pytest.approx(release.perplexity, rel=1e-3)
    assert found < 0.8 * demo.VOCABULARY


def test_a_whole_release_is_not_made_again(release: demo.DemoRelease) -> None:
    journal = Watching()
    assert demo.make_release(release.folder, journal=journal) == release
    assert journal.done == 0


def test_the_same_seed_makes_the_same_release_and_another_seed_another(
    release: demo.DemoRelease, tmp_path: Path
) -> None:
    weights = load_file(release.model / "model.safetensors")
    again = demo.make_release(tmp_path / "release", journal=Silent())
    assert all(tensor.equal(weights[name]) for name, tensor in load_file(again.model / "model.safetensors").items())

    journal = Watching()
    other = demo.make_release(again.folder, seed=1, journal=journal)
    assert (other.seed, journal.done) == (1, STEPS)
    name = "model.embed_tokens.weight"
    assert not load_file(other.model / "model.safetensors")[name].equal(weights[name])


def test_what_is_killed_leaves_nothing_and_what_is_half_there_is_made_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        demo.make_release(tmp_path / "release", journal=Killed())
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "release" / "model").mkdir(parents=True)
    (tmp_path / "release" / "left-over").touch()
    made = demo.make_release(tmp_path / "release", journal=Silent())
    assert sorted(path.name for path in made.folder.iterdir()) == [
        "calibration.txt",
        "model",
        "other.txt",
        "release.json",
        "test.txt",
        "train.txt",
    ]


def test_the_overrides_make_a_recipe_that_the_release_can_serve(release: demo.DemoRelease) -> None:
    recipe = load_recipe(TRSP, [*demo.OVERRIDES, *release.overrides()])
    assert [Path(text.path or "").is_file() for _, text in recipe.texts()] == [True, True, True]
    assert recipe.calibration.length <= demo.WINDOW
    assert recipe.evaluate.speed.prompt + recipe.evaluate.speed.generate <= demo.WINDOW
    (method,) = recipe.methods.chosen
    assert isinstance(method, Trsp)
    assert method.count(demo.SHAPE["num_hidden_layers"]) == 2

    stream = token_stream(read_documents(release.text("calibration")), load_tokenizer(release.model))
    windows = draw_windows(stream, recipe.calibration.samples, recipe.calibration.length, recipe.calibration.seed)
    assert len(windows) == recipe.calibration.samples
