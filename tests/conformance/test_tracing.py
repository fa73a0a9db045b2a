"""Traces: a span for each call below the caller's, one for each step of it, and nothing of what was asked or answered."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from kms.v1 import crypto_pb2 as cpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import made
from tests.fixtures.server import Deployment

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
METADATA = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("x-request-id", "order-1"))


class Collector:
    """An OTLP collector: keeps the spans that it is sent, and the bytes that they came in."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the library names it
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}/v1/traces"

    def spans(self) -> list[Span]:
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [
            span
            for request in requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def wait_for(self, name: str, count: int) -> list[Span]:
        """Return all spans once there are *count* of *name*."""
        deadline = time.monotonic() + 15
        while sum(span.name == name for span in self.spans()) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.spans()


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    thread = threading.Thread(target=running.server.serve_forever, args=(0.05,))
    thread.start()
    yield running
    running.server.shutdown()
    thread.join()
    running.server.server_close()


@contextmanager
def traced(deployment: Deployment, endpoint: str, ratio: float = 1.0) -> Iterator[None]:
    text = deployment.config_file.read_text()
    deployment.config_file.write_text(f'{text}[tracing]\nendpoint = "{endpoint}"\nsample_ratio = {ratio}\n')
    yield
    deployment.config_file.write_text(text)


def attributes(span: Span) -> dict[str, str]:
    return {each.key: each.value.string_value for each in span.attributes}


def test_a_call_is_a_span_of_the_callers_trace_with_its_steps_below_it(deployment: Deployment, collector: Collector) -> None:
    name = "kms.v1.CryptoService/Sign"
    with traced(deployment, collector.endpoint, 0.0), deployment.serving() as server:
        caller = server.caller()
        made(caller, "ed25519", name="private-name")
        request = cpb.SignRequest(key="private-name", message=b"private-message")
        signature = caller.crypto.Sign(request, metadata=METADATA).signature
        caller.crypto.Sign(request)  # no trace of the caller's: none, with a ratio of 0
        bad = cpb.SignRequest(key="private-other", message=b"private-message")
        assert refusal(lambda request, timeout: caller.crypto.Sign(request, timeout=timeout, metadata=METADATA), bad).reason
        spans = collector.wait_for(name, 2)
    good, refused = [span for span in spans if span.name == name]
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    assert good.parent_span_id.hex() == refused.parent_span_id.hex() == PARENT
    below = {span.name for span in spans if span.parent_span_id == good.span_id}
    # Who calls is remembered for a second.
    assert below - {"store users.find"} == {"store keys.find_usable", "hsm sign", "store ledger.settle"}
    assert attributes(good) == {
        "rpc.system": "grpc",
        "rpc.service": "kms.v1.CryptoService",
        "rpc.method": "Sign",
        "kms.outcome": "OK",
        "rpc.grpc.status": "OK",
        "kms.request_id": "order-1",
    }
    assert attributes(refused)["kms.outcome"] == "KEY_NOT_FOUND"
    sent = b"".join(collector.bodies)
    for hidden in (b"private", signature, str(caller.user_id).encode(), deployment.token.pin_file.read_bytes()):
        assert hidden not in sent


def test_a_collector_that_is_away_delays_no_call_and_no_end(deployment: Deployment, collector: Collector) -> None:
    silent = "http://192.0.2.1:4318/v1/traces"  # an address that nobody has (RFC 5737)
    with traced(deployment, silent), deployment.serving() as server:
        caller = server.caller()
        made(caller, "ed25519")
        began = time.monotonic()
        for _ in range(50):
            caller.crypto.Sign(cpb.SignRequest(key="k", message=b"m"), timeout=5)
        assert time.monotonic() - began < 10
        time.sleep(1.5)  # it is trying now
        caller.crypto.Sign(cpb.SignRequest(key="k", message=b"m"), timeout=1)
        began = time.monotonic()
    assert time.monotonic() - began < 10
