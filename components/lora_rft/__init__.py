"""LoRA recovery fine-tuning of the pruned model."""
