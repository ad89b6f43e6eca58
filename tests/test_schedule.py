"""Schedules against the papers' formulas, read naively."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pl_sparse.core.registry import build, catalogue
from pl_sparse.schedule import Constant, Cubic, Cyclic, Exponential, Iterative, Linear, OneShot, Schedule
from pl_sparse.schedule.clock import Clock

NAMES = sorted(catalogue(Schedule))


def run(schedule: Schedule, total: int) -> dict[int, tuple[float, ...]]:
    return {step: due for step in range(total) if (due := schedule.levels(step, total))}


def test_cubic_meets_the_published_numbers() -> None:
    # s_f (1 - (1 - x)^3) at tenths: Zhu and Gupta, equation 1
    golden = [0, 0.2439, 0.4392, 0.5913, 0.7056, 0.7875, 0.8424, 0.8757, 0.8928, 0.8991, 0.9]
    due = run(Cubic(final=0.9, begin="0 steps", end="100 steps", every=10), 200)
    assert list(due) == list(range(0, 101, 10))
    assert [round(level, 4) for (level,) in due.values()] == golden


def test_a_level_at_end_always_happens() -> None:
    due = run(Cubic(final=0.9, begin="3 steps", end="50 steps", every=20), 60)
    assert list(due) == [3, 23, 43, 50] and due[50] == (0.9,)
    assert run(Linear(final=0.5, end=1.0, every=7), 20)[19] == (0.5,)


@given(
    st.sampled_from([name for name in NAMES if name != "tickets"]),  # whose rounds fill the training
    st.floats(0, 0.99),
    st.integers(0, 40),
    st.integers(0, 60),
    st.integers(1, 30),
    st.integers(61, 120),
)
def test_every_schedule_ends_at_the_final_sparsity(
    name: str, final: float, begin: int, length: int, every: int, total: int
) -> None:
    end = min(begin + length, total)
    schedule = build(Schedule, name, final=final, begin=f"{begin} steps", end=f"{end} steps", every=every)
    due = run(schedule, total)
    assert min(due) >= begin and max(due) <= min(end, total - 1)
    levels = [level for found in due.values() for level in found]
    assert levels[-1] == final and all(0 <= level <= final for level in levels)
    if name != "cyclic":
        assert levels == sorted(levels)
    clock = Clock(schedule)
    clock.fit(total)
    assert {step: found for step in range(total + 1) if (found := clock.levels(step))} == due
    last = min(step for step, found in due.items() if step >= schedule.span(total)[1] or name == "constant")
    assert schedule.reached(last + 1, total) and not schedule.reached(min(due), total)


def test_iterative_removes_a_part_of_what_remains() -> None:
    density, expected = 1.0, []
    while True:
        density *= 1 - 0.2
        if density <= 0.1:
            break
        expected.append(1 - density)
    rounds = Iterative(final=0.9, rate=0.2).rounds
    assert rounds == pytest.approx([*expected, 0.9])
    assert len(run(Iterative(final=0.9, begin=0.0, end=0.5), 1000)) == len(rounds)
    assert Iterative(final=0.488, rate=0.2).rounds == pytest.approx([0.2, 0.36, 0.488])


def test_exponential_falls_by_one_factor() -> None:
    due = run(Exponential(final=0.99, begin="0 steps", end="40 steps", every=10), 50)
    densities = [1 - level for (level,) in due.values()]
    assert [b / a for a, b in itertools.pairwise(densities)] == pytest.approx([10**-0.5] * 4)


def test_oneshot_rounds_are_synflows() -> None:
    levels = OneShot(final=0.99, rounds=100).levels(0, 10)
    assert levels == pytest.approx([1 - 0.01 ** (k / 100) for k in range(1, 101)])
    assert OneShot(final=0.9).levels(1, 10) == ()


def test_constant_and_cyclic() -> None:
    assert run(Constant(final=0.5, every=4, end="8 steps"), 20) == {0: (0.5,), 4: (0.5,), 8: (0.5,)}
    assert Constant(final=0.5).reached(1, 20) and not Constant(final=0.5).reached(0, 20)
    assert run(Cyclic(final=0.9, begin=0.0, end=0.8, cycles=2, low=0.1), 10) == {
        0: (0.9,),
        2: (0.1,),
        4: (0.9,),
        6: (0.1,),
        8: (0.9,),
    }


def test_times_in_epochs() -> None:
    schedule = Cubic(final=0.5, begin="1 epoch", end="3 epochs", every="1 epoch")
    assert list(run(schedule.resolved(10), 100)) == [10, 20, 30]
    assert not schedule.fractional and Cubic(final=0.5).fractional
    with pytest.raises(ValueError, match="epochs, but their length is not known"):
        schedule.resolved(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"final": 1.5}, r"final=1.5 must be a fraction"),
        ({"final": -0.1}, "final=-0.1"),
        ({"final": 0.5, "begin": 0.9, "end": 0.2}, "ends before it begins"),
        ({"final": 0.5, "begin": "5 weeks"}, "is not a time"),
        ({"final": 0.5, "begin": -1}, "must not be negative"),
        ({"final": 0.5, "end": 1.5}, "optimizer steps are whole"),
        ({"final": 0.5, "every": 0}, "every=0"),
        ({"final": 0.5, "every": 2.5}, "every=2.5"),
        ({"final": 0.5, "initial": 0.6}, "above final"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cubic(**arguments)


def test_a_schedule_must_fit_the_training() -> None:
    with pytest.raises(ValueError, match="only 10 optimizer steps"):
        Cubic(final=0.5, end="20 steps").levels(0, 10)
    with pytest.raises(ValueError, match="only 10 optimizer steps"):
        Cubic(final=0.5, begin="10 steps", end="10 steps").levels(0, 10)
    with pytest.raises(ValueError, match="ends before it begins"):
        Cubic(final=0.5, begin="8 steps", end=0.5).levels(0, 10)
    for cls, extra in ((Exponential, {}), (Iterative, {})):
        with pytest.raises(ValueError, match=r"final=1\.0"):
            cls(final=1.0, **extra)
    with pytest.raises(ValueError, match="rate"):
        Iterative(final=0.5, rate=1.0)
    with pytest.raises(ValueError, match="rounds"):
        OneShot(final=0.5, rounds=0)
    with pytest.raises(ValueError, match="cycles"):
        Cyclic(final=0.5, cycles=0)


def test_cosine_is_slow_at_both_ends() -> None:
    schedule = build(Schedule, "cosine", final=0.8)
    assert schedule.curve(0.25) == pytest.approx(0.8 * (1 - math.cos(math.pi / 4)) / 2)


def test_unknown_names_are_suggested() -> None:
    with pytest.raises(ValueError, match="Did you mean 'cubic'"):
        build(Schedule, "cubik", final=0.5)
