"""Ensembles over all devices: every device steps its own share of the paths."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PATHS = "paths"


@dataclass(frozen=True)
class Devices:
    """The devices that share an ensemble, in equal parts along the path axis.

    Nothing is exchanged between them. Random numbers are addressed by path, so results do not
    depend on the number of devices, up to the rounding of programs for other numbers of paths.

    - `mesh`: the devices, along one axis.
    """

    mesh: Mesh

    @classmethod
    def sharing(cls, paths: int) -> "Devices":
        """The devices for that many paths: all of this process, if there are as many paths."""
        devices = jax.local_devices()
        return cls(Mesh(np.array(devices[: sharers(paths, len(devices))]), (PATHS,)))

    @property
    def count(self) -> int:
        """The number of devices."""
        return self.mesh.size

    def padded(self, paths: int) -> int:
        """The number of paths rounded up to equal parts."""
        return -(-paths // self.count) * self.count

    def placed(self, tree: Any, layout: Any) -> Any:
        """Arrays moved to where `layout` has them."""
        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), layout)
        return jax.device_put(tree, shardings)

    def each(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        results: Callable[[Any], Any],
    ) -> Callable[..., Any]:
        """A function that every device applies to its own part, without waiting for the others.

        It is traced for the part of one device before it is divided: inside `jax.shard_map` shapes
        carry the mesh, which libraries that compare shapes (lineax) do not expect.

        **Arguments:**

        - `arguments`: the layouts of its arguments, one a positional argument.
        - `results`: gives the layouts of what it returns, from their shapes.
        """

        def shared(*whole: Any) -> Any:
            shapes = jax.tree.map(self._part, whole, arguments)
            program, out = jax.make_jaxpr(function, return_shape=True)(*shapes)

            def one(*parts: Any) -> Any:
                flat = jaxpr_as_fun(program)(*jax.tree.leaves(parts))
                return jax.tree.unflatten(jax.tree.structure(out), flat)

            return jax.shard_map(
                one, mesh=self.mesh, in_specs=arguments, out_specs=results(out), check_vma=False
            )(*whole)

        return shared

    def _part(self, whole: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        """The shape of the part of an array that one device has."""
        names = (*spec, *[None] * (whole.ndim - len(spec)))
        sizes = [n // self.count if a else n for n, a in zip(whole.shape, names, strict=True)]
        return jax.ShapeDtypeStruct(tuple(sizes), whole.dtype)


def sharers(paths: int, devices: int) -> int:
    """How many of the devices get paths if none gets more than it must."""
    each = -(-paths // devices)
    return -(-paths // each)


def along_last(dimensions: int) -> PartitionSpec:
    """The layout of an array that ends in the path axis."""
    return PartitionSpec(*[None] * (dimensions - 1), PATHS)
