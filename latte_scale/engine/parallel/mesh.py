"""HSDP: which ranks form one replica of the sharded weights, and which hold the same shard of different replicas.

In: the ranks and the number of replicas. Out: a device mesh and this rank's place in it. The decision worth knowing: a
replica consists of consecutive ranks, which launchers place on the same machine. Weights are therefore gathered within
a machine, and only reduced gradients cross between replicas. The result is unchanged: gradients are summed over all
ranks either way, and all replicas apply the same update.
"""

import socket
from dataclasses import dataclass
from typing import Literal

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from latte_scale.engine.dist import Ranks


@dataclass(frozen=True)
class ShardMesh:
    """The mesh for fully_shard, and this rank's place: piece `shard` of `num_shards`, in replica `replica`."""

    mesh: DeviceMesh
    group: ProcessGroup  # the ranks of this rank's replica: they hold every piece once
    shard: int
    num_shards: int
    replica: int
    num_replicas: int


def make_shard_mesh(ranks: Ranks, replicate: int | Literal["node"]) -> ShardMesh:
    """`replicate` replicas of the weights ("node": one per machine), each sharded over its ranks. A collective.

    Raises ValueError if the ranks do not divide into that many replicas of equal size.
    """
    copies = _num_hosts(ranks) if replicate == "node" else replicate
    if ranks.size % copies:
        raise ValueError(
            f"engine.replicate is {copies}, but {ranks.size} ranks cannot be cut into {copies} copies of one size; "
            f"set engine.replicate to a divisor of {ranks.size}"
        )
    num_shards = ranks.size // copies
    replica, shard = divmod(ranks.rank, num_shards)
    if copies == 1:
        mesh = init_device_mesh(ranks.device.type, (num_shards,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(ranks.device.type, (copies, num_shards), mesh_dim_names=("replicate", "shard"))
    return ShardMesh(mesh, mesh["shard"].get_group(), shard, num_shards, replica, copies)


def _num_hosts(ranks: Ranks) -> int:
    """The number of machines. Raises ValueError unless each has the same number of consecutive ranks."""
    hosts = ranks.all_gather_object(socket.gethostname())
    num_hosts = len(set(hosts))
    alike = [host for host in dict.fromkeys(hosts) for _ in range(len(hosts) // num_hosts)]
    if hosts != alike:
        counts = ", ".join(f"{host}: {hosts.count(host)}" for host in sorted(set(hosts)))
        raise ValueError(
            f"engine.replicate=node needs as many consecutive ranks on every machine, got {counts}; start as many on "
            "each, or give engine.replicate a number"
        )
    return num_hosts
