"""The second pipeline: which of the watched releases are new, and the first pipeline for each of them.

    sources ─▶ find ─▶ for each new item, at most N side by side: recompress

A schedule starts it (`espalier schedule`). What is left over when N items are taken is found by the next run, so that a claim
never waits in a queue while its lease runs.
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
        recompress: the first pipeline, as it is dressed for a cluster.
    """

    @dsl.pipeline(name="watch", description="Recompress the releases that are new.")
    def watch(sources: list, lease_hours: float = LEASE_HOURS):  # type: ignore[no-untyped-def]
        """Recompress what is new among the sources.

        Args:
            sources: mappings of release, name and recipe (its YAML).
            lease_hours: how long a claim on an item is believed.
        """
        found = find(sources=sources, at_most=at_most, lease_hours=lease_hours)
        # The same question has another answer every time. A run from an uploaded pipeline takes this from the pipeline alone.
        found.set_caching_options(False)
        with dsl.ParallelFor(found.outputs["Output"], parallelism=at_most) as item:
            made = recompress(release=item.release, recipe=item.recipe, name=item.model, run=item.run)
            made.set_caching_options(False)

    return watch
