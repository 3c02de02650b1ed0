"""An OCI image of a checkpoint, as an image layout in a folder: what a registry takes, written without a container engine.

    digest = package(registry.find_version("my-model@champion"), Path(".espalier"), Path("image"))
    files = read_image(Path("image"), digest)

The base is the one that KServe's modelcars have, for amd64 and arm64: a program that holds `/models` open for the server beside it.
Each file of the checkpoint is a layer of its own, not compressed, so that versions share the layers of the files that they share.
No layer and no manifest holds a time or a user: the same files and annotations give the same digests.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from components.lib.errors import Refusal
from components.lib.provenance.signature import check_signature
from components.lib.provenance.verify import signature_required
from components.lib.store.artifacts import describe, filled_at_once
from components.lib.store.store import Store
from components.lib.tracking.registry import Version
from pipeline.serving.manifest import annotations_of
from pipeline.serving.server import fetch

FOLDER = "models"
"""The folder of the image that KServe reads."""
_KIND = "application/vnd.oci.image"
_LAYER = f"{_KIND}.layer.v1.tar"

Descriptor = dict[str, Any]
"""A part of a layout as its parent names it: `mediaType`, `digest` and `size`."""


def target(to: str) -> Path:
    """Return the folder that `oci:FOLDER` names. Raises Refusal if it names none, or one that is not empty."""
    kind, _, folder = to.partition(":")
    if kind != "oci" or not folder or ":" in folder:
        raise Refusal(f"--to is {to!r}, which is no folder of an image: write oci:FOLDER")
    layout = Path(folder)
    if layout.exists() and (not layout.is_dir() or any(layout.iterdir())):
        raise Refusal(f"--to names {layout}, which is not an empty folder: delete it, or name another")
    return layout


def package(version: Version, home: Path, layout: Path) -> str:
    """Write the image of a registered version, read it back, and return its digest.

    Args:
        version: a version that espalier registered.
        home: the folder that the checkpoint is fetched into.
        layout: a missing or empty folder.

    Raises:
        Refusal: the version's files or its signature do not hold, or the image that was written holds other files.
    """
    store = Store.from_environment()
    check_signature(version.reference, store, signature_required(version))
    digest = write_image(fetch(version, home), layout, annotations_of(version), version.version)
    measured = store.manifest(version.reference).only(["model"]).files
    if read_image(layout, digest) != {file.name.removeprefix("model/"): file.sha256 for file in measured}:
        raise Refusal(f"{layout} does not hold the files of the version: delete it, and package the version again")
    return digest


def write_image(model: Path, layout: Path, annotations: Mapping[str, str], name: str = "latest") -> str:
    """Write the image of a checkpoint's files into a new folder, and return its digest, `sha256:…`.

    Args:
        model: the folder of the checkpoint.
        layout: a missing or empty folder.
        annotations: kept in the image, and part of its digest.
        name: the image's name inside the layout, which is not part of its digest.

    Raises:
        Refusal: the folder is not empty.
    """
    from modelcar_base_image.embedded_oci_layout import embedded_oci_layout

    with filled_at_once(layout) as fresh:
        embedded_oci_layout(fresh)
        blobs = _Blobs(fresh)
        root = json.loads((fresh / "index.json").read_text())
        base = blobs.take(root["manifests"][0])
        paths = sorted(path for path in model.rglob("*") if path.is_file())
        layers = [blobs.add_layer(path, f"{FOLDER}/{path.relative_to(model).as_posix()}") for path in paths]
        for platform in base["manifests"]:
            platform |= _with_layers(platform, layers, annotations, blobs)
        index = blobs.add_json({**base, "annotations": dict(annotations)}, base["mediaType"])
        root["manifests"] = [{**index, "annotations": {"org.opencontainers.image.ref.name": name}}]
        (fresh / "index.json").write_text(_canonical(root))
    return str(index["digest"])


def read_image(layout: Path, digest: str) -> dict[str, str]:
    """Read an image of a layout, compare every part of it with its digest, and return its model's files: name → sha256.

    Raises:
        Refusal: a part is missing or differs, or two platforms have other files.
    """
    blobs = _Blobs(layout)
    index = blobs.read_json(digest)
    layers: dict[str, dict[str, str]] = {}  # the platforms share most of them
    files: list[dict[str, str]] = []
    for platform in index["manifests"]:
        manifest = blobs.read_json(platform["digest"])
        blobs.read_json(manifest["config"]["digest"])
        digests = [layer["digest"] for layer in manifest["layers"]]
        layers |= {one: dict(blobs.read_layer(one)) for one in digests if one not in layers}
        files.append(dict(file for one in digests for file in layers[one].items()))
    if not files or any(other != files[0] for other in files):
        raise Refusal(f"{layout} holds other files for another platform: delete it, and package the version again")
    return files[0]


def _with_layers(
    platform: Descriptor, layers: list[Descriptor], annotations: Mapping[str, str], blobs: _Blobs
) -> Descriptor:
    """Return the descriptor of a platform's manifest with further layers; its parts that changed are replaced."""
    manifest = blobs.take(platform)
    config = blobs.take(manifest["config"])
    config["rootfs"]["diff_ids"] += [layer["digest"] for layer in layers]
    # The time of the base: each layer of the manifest needs an entry, and an entry of its own time would change the digest.
    config["history"] += [{"created": config["created"], "created_by": "espalier package"} for _ in layers]
    manifest["config"] = blobs.add_json(config, manifest["config"]["mediaType"])
    manifest["layers"] += layers
    manifest["annotations"] = dict(annotations)
    return blobs.add_json(manifest, platform["mediaType"])


