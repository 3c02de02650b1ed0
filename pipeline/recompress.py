"""The pipeline: recompress a model release into a smaller model, measure both, and register the result.

    release ─▶ pin ─▶ calibrate ─▶ learn gates ─▶ regularize ─▶ prune ─▶ LoRA-RFT ─▶ evaluate ─▶ register ─▶ promote

The stages pass references (a URI and a digest), never files. A stage whose output is in the store does nothing, so the same
pipeline started again continues where the last run ended, on this machine or on a cluster.
"""

from kfp import dsl

from components.calibrate.component import calibrate
from components.control.component import control
from components.evaluate.component import evaluate
from components.finish.component import finish
from components.learn_gates.component import learn_gates
from components.lora_rft.component import lora_rft
from components.pin.component import pin
from components.promote.component import promote
from components.prune.component import prune
from components.register.component import register
from components.regularize.component import regularize


@dsl.pipeline(name="recompress", description="Recompress a model release: regularise, prune, measure, register.")
def recompress(release: str, recipe: str, name: str, run: str):  # type: ignore[no-untyped-def]  # kfp reads the return type as an output
    """Recompress `release` as the recipe says, and register the result under `name`.

    Args:
        release: a Hub id with an optional @revision, an s3:// prefix, models:/name@alias, or a reference.
        recipe: the recipe's YAML.
        name: the registered model's name; nothing is registered if it is empty.
        run: a label of this run, which its stages share.
    """
    with dsl.ExitHandler(finish(run=run)):
        pinned = pin(release=release, recipe=recipe, name=name, run=run)
        dense, champion = pinned.outputs["release"], pinned.outputs["champion"]
        shared = {"recipe": pinned.outputs["recipe"], "run": run}

        windows = calibrate(release=dense, **shared).output
        selection = learn_gates(release=dense, windows=windows, **shared).output

        regularized = regularize(release=dense, windows=windows, selection=selection, **shared).output
        pruned = prune(release=dense, model=regularized, selection=selection, **shared).outputs["Output"]
        candidate = lora_rft(model=pruned, windows=windows, **shared).outputs["Output"]

        # Controls: the same training without regularising first, and without cutting at all.
        trained = {"release": dense, "windows": windows, "selection": selection, **shared}
        pruned_first = control(kind="pruned-first", **trained).output
        dense_trained = control(kind="dense-trained", **trained).output

        models = {
            "dense": dense,
            "candidate": candidate,
            "champion": champion,
            "pruned-first": pruned_first,
            "dense-trained": dense_trained,
        }
        evaluation = evaluate(models=models, **shared).outputs["Output"]

        outputs = {
            "release": dense,
            "windows": windows,
            "selection": selection,
            "regularized": regularized,
            "pruned": pruned,
            "candidate": candidate,
            "pruned-first": pruned_first,
            "dense-trained": dense_trained,
            "evaluation": evaluation,
        }
        decision = register(name=name, outputs=outputs, **shared).outputs["Output"]
        # Only with `approval: auto` in the recipe; else the version waits as challenger for espalier promote.
        with dsl.If(decision == "promote"):
            promote(name=name, run=run)
