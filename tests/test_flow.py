"""Policy: numbers a user can set, and what follows from how a connection ended."""

import dataclasses

import pytest

from fastwire.flow import Limits, resume_time


@pytest.mark.parametrize("code", [1000, 1001, 1005, 1011, 4000])
def test_a_client_that_said_goodbye_is_waited_for_briefly(code: int) -> None:
    assert resume_time(Limits(resume_timeout=50.0, resume_timeout_closed=7.0), code) == 7.0


def test_a_client_whose_connection_broke_is_waited_for_longer() -> None:
    assert resume_time(Limits(resume_timeout=50.0, resume_timeout_closed=7.0), None) == 50.0
    assert resume_time(Limits(), None) > resume_time(Limits(), 1000)


def test_limits_do_not_change_under_those_who_share_them() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().high_water = 1  # type: ignore[misc]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Limits)])
def test_every_limit_is_a_bound_by_default(field: str) -> None:
    assert 0 < getattr(Limits(), field) < float("inf")


def test_a_socket_is_given_less_than_a_session_may_keep() -> None:
    """What waits in a socket cannot be spelled again for the next one: most of it has to be in the outbox."""
    assert Limits().high_water < Limits().client_memory_limit
