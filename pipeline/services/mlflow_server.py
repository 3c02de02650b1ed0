"""MLflow's server in one process, for the embedded services: equal to `mlflow server --workers 1`, in half the start time.

That command imports MLflow twice: in a process that prepares the database, and again in the process that serves.

    python -P mlflow_server.py PORT DATABASE ARTIFACTS
"""

from __future__ import annotations

import os
import sys


def main(port: str, database: str, artifacts: str) -> None:
    """Serve on loopback, with the SQLite file `database`, and `artifacts` (an s3:// prefix) behind the server."""
    # The jobs behind MLflow's language-model judges would be a dozen more processes; nothing here uses them.
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"

    import uvicorn
    from mlflow.server import constants
    from mlflow.server.handlers import initialize_backend_stores

    uri, root = f"sqlite:///{database}", "mlflow-artifacts:/"
    os.environ |= {
        constants.BACKEND_STORE_URI_ENV_VAR: uri,
        constants.REGISTRY_STORE_URI_ENV_VAR: uri,
        constants.ARTIFACT_ROOT_ENV_VAR: root,
        constants.ARTIFACTS_DESTINATION_ENV_VAR: artifacts,
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
    }
    initialize_backend_stores(uri, uri, root)
    uvicorn.run(
        "mlflow.server.fastapi_app:app",
        host="127.0.0.1",
        port=int(port),
        access_log=False,
        timeout_graceful_shutdown=2,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
