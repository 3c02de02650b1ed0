"""The Kubeflow face of lora_rft."""

from kfp.dsl import Model, Output

from components.lib.stage.face import component


@component
def lora_rft(model: str, windows: str, recipe: str, run: str, checkpoint: Output[Model]) -> str:
    """Fine-tune the pruned model if the recipe asks for it. Takes and returns references; resumes from its checkpoints."""
    from components.lora_rft.stage import STAGE

    return STAGE.run(run, recipe, show=checkpoint, model=model, windows=windows)
