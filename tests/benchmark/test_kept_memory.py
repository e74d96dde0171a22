"""The allocator setting "kept", seen to work in a process of its own."""

import platform
import subprocess
import sys

import pytest

# Temporaries of 128 MiB: more than glibc's threads have in heaps of their own.
CALL_OFTEN = """
import resource
import jax, jax.numpy as jnp
from swr_jax.benchmark import timing
timing.prepare_allocator()
assert jax.devices() and timing.keep_freed_memory()
call = jax.jit(lambda x: jnp.sin(jax.lax.optimization_barrier(jnp.cos(x)))).lower(
    jax.ShapeDtypeStruct((2**25,), jnp.float32)).compile()
x = jnp.ones(2**25)
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(call(x))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_temporaries_cost_no_page_faults():
    done = subprocess.run(
        [sys.executable, "-c", CALL_OFTEN], capture_output=True, text=True, check=True
    )
    faults = [int(line) for line in done.stdout.split()]
    assert len(faults) == 5
    assert max(faults) < 100
