"""The order of recomputation, its counts up to 10,000 steps, and plans within a budget."""

import itertools
import math
import re
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from metacanary.replay_schedule import Costs, Order, actions, held_after, plan, work

SIZES = [1, 2, 3, 7, 8, 64, 100, 999, 1000]
COSTS = Costs(
    step_seconds=1.0,
    vjp_seconds=2.5,
    state_bytes=100,
    working_bytes=1000,
    transfer_seconds={"host": 0.1, "disk": 2.0},
)


def carried_out(num_steps, branching):
    """Goes through the actions as an interpreter would, checks each, and counts."""
    stack, current, peak, calls, moved, pulled = [], 0, 0, [], 0, []
    for name, t in actions(num_steps, branching):
        if name == "hold":
            assert current == t
            stack.append(t)
        elif name == "copy":
            assert stack[-1] == t
            current = t
        elif name == "take":
            assert stack.pop() == t
            current = t
        elif name == "step":
            assert current == t
            calls.append(t)
            current = t + 1
        elif name == "objective":
            assert current == t == num_steps == len(calls)
            assert not pulled
        else:
            assert name == "pull"
            assert current == t
            pulled.append(t)
        moved += name in ("hold", "copy", "take")
        peak = max(peak, len(stack))
    assert not stack
    return SimpleNamespace(peak=peak, calls=calls, moved=moved, pulled=pulled)


def depth_of(num_steps, branching):
    """max(1, ceil(log_branching(num_steps))) in integers."""
    return next(d for d in itertools.count(1) if branching**d >= num_steps)


@pytest.mark.parametrize("branching", [2, 3, 4, 10, 32, 1000])
@pytest.mark.parametrize("num_steps", SIZES)
def test_actions_pull_every_step_once_and_backwards(num_steps, branching):
    done = carried_out(num_steps, branching)
    assert done.pulled == list(reversed(range(num_steps)))
    assert done.calls[:num_steps] == list(range(num_steps))


@pytest.mark.parametrize("branching", [2, 3, 4, 10, 32, 1000])
@pytest.mark.parametrize("num_steps", SIZES)
def test_work_counts_what_actions_do(num_steps, branching):
    done, depth = carried_out(num_steps, branching), depth_of(num_steps, branching)
    found = work(num_steps, branching)
    assert (done.peak, len(done.calls), done.moved) == found
    assert found.states_held <= 1 + (branching - 1) * depth
    assert num_steps <= found.step_calls <= num_steps * depth


@pytest.mark.parametrize(("branching", "states", "calls"), [(2, 14, 69009), (8, 29, 41951), (100, 199, 19801)])
def test_work_of_ten_thousand_steps(branching, states, calls):
    """In full, step by step: 10,000 steps in 14 states by replaying training 6.9 times."""
    done = carried_out(10_000, branching)
    assert (done.peak, len(done.calls)) == (states, calls) == work(10_000, branching)[:2]


@pytest.mark.parametrize("num_steps", [1, 2, 50, 600, 2000, 10_000])
def test_work_of_sqrt_and_of_store_all(num_steps):
    """ceil(sqrt(T)) holds at most 2 sqrt(T) + 1 states and replays training once; T holds all and replays nothing."""
    sqrt = math.isqrt(num_steps - 1) + 1 if num_steps > 1 else 2
    assert work(num_steps, max(2, sqrt)).states_held <= 2 * math.sqrt(num_steps) + 1
    assert work(num_steps, max(2, sqrt)).step_calls <= 2 * num_steps
    assert work(num_steps, max(2, num_steps))[:2] == (num_steps, num_steps)
    assert work(num_steps, num_steps + 5) == work(num_steps, max(2, num_steps))


@pytest.mark.parametrize(
    ("num_steps", "branching", "expected"),
    [
        (
            8,
            2,
            "h0 s0 s1 s2 s3 h4 s4 s5 h6 s6 h7 s7 o8 t7 p7 t6 p6 | c4 s4 h5 t5 p5 t4 p4 "
            "| c0 s0 s1 h2 s2 h3 t3 p3 t2 p2 | c0 s0 h1 t1 p1 t0 p0",
        ),
        (
            7,
            3,
            "h0 s0 s1 s2 h3 s3 s4 s5 h6 s6 o7 t6 p6 | c3 s3 h4 s4 h5 t5 p5 t4 p4 t3 p3 "
            "| c0 s0 h1 s1 h2 t2 p2 t1 p1 t0 p0",
        ),
        (3, 3, "h0 s0 h1 s1 h2 s2 o3 t2 p2 t1 p1 t0 p0"),
        (1, 2, "h0 s0 o1 t0 p0"),
    ],
)
def test_actions_come_in_this_order(num_steps, branching, expected):
    """Hold, copy, take, step, objective, pull: parts are of ceil(n / k) steps; |: a part is cut when its turn comes."""
    assert [f"{name[0]}{t}" for name, t in actions(num_steps, branching)] == expected.replace("| ", "").split()


