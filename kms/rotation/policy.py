"""When a key is rotated without anybody asking. Pure values and one pure question: `next_rotation`.

A policy belongs to a name of its owner, and so to the key that has the name: the successor of a rotation is under it from the
moment of the switch. What is due follows from the proven record of that key, its count and a moment:

    every           the key has been active for so long
    before expiry   the key expires so soon
    at usage        the key has been used to such a share of its limit
    on compromise   the key was marked compromised
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from kms.domain.envelope import lengths_prefixed
from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.ids import KeyName, UserId
from kms.domain.keys import KeyRecord
from kms.domain.lifecycle import State, check_rotation
from kms.rotation.rotation import LAST_MOMENT

FORMAT_VERSION: Final = 1
PERIOD_MIN: Final = timedelta(days=1)
PERIOD_MAX: Final = timedelta(days=36_500)
LEAD_MIN: Final = timedelta(hours=1)
COMPROMISED: Final = "policy: compromised"
_DUE_IN: Final = frozenset({State.ACTIVE, State.INACTIVE, State.EXPIRED})
_HELPLESS: Final = "expected at least one of every, before_expiry, at_usage_percent, on_compromise"


@dataclass(frozen=True, slots=True)
class Triggers:
    """What makes a key due. None, False: this does not. `every` and `before_expiry` are whole seconds."""

    every: timedelta | None = None
    before_expiry: timedelta | None = None
    at_usage_percent: int | None = None
    on_compromise: bool = False


@dataclass(frozen=True, slots=True)
class RotationPolicy:
    """The policy of the keys that have a name of *owner_id*. `version` advances with each change."""

    owner_id: UserId
    name: KeyName
    triggers: Triggers
    is_paused: bool
    version: int

    def authenticated_bytes(self) -> bytes:
        """Return the bytes that the MAC of the policy covers."""
        triggers = self.triggers
        return lengths_prefixed(
            b"rotation policy",
            bytes((FORMAT_VERSION,)),
            self.owner_id.bytes,
            str(self.name).encode(),
            _seconds(triggers.every),
            _seconds(triggers.before_expiry),
            b"" if triggers.at_usage_percent is None else b"%d" % triggers.at_usage_percent,
            bytes((triggers.on_compromise,)),
            bytes((self.is_paused,)),
            b"%d" % self.version,
        )


@dataclass(frozen=True, slots=True)
class Due:
    """When a key is to be rotated, and why: the reason of the rotation in the log."""

    at: datetime
    reason: str


def check_triggers(triggers: Triggers, key: KeyRecord) -> None:
    """Raise MALFORMED with the name of the field for triggers that make no sense for *key*.

    Raises why a policy is of no use to the key: it belongs to the service, has a successor, or is in a state without return.
    """
    _check_may_have_policy(key)
    if triggers == Triggers():
        raise malformed("policy", _HELPLESS)
    for is_senseless, field, expected in _senseless(triggers, _lifetime(key), key.usage_limit):
        if is_senseless:
            raise malformed(field, expected)


def _check_may_have_policy(key: KeyRecord) -> None:
    if key.identity.bound_to:
        raise KmsError(Reason.WRONG_PURPOSE, "this key belongs to the service itself", bound_to=key.identity.bound_to)
    if key.superseded_at is not None:
        raise KmsError(Reason.KEY_INACTIVE, "the key was rotated: its policy is that of the key with its name")
    if key.state is not State.PRE_ACTIVE:
        check_rotation(key.state, allow_compromised=True)


def _senseless(triggers: Triggers, lifetime: timedelta | None, limit: int | None) -> Iterator[tuple[bool, str, str]]:
    """Yield what would make no sense: whether it is so, the field, and what is expected of it."""
    every, lead, percent = triggers.every, triggers.before_expiry, triggers.at_usage_percent
    if every is not None:
        yield not PERIOD_MIN <= every <= PERIOD_MAX, "every", f"expected 24 hours to {PERIOD_MAX.days} days"
        is_longer = lifetime is not None and every >= lifetime
        yield is_longer, "every", "expected less than the life of the key, which expires before"
    if lead is not None:
        yield lead < LEAD_MIN, "before_expiry", "expected at least an hour"
        is_longer = lifetime is None or lead >= lifetime
        yield is_longer, "before_expiry", "expected less than the life of the key, which must have an expiry"
        yield every is not None and lead >= every, "before_expiry", "expected less than every"
    if percent is not None:
        yield not 1 <= percent <= 99, "at_usage_percent", "expected 1 to 99"
        yield limit is None, "at_usage_percent", "expected a key with a usage limit"


def next_rotation(policy: RotationPolicy, key: KeyRecord, now: datetime) -> Due | None:
    """Return when *policy* has *key* rotated as things stand at *now*. It is due if that moment has come. None: nothing is ahead.

    A key that its owner deactivated is left alone: they want it to stop. What is due at several moments is due at the first.
    """
    triggers = policy.triggers
    if policy.is_paused or key.identity.bound_to or key.superseded_at is not None:
        return None
    if key.state is State.COMPROMISED:
        return Due(key.compromised_at or now, COMPROMISED) if triggers.on_compromise else None
    if key.deactivated_at is not None or key.state not in {*_DUE_IN, State.PRE_ACTIVE}:
        return None
    return min(_ahead(triggers, key, now), key=lambda due: due.at, default=None)


def is_due(due: Due | None, key: KeyRecord, now: datetime) -> bool:
    """Whether *key* is to be rotated at *now*. A key that is not active yet waits for its time."""
    return due is not None and due.at <= now and key.state is not State.PRE_ACTIVE


def _ahead(triggers: Triggers, key: KeyRecord, now: datetime) -> Iterator[Due]:
    began_at, limit, lifetime = key.activated_at or key.created_at, key.usage_limit, _lifetime(key)
    if triggers.every is not None:
        # A key that becomes active in thousands of years, or is to be rotated then, has no later moment than this.
        at = began_at + triggers.every if triggers.every < LAST_MOMENT - began_at else LAST_MOMENT
        yield Due(at, f"policy: every {_words(triggers.every)}")
    if triggers.before_expiry is not None and key.expires_at is not None and lifetime is not None:
        # A life that was shortened to less than the lead is lived to its end, or each successor would be due at once.
        if triggers.before_expiry < lifetime:
            yield Due(key.expires_at - triggers.before_expiry, f"policy: {_words(triggers.before_expiry)} before expiry")
        else:
            yield Due(key.expires_at, "policy: at expiry")
    percent = triggers.at_usage_percent
    if percent is not None and limit is not None and key.usage_counter * 100 >= limit * percent:
        yield Due(now, f"policy: {percent} % of its uses")


def _lifetime(key: KeyRecord) -> timedelta | None:
    return None if key.expires_at is None else key.expires_at - (key.activated_at or key.created_at)


def _words(span: timedelta) -> str:
    seconds = int(span.total_seconds())
    for unit, size in (("day", 86_400), ("hour", 3600), ("second", 1)):
        if seconds % size == 0:
            count = seconds // size
            return f"{count} {unit}{'' if count == 1 else 's'}"
    raise AssertionError("every span has seconds")


def _seconds(span: timedelta | None) -> bytes:
    return b"" if span is None else b"%d" % (span // timedelta(seconds=1))
