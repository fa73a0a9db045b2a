"""The states of a key and what each allows: the only copy in code of the table in `docs/architecture.md`.

A key's stored columns, its uses and a moment give its *state*; the SQL function `cryptography.effective_status` computes the same
and is compared with `effective_state` exhaustively. The state decides three things: whether the key may protect
(sign, encrypt, make data keys), process (decrypt), or only verify. That a key which is compromised or revoked processes is a
use of its own, which its request and a permission must allow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final

from kms.domain.errors import KmsError, Reason


class State(StrEnum):
    """Effective state at a moment. `status` maps it to the specification's five values of `key_status`."""

    PRE_ACTIVE = "pre_active"
    ACTIVE = "active"
    INACTIVE = "inactive"
    EXPIRED = "expired"
    COMPROMISED = "compromised"
    REVOKED = "revoked"
    PENDING_DESTRUCTION = "pending_destruction"
    DESTROYED = "destroyed"


class Use(StrEnum):
    """What an operation does with the private half."""

    PROTECT = "protect"
    PROCESS = "process"
    PROCESS_COMPROMISED = "process_compromised"
    PROCESS_REVOKED = "process_revoked"


@dataclass(frozen=True, slots=True)
class Standing:
    """What decides a key's state: stored columns, and whether it has reached its limit. Moments are aware; None means never."""

    status: str
    activated_at: datetime | None = None
    deactivated_at: datetime | None = None
    superseded_at: datetime | None = None
    expires_at: datetime | None = None
    destruction_scheduled_at: datetime | None = None
    destroyed_at: datetime | None = None
    is_spent: bool = field(default=False, kw_only=True)


def effective_state(key: Standing, now: datetime) -> State:
    """Return the state of *key* at *now*. Time-driven moves hold when due, whether or not a job has run.

    `destruction_scheduled_at` is the moment at which destruction falls due.
    """
    if key.destroyed_at is not None:
        return State.DESTROYED
    if key.destruction_scheduled_at is not None:
        return State.DESTROYED if key.destruction_scheduled_at <= now else State.PENDING_DESTRUCTION
    if key.status in ("revoked", "compromised"):
        return State(key.status)
    if key.status == "expired" or (key.expires_at is not None and key.expires_at <= now):
        return State.EXPIRED
    if key.deactivated_at is not None or key.superseded_at is not None:
        return State.INACTIVE
    is_activated = key.status == "active" if key.activated_at is None else key.activated_at <= now
    if not is_activated:
        return State.PRE_ACTIVE
    return State.INACTIVE if key.is_spent else State.ACTIVE


class Move(StrEnum):
    """A change of state that somebody asks for. Time makes the others: activation, expiry, destruction when due."""

    ACTIVATE = "activate"
    DEACTIVATE = "deactivate"
    REACTIVATE = "reactivate"
    REVOKE = "revoke"
    COMPROMISE = "compromise"
    SCHEDULE_DESTRUCTION = "schedule_destruction"
    CANCEL_DESTRUCTION = "cancel_destruction"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Change:
    """What a move brings with it. Fields that a move does not use are None."""

    reason: str | None = None
    occurred_at: datetime | None = None
    pending_days: int | None = None
    max_usage_count: int | None = None
    expires_at: datetime | None = None
    metadata: Mapping[str, str] | None = None


