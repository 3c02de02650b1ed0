"""The Kubeflow face of watch."""

from kfp.dsl import Markdown, Output

from components.lib.stage.face import component


@component
def watch(sources: list, at_most: int, lease_hours: float, seen: Output[Markdown]) -> list:
    """Claim the new releases among the sources.

    Args:
        sources: mappings of `release`, `name` and `recipe` (its YAML).
        at_most: how many items are claimed; the next run finds the others.
        lease_hours: hours until a claim expires. A later watcher may start a run that takes longer again.

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
