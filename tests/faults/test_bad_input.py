"""Bad input of every kind is answered with one sentence that names it, in ten seconds of the processor and within a gigabyte."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.lib.errors import Refusal
from components.lib.recipe.loading import load_recipe, parse_recipe
from components.lib.store.artifacts import Manifest, Reference
from components.lib.transformer.checkpoint import INDEX, WEIGHTS
from components.lib.transformer.text import read_documents
from components.pin.pin import check_checkpoint, check_text
from pipeline.cli.sources import load_sources
from pipeline.kubeflow.profile import Profile
from pipeline.runners.run import check_name
from tests.components.lib.recipe.smallest import SMALLEST, recipe
from tests.components.lib.transformer.zoo import Specimen, release

SECONDS = 10
GIGABYTE = 2**30

Json = dict[str, Any]


@pytest.fixture(autouse=True)
def _within_seconds_and_a_gigabyte() -> Iterator[None]:
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GIGABYTE


def refusal(work: Callable[[], object]) -> str:
    """The sentence that the work ends with: one line, not longer than a person reads."""
    with pytest.raises(Refusal) as raised:
        work()
    sentence = str(raised.value)
    assert sentence.strip()
    assert "\n" not in sentence
    assert len(sentence) < 3_000
    return sentence


def refused_or_taken(work: Callable[[], object]) -> None:
    """Drawn input may be good by chance; if it is not, it is refused with one sentence."""
    try:
        work()
    except Refusal as refused:
        sentence = str(refused)
    else:
        return
    assert sentence.strip()
    assert "\n" not in sentence
    assert len(sentence) < 3_000


# Checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four layers in one file."""
    return release(Specimen("llama", "llama").model(layers=4), tmp_path_factory.mktemp("whole") / "release")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    copy = tmp_path / "release"
    copy.mkdir()
    for path in whole.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def header(folder: Path) -> tuple[Json, bytes]:
    """The header of the weights, and the bytes behind it."""
    content = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(change: Callable[[Json, str], Any]) -> Callable[[Path], None]:
    """Write the weights with a changed header; `change` gets it and the name of a tensor, and may return another one."""

    def damage(folder: Path) -> None:
        entries, tensors = header(folder)
        name = sorted(name for name in entries if name != "__metadata__")[1]
        changed = change(entries, name)
        text = changed if isinstance(changed, bytes) else json.dumps(entries if changed is None else changed).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + tensors)

    return damage


def entry(**changed: Any) -> Callable[[Path], None]:
    """Change fields of one tensor's entry in the header; None removes a field."""

    def change(entries: Json, name: str) -> None:
        for field, value in changed.items():
            entries[name][field] = value
            if value is None:
                del entries[name][field]

    return with_header(change)


def cut(length: Callable[[int], int]) -> Callable[[Path], None]:
    """Cut the weights to a length, which is made from the whole one."""

    def damage(folder: Path) -> None:
        os.truncate(folder / WEIGHTS, length((folder / WEIGHTS).stat().st_size))

    return damage


def config(**changed: Any) -> Callable[[Path], None]:
    """Change fields of config.json; None removes a field."""

    def damage(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text()) | changed
        fields = {name: value for name, value in fields.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(fields))

    return damage


def content(name: str, data: bytes) -> Callable[[Path], None]:
    """Write another content into a file."""
    return lambda folder: bool((folder / name).write_bytes(data)) and None


def index(weight_map: Any) -> Callable[[Path], None]:
    """Put an index beside the one file, which becomes `one.safetensors`; a word is the file of all tensors, bytes the whole index."""

    def damage(folder: Path) -> None:
        entries, _ = header(folder)
        (folder / WEIGHTS).rename(folder / "one.safetensors")
        names = [name for name in entries if name != "__metadata__"]
        made = dict.fromkeys(names, weight_map) if isinstance(weight_map, str) else weight_map
        text = made if isinstance(made, bytes) else json.dumps({"weight_map": made}).encode()
        (folder / INDEX).write_bytes(text)

    return damage


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Put something else that is no file in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def outside(folder: Path) -> None:
    """Put the weights beside the folder, and let the index point there."""
    index("../one.safetensors")(folder)
    (folder / "one.safetensors").rename(folder.parent / "one.safetensors")


