"""The second pipeline: find the watched releases that are new, and run the first pipeline for each of them.

    sources ─▶ find ─▶ for each new item, at most N side by side: recompress

A schedule starts it (`espalier schedule`). A run takes at most N items and the next run finds the others, so that no claim
waits in a queue while its lease runs.
"""

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent

from components.watch.component import watch as find
from pipeline.recompress import recompress

AT_MOST = 2
LEASE_HOURS = 48.0


def watch_pipeline(at_most: int = AT_MOST, recompress: GraphComponent = recompress) -> GraphComponent:
    """The pipeline for `at_most` items at a time, a number that Kubeflow fixes when a pipeline is compiled.

    Args:
        at_most: how many items one run takes.
        recompress: the first pipeline, configured for a cluster.
    """

    @dsl.pipeline(name="watch", description="Recompress the releases that are new.")
    def watch(sources: list, lease_hours: float = LEASE_HOURS):  # type: ignore[no-untyped-def]
        """Recompress the releases that are new among the sources.

        Args:
            sources: mappings of release, name and recipe (its YAML).
            lease_hours: hours until a claim on an item expires.
        """
        found = find(sources=sources, at_most=at_most, lease_hours=lease_hours)
        # The answer changes from run to run, so it is never cached. A run of an uploaded pipeline reads this setting from the pipeline.
        found.set_caching_options(False)
        with dsl.ParallelFor(found.outputs["Output"], parallelism=at_most) as item:
            made = recompress(release=item.release, recipe=item.recipe, name=item.model, run=item.run)
            made.set_caching_options(False)

    return watch
