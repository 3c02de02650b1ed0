"""The store, against a real S3 server."""

from __future__ import annotations

import errno
import itertools
import json
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from botocore.exceptions import ClientError, ConnectionClosedError
from safetensors import safe_open
from safetensors.torch import save_file

from components.lib.errors import Refusal, Unavailable
from components.lib.store.artifacts import MANIFEST, Manifest, Reference, need_space
from components.lib.store.s3 import PART, explained
from components.lib.store.store import PrefixCheckpoints, Store

SECRET = "0" * 40


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def behind(s3_home: Path, store: Store) -> Path:
    """Where the server keeps the store's objects as files."""
    return s3_home / "s3" / store.bucket / store.prefix


class TestReference:
    def test_is_one_string(self) -> None:
        text = f"s3://bucket/prune/0123@sha256:{'a' * 64}"
        assert str(Reference.parse(text)) == text
        assert Reference.parse(text).uri == "s3://bucket/prune/0123"

    @pytest.mark.parametrize("text", ["", "s3://bucket/x", "/tmp/x@sha256:" + "a" * 64, "s3://b/x@sha256:" + "a" * 63])
    def test_refuses_anything_else(self, text: str) -> None:
        with pytest.raises(Refusal, match="is no reference"):
            Reference.parse(text)


class TestManifest:
    def test_digest_is_of_the_files_alone_in_any_order(self, folder: Path) -> None:
        manifest = Manifest.of(folder)
        other = Manifest(files=manifest.files[::-1], metadata={"seconds": 3})
        assert manifest.digest == other.digest

    def test_digest_changes_with_a_name_and_with_a_byte(self, folder: Path) -> None:
        digests = {Manifest.of(folder).digest}
        (folder / "notes.json").rename(folder / "other.json")
        digests.add(Manifest.of(folder).digest)
        (folder / "other.json").write_text("[]")
        digests.add(Manifest.of(folder).digest)
        assert len(digests) == 3

    @pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "a//x", "", MANIFEST])
    def test_refuses_names_outside_the_artifact(self, name: str) -> None:
        with pytest.raises(ValueError, match="is not the name of a file inside"):
            Manifest.model_validate({"files": [{"name": name, "size": 0, "sha256": "a" * 64}]})

    def test_refuses_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(Refusal, match="holds no file"):
            Manifest.of(tmp_path)

    def test_refuses_a_file_with_the_manifests_name(self, folder: Path) -> None:
        (folder / MANIFEST).write_text("{}")
        with pytest.raises(Refusal, match="reserves"):
            Manifest.of(folder)

    def test_a_changed_byte_is_noticed(self, folder: Path) -> None:
        sealed = Manifest.of(folder, {"seconds": 0.1}).sealed()
        assert Manifest.opened(sealed) == Manifest.of(folder, {"seconds": 0.1})
        for changed in (sealed.replace('"size": 2', '"size": 3'), sealed.replace("0.1", "0.2"), "[]", "{"):
            with pytest.raises(ValueError, match=r"sha256|mapping|delimiter|property name"):
                Manifest.opened(changed)

    def test_one_of_an_earlier_version_has_no_seal(self, folder: Path) -> None:
        assert Manifest.opened(Manifest.of(folder).model_dump_json()) == Manifest.of(folder)


