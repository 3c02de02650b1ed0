"""What is lost if a teacher's k largest probabilities and the mass of the rest stand for its whole distribution.

    python -m benchmarks.teacher --model FOLDER --text FILE [--windows 8] [--length 256] [--removed 4,5,6] [--k 64,256,1024,4096]

The teacher is the model, the student the same one without some layers: the beginning of a training, where they differ most. Of each k the
table has the KL divergence over the whole one, how far its gradient is from that of the whole one (the norm of the difference over
the norm), for the student's logits and for its weights, and the bytes a token.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from components.lib.training.objective import Top, next_token_losses
from components.lib.transformer.checkpoint import load_model, load_tokenizer
from components.lib.transformer.gates import bypassed
from components.lib.transformer.text import consecutive_windows, read_documents, token_stream


def divergence(student: Tensor, batch: Tensor, teacher: Tensor | Top) -> tuple[Tensor, Tensor]:
    """Return KL(teacher ‖ student) and its gradient for the student's logits (batch, length, vocabulary)."""
    logits = student.detach().requires_grad_()
    loss, _, kl = next_token_losses(logits, batch, teacher, lm=0.0, kl=1.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    return kl, gradient


def of_weights(model: PreTrainedModel, logits: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient for all weights in one row, from that for the logits; the graph is kept."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(logits, weights, gradient, retain_graph=True, allow_unused=True)
    return torch.cat([one.flatten() for one in found if one is not None])


def compare(
    model: PreTrainedModel, windows: Tensor, removed: Sequence[int], ks: Sequence[int]
) -> dict[int, tuple[float, float, float]]:
    """Return for each k the divergence over the whole one, and the distances of the gradients for logits and for weights.

    Args:
        model: the model, in fp32.
        windows: token ids (windows, length); each is a batch, and the figures are means over all of them.
        removed: the layers that the student lacks.
        ks: how many probabilities are known.
    """
    sums = {k: torch.zeros(3, dtype=torch.float64) for k in ks}
    whole = torch.zeros(3, dtype=torch.float64)
    for batch in windows.long().split(1):
        with torch.no_grad():
            teacher = model(input_ids=batch, use_cache=False).logits
        with bypassed(model, removed):
            student = model(input_ids=batch, use_cache=False).logits
        kl, exact = divergence(student, batch, teacher)
        exact_weights = of_weights(model, student, exact)
        whole += torch.stack([kl, exact.norm(), exact_weights.norm()]).double()
        for k in ks:
            known = Top(*(part[None] for part in Top.of(teacher[0], k)))
            few, gradient = divergence(student, batch, known)
            apart = of_weights(model, student, gradient) - exact_weights
            sums[k] += torch.stack([few, (gradient - exact).norm(), apart.norm()]).double()
    return {k: tuple((found / whole).tolist()) for k, found in sums.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint folder")
    parser.add_argument("--text", type=Path, required=True, help="a text")
    parser.add_argument("--windows", type=int, default=8, help="windows of the text")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--removed", default="4,5,6", help="the layers that the student lacks")
    parser.add_argument("--k", default="64,256,1024,4096", help="how many probabilities are known")
    arguments = parser.parse_args()
    removed, ks = ([int(one) for one in value.split(",")] for value in (arguments.removed, arguments.k))
    stream = token_stream(read_documents(arguments.text), load_tokenizer(arguments.model))
    windows = consecutive_windows(stream, arguments.length)[: arguments.windows]
    model = load_model(arguments.model, dtype=torch.float32)
    print("| k | KL over the whole one | gradient for the logits, off by | for the weights, off by | bytes a token |")
    print("|---|---|---|---|---|")
    for k, (kl, logits, weights) in compare(model, windows, removed, ks).items():
        print(f"| {k} | {kl:.4f} | {100 * logits:.2f} % | {100 * weights:.2f} % | {8 * k + 4} |", flush=True)


if __name__ == "__main__":
    main()
