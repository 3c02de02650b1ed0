"""One round of put, find and get through the proxy, repeated as a person repeats a command, with what must hold after each try."""

from __future__ import annotations

import os
import random
import tempfile
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from components.lib.errors import Unavailable
from components.lib.store.store import Store
from tests.faults.proxy import Proxy, Schedule

TRIES = 12
"""After so many repetitions of the command the round counts as failed."""
LARGE = 20 * 2**20
"""Bytes of a file that travels in parts."""

_OPENING = threading.Lock()


@dataclass(frozen=True)
class Round:
    """How a round ended."""

    seed: int
    tries: int
    faults: Mapping[str, int]
    """How often each fault happened."""
    refusals: tuple[str, ...]
    """The errors, one sentence each, after which the command was given again."""
    wrong: str = ""
    """The promise that did not hold; empty if all did."""


def store_round(seed: int, environment: Mapping[str, str], rate: float = 0.2) -> Round:
    """Put, find and get a folder of files that the seed draws, through a proxy whose faults it draws too.

    Args:
        seed: of the files and of the schedule.
        environment: that of the S3 server, which is asked directly for what it really holds.
        rate: the share of requests that are broken.
    """
    direct = opened(environment, environment["AWS_ENDPOINT_URL_S3"], uuid.uuid4().hex)
    with (
        tempfile.TemporaryDirectory(prefix="espalier-faults-") as scratch,
        Proxy(environment["AWS_ENDPOINT_URL_S3"], Schedule(seed, rate)) as proxy,
    ):
        folder = drawn(Path(scratch) / "made", random.Random(seed))
        if seed % 3 == 0:
            leave_orphan(direct, random.Random(seed), Path(scratch) / "orphan")
        through = opened(environment, proxy.address, direct.prefix)
        refusals: list[str] = []
        wrong = ""
        while not wrong and len(refusals) < TRIES:
            try:
                wrong = attempt(through, folder, Path(scratch) / str(len(refusals)))
                break
            except Unavailable as refusal:
                refusals.append(str(refusal))
            except Exception as error:
                wrong = f"a traceback: {type(error).__name__}: {error}"
            wrong = wrong or lies(direct)
        else:
            wrong = wrong or f"{TRIES} tries were not enough"
        wrong = wrong or lies(direct)
        faults = [fault.name for fault, _ in proxy.broken]
    return Round(
        seed, len(refusals) + 1, {name: faults.count(name) for name in sorted(set(faults))}, tuple(refusals), wrong
    )


def opened(environment: Mapping[str, str], address: str, prefix: str) -> Store:
    """Open a store at an address; boto3 reads it from the environment while the client is made, and never again."""
    variables = {**environment, "AWS_ENDPOINT_URL_S3": address}
    with _OPENING:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            return Store(environment["ESPALIER_BUCKET"].partition("/")[0], prefix)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def drawn(folder: Path, dice: random.Random) -> Path:
    """Fill a folder with what stages leave: a checkpoint, its JSON, curves, and now and then a file that travels in parts."""
    (folder / "model").mkdir(parents=True)
    generator = torch.Generator().manual_seed(dice.randrange(2**31))
    save_file({"w": torch.randn(dice.randrange(1, 64), 32, generator=generator)}, folder / "model" / "m.safetensors")
    (folder / "model" / "config.json").write_text(f'{{"layers": {dice.randrange(100)}}}')
    for number in range(dice.randrange(4)):
        (folder / f"file-{number}.jsonl").write_bytes(dice.randbytes(dice.choice([0, 1, 100, 10_000])))
    if dice.random() < 0.15:
        (folder / "large").write_bytes(dice.randbytes(LARGE))
    return folder


def leave_orphan(store: Store, dice: random.Random, scratch: Path) -> None:
    """Leave what a run that was killed leaves: files at the key, of another content, and no manifest."""
    whole = store.put(drawn(scratch, dice), "key")
    for name in ("model/config.json", "large"):
        if (scratch / name).exists():
            size = (scratch / name).stat().st_size
            store.attach(whole, name, "0" * size)
    store.delete_text("key/manifest.json")


def attempt(store: Store, folder: Path, copy: Path) -> str:
    """Give the command once. Return the promise that did not hold, or nothing. Raises Unavailable as the product does."""
    reference = store.put(folder, "key")
    found = store.find("key")
    if found != reference:
        return f"put returned {reference}, find {found}"
    if contents(store.get(reference, copy / "all")) != contents(folder):
        return "get returned other bytes than put was given"
    config = store.get_headers(reference, copy / "headers") / "model" / "config.json"
    if config.read_bytes() != (folder / "model" / "config.json").read_bytes():
        return "get_headers returned other bytes than put was given"
    return ""


def lies(direct: Store) -> str:
    """Ask the server itself: what it calls complete must be whole, byte for byte."""
    reference = direct.find("key")
    if reference is None:
        return ""
    try:
        direct.verify(reference)
    except Unavailable as damage:
        return f"the artifact has a manifest and is not whole: {damage}"
    return ""


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
