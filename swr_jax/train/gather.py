"""Parameters that are split over `fsdp`: whole on every device for as long as a block needs them.

Arithmetic with split parameters would make the compiler split the features of the activations
likewise, and gather the batch on every device. So each is gathered before its use, those of a block
when its turn comes; where the backward pass computes blocks again it gathers again, and no device
ever holds more than a period's blocks whole. The gradient goes back in parts: each device gets the
sum of the part that it updates (ZeRO, arXiv 1910.02054, stage 3).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from swr_jax.nn.language_model import LanguageModel
from swr_jax.train.sharding import gathered


def gathering(graphdef: nnx.GraphDef, params: Any, shardings: Any) -> LanguageModel:
    """A model that gathers its parameters when it uses them.

    Args:
        graphdef: the model without them.
        params: nested dict of arrays.
        shardings: of these, nested alike.
    """
    around = {name: value for name, value in params.items() if name != "periods"}
    around = jax.tree.map(_whole, around, {name: shardings[name] for name in around})
    model = nnx.merge(graphdef, params | around)
    for place, of_place in shardings["periods"].items():
        of_one = jax.tree.map(_without_layers, of_place)
        model.periods[place] = _Gathering(
            model.periods[place], lambda params, of_one=of_one: jax.tree.map(_whole, params, of_one)
        )
    return model


class _Gathering(nnx.Module):
    """A block that gathers its parameters first."""

    def __init__(self, block: nnx.Module, gather: Callable[[Any], Any]):
        self.block = block
        self.gather = gather

    def __call__(self, x: jax.Array, **options: Any) -> tuple[jax.Array, Any]:
        definition, variables = nnx.split(self.block)
        block = nnx.merge(definition, self.gather(nnx.to_pure_dict(variables)))
        return block(x, **options)


def _without_layers(sharding: NamedSharding) -> NamedSharding:
    """That of one layer's part of a stack of layers."""
    return NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(param: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(param, gathered(sharding))


def _whole_forward(param: jax.Array, sharding: NamedSharding) -> tuple[jax.Array, None]:
    return _whole(param, sharding), None


def _whole_backward(sharding: NamedSharding, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, sharding),)


_whole.defvjp(_whole_forward, _whole_backward)
