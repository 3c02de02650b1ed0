"""The sections of the recipe for the trainings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.lib.recipe.choices import Transfers
from components.lib.recipe.section import Count, Fraction, Rate, Section, Weight


class Objective(Section):
    """The weights of the losses. The paper minimises the LM loss alone."""

    lm: Weight = Field(0.5, description="Cross-entropy of the next token, on every token of the window.")
    kl: Weight = Field(0.5, description="KL divergence from the dense model's next-token distribution.")
    state: Weight = Field(3.0, description="Relative squared distance to the dense model's final hidden state.")

    @model_validator(mode="after")
    def _something(self) -> Objective:
        if self.lm + self.kl + self.state == 0:
            raise ValueError("lm, kl and state are all 0, so there is nothing to minimise: give one of them a weight")
        return self


class Lora(Section):
    """Low-rank adapters, merged into the weights at the end."""

    rank: Count = Field(16, description="Rank of the adapters.")
    alpha: Rate = Field(32, description="Scale of the adapters; the update is multiplied by alpha / rank.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout on the adapters' input.")


class Optimisation(Section):
    """The settings of optimisation that every training stage has."""

    steps: Count = Field(100, description="Optimizer steps.")
    batch_size: Count = Field(8, description="Windows an optimizer step.")
    micro_batch_size: Count | Literal["auto"] | None = Field(
        None,
        description="Windows a forward pass; fewer than batch_size accumulates gradients, with the same losses to rounding. auto: the most that fit into the memory, found before the first step. All when absent.",
    )
    learning_rate: Rate | None = Field(
        None,
        description="AdamW's peak learning rate. When absent 1e-4 for adapters, and 0.08 / hidden width for whole weights: 2e-5 at the width of the papers' 7B models.",
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.03, description="The part of the steps over which the learning rate rises; it then falls linearly to 0."
    )
    weight_decay: Weight = Field(0.0, description="AdamW's weight decay.")
    clip: Rate = Field(1.0, description="Gradients are scaled down to this norm.")
    optimizer: Literal["adamw", "adamw-8bit"] = Field(
        "adamw",
        description="adamw-8bit keeps the optimizer's states in 8 bits: a quarter of the memory. It cannot step weights that FSDP divides.",
    )
    offload_optimizer: bool = Field(
        False,
        description="Keep the optimizer's states in the machine's memory, from which each step brings them to the GPU piece by piece: the same numbers, slower. On a processor it saves nothing.",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="auto trains weights of fp32, and computes in bf16 if the hardware does. bf16 keeps the trained weights, gradients and states in bf16 as well: half the memory; steps are rounded at random, so that small ones are not lost.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: slower, far less memory."
    )
    checkpoint_every: Count = Field(50, description="Optimizer steps between two checkpoints to the store.")
    seed: int = Field(0, description="Seed of the batches' order and of the adapters.")

    @model_validator(mode="after")
    def _whole_batches(self) -> Optimisation:
        if isinstance(self.micro_batch_size, int) and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self

    @property
    def trains(self) -> bool:
        """Whether the section asks for its training."""
        return True

    @property
    def weight_size(self) -> int:
        """Bytes of a number of the trained weights, and of their gradients."""
        return 2 if self.precision == "bf16" else 4

    @property
    def states_size(self) -> int:
        """Bytes of the optimizer's two states of a number of the trained weights, wherever they are kept."""
        return 2 if self.optimizer == "adamw-8bit" else 2 * self.weight_size

    @property
    def surely_fits(self) -> int:
        """The windows of a pass that needs no more memory than the training: for `auto` 1, which is the least that it finds."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size or self.batch_size


class Regularize(Optimisation):
    """The second regularisation: move the knowledge of the chosen layers and channels to the others before the cut."""

    transfer: Transfers = Field(
        Transfers(),
        description="The transfer in closed form before the training: none, a transfer's name, or {name: {its settings}}. The controls have none.",
    )
    schedule: Literal["anneal", "penalty", "none"] = Field(
        "anneal",
        description="anneal: the gates of the chosen layers and channels fall from 1 to 0 while the rest trains; penalty: the papers' norms, of f(x) − x for layers and of the weights' slices for channels; none: no regularisation.",
    )
    anneal: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="The part of the steps over which the gates are annealed. 0 closes them before the first step. When absent 0 after a transfer, else 0.15, and 0.05 if channels are removed and no layers.",
    )
    norm: Literal["l1", "l2"] = Field(
        "l2",
        description="Norm of the penalty, relative to the same norm of the layer's input, or of the slice before the training.",
    )
    strength: Weight = Field(1.0, description="λ2, the weight of the penalty.")
    ramp: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="The part of the steps over which λ2 rises from 0."
    )
    objective: Objective = Field(
        Objective(), description="The weights of the losses that are minimised beside the penalty."
    )
    teacher_top: Count | None = Field(
        None,
        description="Run the dense model once before the training instead of beside it, and keep in files: so many largest probabilities of each next-token distribution, the mass of the rest, and the final hidden state if the objective compares it. docs/memory.md has how exact that is. When absent both models are in memory.",
    )
    trainable: Literal["all", "lora"] = Field(
        "all", description="Train every parameter, or adapters that are merged before the cut."
    )
    lora: Lora = Field(Lora(), description="The adapters, if trainable is lora.")

    @property
    def trains(self) -> bool:
        """Whether there is a schedule."""
        return self.schedule != "none"

    @model_validator(mode="after")
    def _teacher_to_keep(self) -> Regularize:
        if self.teacher_top and self.objective.kl + self.objective.state == 0:
            raise ValueError(
                f"teacher_top is {self.teacher_top}, but objective.kl and objective.state are 0, so there is no teacher: "
                "leave teacher_top out, or give one of them a weight"
            )
        return self


class Recover(Optimisation):
    """LoRA recovery fine-tuning (RFT) of the pruned model."""

    enabled: bool = Field(False, description="Whether the pruned model is fine-tuned.")
    lora: Lora = Field(Lora(), description="The adapters.")
    validation: Fraction = Field(0.1, description="The part of the windows that is held out to stop early.")
    evaluate_every: Count = Field(20, description="Optimizer steps between two measurements on the held-out windows.")
    patience: Count = Field(3, description="Measurements without improvement before the training stops.")
    keep_adapter: bool = Field(
        False,
        description="Whether the best adapters are also kept in peft's form, for servers that load adapters; they belong to the pruned model before this training.",
    )

    @property
    def trains(self) -> bool:
        """Whether it is enabled."""
        return self.enabled

    @model_validator(mode="after")
    def _adapter_to_keep(self) -> Recover:
        if self.keep_adapter and not self.enabled:
            raise ValueError(
                "keep_adapter is true, but enabled is not, so no adapters are trained: set enabled: true, or leave keep_adapter out"
            )
        return self
