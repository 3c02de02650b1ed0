"""Time the promotion of a checkpoint: its files fetched and hashed, the checkpoint loaded, a text generated, the aliases moved.

    python -m benchmarks.promotion --model smollm2-135m

The services are embedded ones in a folder that is removed afterwards.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from components.lib.store.store import Store
from components.lib.tracking import registry, runs
from components.promote import promote as module
from components.promote.promote import Promoted, promote
from pipeline.runners.run import in_environment
from pipeline.services.embedded import services


def main() -> None:
    """Promote the checkpoint a few times, each time as another version, and print the seconds."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, required=True, help="a checkpoint folder")
    arguments.add_argument("--repeats", type=int, default=3)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as home, services(Path(home)) as environment, in_environment(environment):
        for number in range(1, given.repeats + 1):
            version = register(given.model, number, Path(home))
            began = time.perf_counter()
            told = promote("benchmark", version)
            print(line(told, time.perf_counter() - began))


def register(model: Path, number: int, home: Path) -> str:
    """Register the checkpoint with a note that makes it another version, and return the version."""
    artifact = home / str(number)
    shutil.copytree(model, artifact / "model")
    (artifact / "note.txt").write_text(str(number))
    reference = Store.from_environment().put_content(artifact, "stages/prune")
    shutil.rmtree(artifact)
    run = runs.open_parent("benchmark", {}, {})
    return registry.register_version("benchmark", reference, run, {"espalier.verdict": "pass"}).version


def line(told: Promoted, seconds: float) -> str:
    """Return the figures of one promotion."""
    assert told.checked is not None
    checked = told.checked
    return (
        f"{checked.bytes / 1e6:.0f} MB: {seconds:.1f} s, of which {checked.seconds:.1f} s to fetch and hash, "
        f"{checked.answer_seconds:.1f} s to load and generate, {module.SETTLE:.1f} s to wait for other promotions"
    )


if __name__ == "__main__":
    main()
