"""`kms audit`: the trail for an auditor."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kms.cli.failures import ExitCode
from kms.cli.invocation import Invocation, command
from kms.cli.output import print_json
from kms.domain.fields import NUMBER_MAX

_RANGE_ROWS = 200_000

if TYPE_CHECKING:
    from kms.domain.key_check import KeyReport
    from kms.domain.trail_check import TrailReport
    from kms.v1.audit_pb2 import KeyComparison


def key(invocation: Invocation) -> None:
    """Print the public key with which checkpoints are verified, as a C2SP verifier key. Keep it where the database is not."""
    config = invocation.operator_config("database")
    from kms.wiring import audit as wiring

    found = wiring.audit_key(config)
    if invocation.as_json:
        print_json({"key": str(found), "origin": found.name})
    else:
        print(found)


def export(
    invocation: Invocation,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file.", show_default=False)],
    after: Annotated[
        int,
        typer.Option(
            "--after", metavar="ROWS", min=0, max=NUMBER_MAX, help="Leave out what a checkpoint of so many rows covers."
        ),
    ] = 0,
) -> None:
    """Write the trail, its checkpoints and the keys to a file, a JSON object a line, for kms audit verify. Needs [database].

    The keys come without their envelopes, which no file of an auditor needs.

    Rows of partitions that were archived are left out; the file then begins with a checkpoint that covers them.
    """
    config = invocation.operator_config("database")
    from kms.wiring import audit as wiring

    lines = wiring.export_trail(config, file, after)
    if invocation.as_json:
        print_json({"file": str(file), "lines": lines})
    else:
        print(f"{lines} lines in {file}")


def verify(
    invocation: Invocation,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="What kms audit export wrote.", show_default=False)
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", metavar="KEY", help="The verifier key, as kms audit key prints it.", show_default=False)
    ] = None,
    checkpoints: Annotated[
        Path | None, typer.Option("--checkpoints", metavar="FILE", help="The checkpoints that the service wrote to a file.")
    ] = None,
    begins_at: Annotated[
        int, typer.Option("--begins-at", metavar="ROWS", min=0, help="How many rows are left out or archived, exactly.")
    ] = 0,
    restored: Annotated[
        list[int] | None,
        typer.Option("--restored", metavar="EPOCH", min=1, help="An epoch that an administrator began; again for each."),
    ] = None,
) -> None:
    """Verify an exported trail, with its public key and nothing else: no database, no service, no token.

    Without FILE the service verifies the trail in its database, for an auditor who trusts the service.

    Finds a row that was changed, removed or inserted, and a checkpoint that was. Only --checkpoints, with a copy made before
    the export, shows that the end was cut off. A trail that begins later than --begins-at says, an epoch that --restored does
    not name, and rows without any checkpoint are differences too. So is a key whose row is not what the trail says. The report
    ends with what was not checked.
    """
    from kms.domain.not_checked import not_checked
    from kms.domain.trail_check import judged

    if file is None:
        if key is not None or checkpoints is not None:
            raise typer.BadParameter("--key and --checkpoints: expected FILE with them")
        report = _asked(invocation)
    elif key is None:
        raise typer.BadParameter("--key: expected the verifier key of FILE")
    else:
        from kms.wiring import audit as wiring

        report = wiring.verify_file(file, key, checkpoints)
    report = judged(report, begins_at, restored or ())
    rest = not_checked(report, has_outside=checkpoints is not None)
    if invocation.as_json:
        print_json({**asdict(report), "not_checked": [asdict(each) for each in rest]})
    else:
        print("\n".join([*told(report), *(f"not checked: {each.message}" for each in rest)]))
    if report.finding is not None or (report.keys is not None and report.keys.differences):
        raise typer.Exit(ExitCode.NOT_VALID)


def _asked(invocation: Invocation) -> "TrailReport":
    """Return what the service says of its trail and its keys.

    It is asked a range of rows or of keys at a time: each is answered within a call's time.
    """
    from kms.domain.key_check import joined
    from kms.domain.trail_check import Difference, EpochStart, Finding, TrailReport
    from kms.v1 import audit_pb2

    size, answers = 0, list[audit_pb2.VerifyTrailResponse]()
    with invocation.client() as client:
        is_last = False
        while not is_last:
            request = audit_pb2.VerifyTrailRequest(from_size=size, to_size=size + _RANGE_ROWS)
            answers.append(client.call(client.audit.VerifyTrail, request))
            size = answers[-1].verified_size
            is_last = size < request.to_size or answers[-1].HasField("finding")
        ends = [client.call(client.audit.VerifyTrail, audit_pb2.VerifyTrailRequest(from_size=size))]
        while after := ends[-1].keys.next_after:
            request = audit_pb2.VerifyTrailRequest(from_size=size, keys_after=after)
            ends.append(client.call(client.audit.VerifyTrail, request))
    if not answers[-1].HasField("finding"):
        answers.append(ends[0])
    found = answers[-1]
    what = found.finding
    by_size = what.by_size if what.HasField("by_size") else None
    finding = Finding(Difference(what.difference), what.after_size, by_size, what.message) if found.HasField("finding") else None
    epochs = tuple(EpochStart(each.number, each.goes_on_from) for answer in answers for each in answer.epochs)
    checkpoints = sum(answer.checkpoints for answer in answers)
    keys = joined(_key_report(each.keys) for each in ends) if ends[0].HasField("keys") else None
    return TrailReport(answers[0].begun_at, found.verified_size, checkpoints, found.unsealed, epochs, (), finding, keys)


def _key_report(found: "KeyComparison") -> "KeyReport":
    from kms.domain.key_check import KeyDifference, KeyFinding, KeyReport

    findings = tuple(
        KeyFinding(KeyDifference(each.difference), each.key_id, each.column, each.message) for each in found.findings
    )
    counts = (found.compared, found.partly, found.not_comparable, found.unsigned, found.differences)
    return KeyReport(*counts, findings, found.next_after)


def told(report: "TrailReport") -> list[str]:
    """Return the sentences that a report is."""
    lines = [f"{report.verified_size} rows are as {report.checkpoints} checkpoints say"]
    lines += [f"epoch {each.epoch} goes on from {each.goes_on_from} rows" for each in report.epochs]
    lines += [
        f"rolled back: epoch {each.epoch} reached {each.reached} rows, and epoch {each.next_epoch} goes on from "
        f"{each.goes_on_from}"
        for each in report.rollbacks
    ]
    finding = report.finding
    if finding is None:
        lines.append(f"not yet sealed: {report.unsealed}")
    else:
        until = f"and not after row {finding.by_size}" if finding.by_size is not None else "and before the next checkpoint"
        lines += [f"{finding.difference}: {finding.message}", f"the difference lies behind row {finding.after_size} {until}"]
    return lines if report.keys is None else [*lines, *_told_of_keys(report.keys)]


def _told_of_keys(keys: "KeyReport") -> list[str]:
    if not keys.differences:
        return [f"{keys.compared + keys.partly} keys are as the trail says"]
    lines = [f"{each.difference}: key {each.key_id}: {each.message}" for each in keys.findings]
    if keys.differences > len(lines):
        lines.append(f"and {keys.differences - len(lines)} more differences of keys")
    return [*lines, f"{keys.compared + keys.partly} keys were compared with the trail: {keys.differences} differences"]


def register(audit: typer.Typer) -> None:
    """Add these commands to the group *audit*."""
    command(audit, "key", "kms audit key --config kms.toml")(key)
    command(audit, "export", "kms audit export trail.jsonl --config kms.toml")(export)
    command(audit, "verify", "kms audit verify", "kms audit verify trail.jsonl --key KEY --checkpoints checkpoints.jsonl")(verify)