class _Blobs:
    """The parts of a layout, each in a file that has its digest as name."""

    def __init__(self, layout: Path) -> None:
        self._folder = layout / "blobs" / "sha256"

    def take(self, part: Descriptor) -> dict[str, Any]:
        """Read a part that another one replaces, and delete it."""
        path = self._path(part["digest"])
        content: dict[str, Any] = json.loads(path.read_text())
        path.unlink()
        return content

    def add_json(self, content: dict[str, Any], kind: str) -> Descriptor:
        text = _canonical(content).encode()
        digest = f"sha256:{hashlib.sha256(text).hexdigest()}"
        self._path(digest).write_bytes(text)
        return {"mediaType": kind, "digest": digest, "size": len(text)}

    def add_layer(self, path: Path, name: str) -> Descriptor:
        """Add a file as a layer, under its name in the image."""
        fresh = self._folder / "fresh"
        # A fresh entry has no time and no owner. The format has room for files above 8 GiB in the header that every reader knows.
        entry = tarfile.TarInfo(name)
        entry.size = path.stat().st_size
        with tarfile.open(fresh, "w", format=tarfile.GNU_FORMAT) as archive, path.open("rb") as stream:
            archive.addfile(entry, stream)
        written = describe(fresh, name)
        digest = f"sha256:{written.sha256}"
        fresh.rename(self._path(digest))
        return {"mediaType": _LAYER, "digest": digest, "size": written.size}

    def read_json(self, digest: str) -> dict[str, Any]:
        """Return the content of a part. Raises Refusal if it is missing or differs from its digest."""
        content: dict[str, Any] = json.loads(self._checked(digest).read_text())
        return content

    def read_layer(self, digest: str) -> Iterator[tuple[str, str]]:
        """Yield name and sha256 of the model's files in a layer. Raises Refusal if it is missing or differs from its digest."""
        with tarfile.open(self._checked(digest)) as archive:
            for entry in archive:
                if entry.name.startswith(f"{FOLDER}/") and (stream := archive.extractfile(entry)):
                    yield entry.name.removeprefix(f"{FOLDER}/"), hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]

    def _checked(self, digest: str) -> Path:
        path = self._path(digest)
        if not path.is_file() or f"sha256:{describe(path, path.name).sha256}" != digest:
            raise Refusal(f"{path} is missing or damaged: delete the layout, and package the version again")
        return path

    def _path(self, digest: str) -> Path:
        return self._folder / digest.removeprefix("sha256:")


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
