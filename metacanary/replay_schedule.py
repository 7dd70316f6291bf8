"""In which order REPLAY recomputes states, what that costs, and the choice of it for a memory budget.

The states s[0], ..., s[T-1] are needed backwards. A lazy k-ary tree cuts the steps into at most k parts, holds the
state at the start of each, and does the same with a part when its turn comes, the last part first. One number spans
what is usual: branching = 2 is the binary tree, ceil(sqrt(T)) holds about 2 sqrt(T) states and replays training once,
and branching >= T stores all states and replays nothing.

    costs = metagradient.measure(step_fn, objective_fn, state, metaparams)
    chosen = plan(600, costs, {"device": 8 * 2**30})
    print(chosen)  # branching, states held, step calls, bytes, seconds

Nothing here computes: the order is a plain iteration over actions, which `metagradient.replay` carries out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from numbers import Integral
from typing import NamedTuple


class Action(NamedTuple):
    """One thing to do; t is the number of the state that it reads or of the step that it takes.

    name: "hold", keep the current state s[t] on top of the stack; "copy", make the state on top current, keeping it
    there; "take", the same, taking it off; "step", from s[t] to s[t+1]; "objective", evaluate it at the current state
    s[t], with its derivatives; "pull", pull the adjoint back through step t at the current state s[t].
    """

    name: str
    t: int


def actions(num_steps: int, branching: int, objective_steps: Sequence[int] = ()) -> Iterator[Action]:
    """All that a replay does, in order.

    Args:
      num_steps: T, an integer >= 1.
      branching: k, an integer >= 2.
      objective_steps: steps after which the objective is taken, ascending, from 1 to T, the last of them T; none for
        T alone.

    Raises:
      ValueError: smaller numbers, other steps, or what is no integer.

    Guarantees:
      Each step is pulled back once, from T - 1 down, after the objective at T and with its state current.
      The objective at an earlier t is taken right after step t was pulled back: s[t] is current then, and the adjoint
      that its derivative is added to is that of s[t]. Nothing is computed or held for it that was not without it.
      The first T step calls go forward from 0 to T - 1 with none repeated.

    References:
      arXiv 2503.13751, Section 2 (the lazy k-ary tree).
    """
    check_tree(num_steps, branching)
    earlier = check_objective_steps(num_steps, objective_steps)[:-1]
    yield Action("hold", 0)
    for action in _part(0, num_steps, num_steps, branching, is_current=True):
        yield action
        if action.name == "pull" and action.t in earlier:
            yield Action("objective", action.t)


def _part(low: int, high: int, num_steps: int, branching: int, *, is_current: bool) -> Iterator[Action]:
    """The actions of steps [low, high), whose first state is on top of the stack and is gone afterwards."""
    if high - low == 1:
        if high == num_steps:  # the first part to be reached: s[T] has not been computed yet
            yield Action("step", low)
            yield Action("objective", high)
        yield Action("take", low)
        yield Action("pull", low)
        return
    if not is_current:
        yield Action("copy", low)
    starts = range(low, high, -(-(high - low) // branching))
    for t in range(low, starts[-1]):
        yield Action("step", t)
        if t + 1 in starts:
            yield Action("hold", t + 1)
    for start, end in reversed([*zip(starts, [*starts[1:], high], strict=True)]):
        yield from _part(start, end, num_steps, branching, is_current=end == high)


@dataclass(frozen=True)
class Order:
    """What `actions` of the same arguments yields, made anew each time it is gone through: no list of T log T actions.

    Raises:
      ValueError: as of `actions`.
    """

    num_steps: int
    branching: int
    objective_steps: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_tree(self.num_steps, self.branching)
        check_objective_steps(self.num_steps, self.objective_steps)

    def __iter__(self) -> Iterator[Action]:
        return actions(self.num_steps, self.branching, self.objective_steps)

    def __len__(self) -> int:
        found = work(self.num_steps, self.branching)
        objectives = len(check_objective_steps(self.num_steps, self.objective_steps))
        return found.transfers + found.step_calls + objectives + self.num_steps


def held_after(order: Iterable[Action], done: int) -> list[int]:
    """The states on the stack after the first `done` actions, from its bottom up."""
    stack: list[int] = []
    for action in islice(order, done):
        if action.name == "hold":
            stack.append(action.t)
        elif action.name == "take":
            stack.pop()
    return stack


class Work(NamedTuple):
    """What a replay costs: states held at a time, s[0] among them; step calls; states put away and brought back."""

    states_held: int
    step_calls: int
    transfers: int


def work(num_steps: int, branching: int) -> Work:
    """Count what `actions` does, without going through it.

    Args and Raises as of `actions`.

    Guarantees:
      Equal to the counts over `actions(num_steps, branching)`. With depth = max(1, ceil(log_branching(num_steps))):
      states_held <= 1 + (branching - 1) * depth, and num_steps <= step_calls <= num_steps * depth.
    """
    check_tree(num_steps, branching)
    held, calls, brought = _part_work(num_steps, branching)
    return Work(held, calls + 1, 1 + brought)


@cache
def _part_work(length: int, branching: int) -> tuple[int, int, int]:
    """States held, step calls, and transfers of a part whose first state is held and current."""
    if length == 1:
        return 1, 0, 1
    size = -(-length // branching)
    before, last = -(-length // size) - 1, (length - 1) % size + 1
    (full_held, full_calls, full_moved), (last_held, last_calls, last_moved) = (
        _part_work(n, branching) for n in (size, last)
    )
    copies = before if size > 1 else 0  # a full part is not current when its turn comes
    held = max(before + last_held, before - 1 + full_held)
    return held, before * (size + full_calls) + last_calls, before * (1 + full_moved) + copies + last_moved


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one step costs, as `metagradient.measure` finds or as you know it.

    Attributes:
      step_seconds: of one training step.
      vjp_seconds: of pulling the adjoint back through one step.
      state_bytes: of what changes in the state from step to step; a held state takes so much.
      working_bytes: device memory beside held states: arguments, results and temporaries of the largest call.
      transfer_seconds: of putting one state away and of bringing it back, the mean of both, by storage.
    """

    step_seconds: float
    vjp_seconds: float
    state_bytes: int
    working_bytes: int
    transfer_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a replay is to be done, and what it will cost.

    Attributes:
      num_steps: T.
      branching: for `metagradient.replay`.
      storage: "device", "host" or "disk": where held states live.
      states_held: at most so many at a time, s[0] among them.
      step_calls: T and those that are repeated.
      held_bytes: of the states held.
      device_bytes: expected peak of device memory, with what a step works in.
      seconds: expected.
    """

    num_steps: int
    branching: int
    storage: str
    states_held: int
    step_calls: int
    held_bytes: int
    device_bytes: int
    seconds: float

    def __str__(self) -> str:
        """One line for a log."""
        held = f"holds {self.states_held} states ({_size(self.held_bytes)}, {self.storage})"
        calls = f"{self.step_calls} step calls ({self.step_calls / self.num_steps:.2f} trainings)"
        peak = f"device peak about {_size(self.device_bytes)}"
        return (
            f"{self.num_steps} steps, branching {self.branching}: {held}, {calls}, {peak}, about {self.seconds:.3g} s"
        )


def _size(num_bytes: int) -> str:
    """Bytes with three digits and a unit."""
    power = min(3, max(0, (num_bytes.bit_length() - 1) // 10))
    return f"{num_bytes / 1024**power:.3g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


def plan(num_steps: int, costs: Costs, budget: Mapping[str, int]) -> Plan:
    """Choose branching and storage for the least expected time within a memory budget.

    Args:
      num_steps: T >= 1.
      costs: of a step.
      budget: bytes by storage: "device", always, for all that a replay needs there; "host" and "disk", if held states
        may live there.

    Returns:
      The fastest plan that fits; of equally fast ones that with the fewest states, on the device if it may be.

    Raises:
      ValueError: num_steps < 1, an unknown storage, a storage whose transfers were not measured, or a budget that no
        plan fits.

    Guarantees:
      Its counts are those of `work`; states_held * state_bytes is within the budget of its storage, and
      device_bytes within that of the device.
    """
    check_tree(num_steps, 2)
    unknown = [name for name in budget if name not in STORAGES]
    if unknown or "device" not in budget:
        raise ValueError(f"budget: got {sorted(budget)}, expected device, and host and disk where they may be used")
    plans = [_best(num_steps, costs, storage, budget) for storage in STORAGES if storage in budget]
    fitting = [found for found in plans if found is not None]
    if not fitting:
        least, moving = (n * costs.state_bytes for n in (work(num_steps, 2).states_held, _MOVING))
        raise ValueError(
            f"budget: got {dict(budget)} bytes, expected at least {costs.working_bytes + least} on the device, or "
            f"{costs.working_bytes + moving} there and {least} on the host or disk, for {num_steps} steps "
            f"with states of {costs.state_bytes} bytes; a microbatch needs less to work in"
        )
    return min(fitting, key=lambda found: found.seconds)


STORAGES = ("device", "host", "disk")
_MOVING = 3  # states on the device while the others are elsewhere: the newest, one on its way, the current one


def _best(num_steps: int, costs: Costs, storage: str, budget: Mapping[str, int]) -> Plan | None:
    """The fastest plan with one storage, None if none fits."""
    moved = costs.transfer_seconds.get(storage, 0.0 if storage == "device" else None)
    if moved is None:
        raise ValueError(f"costs.transfer_seconds: got no {storage}, expected it to be measured")
    room = budget["device"] - costs.working_bytes if storage == "device" else budget[storage]
    on_the_way = 0 if storage == "device" else _MOVING * costs.state_bytes
    if on_the_way + costs.working_bytes > budget["device"]:
        return None
    best: Plan | None = None
    for branching in _branchings(num_steps):
        held, calls, transfers = work(num_steps, branching)
        if held * costs.state_bytes > room:
            continue
        seconds = calls * costs.step_seconds + num_steps * costs.vjp_seconds + transfers * moved
        if best is None or (seconds, held) < (best.seconds, best.states_held):
            size = held * costs.state_bytes
            best = Plan(
                num_steps=num_steps,
                branching=branching,
                storage=storage,
                states_held=held,
                step_calls=calls,
                held_bytes=size,
                device_bytes=costs.working_bytes + (size if storage == "device" else on_the_way),
                seconds=seconds,
            )
    return best


def _branchings(num_steps: int) -> list[int]:
    """All that differ: those up to sqrt(T) + 1, and above it the smallest for each length of the parts."""
    root = math.isqrt(num_steps)
    return sorted({*range(2, root + 2), *(max(2, -(-num_steps // length)) for length in range(1, root + 1))})


def check_objective_steps(num_steps: int, objective_steps: Sequence[int]) -> tuple[int, ...]:
    """The steps after which an objective is taken, T alone if none are given; ValueError as of `actions`."""
    steps = tuple(objective_steps) or (num_steps,)
    integers = all(isinstance(t, Integral) for t in steps)
    if not integers or steps != tuple(sorted(set(steps))) or steps[0] < 1 or steps[-1] != num_steps:
        expected = f"ascending steps from 1 to num_steps = {num_steps}, the last of them"
        raise ValueError(f"objective_steps: got {list(steps)}, expected {expected}")
    return tuple(map(int, steps))


def check_tree(num_steps: int, branching: int) -> None:
    """Raise ValueError for less than one step or a branching below 2, which make no tree, and for no integers."""
    for name, value, least in (("num_steps", num_steps, 1), ("branching", branching, 2)):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name}: got {value!r}, expected an integer >= {least}")
