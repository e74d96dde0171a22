"""What a plan says when the compiler does not give a program."""

import jax
import pytest

from pallas_kernels.targets import CHIPS
from swr_jax.train.plan import compile_step


class Refused:
    """A traced step that does not compile."""

    def __init__(self, message: str) -> None:
        self.jaxpr = jax.make_jaxpr(lambda x: x @ x)(jax.numpy.ones((4, 4)))
        self._message = message

    def lower(self) -> "Refused":
        return self

    def compile(self) -> None:
        raise jax.errors.JaxRuntimeError(self._message)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm. Exceeded", {"memory": 20.5 * 2**30}),
        ("RESOURCE_EXHAUSTED: no figure", {"memory": None}),
        ("INTERNAL: no routes\nat line 3", {"memory": None, "failure": "INTERNAL: no routes"}),
    ],
)
def test_a_step_that_does_not_compile_is_counted_all_the_same(message, expected):
    found, program, cost = compile_step(lambda: Refused(message), CHIPS["v5e"], jax.devices()[0])
    assert program is None
    assert cost.flops == 2 * 4**3
    assert found == {"fits": False, "traced_flops": cost.flops} | expected
