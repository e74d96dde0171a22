"""Timing for devices that work through calls in order, and what may take part in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swr_jax.benchmark import timing
from swr_jax.benchmark.device import contest, platform

ONCE = timing.Budget(seconds=0, min_rounds=3, max_rounds=3)


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_calls_are_in_flight_than_allowed_and_all_are_waited_for(monkeypatch, depth):
    flying, most = [], []

    def call():
        flying.append(object())
        most.append(len(flying))
        return flying[-1]

    def wait(results):
        for result in results if isinstance(results, list) else [results]:
            flying.remove(result)

    monkeypatch.setattr(jax, "block_until_ready", wait)
    samples = timing.measure({"one": call}, ONCE, in_flight={"one": depth})
    assert max(most) == depth
    assert flying == []
    assert len(samples["one"].seconds) == 3


def test_successive_calls_take_successive_inputs():
    call = timing.Rotation(lambda x, y: (x, y), [(1, 2), (3, 4), (5, 6)])
    assert [call() for _ in range(4)] == [(1, 2), (3, 4), (5, 6), (1, 2)]


def test_inputs_together_exceed_every_cache():
    assert timing.rotation(2**28) == timing.rotation(2**40) == 2
    assert timing.rotation(2**26) * 2**26 >= 126 * 2**20  # a B200's


def test_calls_in_flight_fit_the_memory():
    program = timing.compile_ahead(lambda x: jnp.concatenate([x] * 4), jnp.zeros(2**18))
    held = 4 * 2**20
    assert timing.calls_in_flight(program, 2 * 10 * held) == 10
    assert timing.calls_in_flight(program, held) == 1
    assert timing.calls_in_flight(program, 2**60) == 256


def test_many_programs_are_compiled_and_failures_are_kept():
    class Broken:
        def compile(self):
            raise ValueError("too large")

    programs = timing.compile_all(
        {
            "good": lambda: jax.jit(double).lower(jnp.ones(3)),
            "refused": lambda: jax.jit(refuse).lower(jnp.ones(3)),
            "broken": Broken,
        }
    )
    assert str(programs["refused"]) == "no kernel for (3,)"
    assert str(programs["broken"]) == "too large"
    np.testing.assert_array_equal(programs["good"](jnp.ones(3)), [2, 2, 2])


def double(x):
    return 2 * x


def entrant(function, **options):
    return contest.Entrant(function, [(jnp.arange(4.0),), (jnp.ones(4),)], **options)


def refuse(x):
    raise NotImplementedError(f"no kernel for {x.shape}")


def test_who_cannot_take_part_is_left_out_with_the_reason():
    found = contest.hold(
        {
            "ours": entrant(double),
            "same": entrant(lambda x: x + x),
            "wrong": entrant(lambda x: 2.1 * x),
            "not a number": entrant(lambda x: x / 0 * 0),
            "refused": entrant(refuse),
            "slow": entrant(double, expected=1.5),
            "slower": entrant(double, expected=float("inf")),
        },
        ONCE,
        ("ours", "refused"),
        peers=contest.Peers(dict.fromkeys(["same", "wrong", "not a number"], "ours"), 1e-3),
    )
    assert set(found["contestants"]) == {"ours", "same"}
    assert found["left_out"] == {
        "wrong": "differs from ours by 5.0e-02",
        "not a number": "differs from ours by nan",
        "refused": "does not compile: NotImplementedError: no kernel for (4,)",
        "slow": "a call might take 1.5 s",
        "slower": "a call might take longer still than at a shorter length",
    }
    # A reference that was left out is left out of the comparison too.
    assert set(found["contestants"]["same"]["speedup"]) == {"ours"}


def test_what_does_not_fit_into_memory_is_not_run(monkeypatch):
    monkeypatch.setattr(platform, "free_bytes", lambda: 8)
    found = contest.hold({"large": entrant(double)}, ONCE, ())
    assert found["contestants"] == {}
    assert found["left_out"] == {"large": "needs 0.0 GiB more memory than is free"}


def test_expectations_follow_the_longest_rows_so_far():
    def measurement(tokens, batch, **contestants):
        times = {name: {"milliseconds": {"median": ms}} for name, ms in contestants.items()}
        return {
            "tokens": tokens,
            "batch": batch,
            "mode": "forward",
            "contestants": times,
            "left_out": {},
        }

    earlier = [measurement(2048, 4, scan=10.0), measurement(1024, 8, scan=7.0, other=1.0)]
    expect = contest.expected_seconds
    assert expect(earlier, "scan", 2, 4096, mode="forward") == pytest.approx(0.02)
    assert expect(earlier, "scan", 4, 4096, mode="forward") == pytest.approx(0.04)
    assert expect(earlier, "scan", 2, 4096, mode="backward") is None
    # What was too slow is too slow for longer rows, but not for shorter ones.
    earlier[0]["left_out"]["other"] = "a call might take 3.0 s"
    assert expect(earlier, "other", 2, 4096, mode="forward") == float("inf")
    assert expect(earlier, "other", 4, 1536, mode="forward") == pytest.approx(1.125e-3)