class TestPutAndGet:
    def test_what_comes_back_is_what_was_put(self, store: Store, folder: Path, tmp_path: Path) -> None:
        reference = store.put(folder, "prune/key", {"stage": "prune"})
        assert contents(store.get(reference, tmp_path / "copy")) == contents(folder)
        assert reference.uri == f"s3://{store.bucket}/{store.prefix}/prune/key"
        assert store.manifest(reference).metadata == {"stage": "prune"}
        store.verify(reference)

    def test_large_files_travel_in_parts(self, store: Store, folder: Path, tmp_path: Path) -> None:
        (folder / "large").write_bytes(os.urandom(40 * 2**20 + 7))
        reference = store.put(folder, "large")
        assert contents(store.get(reference, tmp_path / "copy")) == contents(folder)
        store.verify(reference)

    @pytest.mark.parametrize(("operation", "size"), [("PutObject", 100), ("UploadPart", PART + 1)])
    def test_a_bit_that_flips_in_an_upload_is_refused_and_the_upload_sent_again(
        self, operation: str, size: int, store: Store, folder: Path, tmp_path: Path
    ) -> None:
        (folder / "model" / "weights").write_bytes(os.urandom(size))
        # Threads send at once, and a counter tells them apart.
        numbers, sent = itertools.count(1), []

        def flip_once(request: Any, **_: Any) -> None:
            number = next(numbers)
            sent.append(number)
            if number == 1:
                whole = request.body.read()
                request.body.seek(0)
                request.body = bytes([whole[0] ^ 1]) + whole[1:]

        store._client.meta.events.register(f"before-send.s3.{operation}", flip_once)
        reference = store.put(folder, "prune/0123")
        store.verify(reference)
        assert len(sent) == (4 if operation == "PutObject" else 3), "one more than the files, or than the parts"

    def test_empty_files_and_odd_names_travel(self, store: Store, folder: Path, tmp_path: Path) -> None:
        (folder / "a name + ü @ 100%.txt").write_bytes(b"")
        reference = store.put(folder, "odd")
        assert contents(store.get(reference, tmp_path / "copy")) == contents(folder)

    def test_names_choose_files_and_folders(self, store: Store, folder: Path, tmp_path: Path) -> None:
        reference = store.put(folder, "prune/key")
        assert list(contents(store.get(reference, tmp_path / "copy", ["model"]))) == ["model/weights"]
        with pytest.raises(Refusal, match="no file 'modle'"):
            store.get(reference, tmp_path / "other", ["modle"])

    def test_same_content_has_one_place(self, store: Store, folder: Path, behind: Path) -> None:
        first = store.put_content(folder, "releases")
        before = (behind / "releases" / first.digest / MANIFEST).stat().st_mtime_ns
        assert store.put_content(folder, "releases", {"source": "elsewhere"}) == first
        assert (behind / "releases" / first.digest / MANIFEST).stat().st_mtime_ns == before

    def test_what_is_whole_stands(self, store: Store, folder: Path) -> None:
        first = store.put(folder, "prune/key")
        (folder / "notes.json").write_text("another run's")
        assert store.put(folder, "prune/key") == first

    def test_an_upload_that_broke_off_goes_on(self, store: Store, folder: Path, behind: Path) -> None:
        reference = store.put(folder, "prune/key")
        store._client.delete_object(Bucket=store.bucket, Key=f"{store.prefix}/prune/key/{MANIFEST}")
        arrived = (behind / "prune/key/model/weights").stat().st_ino
        (folder / "notes.json").write_text("changed")
        assert store.find("prune/key") is None
        assert store.put(folder, "prune/key") != reference
        assert (behind / "prune/key/model/weights").stat().st_ino == arrived
        assert (behind / "prune/key/notes.json").read_text() == "changed"

    def test_files_that_were_sent_before_belong_to_the_artifact(
        self, store: Store, folder: Path, tmp_path: Path
    ) -> None:
        sent = store.send(folder, "prune/key", "notes.json")
        (folder / "notes.json").unlink()
        assert store.find("prune/key") is None
        reference = store.put(folder, "prune/key", sent=[sent])
        copy = store.get(reference, tmp_path / "copy")
        assert (copy / "notes.json").read_text() == "{}"
        assert (copy / "model/weights").is_file()

    def test_a_file_that_was_sent_and_is_lost_is_named(self, store: Store, folder: Path, behind: Path) -> None:
        sent = store.send(folder, "prune/key", "notes.json")
        (folder / "notes.json").unlink()
        (behind / "prune/key/notes.json").unlink()
        time.sleep(1)  # the embedded server lists folders again after a second
        with pytest.raises(Unavailable, match=r"S3 lost .*prune/key/notes.json, which it had taken"):
            store.put(folder, "prune/key", sent=[sent])
        assert store.find("prune/key") is None

    def test_without_a_manifest_nothing_is_there(
        self, store: Store, folder: Path, behind: Path, tmp_path: Path
    ) -> None:
        reference = store.put(folder, "prune/key")
        store._client.delete_object(Bucket=store.bucket, Key=f"{store.prefix}/prune/key/{MANIFEST}")
        assert store.find("prune/key") is None
        with pytest.raises(Refusal, match=r"has no manifest.json, so it is not complete"):
            store.get(reference, tmp_path / "copy")

    def test_manifest_must_be_the_references(self, store: Store, folder: Path) -> None:
        reference = store.put(folder, "prune/key")
        with pytest.raises(Refusal, match="was changed since"):
            store.manifest(Reference(reference.uri, "a" * 64))

    def test_damaged_manifest_is_refused(self, store: Store, folder: Path) -> None:
        reference = store.put(folder, "prune/key")
        store.write_text(f"prune/key/{MANIFEST}", json.dumps({"files": [{"name": "x"}]}))
        with pytest.raises(Refusal, match="is no manifest"):
            store.manifest(reference)

    @pytest.mark.parametrize(
        ("damage", "said"), [(b"\0" * 1024, "has the sha256"), (b"short", "has 5 bytes, not 1024")]
    )
    def test_damaged_file_is_refused_by_name(
        self, store: Store, folder: Path, behind: Path, tmp_path: Path, damage: bytes, said: str
    ) -> None:
        reference = store.put(folder, "prune/key")
        store._client.put_object(Bucket=store.bucket, Key=f"{store.prefix}/prune/key/model/weights", Body=damage)
        with pytest.raises(Refusal, match=f"model/weights {said}"):
            store.get(reference, tmp_path / "copy")
        with pytest.raises(Refusal, match=f"model/weights {said}"):
            store.verify(reference)
        assert list(tmp_path.iterdir()) == [folder]

    def test_missing_file_is_refused_by_name(self, store: Store, folder: Path, tmp_path: Path) -> None:
        reference = store.put(folder, "prune/key")
        store._client.delete_object(Bucket=store.bucket, Key=f"{store.prefix}/prune/key/notes.json")
        with pytest.raises(Refusal, match=r"notes.json is missing"):
            store.get(reference, tmp_path / "copy")
        with pytest.raises(Refusal, match=r"notes.json is missing"):
            store.verify(reference)

    def test_an_object_that_the_manifest_does_not_name_is_a_stranger(self, store: Store, folder: Path) -> None:
        reference = store.put(folder, "prune/key")
        assert store.strangers(reference) == []
        store.write_text("prune/key/model/chat_template.jinja", "evil")
        store.write_text("prune/key2/notes.json", "of another artifact")
        assert store.strangers(reference) == ["model/chat_template.jinja"]

    def test_only_an_empty_folder_is_filled(self, store: Store, folder: Path, tmp_path: Path) -> None:
        reference = store.put(folder, "prune/key")
        (tmp_path / "empty").mkdir()
        store.get(reference, tmp_path / "empty")
        with pytest.raises(Refusal, match="is not an empty folder"):
            store.get(reference, tmp_path / "empty")

    def test_too_small_a_disk_is_refused_first(
        self, store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reference = store.put(folder, "prune/key")
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(Unavailable, match="make room"):
            store.get(reference, tmp_path / "copy")

    def test_delete_leaves_nothing(self, store: Store, folder: Path) -> None:
        store.put(folder, "prune/key")
        neighbour = store.put(folder, "prune/key2")
        store.delete("prune/key")
        assert store.find("prune/key") is None
        assert store.folders("prune") == ["key2"]
        store.verify(neighbour)
        with pytest.raises(ValueError, match="the whole store"):
            store.delete("/")

    def test_texts_are_written_over(self, store: Store) -> None:
        assert store.read_text("runs/one/report.json") is None
        for text in ("{}", "größer"):
            store.write_text("runs/one/report.json", text)
            assert store.read_text("runs/one/report.json") == text


class TestHeaders:
    """Enough of an artifact to open its checkpoint, without its tensors."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        folder = tmp_path / "headed"
        (folder / "model").mkdir(parents=True)
        save_file({"w": torch.ones(64, 1024)}, folder / "model/model.safetensors")
        (folder / "model/config.json").write_text('{"layers": 2}')
        (folder / "model/empty.json").touch()
        (folder / "model/README.md").write_text("a card")
        return folder

    def test_are_json_whole_and_safetensors_without_their_tensors(
        self, store: Store, model: Path, tmp_path: Path
    ) -> None:
        found = store.get_headers(store.put(model, "releases/key"), tmp_path / "headers")
        assert {path.name for path in (found / "model").iterdir()} == {
            "model.safetensors",
            "config.json",
            "empty.json",
        }
        assert (found / "model/config.json").read_text() == '{"layers": 2}'
        weights = found / "model/model.safetensors"
        with safe_open(weights, "pt") as opened:
            assert opened.get_slice("w").get_shape() == [64, 1024]
            assert not opened.get_tensor("w").any()
        assert weights.stat().st_size == (model / "model/model.safetensors").stat().st_size
        assert weights.stat().st_blocks * 512 < 64 * 1024

    def test_of_a_file_that_is_missing_are_refused(self, store: Store, model: Path, tmp_path: Path) -> None:
        reference = store.put(model, "releases/key")
        store._client.delete_object(Bucket=store.bucket, Key=f"{store.prefix}/releases/key/model/config.json")
        with pytest.raises(Refusal, match=r"config\.json"):
            store.get_headers(reference, tmp_path / "headers")
        assert not (tmp_path / "headers").exists()

    def test_fill_an_empty_folder_only(self, store: Store, model: Path, tmp_path: Path) -> None:
        reference = store.put(model, "releases/key")
        (tmp_path / "headers").mkdir()
        (tmp_path / "headers/stray").touch()
        with pytest.raises(Refusal, match="is not an empty folder"):
            store.get_headers(reference, tmp_path / "headers")


class TestNewest:
    def test_whole_artifacts_come_newest_first(self, store: Store, folder: Path) -> None:
        for key in ("prune/b", "prune/a", "prune/c"):
            store.put(folder, key)
            time.sleep(1.1)  # S3 tells times in whole seconds.
        store.write_text("prune/half/model/weights", "no manifest yet")
        store.put(folder, "prune/deep/er")
        store.put(folder, "prune-not/d")
        assert store.newest("prune") == ["prune/c", "prune/a", "prune/b"]

    def test_of_nothing_are_none(self, store: Store) -> None:
        assert store.newest("prune") == []


class TestFetch:
    def put(self, store: Store, *names: str) -> None:
        for name in names:
            store.write_text(name, f"text of {name}")

    def test_a_prefix_becomes_a_folder(self, store: Store, tmp_path: Path) -> None:
        self.put(store, "given/a.txt", "given/deep/b.txt", "given-not/c.txt")
        fetched = store.fetch(store.uri("given"), tmp_path / "fetched")
        assert {name: text.decode() for name, text in contents(fetched).items()} == {
            "a.txt": "text of given/a.txt",
            "deep/b.txt": "text of given/deep/b.txt",
        }
        assert contents(store.fetch(store.uri("given") + "/", tmp_path / "again")) == contents(fetched)

    def test_an_object_becomes_a_file_in_it(self, store: Store, tmp_path: Path) -> None:
        self.put(store, "given/a.txt", "given/a.txt.old")
        assert list(contents(store.fetch(store.uri("given/a.txt"), tmp_path / "fetched"))) == ["a.txt"]

    def test_more_objects_than_one_page_lists(self, store: Store, tmp_path: Path, behind: Path) -> None:
        (behind / "many").mkdir(parents=True)
        for number in range(1005):
            (behind / "many" / f"{number:04d}").write_bytes(b"")
        time.sleep(1.1)  # The server looks at its folders afresh after a second.
        assert len(store.listing(store.uri("many"))) == 1005

    def test_listing_changes_with_the_content(self, store: Store) -> None:
        self.put(store, "given/a.txt")
        before = store.listing(store.uri("given"))
        assert store.listing(store.uri("given")) == before
        store.write_text("given/a.txt", "a longer text than before")
        assert store.listing(store.uri("given")) != before

    @pytest.mark.parametrize("uri", ["s3://espalier/nothing-here", "s3://espalier/nothing-here/"])
    def test_nothing_there_is_refused(self, store: Store, tmp_path: Path, uri: str) -> None:
        with pytest.raises(Refusal, match="names no object and no prefix"):
            store.fetch(uri, tmp_path / "fetched")
        assert not (tmp_path / "fetched").exists()

    def test_no_s3_address_is_refused(self, store: Store, tmp_path: Path) -> None:
        with pytest.raises(Refusal, match="write s3://bucket/prefix"):
            store.fetch("/a/folder", tmp_path / "fetched")


class TestCheckpoints:
    def test_the_newest_whole_one_comes_back(self, store: Store, folder: Path, tmp_path: Path) -> None:
        checkpoints = PrefixCheckpoints(store, "checkpoints/key")
        assert checkpoints.latest(tmp_path / "none") is None
        checkpoints.save(folder, 50)
        (folder / "notes.json").write_text("step 100")
        checkpoints.save(folder, 100)
        assert checkpoints.latest(tmp_path / "resumed") == 100
        assert contents(tmp_path / "resumed") == contents(folder)

    def test_older_ones_go_once_a_newer_one_is_whole(self, store: Store, folder: Path) -> None:
        checkpoints = PrefixCheckpoints(store, "checkpoints/key")
        for step in (900_000, 1_000_000):
            checkpoints.save(folder, step)
        assert store.folders("checkpoints/key") == ["step-1000000"]

    def test_one_that_was_broken_off_is_passed_over(self, store: Store, folder: Path, tmp_path: Path) -> None:
        checkpoints = PrefixCheckpoints(store, "checkpoints/key")
        checkpoints.save(folder, 50)
        store.write_text("checkpoints/key/step-000100/model/weights", "half")
        assert checkpoints.latest(tmp_path / "resumed") == 50
        (folder / "notes.json").write_text("this time it arrives")
        checkpoints.save(folder, 100)
        assert checkpoints.latest(tmp_path / "whole") == 100
        assert contents(tmp_path / "whole") == contents(folder)

    def test_kept_apart_by_key(self, store: Store, folder: Path, tmp_path: Path) -> None:
        PrefixCheckpoints(store, "checkpoints/one").save(folder, 50)
        assert PrefixCheckpoints(store, "checkpoints/on").latest(tmp_path / "none") is None


class TestCheck:
    """Each trouble has its own sentence, within seconds."""

    def test_works_where_nothing_is_wrong(self, store: Store) -> None:
        store.check()
        store.check()

    def test_makes_the_bucket(self, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ESPALIER_BUCKET", "another-bucket/below")
        store = Store.from_environment()
        store.check()
        store.write_text("x", "y")
        assert store.uri("x") == "s3://another-bucket/below/x"

    @pytest.mark.parametrize(
        ("variable", "value", "said"),
        [
            (
                "AWS_SECRET_ACCESS_KEY",
                SECRET,
                "does not accept the credentials .*SignatureDoesNotMatch.*check AWS_ACCESS",
            ),
            ("AWS_ACCESS_KEY_ID", "nobody-known-here-at", "does not accept the credentials .*InvalidAccessKeyId"),
            ("AWS_ENDPOINT_URL_S3", "no address", "S3 cannot be set up .*no address"),
            ("AWS_PROFILE", "nobody", "S3 cannot be set up .*nobody"),
            ("ESPALIER_BUCKET", "", "ESPALIER_BUCKET is not set"),
            ("ESPALIER_BUCKET", "not a bucket", "S3 cannot be asked for the bucket 'not a bucket'"),
            ("ESPALIER_BUCKET", "Capitals", "the bucket 'Capitals'.*name another bucket"),
        ],
    )
    def test_names_what_is_wrong_in_the_environment(
        self, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
    ) -> None:
        monkeypatch.setenv(variable, value)
        with pytest.raises(Refusal, match=said):
            Store.from_environment().check()

    def test_unreachable(self, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
            began = time.monotonic()
            with pytest.raises(Unavailable, match=f"'espalier' at {address} cannot be reached .*AWS_ENDPOINT_URL_S3"):
                Store.from_environment().check()
        assert time.monotonic() - began < 10

    def test_no_credentials(self, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
        with pytest.raises(Unavailable, match="no credentials for the bucket"):
            Store.from_environment().check()


def answer(code: str, message: str = "", status: int = 400) -> ClientError:
    told = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(told, "PutObject")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (answer("AccessDenied"), "do not allow PutObject on s3://b/x .*ask for that permission"),
        (answer("XMinioStorageFull", "minimum free drive threshold"), "has no room for s3://b/x .*threshold"),
        (answer("InternalError", "write /data/x: no space left on device"), "has no room for s3://b/x"),
        (answer("SlowDown", status=503), r"answers 503 \(SlowDown\) to PutObject of s3://b/x"),
        (answer("429", status=429), "start again when the server is well"),
        (answer("NoSuchKez", status=404), "s3://b/x is missing"),
        (OSError(errno.ENOSPC, "No space left on device", "/copy/weights"), "disk is full .*/copy/weights"),
        (ConnectionClosedError(endpoint_url="http://s3"), "s3://b/x cannot be reached"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_trouble_that_cannot_be_had_here_is_explained(error: Exception, said: str) -> None:
    with pytest.raises(Unavailable, match=said), explained("s3://b/x"):
        raise error


def test_a_fault_keeps_its_traceback() -> None:
    with pytest.raises(ClientError, match="MalformedXML"), explained("s3://b/x"):
        raise answer("MalformedXML")


def test_need_space_tells_both_numbers(tmp_path: Path) -> None:
    need_space(tmp_path / "not" / "there", 1)
    with pytest.raises(Unavailable, match=r"needs 1e\+09 GB and its disk has .* GB free"):
        need_space(tmp_path / "not" / "there", 10**18)


@pytest.mark.timeout(120)
def test_a_file_of_many_parts_is_verified(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "weights").touch()
    os.truncate(folder / "weights", 12 * PART + 1)  # a concurrent download that cannot seek waits for ever at ten parts
    store.verify(store.put_content(folder, "large"))
