"""What passes chunks by: exact where the sums are, and put right where they are not."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mlstm.mosaic_gpu_flows import passed_by

GROUP, TOKENS = 8, 4


@pytest.mark.parametrize("chunks", [1, 7, 8, 9, 27])
def test_it_follows_from_what_is_written_and_read(chunks):
    rng = np.random.default_rng(chunks)
    passed = rng.standard_normal((3, chunks))
    written = rng.standard_normal((3, chunks, TOKENS))
    carry = np.where(rng.uniform(size=(3, chunks)) < 0.2, 0, 0.5)
    passed = np.where(carry > 0, passed, 0)
    read = rng.standard_normal((3, chunks, TOKENS))
    come = (passed + written.sum(-1))[:, :-1]
    read[:, 1:, 0] += come - passed[:, 1:] - read[:, 1:].sum(-1)

    def found():
        given = carry, passed[:, ::GROUP] / 0.5, written, read
        return passed_by(GROUP, *map(jnp.float32, given))

    np.testing.assert_allclose(found(), passed, atol=1e-5)
    if chunks > GROUP:  # One percent of a large number is lost, and found again at the next mark.
        large = rng.uniform(100, 200, size=3)
        written[:, 3, 1] += 1.01 * large
        read[:, 4, 2] += large
        np.testing.assert_allclose(found()[:, :GROUP], passed[:, :GROUP], atol=0.05)


def test_numbers_of_any_size_stay_finite():
    rng = np.random.default_rng(0)
    written, read = rng.standard_normal((2, 2, 20, TOKENS)) * 1e30
    found = passed_by(
        GROUP,
        jnp.ones((2, 20)),
        jnp.zeros((2, 3)),
        *(jnp.asarray(x, jnp.float32) for x in (written, read)),
    )
    assert np.isfinite(found).all()
