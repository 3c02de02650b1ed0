"""The Kubeflow face of lora_rft."""

from kfp.dsl import Model, Output

from components.lib.stage.face import component


@component
def lora_rft(model: str, windows: str, recipe: str, run: str, checkpoint: Output[Model]) -> str:
    """Fine-tune the pruned model where the recipe asks for it. Takes and returns references; resumes from its checkpoints."""
    from components.lib.stage.run import stage

    inputs = {"model": model, "windows": windows}
    with stage("lora_rft", run=run, recipe=recipe, sections=["recover"], inputs=inputs) as this:
        if not this.recipe.recover.enabled:
            this.hand_on("model")
        elif this.pending:
            from components.lora_rft.lora_rft import lora_rft

            this.perform(lora_rft, resumes=True)
        this.show(checkpoint)
        return this.reference
