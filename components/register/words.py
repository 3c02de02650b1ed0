"""The vocabulary of the report: a short explanation for each name that the report uses."""

from __future__ import annotations

MODELS = {
    "dense": "the release, nothing removed",
    "candidate": "the pruned model this report is about",
    "champion": "the model in service now",
    "pruned-first": "control: the same cut made first, without a transfer, then trained as the candidate was",
    "dense-trained": "control: nothing cut, trained as the candidate was",
}

AXES = {
    "layers": "whole transformer layers",
    "hidden": "channels of the residual stream, in every tensor that reads or writes it",
    "ffn": "intermediate channels of each layer's feed-forward network",
    "heads": "key-value groups of each layer, with the query heads that read them",
    "experts": "routed experts of each layer that has some, with their rows of the router",
}

ABOUT = MODELS | AXES
"""Every name that heads a row of a table."""

METRICS = {
    "lm": "LM loss",
    "kl": "KL divergence from the dense model",
    "state": "distance to the dense model's final state",
    "penalty": "relative norm of f(x) − x, removed layers",
    "validation": "perplexity on the held-out windows",
}
"""Titles of the training curves; a metric that is not listed is shown under its own name."""

BACKSTAGE = ("learning_rate", "gradient_norm")
"""Metrics that describe how the training ran, not its result: MLflow shows them, the report does not."""
