"""The MLflow client, and the experiment that the runs are kept in.

Only ids are used, never MLflow's notion of an active run: nothing depends on what else runs in the process.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from functools import cache

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from components.lib.errors import Unavailable
from components.lib.settings import MlflowSettings

# MLflow's default retries a failing server for some minutes at every call.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")


def client() -> MlflowClient:
    """The client of the server that MLFLOW_TRACKING_URI names.

    Raises:
        Unavailable: the variable is not set; MLflow itself would write to a local file without a warning.
    """
    address = MlflowSettings().tracking_uri
    if not address:
        raise Unavailable(
            "MLFLOW_TRACKING_URI is not set: start the embedded services (espalier services up) or name your server"
        )
    return _client(address)


_client = cache(MlflowClient)


def check() -> None:
    """Check within seconds that the tracking server answers.

    Raises:
        Unavailable: it does not answer, or it refuses this client.
    """
    address = client().tracking_uri
    if not address.startswith("http"):
        return
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=5):
            pass
    except urllib.error.HTTPError as error:
        if error.code in {401, 403}:
            cure = "set MLFLOW_TRACKING_TOKEN or MLFLOW_TRACKING_USERNAME, or have the server allow this host"
            raise Unavailable(f"MLflow at {address} refuses this client ({error.code}): {cure}") from None
    except OSError as error:
        raise Unavailable(
            f"MLflow at {address} does not answer ({error}): start it, or correct MLFLOW_TRACKING_URI"
        ) from None


def experiment_id() -> str:
    """The id of the experiment MLFLOW_EXPERIMENT_NAME (default `espalier`), which is created if it is missing.

    MLFLOW_EXPERIMENT_ID takes precedence: the Kubeflow server's MLflow plugin sets it to the experiment of its runs.
    """
    settings = MlflowSettings()
    if settings.experiment_id:
        return settings.experiment_id
    name = settings.experiment_name
    found = client().get_experiment_by_name(name)
    if found:
        return found.experiment_id
    try:
        return client().create_experiment(name)
    except MlflowException:
        # Another stage created it in the meantime.
        made = client().get_experiment_by_name(name)
        if made is None:
            raise
        return made.experiment_id
