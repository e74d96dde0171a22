"""Shared test set-up: eight fake CPU devices, so that meshes and sharding are testable anywhere."""

import os

# JAX reads XLA_FLAGS once, when its first backend starts, so this precedes every import of jax.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
