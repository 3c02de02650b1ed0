"""The third pipeline: run the first one for each cell of a comparison, on a cluster.

    for each cell, at most N side by side: recompress, with an empty name, so that nothing is registered

Each cell is the whole first pipeline, its exit handler included: `finish` records the end of each cell by itself.
"""

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent

from pipeline.recompress import recompress

AT_MOST = 2


def compare_pipeline(at_most: int = AT_MOST, recompress: GraphComponent = recompress) -> GraphComponent:
    """The pipeline for `at_most` cells at a time, a number that Kubeflow fixes when a pipeline is compiled.

    Args:
        at_most: how many cells run side by side.
        recompress: the first pipeline, configured for a cluster.
    """

    @dsl.pipeline(name="compare", description="Measure each cell of a comparison, and register nothing.")
    def compare(release: str, cells: list):  # type: ignore[no-untyped-def]  # kfp reads the return type as an output
        """Measure each cell on one release.

        Args:
            release: a reference.
            cells: mappings of recipe (its YAML) and run (the label of the cell's run).
        """
        with dsl.ParallelFor(cells, parallelism=at_most) as cell:
            made = recompress(release=release, recipe=cell.recipe, name="", run=cell.run)
            made.set_caching_options(False)

    return compare
