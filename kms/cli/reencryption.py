"""`kms reencrypt`: moving one ciphertext, or the ciphertexts of a list of files, to another key."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kms.app.limits import BATCH_BYTES_MAX, BATCH_ITEMS_MAX
from kms.cli import options
from kms.cli.failures import CallError, ExitCode, Failure, failure_of, report, usage_failure
from kms.cli.file_list import ListedFile, Pace, batches, read_list
from kms.cli.inputs import STDIN, read_aad, read_encoded
from kms.cli.interruption import interruptible
from kms.cli.invocation import Invocation, command
from kms.cli.output import Encoding, json_bytes, print_fields, print_json, progress, write_bytes

if TYPE_CHECKING:
    from kms.cli.client import Client
    from kms.v1 import crypto_pb2

_AGAIN = "run the command again to go on: what is done is not done again"


def reencrypt(
    invocation: Invocation,
    file: options.InOption = None,
    in_encoding: Annotated[Encoding, typer.Option(help="How the input is written.")] = Encoding.RAW,
    key: Annotated[str, typer.Option(metavar="KEY", help="The new key. Default: the current key of the lineage.")] = "",
    source_key: Annotated[str, typer.Option(metavar="KEY", help="Refuse a ciphertext of another key than this.")] = "",
    aad: options.AadOption = None,
    aad_hex: options.AadHexOption = None,
    new_aad: Annotated[str | None, typer.Option(metavar="TEXT", help="Associated data from now on. Default: the same.")] = None,
    new_aad_hex: Annotated[str | None, typer.Option(metavar="HEX", help="The same in hexadecimal.")] = None,
    oaep_hash: options.OaepHashOption = None,
    allow_compromised: options.AllowCompromisedOption = False,
    allow_revoked: options.AllowRevokedOption = False,
    out: options.OutOption = None,
    encoding: options.EncodingOption = None,
    in_list: Annotated[Path | None, typer.Option(metavar="FILE", help="Move each file of this list; -: standard input.")] = None,
    out_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="With --in-list: write the results below here.")] = None,
    rate: Annotated[float | None, typer.Option(metavar="N", min=0.001, help="With --in-list: at most N a second.")] = None,
) -> None:
    """Move a ciphertext to the current key of its lineage, or to another key. The plaintext never leaves the service.

    A list has a path below the current directory on each line. A file with associated data of its own has that in hexadecimal
    after a tab. The result of a/b is DIR/a/b. A file whose result is there is done: run the command again after an interruption.
    A file that fails is named at the end, the others are done, and the exit code is 1.
    """
    if (in_list is None) != (out_dir is None) or (in_list is None and rate is not None):
        raise typer.BadParameter("--in-list and --out-dir go together, and --rate with them")
    if in_list is not None and (file is not None or out is not None):
        raise typer.BadParameter("give --in and --out, or --in-list and --out-dir")
    with invocation.client() as client:
        from kms.cli.words import number
        from kms.rpc import enums
        from kms.v1 import crypto_pb2

        request = crypto_pb2.ReEncryptRequest(
            aad=read_aad(aad, aad_hex),
            source_key=source_key,
            key=key,
            oaep_hash=number(enums.HASHES, oaep_hash),
            allow_compromised=allow_compromised,
            allow_revoked=allow_revoked,
        )
        if new_aad is not None or new_aad_hex is not None:
            request.new_aad = read_aad(new_aad, new_aad_hex, option="--new-aad")
        if in_list is not None and out_dir is not None:
            _move_all(invocation, client, request, read_list(in_list, out_dir), Pace(rate), in_encoding, encoding)
            return
        request.ciphertext = read_encoded(file or STDIN, in_encoding)
        moved = client.call(client.crypto.ReEncrypt, request)
    if invocation.as_json:
        ids = {"key_id": moved.key_id, "source_key_id": moved.source_key_id}
        print_json({**ids, **json_bytes("ciphertext", moved.ciphertext, encoding, out)})
    else:
        write_bytes(moved.ciphertext, out, encoding)


@dataclass(slots=True)
class Work:
    """What has become of the files of a list so far."""

    client: "Client"
    template: "crypto_pb2.ReEncryptRequest"
    encoding: Encoding | None
    moved: int = 0
    failed: list[tuple[Path, Failure]] = field(default_factory=list)

    def requests(self, files: list[ListedFile], in_encoding: Encoding) -> Iterator[tuple[tuple[ListedFile, Any], int]]:
        """Yield each file that can be read with its request, and the size of that. Each is read when it is its turn."""
        from kms.v1 import crypto_pb2

        for each in files:
            request = crypto_pb2.ReEncryptRequest()
            request.CopyFrom(self.template)
            try:
                request.ciphertext = read_encoded(each.source, in_encoding)
            except Exception as error:  # noqa: BLE001  # a bug is raised again
                self.fail(each.source, error)
                continue
            if each.aad is not None:
                request.aad = each.aad
            yield (each, request), len(request.ciphertext) + len(request.aad) + len(request.new_aad)

    def move(self, batch: list[tuple[ListedFile, Any]]) -> None:
        """Move a batch and write its results. Raises `CallError` if the service cannot work now."""
        from kms.cli.client import status_error
        from kms.v1 import crypto_pb2

        request = crypto_pb2.BatchReEncryptRequest(items=[item for _, item in batch])
        answers = self.client.call(self.client.crypto.BatchReEncrypt, request).items
        unavailable: CallError | None = None
        for (each, _), answer in zip(batch, answers, strict=True):
            if answer.HasField("error"):
                error = status_error(answer.error)
                if error.code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"):
                    unavailable = error
                else:
                    self.fail(each.source, error)
                continue
            each.result.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(answer.result.ciphertext, each.result, self.encoding)
            self.moved += 1
        if unavailable is not None:
            raise unavailable

    def fail(self, file: Path, error: Exception) -> None:
        """Note that a file failed. What is not expected of a file is raised again."""
        failure = usage_failure(str(error)) if isinstance(error, typer.BadParameter) else failure_of(error)
        if failure is None:
            raise error
        self.failed.append((file, failure))


def _move_all(
    invocation: Invocation,
    client: "Client",
    template: "crypto_pb2.ReEncryptRequest",
    files: list[ListedFile],
    pace: Pace,
    in_encoding: Encoding,
    encoding: Encoding | None,
) -> None:
    """Move each file whose result is not there yet. Say at the end which failed, also where the command is interrupted."""
    left = [each for each in files if not each.is_done]
    done_before = len(files) - len(left)
    work = Work(client, template, encoding)
    items_max = BATCH_ITEMS_MAX if pace.rate is None else min(BATCH_ITEMS_MAX, math.ceil(pace.rate))
    try:
        with interruptible(), progress(len(files), done_before, quiet=invocation.as_json) as advance:
            for batch in batches(work.requests(left, in_encoding), items_max=items_max, bytes_max=BATCH_BYTES_MAX):
                pace.wait(len(batch))
                work.move(batch)
                advance(done_before + work.moved, f"{len(work.failed)} failed")
    except CallError as error:
        raise CallError(error.code, error.reason, f"{error.message}; {_AGAIN}", error.metadata) from None
    finally:
        _conclude(invocation, work, done_before)
    if work.failed:
        raise typer.Exit(ExitCode.FAILED)


def _conclude(invocation: Invocation, work: Work, done_before: int) -> None:
    if invocation.as_json:
        failed = [
            {"file": str(file), "reason": failure.reason, "message": "; ".join(failure.lines)} for file, failure in work.failed
        ]
        print_json({"moved": work.moved, "done_before": done_before, "failed": failed})
        return
    for file, failure in work.failed:
        lines = tuple(f"{file}: {line}" for line in failure.lines)
        report(Failure(failure.code, failure.reason, lines, failure.exit_code, failure.metadata), as_json=False)
    print_fields({"moved": work.moved, "done before": done_before, "failed": len(work.failed)})


def register(app: typer.Typer) -> None:
    """Add this command to *app*."""
    command(
        app,
        "reencrypt",
        "kms reencrypt --in secret.kms --out secret-2.kms",
        "find . -name '*.kms' | kms reencrypt --in-list - --out-dir ../moved --rate 100",
        "kms reencrypt --allow-compromised --key backups-2 --in secret.kms --out secret-2.kms",
    )(reencrypt)
