"""States and what they allow, against the table written out a second time."""

from datetime import UTC, datetime, timedelta
from typing import Final

import pytest

from kms.domain.errors import KmsError
from kms.domain.lifecycle import Move, Standing, State, Use, check_move, check_use, effective_state, use_among

NOW: Final = datetime(2026, 1, 1, tzinfo=UTC)
PAST: Final = NOW - timedelta(seconds=1)
AHEAD: Final = NOW + timedelta(seconds=1)

# Read from the uses' side; the code has it from the states'.
_USED_IN: Final = {
    "protect": {State.ACTIVE},
    "process": {State.ACTIVE, State.INACTIVE, State.EXPIRED},
    "process_compromised": {State.COMPROMISED},
    "process_revoked": {State.REVOKED},
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
    if state in _USED_IN[use.value]:
        check_use(state, use)
        return
    with pytest.raises(KmsError) as refusal:
        check_use(state, use)
    assert refusal.value.reason == f"KEY_{state.value.upper()}"


@pytest.mark.parametrize(
    ("state", "allowed", "use"),
    [
        (State.ACTIVE, (Use.PROCESS_COMPROMISED, Use.PROCESS_REVOKED), Use.PROCESS),
        (State.EXPIRED, (Use.PROCESS_COMPROMISED, Use.PROCESS_REVOKED), Use.PROCESS),
        (State.COMPROMISED, (Use.PROCESS_COMPROMISED, Use.PROCESS_REVOKED), Use.PROCESS_COMPROMISED),
        (State.REVOKED, (Use.PROCESS_COMPROMISED, Use.PROCESS_REVOKED), Use.PROCESS_REVOKED),
        (State.REVOKED, (Use.PROCESS_COMPROMISED,), Use.PROCESS),
        (State.COMPROMISED, (), Use.PROCESS),
        (State.PENDING_DESTRUCTION, (Use.PROCESS_COMPROMISED, Use.PROCESS_REVOKED), Use.PROCESS),
    ],
)
def test_a_use_that_is_allowed_beside_processing_is_taken_only_where_the_state_asks_for_it(
    state: State, allowed: tuple[Use, ...], use: Use
) -> None:
    assert use_among(state, Use.PROCESS, *allowed) is use


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