@pytest.mark.parametrize("objective_steps", [(1, 4, 9), (8, 9), tuple(range(1, 10)), (9,), ()])
@pytest.mark.parametrize("branching", [2, 3, 9])
def test_actions_take_an_earlier_objective_when_its_state_was_pulled(branching, objective_steps):
    """At t, right after step t was pulled back; all else as without it."""
    plain, found = list(actions(9, branching)), list(actions(9, branching, objective_steps))
    earlier = [i for i, action in enumerate(found) if action.name == "objective" and action.t < 9]
    assert [found[i].t for i in earlier] == sorted(objective_steps, reverse=True)[1:]
    assert all(found[i - 1] == ("pull", found[i].t) for i in earlier)
    assert [action for i, action in enumerate(found) if i not in earlier] == plain


@pytest.mark.parametrize("objective_steps", [(9, 4), (4, 4, 9), (0, 9), (4,), (4, 10), (-1, 9), (4.5, 9), ("4", 9)])
def test_actions_reject_objective_steps(objective_steps):
    expected = "expected ascending steps from 1 to num_steps = 9, the last of them"
    with pytest.raises(ValueError, match=f"objective_steps: got {re.escape(str([*objective_steps]))}, {expected}"):
        list(actions(9, 3, objective_steps))


def test_held_after_lists_the_stack():
    order = list(actions(8, 2))
    assert held_after(order, 0) == []
    assert held_after(order, 6) == [0, 4]
    assert held_after(order, 13) == [0, 4, 6, 7]
    assert held_after(order, len(order)) == []


@pytest.mark.parametrize("objective_steps", [(), (1, 4, -1)])
@pytest.mark.parametrize("branching", [2, 3, 10, 1000])
@pytest.mark.parametrize("num_steps", [8, 64, 999])
def test_order_is_counted_without_being_listed(num_steps, branching, objective_steps):
    """And may be gone through more than once."""
    objective_steps = [t % (num_steps + 1) for t in objective_steps]
    order = Order(num_steps, branching, objective_steps)
    expected = list(actions(num_steps, branching, objective_steps))
    assert list(order) == expected == list(order)
    assert len(order) == len(expected)
    assert held_after(order, 9) == held_after(expected, 9)


def test_order_takes_no_memory_for_its_steps():
    """A list of the 99,000 actions of 10,000 steps takes 8 MB; the tree's way to a leaf takes less than 100 kB."""
    tracemalloc.start()
    try:
        for _ in Order(10_000, 2):
            pass
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("budget", [2000, 2500, 6000, 21_000, 10**9])
@pytest.mark.parametrize("num_steps", [10, 200, 24, 99])
def test_plan_keeps_to_its_budget_and_is_the_fastest_that_does(num_steps, budget):
    found = plan(num_steps, COSTS, {"device": budget})
    assert found.device_bytes == 1000 + found.held_bytes <= budget
    assert (found.states_held, found.step_calls) == work(num_steps, found.branching)[:2]
    assert found.seconds == pytest.approx(found.step_calls + 2.5 * num_steps)
    fitting = [k for k in range(2, num_steps + 2) if 1000 + 100 * work(num_steps, k).states_held <= budget]
    assert found.step_calls == min(work(num_steps, k).step_calls for k in fitting)


def test_plan_moves_states_where_that_is_faster():
    on_device = plan(1000, COSTS, {"device": 3000})
    with_host = plan(1000, COSTS, {"device": 3000, "host": 10**6})
    assert (on_device.storage, with_host.storage) == ("device", "host")
    assert with_host.seconds < on_device.seconds
    assert with_host.device_bytes == 1000 + 3 * 100  # the newest, one on its way, the current one
    assert with_host.branching == 1000  # it stores all
    slow_disk = plan(1000, COSTS, {"device": 3000, "disk": 10**6})
    assert slow_disk.storage == "device"  # a transfer takes as long as two steps


