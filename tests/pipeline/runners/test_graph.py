"""The tasks of a pipeline, read from the compiled pipeline."""

from kfp import dsl

from pipeline.recompress import recompress
from pipeline.runners.graph import Output, tasks_of

TASKS = {task.name: task for task in tasks_of(recompress)}


def test_each_task_runs_its_stage_and_variant() -> None:
    stages = {name: task.stage.name for name, task in TASKS.items() if task.stage}
    assert stages["learn-gates"] == "learn_gates"
    assert {name for name, stage in stages.items() if stage == "control"} == {"control", "control-2"}
    assert {TASKS["control"].variant, TASKS["control-2"].variant} == {"pruned-first", "dense-trained"}
    assert TASKS["pin"].stage is None


def test_each_task_comes_after_those_whose_outputs_it_reads() -> None:
    order = list(TASKS)
    assert order.index("pin") < order.index("calibrate") < order.index("learn-gates") < order.index("regularize")
    assert order.index("evaluate") < order.index("register")


def test_inputs_are_outputs_of_other_tasks() -> None:
    assert TASKS["prune"].inputs["model"] == Output("regularize", "Output")
    assert TASKS["prune"].inputs["release"] == Output("pin", "release")


def test_a_task_of_a_condition_reads_what_the_condition_reads() -> None:
    assert TASKS["promote"].inputs == {"name": Output("", "name"), "run": Output("", "run")}
    assert TASKS["promote"].reads == {"register"}


def test_a_mapping_holds_the_outputs_by_name() -> None:
    models = TASKS["evaluate"].inputs["models"]
    assert models["candidate"] == Output("lora-rft", "Output")
    assert models["champion"] == Output("pin", "champion")


def test_resolved_inputs_are_the_values_of_the_outputs() -> None:
    values = {Output("regularize", "Output"): "one", Output("lora-rft", "Output"): "two"}
    assert TASKS["prune"].resolved(values)["model"] == "one"
    assert TASKS["evaluate"].resolved(values)["models"]["candidate"] == "two"
    assert TASKS["evaluate"].resolved({})["models"]["candidate"] == ""


@dsl.component(base_image="any", install_kfp_package=False)
def constant(text: str) -> str:
    return text


def test_a_constant_is_itself() -> None:
    @dsl.pipeline(name="constants")
    def constants() -> None:
        constant(text="as it is")

    (task,) = tasks_of(constants)
    assert (task.name, task.stage, task.inputs) == ("constant", None, {"text": "as it is"})