_MOVES_FROM: Final[dict[Move, frozenset[State]]] = {
    Move.ACTIVATE: frozenset({State.PRE_ACTIVE}),
    Move.DEACTIVATE: frozenset({State.ACTIVE}),
    Move.REACTIVATE: frozenset({State.INACTIVE}),
    Move.REVOKE: frozenset({State.PRE_ACTIVE, State.ACTIVE, State.INACTIVE, State.EXPIRED, State.COMPROMISED}),
    Move.COMPROMISE: frozenset({State.PRE_ACTIVE, State.ACTIVE, State.INACTIVE, State.EXPIRED}),
    Move.SCHEDULE_DESTRUCTION: frozenset({State.PRE_ACTIVE, State.INACTIVE, State.EXPIRED, State.COMPROMISED, State.REVOKED}),
    Move.CANCEL_DESTRUCTION: frozenset({State.PENDING_DESTRUCTION}),
    Move.UPDATE: frozenset({State.PRE_ACTIVE, State.ACTIVE, State.INACTIVE}),
}
_ALLOWED: Final[dict[State, frozenset[Use]]] = {
    State.PRE_ACTIVE: frozenset(),
    State.ACTIVE: frozenset({Use.PROTECT, Use.PROCESS}),
    State.INACTIVE: frozenset({Use.PROCESS}),
    State.EXPIRED: frozenset({Use.PROCESS}),
    State.COMPROMISED: frozenset({Use.PROCESS_COMPROMISED}),
    State.REVOKED: frozenset({Use.PROCESS_REVOKED}),
    State.PENDING_DESTRUCTION: frozenset(),
    State.DESTROYED: frozenset(),
}
_REFUSALS: Final[dict[State, Reason]] = {
    State.PRE_ACTIVE: Reason.KEY_PRE_ACTIVE,
    State.ACTIVE: Reason.KEY_ACTIVE,
    State.INACTIVE: Reason.KEY_INACTIVE,
    State.EXPIRED: Reason.KEY_EXPIRED,
    State.COMPROMISED: Reason.KEY_COMPROMISED,
    State.REVOKED: Reason.KEY_REVOKED,
    State.PENDING_DESTRUCTION: Reason.KEY_PENDING_DESTRUCTION,
    State.DESTROYED: Reason.KEY_DESTROYED,
}


def is_open_to(state: State, use: Use) -> bool:
    """Whether a key in *state* may be put to *use*: only to look again before it is refused, which `check_use` does."""
    return use in _ALLOWED[state]


def use_among(state: State, *uses: Use) -> Use:
    """Return the first of *uses* to which a key in *state* may be put; the first of all, to be refused, where there is none."""
    return next((use for use in uses if is_open_to(state, use)), uses[0])


def check_use(state: State, use: Use) -> None:
    """Raise the state's reason (KEY_EXPIRED, KEY_REVOKED, …) unless a key in *state* may be put to *use*."""
    if not is_open_to(state, use):
        verb = use.partition("_")[0]
        raise KmsError(_REFUSALS[state], f"a key that is {state.replace('_', ' ')} does not {verb}", state=state)


def check_repeat(state: State) -> None:
    """Raise the state's reason where a result made earlier is no longer handed out: KEY_REVOKED, KEY_COMPROMISED, ….

    A key that has reached its limit or its end since then is no obstacle: the use was charged while it had not.
    """
    if state in (State.COMPROMISED, State.REVOKED, State.PENDING_DESTRUCTION, State.DESTROYED):
        raise KmsError(_REFUSALS[state], f"what a key that is {state.replace('_', ' ')} made is not repeated", state=state)


def check_move(state: State, move: Move) -> None:
    """Raise the state's reason (KEY_ACTIVE, KEY_REVOKED, …) unless *move* leads anywhere from *state*."""
    if state not in _MOVES_FROM[move]:
        raise KmsError(
            _REFUSALS[state], f"a key that is {state.replace('_', ' ')} is not open to {move.replace('_', ' ')}", state=state
        )


_ROTATED_FROM: Final = frozenset({State.ACTIVE, State.INACTIVE, State.EXPIRED})


def check_rotation(state: State, *, allow_compromised: bool) -> None:
    """Raise the state's reason unless a key in *state* may get a successor. One that is compromised takes a caller's word."""
    if state in _ROTATED_FROM or (state is State.COMPROMISED and allow_compromised):
        return
    hint = ": say that you want it (allow_compromised)" if state is State.COMPROMISED else ""
    raise KmsError(_REFUSALS[state], f"a key that is {state.replace('_', ' ')} is not rotated{hint}", state=state)
