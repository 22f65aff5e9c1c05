"""OpenTelemetry without code of ours: the documented command, and a receiver that gets the span of a request."""

import gzip
import http.client
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from fakes import make_bundle, make_image
from model_server import TIMEOUT_S, wait_for

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def receiver() -> Iterator[tuple[int, list[Span]]]:
    """An OTLP/HTTP receiver: its port, and the spans that came."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                data = gzip.decompress(data)
            if self.path == "/v1/traces":
                request = ExportTraceServiceRequest.FromString(data)
                spans.extend(s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port, spans
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_request_is_a_span_of_the_trace_that_its_client_began(
    receiver: tuple[int, list[Span]], tmp_path: Path
) -> None:
    port, spans = receiver
    (tmp_path / "params.yaml").write_text("name: fake\nserve:\n  lame_duck_s: 0\n  log_format: json\n")
    make_bundle(tmp_path / "bundle")
    folder = Path(sys.executable).parent
    variables = {
        "OTEL_SERVICE_NAME": "pets",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "NO_PROXY": "127.0.0.1",
    }
    command = ["opentelemetry-instrument", "visionloop", "serve", "--port", "0", "--bundle", "bundle"]
    env = {**os.environ, **variables, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    with subprocess.Popen(
        [str(folder / command[0]), *command[1:]],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "log").open("w"),
        text=True,
    ) as process:
        assert process.stdout
        line = process.stdout.readline()
        assert " on http://" in line, (tmp_path / "log").read_text()
        address = line.split(" on http://")[1].split()[0]
        with closing(http.client.HTTPConnection(address, timeout=TIMEOUT_S)) as connection:
            connection.request("POST", "/predict", make_image(1), {"traceparent": f"00-{TRACE}-{PARENT}-01"})
            assert connection.getresponse().status == 200
        wait_for(lambda: any(s.kind == Span.SPAN_KIND_SERVER for s in spans))
        process.terminate()
    [span] = [s for s in spans if s.kind == Span.SPAN_KIND_SERVER]
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.name) == (TRACE, PARENT, "POST /predict")
    attributes = {a.key: a.value.int_value or a.value.string_value for a in span.attributes}
    assert 200 in (attributes.get("http.status_code"), attributes.get("http.response.status_code"))
    assert f'"trace_id": "{TRACE}"' in (tmp_path / "log").read_text(), "a line of the log leads to its trace"
