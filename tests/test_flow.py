"""Policy: numbers a user can set, and what follows from how a connection ended."""

import dataclasses

import pytest

from fastwire.flow import Limits, Rate, resume_time, too_many


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


def test_a_rate_is_an_average_with_bursts() -> None:
    rate = Rate(10.0)
    assert not rate.exceeded(100, 1000.0), "a whole window at once"
    assert rate.exceeded(1, 1000.0)
    rate = Rate(10.0)
    assert not any(rate.exceeded(10, float(second)) for second in range(1000))
    rate = Rate(10.0)
    found = [second for second in range(100) if rate.exceeded(12, float(second))]
    assert 40 < found[0] < 60, "a fifth more than allowed fills the bucket in some 50 seconds"


def test_a_rate_forgets_what_was_long_ago() -> None:
    rate = Rate(10.0)
    rate.exceeded(100, 5.0)
    assert not rate.exceeded(100, 15.0)
    assert rate.exceeded(1, 15.0)


@pytest.mark.parametrize(
    ("of_kernel", "of_user", "why"),
    [(1, 2, None), (2, 0, "kernel has 2"), (0, 3, "user has 3"), (2, 3, "kernel has 2")],
)
def test_clients_that_are_one_too_many(of_kernel: int, of_user: int, why: str | None) -> None:
    refusal = too_many(Limits(clients_per_kernel=2, clients_per_user=3), of_kernel, of_user)
    assert refusal is why is None or why in refusal
