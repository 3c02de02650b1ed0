"""What every stage's Kubeflow face has in common."""

import os
from functools import partial

from kfp import dsl

IMAGE = os.environ.get("ESPALIER_IMAGE", "espalier")
"""The image that the stages run in, with this package installed; read once, where a pipeline is defined."""

component = partial(dsl.component, base_image=IMAGE, install_kfp_package=False)
"""Turns a function into a component whose body imports the installed package: nothing is installed when a task starts."""
