"""A server that speaks the part of the Kubeflow Pipelines API that a submission uses.

Its answers are made of kfp-server-api's own models, and what it is sent has to fit them.
"""

from __future__ import annotations

import email
import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
ROOT = "/apis/v2beta1"

Look = tuple[str, dict[str, str]]
"""What one look at a run finds: its state, and its tasks' states."""


class KubeflowServer:
    """Pipelines, versions, experiments and runs in memory; `looks` is what the looks at a run find, the last one for ever."""

    def __init__(self) -> None:
        self.pipelines: list[api.V2beta1Pipeline] = []
        self.versions: list[api.V2beta1PipelineVersion] = []
        self.experiments: list[api.V2beta1Experiment] = []
        self.runs: list[api.V2beta1Run] = []
        self.uploads: list[str] = []
        self.looks: list[Look] = [("SUCCEEDED", {})]
        self.on_run: Callable[[api.V2beta1Run], None] = lambda run: None
        self.tokens: set[str] = set()
        self.fails_next = 0
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, content_type: str) -> Any:
        """Do what is asked, and return a model; a KeyError for what this server does not speak."""
        if (method, path) == ("GET", "/healthz"):
            return api.V2beta1GetHealthzResponse(multi_user=False)
        if (method, path) == ("GET", "/pipelines"):
            return api.V2beta1ListPipelinesResponse(pipelines=_named(self.pipelines, query))
        if (method, path) == ("POST", "/pipelines/upload"):
            return self._upload_pipeline(query, _package(body, content_type))
        if (method, path) == ("POST", "/pipelines/upload_version"):
            return self._upload_version(query["pipelineid"], query["name"], _package(body, content_type))
        if method == "GET" and path.endswith("/versions"):
            mine = [one for one in self.versions if one.pipeline_id == path.split("/")[2]]
            return api.V2beta1ListPipelineVersionsResponse(pipeline_versions=_named(mine, query))
        if (method, path) == ("GET", "/experiments"):
            return api.V2beta1ListExperimentsResponse(experiments=_named(self.experiments, query))
        if (method, path) == ("POST", "/experiments"):
            return self._kept(self.experiments, _model(body, "V2beta1Experiment"), "experiment_id")
        if (method, path) == ("POST", "/runs"):
            return self._start(_model(body, "V2beta1Run"))
        if (method, path) == ("GET", "/runs"):
            return api.V2beta1ListRunsResponse(runs=_named(self.runs, query)[::-1])
        if method == "GET" and path.startswith("/runs/"):
            return self._look(next(run for run in self.runs if run.run_id == path.split("/")[2]))
        raise KeyError(f"{method} {path}")

    def _upload_pipeline(self, query: dict[str, str], package: str) -> api.V2beta1Pipeline:
        made = api.V2beta1Pipeline(display_name=query["name"], namespace=query.get("namespace"))
        self._kept(self.pipelines, made, "pipeline_id")
        # As the real one does: the first version bears the pipeline's name.
        self._upload_version(made.pipeline_id, query["name"], package)
        return made

    def _upload_version(self, pipeline_id: str, name: str, package: str) -> api.V2beta1PipelineVersion:
        _parse(package)
        self.uploads.append(package)
        made = api.V2beta1PipelineVersion(pipeline_id=pipeline_id, display_name=name)
        return self._kept(self.versions, made, "pipeline_version_id")

    def _start(self, run: api.V2beta1Run) -> api.V2beta1Run:
        reference = run.pipeline_version_reference
        assert reference.pipeline_version_id in {one.pipeline_version_id for one in self.versions}
        assert run.experiment_id in {one.experiment_id for one in self.experiments}
        self._kept(self.runs, run, "run_id")
        self.on_run(run)
        return run

    def _look(self, run: api.V2beta1Run) -> api.V2beta1Run:
        state, tasks = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        details = [
            api.V2beta1PipelineTaskDetail(
                display_name=name,
                state=getattr(api.V2beta1RuntimeState, found),
                start_time=BEGAN,
                end_time=BEGAN + timedelta(seconds=7) if found != "RUNNING" else None,
            )
            for name, found in tasks.items()
        ]
        run.state, run.run_details = state, api.V2beta1RunDetails(task_details=details)
        return run

    @staticmethod
    def _kept(kept: list[Any], made: Any, identifier: str) -> Any:
        setattr(made, identifier, f"{identifier.removesuffix('_id').replace('_', '-')}-{len(kept) + 1}")
        kept.append(made)
        return made

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._serve("GET")

            def do_POST(self) -> None:
                self._serve("POST")

            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def _serve(self, method: str) -> None:
                url = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                if server.tokens and self.headers.get("Authorization", "").removeprefix("Bearer ") not in server.tokens:
                    return self._send(401, {"message": "the token is not known"})
                if server.fails_next:
                    server.fails_next -= 1
                    return self._send(503, {"message": "away for a moment"})
                content_type = self.headers.get("Content-Type", "")
                model = server.answer(method, url.path.removeprefix(ROOT), query, body, content_type)
                return self._send(200, api.ApiClient().sanitize_for_serialization(model))

            def _send(self, status: int, answer: Any) -> None:
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        return Handler


def _named(kept: list[Any], query: dict[str, str]) -> list[Any]:
    """What the filter lets through: the one predicate that is used here is the display name."""
    if "filter" not in query:
        return kept
    (predicate,) = json.loads(query["filter"])["predicates"]
    assert predicate["operation"] in {1, "EQUALS"}
    assert predicate["key"] == "display_name"
    wanted = predicate.get("stringValue") or predicate["string_value"]
    return [one for one in kept if one.display_name == wanted]


def _model(body: bytes, name: str) -> Any:
    """What was sent, as the model that the API says it is; a field of no such name is an error."""
    sent = json.loads(body)
    assert set(sent) <= set(getattr(api, name).attribute_map.values())
    return api.ApiClient().deserialize(SimpleNamespace(data=body), name)


def _package(body: bytes, content_type: str) -> str:
    """The file of an upload."""
    message = email.message_from_bytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    (part,) = message.get_payload()  # type: ignore[misc]
    return part.get_payload(decode=True).decode()  # type: ignore[union-attr]


def _parse(package: str) -> None:
    """Read the package as the server does: a PipelineSpec, and a PlatformSpec where there is one."""
    pipeline, *platform = yaml.safe_load_all(package)
    json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec())
    for one in platform:
        json_format.ParseDict(one, pipeline_spec_pb2.PlatformSpec())
