"""The Kubeflow face of watch."""

from kfp.dsl import Markdown, Output

from components.lib.stage.face import component


@component
def watch(sources: list, at_most: int, lease_hours: float, seen: Output[Markdown]) -> list:
    """Claim what is new among the sources.

    Args:
        sources: mappings of `release`, `name` and `recipe` (its YAML).
        at_most: how many items are claimed; the rest is left to the next time.
        lease_hours: how long a claim is believed. A run that takes longer may be started again by a later watcher.

    Returns:
        release, recipe, model (the registered name) and run of each item claimed.
    """
    from datetime import timedelta
    from pathlib import Path

    from components.lib.stage.events import reported
    from components.watch.find import find_new, table

    with reported("watch"):
        runs, findings = find_new(sources, at_most, timedelta(hours=lease_hours))
        page = table(findings, runs)
        print(page)
        Path(seen.path).parent.mkdir(parents=True, exist_ok=True)
        Path(seen.path).write_text(page)
        return runs
