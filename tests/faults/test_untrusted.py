"""A release from elsewhere runs nothing: neither its code, nor its chat template beyond transformers' sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.lib.errors import Refusal
from components.lib.recipe.loading import parse_recipe
from components.lib.store.store import Store
from components.lib.transformer.checkpoint import load_model, load_tokenizer
from components.lib.transformer.text import prompt_ids
from components.pin.pin import pin_folder
from components.promote.checks import generate
from tests.components.lib.transformer.zoo import Specimen, release

RECIPE = """
methods: {last: {ratio: 0.5}}
calibration: {data: /x.txt, samples: 2, length: 8}
evaluate: {perplexity: {x: {path: /x.txt}}, speed: {enabled: false}}
"""

TEMPLATES = {
    "include": "{% include 'SECRET' %}",
    "open by the builtins": "{{ ().__class__.__base__.__subclasses__() }}",
    "open by a function's globals": "{{ raise_exception.__globals__['__builtins__']['open']('SECRET').read() }}",
    "open by a cycler": "{{ cycler.__init__.__globals__.os.popen('cat SECRET').read() }}",
    "a format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a list that is changed": "{{ messages.append('x') }}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return release(Specimen("llama", "llama").model(layers=2), tmp_path / "release")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Made by the release's code, if it runs."""
    return tmp_path / "it-ran"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_reads_no_file_and_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("w7 w8 w9 of a file")
    (folder / "chat_template.jinja").write_text(TEMPLATES[name].replace("SECRET", str(secret)))
    with pytest.raises(Refusal, match=r"the chat template .* does not render") as refused:
        prompt_ids("hello", load_tokenizer(folder))
    with pytest.raises(Refusal, match="version 1 of m cannot generate"):
        generate(folder, "version 1 of m")
    assert "of a file" not in str(refused.value)
    assert "\n" not in str(refused.value)


def write_code(folder: Path, marker: Path) -> None:
    """Put a module into the release that leaves a mark as soon as it is imported."""
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: pass\n")


def changed(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_code_of_a_model_is_neither_run_nor_stored(folder: Path, marker: Path, store: Store) -> None:
    write_code(folder, marker)
    kept = pin_folder(folder, parse_recipe(RECIPE), store)
    assert not [file.name for file in store.manifest(kept).files if file.name.endswith(".py")]
    changed(folder / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    with pytest.raises(Refusal, match="auto_map"):
        pin_folder(folder, parse_recipe(RECIPE), store)
    load_model(folder)  # by the class that transformers has
    assert not marker.exists()


def test_the_code_of_a_tokenizer_is_not_run(folder: Path, marker: Path) -> None:
    write_code(folder, marker)
    changed(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil"
    )
    with pytest.raises(Refusal, match="has no tokenizer that can be read"):
        load_tokenizer(folder)
    assert not marker.exists()


def test_weights_that_are_not_finite_are_not_stored(folder: Path, store: Store) -> None:
    [weights] = folder.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-4:] = b"\xff\xff\xff\x7f"  # NaN, of 16 bits as of 32
    weights.write_bytes(content)
    with pytest.raises(Refusal, match="holds NaN or infinity in "):
        pin_folder(folder, parse_recipe(RECIPE), store)
    assert store.objects("releases") == []
