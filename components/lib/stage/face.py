"""The decorator of every stage's Kubeflow face."""

from functools import partial

from kfp import dsl

IMAGE = "espalier"
"""Stands for the image that the stages run in, with this package installed, until a pipeline is configured with a real one."""

component = partial(dsl.component, base_image=IMAGE, install_kfp_package=False)
"""Turns a function into a component whose body imports the installed package: nothing is installed when a task starts."""