def overlap(entries: Json, name: str) -> None:
    """Give a tensor the bytes of another of the same size."""
    start, end = entries[name]["data_offsets"]
    for other, held in entries.items():
        if other not in (name, "__metadata__") and held["data_offsets"][1] - held["data_offsets"][0] == end - start:
            entries[name]["data_offsets"] = held["data_offsets"]
            return
    raise AssertionError("no two tensors have one size")


DEEP = b"[" * 200_000
CHECKPOINTS: dict[str, Callable[[Path], Any]] = {
    # the file
    **{f"cut to {length}": cut(lambda size, length=length: length) for length in (0, 1, 7, 8, 9, 20, 100)},
    "cut by a byte": cut(lambda size: size - 1),
    "cut by half": cut(lambda size: size // 2),
    "cut to nine tenths": cut(lambda size: size * 9 // 10),
    "bytes behind the tensors": cut(lambda size: size + 100),
    "no file": lambda folder: (folder / WEIGHTS).unlink(),
    "weights are a folder": instead(WEIGHTS, Path.mkdir),
    "weights are a link to nothing": instead(WEIGHTS, lambda path: path.symlink_to("nowhere")),
    "weights are a link to themselves": instead(WEIGHTS, lambda path: path.symlink_to(path.name)),
    "weights are a link to a device": instead(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
    "weights are a link to another file": instead(WEIGHTS, lambda path: path.symlink_to("/etc/passwd")),
    "weights are a pipe": instead(WEIGHTS, os.mkfifo),
    "weights are zeros": content(WEIGHTS, bytes(10_000)),
    "weights are text": content(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
    "weights are HTML": content(WEIGHTS, b"<!doctype html><title>Sign in</title>"),
    "weights are a zip": content(WEIGHTS, b"PK\x03\x04" + bytes(1000)),
    # the header
    "a length of 2^63": content(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"),
    "a length of 2^64 - 1": content(WEIGHTS, b"\xff" * 100),
    "a length of 0": content(WEIGHTS, struct.pack("<Q", 0) + bytes(100)),
    "header is a list": with_header(lambda entries, name: []),
    "header is a number": with_header(lambda entries, name: b"3"),
    "header is null": with_header(lambda entries, name: b"null"),
    "header is a word": with_header(lambda entries, name: b'"header"'),
    "header is empty": with_header(lambda entries, name: {}),
    "header is no UTF-8": with_header(lambda entries, name: b'{"\xff\xfe": 1}'),
    "header is deep": with_header(lambda entries, name: DEEP),
    "header has metadata alone": with_header(lambda entries, name: {"__metadata__": {}}),
    "an entry is null": with_header(lambda entries, name: entries.update({name: None})),
    "an entry is a list": with_header(lambda entries, name: entries.update({name: [1, 2]})),
    "an entry is a word": with_header(lambda entries, name: entries.update({name: "F32"})),
    "an entry is empty": with_header(lambda entries, name: entries.update({name: {}})),
    "a tensor is missing": with_header(lambda entries, name: entries.pop(name) and None),
    "offsets overlap": with_header(overlap),
    **{f"dtype {dtype!r}": entry(dtype=dtype) for dtype in (None, "Q7", "", 3, ["F32"], {}, "F64", "F16", "f32", "I8")},
    **{
        f"shape {shape!r}": entry(shape=shape)
        for shape in (
            None,
            3,
            "3",
            [-1, 2],
            [0],
            [10**30],
            ["a"],
            [None],
            [1.5],
            [[1]],
            {},
            [1],
            [True],
            [2**40, 2**40],
        )
    },
    **{
        f"offsets {offsets!r}": entry(data_offsets=offsets)
        for offsets in (
            None,
            3,
            "03",
            [],
            [0],
            [0, 1, 2],
            [-8, 8],
            [8, 0],
            ["0", "4"],
            [0.0, 4.0],
            [None, 4],
            {},
            [0, 10**30],
            [10**12, 10**12 + 4],
            [0, 0],
        )
    },
    # the index
    "index without a shard": index("gone.safetensors"),
    "index points outside": outside,
    "index points to /etc": index("/etc/passwd"),
    "index points to the folder": index("."),
    "index points to nothing": index(""),
    "index points to another kind": index("config.json"),
    "index with a NUL": index("a\0b.safetensors"),
    "index with a long name": index("a" * 5000),
    "index is empty": index({}),
    "index is a list": index([]),
    "index is null": index(b'{"weight_map": null}'),
    "index has no map": index(b"{}"),
    "index has numbers": index({"model.norm.weight": 3}),
    "index has lists": index({"model.norm.weight": ["one.safetensors"]}),
    "index has null": index({"model.norm.weight": None}),
    "index promises more": index({"model.norm.weight": "one.safetensors", "model.more.weight": "one.safetensors"}),
    "index is no JSON": index(b"{"),
    "index is deep": index(DEEP),
    # the config
    "config is empty": content("config.json", b""),
    "config is a list": content("config.json", b"[]"),
    "config is null": content("config.json", b"null"),
    "config is cut short": content("config.json", b'{"model_type": "llama", "num_hid'),
    "config is binary": content("config.json", bytes(range(256))),
    "config is UTF-16": content("config.json", '{"model_type": "llama"}'.encode("utf-16")),
    "config is deep": content("config.json", DEEP),
    "config is deep inside": content("config.json", b'{"a": ' + DEEP),
    "config has a million keys": content("config.json", json.dumps({f"key_{n}": n for n in range(10**6)}).encode()),
    "config has a number of a million digits": content("config.json", b'{"num_hidden_layers": ' + b"9" * 10**6 + b"}"),
    "config is a folder": instead("config.json", Path.mkdir),
    "config is a link to nothing": instead("config.json", lambda path: path.symlink_to("nowhere")),
    "config is a link to a device": instead("config.json", lambda path: path.symlink_to("/dev/zero")),
    "config is missing": lambda folder: (folder / "config.json").unlink(),
    **{
        f"model_type {kind!r}": config(model_type=kind)
        for kind in (None, "", "lama", 3, [], {}, ["llama"], True, "../llama", "x" * 10_000, "llama\n", "bert", "mamba")
    },
    **{
        f"num_hidden_layers {count!r}": config(num_hidden_layers=count)
        for count in (None, 0, -1, 3, 5, 10**9, 10**30, "4", "four", 4.5, [4], {}, True, float("nan"), float("inf"))
    },
    **{
        f"auto_map {files!r}": config(auto_map=files)
        for files in ({"AutoModelForCausalLM": "evil.Evil"}, {"AutoConfig": "other/repo--evil.Evil"})
    },
    "quantised by the config": config(quantization_config={"quant_method": "gptq", "bits": 4}),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_by_the_name_of_its_file(name: str, folder: Path) -> None:
    CHECKPOINTS[name](folder)
    sentence = refusal(lambda: check_checkpoint(folder, recipe()))
    assert str(folder) in sentence or "config" in sentence or "model_type" in sentence or "model" in sentence


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_checkpoint_with_drawn_damage_is_refused_or_read(data: st.DataObject, folder: Path, whole: Path) -> None:
    content = bytearray((whole / WEIGHTS).read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(content)
    refused_or_taken(lambda: check_checkpoint(folder, recipe()))


# Recipes

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{two}: &{two} [{', '.join([f'*{one}'] * 9)}]\n" for one, two in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES: dict[str, str | bytes] = {
    "nothing": "",
    "null": "null",
    "a number": "3",
    "a word": "recipe",
    "a list": "- methods",
    "two documents": "methods: {}\n---\nmethods: {}\n",
    "a tab": "methods:\n\ttrsp: {ratio: 0.25}",
    "an open bracket": "methods: {trsp: {ratio: 0.25}",
    "an unknown anchor": "methods: *none",
    "an anchor within itself": "methods: &m {trsp: *m}",
    "a list within itself": "methods: &m [*m]",
    "a bomb of aliases": BOMB,
    "a bomb in a field": BOMB + "methods: *i\n",
    "a Python object": "methods: !!python/object/apply:os.system ['touch /tmp/espalier-was-here']",
    "an unknown tag": "methods: !secret x",
    "deep brackets": "[" * 20_000,
    "deep mappings": "{a: " * 5_000,
    "no UTF-8": b"methods: \xff\xfe",
    "UTF-16": "methods: {}".encode("utf-16"),
    "binary": bytes(range(256)),
    "a NUL": "methods: \0",
    "a terminal's escape": "methods: '\x1b[2J'",
    "a long word": "methods: " + "x" * 1_000_000,
    "a long key": "x" * 1_000_000 + ": 1",
    "a number as a key": "1: 2",
    "null as a key": "null: 2",
    "a list as a key": "? [a, b]\n: 1",
    "a date as a key": "2024-01-01: 1",
    "a number of a million digits": "methods: " + "9" * 1_000_000,
    "many unknown fields": "\n".join(f"field_{number}: 1" for number in range(50_000)),
    "a number in hours": "methods: 1:30:00",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe_file_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    made = RECIPES[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(made.encode() if isinstance(made, str) else made)
    refusal(lambda: load_recipe(path))
    assert not Path("/tmp/espalier-was-here").exists()


VALUES: list[Any] = [None, "", "x", "x" * 10_000, -1, 0, 10**30, -0.5, 1.5, float("nan"), float("inf"), [], [[]], {}, {"": 1}, {"x": {"y": 1}}, True]  # fmt: skip
FIELDS = (
    "methods", "methods.trsp", "methods.trsp.ratio", "methods.trsp.steps", "calibration", "calibration.data", "calibration.samples",
    "calibration.length", "regularize", "regularize.steps", "regularize.learning_rate", "regularize.transfer", "regularize.schedule",
    "evaluate", "evaluate.perplexity", "evaluate.perplexity.test", "evaluate.tasks", "evaluate.controls", "evaluate.speed",
    "evaluate.prompts", "promote", "promote.rules", "promote.rules.r", "promote.approval", "recover", "target", "seed", "unknown",
)  # fmt: skip


def changed(dotted: str, value: Any) -> str:
    """The smallest recipe, as YAML, with a value in a field."""
    made = json.loads(json.dumps(SMALLEST))
    *way, leaf = dotted.split(".")
    section = made
    for part in way:
        section = section.setdefault(part, {})
    section[leaf] = value
    return yaml.safe_dump(made)


@pytest.mark.parametrize("field", FIELDS)
def test_a_value_of_the_wrong_kind_is_refused_in_one_sentence(field: str) -> None:
    for value in VALUES:
        refused_or_taken(lambda value=value: parse_recipe(changed(field, value)))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(field=st.sampled_from(FIELDS), value=ANY)
@settings(max_examples=300)
def test_a_drawn_value_is_refused_or_taken(field: str, value: Any) -> None:
    refused_or_taken(lambda: parse_recipe(changed(field, value)))


@given(text=st.text(max_size=200))
@settings(max_examples=200)
def test_drawn_text_is_no_recipe(text: str) -> None:
    refusal(lambda: parse_recipe(text))


OVERRIDES = ["", "=", "=1", "methods", "methods=", "methods.=1", ".=1", "..=1", "methods.trsp.ratio=[", "methods.trsp.ratio=&a [*a]", "methods.trsp.ratio.deep=1", "calibration.data.path.x.y=1", "unknown=1", "seed=x", "evaluate.perplexity=!!python/name:os.system", "seed=" + "9" * 100_000]  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDES, ids=range(len(OVERRIDES)))
def test_a_bad_override_is_refused_in_one_sentence(override: str) -> None:
    refused_or_taken(lambda: parse_recipe(yaml.safe_dump(SMALLEST), [override]))


# Profiles and lists of sources

YAML_FILES = {name: made for name, made in RECIPES.items() if name != "many unknown fields"}


@pytest.mark.parametrize("name", YAML_FILES)
def test_a_bad_profile_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    made = YAML_FILES[name]
    path = tmp_path / "profile.yaml"
    path.write_bytes(made.encode() if isinstance(made, str) else made)
    assert str(path) in refusal(lambda: Profile.load(str(path)))


@pytest.mark.parametrize("name", YAML_FILES)
def test_a_bad_list_of_sources_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    made = YAML_FILES[name]
    path = tmp_path / "sources.yaml"
    path.write_bytes(made.encode() if isinstance(made, str) else made)
    assert str(path) in refusal(lambda: load_sources(path, None, Path))


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", " ", "a b", "a.b", "-a", "a'b", 'a"; drop', "a\n", "ü", "a" + "\0", "..", "x" * 100_000]
)
def test_a_bad_name_is_refused_in_one_sentence(name: str) -> None:
    refusal(lambda: check_name(name))


# Texts


def bomb(path: Path) -> None:
    """Write 4 GB of one word as 20 kB of parquet."""
    column = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 4096, pyarrow.int32()), pyarrow.array(["x" * 2**20])
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd")


def table(path: Path, **columns: Any) -> None:
    """Write a table as parquet."""
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


TEXTS: dict[str, tuple[str, bytes | Callable[[Path], Any]]] = {
    "an empty text": ("x.txt", b""),
    "blanks alone": ("x.txt", b" \n\t\n"),
    "no UTF-8": ("x.txt", b"caf\xe9"),
    "UTF-16": ("x.txt", "text".encode("utf-16")),
    "another kind": ("x.pdf", b"%PDF-1.4"),
    "no suffix": ("x", b"text"),
    "a folder": ("x.txt", Path.mkdir),
    "a pipe": ("x.txt", os.mkfifo),
    "a link to nothing": ("x.txt", lambda path: path.symlink_to("nowhere")),
    "a link to itself": ("x.txt", lambda path: path.symlink_to(path.name)),
    "a link to a device": ("x.txt", lambda path: path.symlink_to("/dev/zero")),
    "lines that are no JSON": ("x.jsonl", b"text\n"),
    "a line cut short": ("x.jsonl", b'{"text": "a"}\n{"text": "b'),
    "a line that is a list": ("x.jsonl", b'["text"]\n'),
    "a line that is null": ("x.jsonl", b"null\n"),
    "a line without the column": ("x.jsonl", b'{"txt": "a"}\n'),
    "a line with a number": ("x.jsonl", b'{"text": 3}\n'),
    "a line with null": ("x.jsonl", b'{"text": null}\n'),
    "a deep line": ("x.jsonl", b'{"text": ' + DEEP),
    "a line with a number of a million digits": ("x.jsonl", b'{"text": ' + b"9" * 10**6 + b"}"),
    "a line with many columns": ("x.jsonl", json.dumps({f"column_{n}": n for n in range(100_000)}).encode()),
    "a surrogate alone": ("x.jsonl", b'{"text": "\\ud800"}\n'),
    "lines without text": ("x.jsonl", b'{"text": ""}\n'),
    "no parquet": ("x.parquet", b"PAR1"),
    "zeros as parquet": ("x.parquet", bytes(1000)),
    "an empty parquet": ("x.parquet", b""),
    "a parquet without the column": ("x.parquet", lambda path: table(path, txt=["a"])),
    "a parquet with numbers": ("x.parquet", lambda path: table(path, text=[1])),
    "a parquet with null": ("x.parquet", lambda path: table(path, text=["a", None])),
    "a parquet with lists": ("x.parquet", lambda path: table(path, text=[["a"]])),
    "a parquet with bytes": ("x.parquet", lambda path: table(path, text=[b"\xff"])),
    "a parquet without rows": ("x.parquet", lambda path: table(path, text=pyarrow.array([], pyarrow.string()))),
    "a parquet that unpacks to 4 GB": ("x.parquet", bomb),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_bad_text_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    file, made = TEXTS[name]
    path = tmp_path / file
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        made(path)
    assert str(path) in refusal(lambda: read_documents(check_text(str(path))))


@given(content=st.binary(max_size=200), suffix=st.sampled_from([".txt", ".jsonl", ".parquet"]))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_drawn_bytes_are_refused_or_read(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"drawn{suffix}"
    path.write_bytes(content)
    refused_or_taken(lambda: read_documents(path))


# Artifacts

REFERENCES = ["", "x", "s3://", "s3:///x", "s3://b", "s3://b/x", "s3://b/x@sha256:", f"s3://b/x@sha256:{'A' * 64}", f"s3://b/x y@sha256:{'a' * 64}", f"http://b/x@sha256:{'a' * 64}", f"s3://b/x@sha256:{'a' * 64}\n", "x" * 1_000]  # fmt: skip


@pytest.mark.parametrize("text", REFERENCES, ids=range(len(REFERENCES)))
def test_a_bad_reference_is_refused(text: str) -> None:
    refusal(lambda: Reference.parse(text))


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../x", "a//x", "./x", "a/.", "", ".", "..", "a/", "manifest.json", "a\0b"]
)
def test_a_manifest_with_a_name_outside_its_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Manifest.opened(json.dumps({"files": [{"name": name, "size": 0, "sha256": "a" * 64}]}))


@given(content=ANY)
@settings(max_examples=150)
def test_a_drawn_manifest_is_no_manifest(content: Any) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Manifest.opened(json.dumps({"files": content}) if content else json.dumps(content))
