"""What waits for a kernel, in the bounds of memory."""

import asyncio

from fastwire.budgets import FLOOR, Budget
from fastwire.charge import FREE, LOOK, LOOK_SELDOM, Charge
from fastwire.flow import MIB

LIMIT = 8 * MIB


def test_much_is_counted_and_little_is_not() -> None:
    async def run() -> None:
        budget = Budget(100 * MIB)
        charge = Charge(budget, LIMIT, lambda: None)
        for nbytes, counted in (FREE, 0), (FREE + 1, FREE + 1), (3 * MIB, 3 * MIB), (FREE, 0), (2 * MIB, 2 * MIB):
            charge.set(nbytes)
            assert budget.used == charge.nbytes == counted
        charge.end()
        charge.set(2 * MIB)
        assert budget.used == charge.nbytes == 0, "nothing waits any more, whoever looks late"

    asyncio.run(run())


def test_what_may_wait_depends_on_others_down_to_a_floor() -> None:
    budget = Budget(10 * MIB)
    charge = Charge(budget, LIMIT, lambda: None)
    assert charge.most == LIMIT
    budget.take(7 * MIB)
    assert charge.most == 3 * MIB
    budget.take(70 * MIB)
    assert charge.most == FLOOR
    assert Charge(budget, FREE // 2, lambda: None).free == FREE // 2


def test_somebody_looks_while_much_waits_and_less_often_when_nothing_moves() -> None:
    async def run() -> None:
        waits = [2 * MIB] * 4 + [1 * MIB] * 2 + [0]
        left = iter(waits)
        pauses = []
        loop = asyncio.get_running_loop()
        call_later = loop.call_later
        ended = asyncio.Event()

        def at_once(delay, callback, *args):
            pauses.append(delay)
            return call_later(0, callback, *args)

        def look() -> None:
            charge.set(next(left))
            if not charge.nbytes:
                ended.set()

        charge = Charge(Budget(100 * MIB), LIMIT, look)
        loop.call_later = at_once
        look()
        await ended.wait()
        assert pauses == [LOOK, 2 * LOOK, 4 * LOOK, 8 * LOOK, LOOK, 2 * LOOK]
        assert all(pause <= LOOK_SELDOM for pause in pauses)
        assert next(left, None) is None

    asyncio.run(run())
