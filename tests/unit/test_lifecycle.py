"""States and what they allow, against the table written out a second time."""

from datetime import UTC, datetime, timedelta
from typing import Final

import pytest

from kms.domain.errors import KmsError, Reason
from kms.domain.lifecycle import Move, Standing, State, Use, check_move, check_use, effective_state

NOW: Final = datetime(2026, 1, 1, tzinfo=UTC)
PAST: Final = NOW - timedelta(seconds=1)
AHEAD: Final = NOW + timedelta(seconds=1)

_REFUSED: Final = {
    (State.PRE_ACTIVE, Use.PROTECT): Reason.KEY_PRE_ACTIVE,
    (State.PRE_ACTIVE, Use.PROCESS): Reason.KEY_PRE_ACTIVE,
    (State.INACTIVE, Use.PROTECT): Reason.KEY_INACTIVE,
    (State.EXPIRED, Use.PROTECT): Reason.KEY_EXPIRED,
    (State.COMPROMISED, Use.PROTECT): Reason.KEY_COMPROMISED,
    (State.COMPROMISED, Use.PROCESS): Reason.KEY_COMPROMISED,
    (State.REVOKED, Use.PROTECT): Reason.KEY_REVOKED,
    (State.REVOKED, Use.PROCESS): Reason.KEY_REVOKED,
    (State.PENDING_DESTRUCTION, Use.PROTECT): Reason.KEY_PENDING_DESTRUCTION,
    (State.PENDING_DESTRUCTION, Use.PROCESS): Reason.KEY_PENDING_DESTRUCTION,
    (State.DESTROYED, Use.PROTECT): Reason.KEY_DESTROYED,
    (State.DESTROYED, Use.PROCESS): Reason.KEY_DESTROYED,
}


# Read from the states' side, as the table of the API is; the code has it from the moves' side.
_OPEN: Final = {
    State.PRE_ACTIVE: {"activate", "compromise", "revoke", "schedule_destruction", "update"},
    State.ACTIVE: {"deactivate", "compromise", "revoke", "update"},
    State.INACTIVE: {"reactivate", "compromise", "revoke", "schedule_destruction", "update"},
    State.EXPIRED: {"compromise", "revoke", "schedule_destruction"},
    State.COMPROMISED: {"revoke", "schedule_destruction"},
    State.REVOKED: {"schedule_destruction"},
    State.PENDING_DESTRUCTION: {"cancel_destruction"},
    State.DESTROYED: set[str](),
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("move", Move)
def test_a_state_is_open_to_the_moves_of_the_table_and_to_no_other(state: State, move: Move) -> None:
    if move.value in _OPEN[state]:
        check_move(state, move)
        return
    with pytest.raises(KmsError) as refusal:
        check_move(state, move)
    assert refusal.value.reason == f"KEY_{state.value.upper()}"


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("use", Use)
def test_a_state_allows_what_the_table_says_and_nothing_else(state: State, use: Use) -> None:
    expected = _REFUSED.get((state, use))
    if expected is None:
        check_use(state, use)
        return
    with pytest.raises(KmsError) as refusal:
        check_use(state, use)
    assert refusal.value.reason is expected


@pytest.mark.parametrize(
    ("key", "state"),
    [
        (Standing("active"), State.ACTIVE),
        (Standing("active", expires_at=AHEAD), State.ACTIVE),
        (Standing("active", expires_at=NOW), State.EXPIRED),
        (Standing("active", expires_at=PAST), State.EXPIRED),
        (Standing("inactive", activated_at=AHEAD), State.PRE_ACTIVE),
        (Standing("inactive", activated_at=NOW), State.ACTIVE),
        (Standing("inactive", deactivated_at=PAST), State.INACTIVE),
        (Standing("inactive", superseded_at=PAST, expires_at=PAST), State.EXPIRED),
        (Standing("revoked", expires_at=PAST), State.REVOKED),
        (Standing("compromised"), State.COMPROMISED),
        (Standing("revoked", destruction_scheduled_at=AHEAD), State.PENDING_DESTRUCTION),
        (Standing("inactive", destruction_scheduled_at=NOW), State.DESTROYED),
        (Standing("inactive", destroyed_at=PAST), State.DESTROYED),
    ],
)
def test_a_move_that_is_due_holds_at_its_moment(key: Standing, state: State) -> None:
    assert effective_state(key, NOW) is state