def test_plan_is_the_fastest_of_all_branchings():
    """Also where T is just below a square: (T, states) -> the least calls."""
    for num_steps in (8, 24, 48, 99, 624):
        free = replace(COSTS, working_bytes=0)
        for states in (4, 10, 30):
            options = [work(num_steps, k) for k in range(2, num_steps + 1)]
            fitting = [found.step_calls for found in options if found.states_held <= states]
            if fitting:
                assert plan(num_steps, free, {"device": states * 100}).step_calls == min(fitting)


def test_plan_prefers_fewer_states_and_the_device():
    """Of equally fast ones: 3 steps need 3 states however wide the tree; free transfers change nothing."""
    free = replace(COSTS, transfer_seconds={"host": 0.0, "disk": 0.0})
    found = plan(7, free, {"device": 10**6, "host": 10**6, "disk": 10**6})
    assert (found.storage, found.states_held, found.branching) == ("device", 7, 7)
    equal = [k for k in range(2, 200) if work(100, k).step_calls == work(100, 34).step_calls]
    budget = {"device": 1000 + 100 * max(work(100, k).states_held for k in equal)}
    fastest = plan(100, COSTS, budget)
    assert fastest.states_held == min(
        work(100, k).states_held for k in equal if work(100, k).step_calls == fastest.step_calls
    )


def test_plan_away_from_the_device_needs_room_for_what_is_on_its_way():
    assert plan(64, COSTS, {"device": 1300, "host": 10**6}).storage == "host"
    with pytest.raises(ValueError, match="budget: got"):
        plan(64, COSTS, {"device": 1299, "host": 10**6})


def test_plan_refuses_what_does_not_fit():
    with pytest.raises(
        ValueError, match=r"budget: got {'device': 1500} bytes, expected at least 2000 on the device, or 1300 there"
    ):
        plan(512, COSTS, {"device": 1500})
    assert plan(512, COSTS, {"device": 2000}).branching == 2
    with pytest.raises(ValueError, match="budget: got"):
        plan(100, COSTS, {"device": 900, "host": 10**9})  # a step itself does not fit


def test_plan_refuses_unknown_storages():
    with pytest.raises(ValueError, match=r"budget: got \['host'\], expected device"):
        plan(10, COSTS, {"host": 10**6})
    with pytest.raises(ValueError, match=r"budget: got \['device', 'tape'\]"):
        plan(10, COSTS, {"device": 10**6, "tape": 10**6})
    unmeasured = Costs(step_seconds=1.0, vjp_seconds=1.0, state_bytes=1, working_bytes=1)
    with pytest.raises(ValueError, match=r"costs.transfer_seconds: got no disk, expected it to be measured"):
        plan(10, unmeasured, {"device": 10**6, "disk": 10**6})


def test_plan_prints_what_it_will_cost():
    text = str(plan(200, COSTS, {"device": 4000}))
    assert text == (
        "200 steps, branching 20: holds 29 states (2.83 KiB, device), 371 step calls (1.85 trainings), "
        "device peak about 3.81 KiB, about 871 s"
    )


@pytest.mark.parametrize(
    ("num_steps", "branching", "message"),
    [
        (0, 2, "num_steps: got 0, expected an integer >= 1"),
        (-1, 2, "num_steps: got -1, expected an integer >= 1"),
        (3, 1, "branching: got 1, expected an integer >= 2"),
        (3.0, 2, r"num_steps: got 3\.0, expected an integer >= 1"),
        ("3", 2, "num_steps: got '3', expected an integer >= 1"),
        (30, 30**0.5, r"branching: got 5\.477\d+, expected an integer >= 2"),
        (30, jnp.float32(5), r"branching: got Array\(5.*\), expected an integer >= 2"),
    ],
)
def test_actions_and_work_refuse_bad_numbers(num_steps, branching, message):
    for function in (lambda *a: list(actions(*a)), work, Order):
        with pytest.raises(ValueError, match=message):
            function(num_steps, branching)


@pytest.mark.parametrize("num_steps", [0, 3.0])
def test_plan_refuses_bad_numbers(num_steps):
    with pytest.raises(ValueError, match=f"num_steps: got {num_steps}, expected an integer >= 1"):
        plan(num_steps, COSTS, {"device": 10**6})


def test_numbers_may_be_of_numpy():
    steps = np.array([4, 9])
    assert list(actions(np.int64(9), np.int32(3), steps)) == list(actions(9, 3, (4, 9)))
