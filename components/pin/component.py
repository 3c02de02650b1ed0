"""The Kubeflow face of pin."""

from typing import NamedTuple

from components.lib.stage.face import component


@component
def pin(release: str, recipe: str, name: str, run: str) -> NamedTuple(
    "Pinned", [("release", str), ("recipe", str), ("champion", str)]
):
    """Pin the release, the recipe's texts and task files and the present champion, and open the run in MLflow.

    Args:
        release: a reference, an s3:// prefix, models:/name@alias, or a Hub id with an optional @revision.
        recipe: the recipe's YAML.
        name: the registered model's name.
        run: the label that this run's stages share.

    Returns:
        release and champion as references (champion is empty if there is none), and the recipe with a reference in place of
        each text and task file.
    """
    from collections import namedtuple

    from components.pin.run import pin_run

    return namedtuple("Pinned", ["release", "recipe", "champion"])(*pin_run(release, recipe, name, run))
