"""An image holds the files that were measured, other programs read it, and the same version gives the same digests."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from olot.basics import crawl_ocilayout_indexes, crawl_ocilayout_manifests
from olot.oci.oci_image_index import read_ocilayout_root_index
from olot.oci.oci_image_layout import verify_ocilayout

from components.lib.errors import Refusal
from components.lib.provenance.verify import REQUIRED
from components.lib.store.artifacts import describe
from components.lib.tracking import registry
from pipeline.kubeflow.profile import Profile
from pipeline.serving.image import package, read_image, target, write_image
from pipeline.serving.manifest import manifest
from tests.pipeline.serving.conftest import Register

PROFILE = Profile(environment={"ESPALIER_BUCKET": "espalier"})
ANNOTATIONS = {"espalier.version": "3"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint with a file in a folder of its own."""
    folder = tmp_path / "model"
    (folder / "tokenizer").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer/vocabulary.txt"):
        (folder / name).write_text(name)
    return folder


def files(layout: Path) -> dict[str, bytes]:
    """All files of a layout."""
    return {str(path.relative_to(layout)): path.read_bytes() for path in layout.rglob("*") if path.is_file()}


def test_the_image_holds_the_files_of_the_model(model: Path, tmp_path: Path) -> None:
    digest = write_image(model, tmp_path / "image", ANNOTATIONS)
    assert read_image(tmp_path / "image", digest) == {
        name: describe(model / name, name).sha256
        for name in ("config.json", "model.safetensors", "tokenizer/vocabulary.txt")
    }


def test_neither_the_time_nor_the_mode_of_a_file_changes_a_byte(model: Path, tmp_path: Path) -> None:
    digest = write_image(model, tmp_path / "image", ANNOTATIONS)
    for path in model.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    assert write_image(model, tmp_path / "again", ANNOTATIONS) == digest
    assert files(tmp_path / "again") == files(tmp_path / "image")


def test_versions_share_the_layers_of_the_files_that_they_share(model: Path, tmp_path: Path) -> None:
    digest = write_image(model, tmp_path / "one", ANNOTATIONS)
    (model / "config.json").write_text("another")
    assert write_image(model, tmp_path / "two", ANNOTATIONS) != digest
    other = set(files(tmp_path / "two")) - set(files(tmp_path / "one"))
    assert len(other) == 6  # the layer of the changed file; for two platforms, configuration and manifest; the index


def test_another_program_reads_every_part_of_it(model: Path, tmp_path: Path) -> None:
    layout = tmp_path / "image"
    digest = write_image(model, layout, ANNOTATIONS, "3")
    verify_ocilayout(layout)
    root = read_ocilayout_root_index(layout)
    assert [one.digest for one in root.manifests] == [digest]
    indexes = crawl_ocilayout_indexes(layout, root)
    manifests = crawl_ocilayout_manifests(layout, indexes, root)
    [index] = indexes.values()
    assert [one.platform.architecture for one in index.manifests if one.platform] == ["amd64", "arm64"]
    named = {digest}
    for one in manifests.values():
        assert one.annotations == ANNOTATIONS
        named |= {one.config.digest, *(layer.digest for layer in one.layers)}
        assert all((layout / "blobs/sha256" / layer.digest[7:]).stat().st_size == layer.size for layer in one.layers)
        config = json.loads((layout / "blobs/sha256" / one.config.digest[7:]).read_text())
        assert len(config["rootfs"]["diff_ids"]) == len(one.layers) == 1 + 3
        assert sum(not entry.get("empty_layer") for entry in config["history"]) == len(one.layers)
    named |= {one.digest for one in index.manifests}
    assert {f"sha256:{path.name}" for path in (layout / "blobs/sha256").iterdir()} == named


def test_a_registered_version_becomes_an_image_that_its_manifest_can_name(
    name: str, register: Register, tmp_path: Path
) -> None:
    version = register("first", "champion")
    digest = package(version, tmp_path / "home", target(f"oci:{tmp_path}/image"))
    assert set(read_image(tmp_path / "image", digest)) == {"model.safetensors", "chat_template.jinja", "README.md"}
    assert package(version, tmp_path / "home", tmp_path / "again") == digest
    assert digest in manifest(version, PROFILE, uri=f"oci://registry.example/{name}@{digest}")


def test_a_version_whose_required_signature_is_missing_is_not_packaged(register: Register, tmp_path: Path) -> None:
    version = register("first")
    registry.tag_version(version, {REQUIRED: "true"})
    with pytest.raises(Refusal, match="has no signature"):
        package(registry.version_of(version.name, "1"), tmp_path / "home", tmp_path / "image")
    assert not (tmp_path / "image").exists()


def test_a_damaged_layer_is_found(model: Path, tmp_path: Path) -> None:
    digest = write_image(model, tmp_path / "image", ANNOTATIONS)
    largest = max((tmp_path / "image/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"x" + largest.read_bytes()[1:])
    with pytest.raises(Refusal, match="is missing or damaged"):
        read_image(tmp_path / "image", digest)


@pytest.mark.parametrize("to", ["image", "docker:image", "oci:", "oci:image:3"])
def test_a_target_that_is_no_layout_is_refused(to: str) -> None:
    with pytest.raises(Refusal, match="write oci:FOLDER"):
        target(to)


def test_a_folder_that_is_not_empty_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(Refusal, match="is not an empty folder"):
        target(f"oci:{tmp_path}")
