"""Two processes share each batch, and end where one process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.lib.recipe.training import Objective, Regularize
from components.lib.training.regularize import regularize
from tests.components.lib.training.tiny import Kept, Written, chosen, counting, llama, weights

ROOT = Path(__file__).parents[4]


def train(out: Path) -> None:
    """Regularise under whatever accelerate finds in the environment, and leave each process's weights in `out`."""
    settings = Regularize(
        steps=4,
        batch_size=8,
        learning_rate=3e-3,
        precision="fp32",
        objective=Objective(),
        anneal=0.5,
        checkpoint_every=2,
    )
    journal, rank = Written(), int(os.environ.get("RANK", 0))
    checkpoints = Kept(out / f"kept-{rank}")
    model = regularize(llama(), llama(), counting(), chosen(1), settings, checkpoints=checkpoints, journal=journal)
    held = {name: weight for name, weight in weights(model).items() if name != "lm_head.weight"}
    save_file(held | {"loss": torch.tensor(journal.curve("loss"))}, out / f"{rank}.safetensors")
    assert bool(checkpoints.steps) == (rank == 0)


@pytest.mark.timeout(300)
def test_two_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir()
    shared.mkdir()
    train(alone)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = ["-m", "tests.components.lib.training.test_parallel", str(shared)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launch, *program], cwd=ROOT, env=environment, check=True, capture_output=True)

    one, *both = (
        load_file(path) for path in (alone / "0.safetensors", shared / "0.safetensors", shared / "1.safetensors")
    )
    for name in one.keys() - {"loss"}:
        assert torch.equal(both[0][name], both[1][name])
        torch.testing.assert_close(both[0][name], one[name], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(both[0]["loss"], one["loss"], rtol=1e-3, atol=1e-4)
    assert both[1]["loss"].numel() == 0  # the main process alone writes


if __name__ == "__main__":
    train(Path(sys.argv[1]))
