"""A bare gRPC server that refuses every Decrypt, in a process of its own: what refusing cannot cost less than.

    python -m tests.conformance.refuser CERTIFICATE KEY AUTHORITY < PIPE

It says its port, and when the pipe is closed how many calls it refused and the seconds of processor time that took.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import grpc
import uvloop

from tests.fixtures.server import Deployment


def refusal_seconds(deployment: Deployment, flood: Callable[[str], object]) -> float:
    """Let *flood* call the address of one, and return the seconds of processor time it took for each refusal."""
    files = [str(deployment.directory / name) for name in ("server.crt", "server.key", "authority.crt")]
    command = [sys.executable, "-m", "tests.conformance.refuser", *files]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        flood(f"127.0.0.1:{json.loads(process.stdout.readline())}")
        process.stdin.close()
        calls, seconds = json.loads(process.stdout.readline())
    return float(seconds / calls)


async def _serve(certificate: bytes, key: bytes, authority: bytes) -> None:
    calls = 0

    async def refuse(_: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> NoReturn:
        nonlocal calls
        calls += 1
        await context.abort(grpc.StatusCode.NOT_FOUND, "there is nothing here")

    server = grpc.aio.server()
    handlers = {"Decrypt": grpc.unary_unary_rpc_method_handler(refuse)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("kms.v1.CryptoService", handlers),))
    credentials = grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    before = time.process_time()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(json.dumps([calls, time.process_time() - before]), flush=True)
    await server.stop(None)


if __name__ == "__main__":
    uvloop.run(_serve(*(Path(file).read_bytes() for file in sys.argv[1:4])))
