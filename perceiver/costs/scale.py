"""What a training takes on many machines: time of a step with its traffic, checkpoints, reads. Closed formulas with a cluster's figures.

Collectives are rings (as NCCL's): every device of a group receives the bytes of the others, all links at once, so that the slowest of
them decides; between nodes that is a node's connection, which the groups that cross it share. Traffic and computation go on at the same
time (FSDP gathers the next layer while one computes), but for the first layer's parameters and the last one's gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

from perceiver.costs.activations import Layout
from perceiver.costs.memory import Step, gathered_parts
from perceiver.costs.traffic import gathers, step_traffic

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines, and what joins them. Bytes a second in one direction."""

    gpus_per_node: int = 8
    intra_node: float = 450 * GB
    """A device receives from others of its node (NVLink of an H100 or H200)."""
    inter_node: float = 50 * GB
    """A node receives from other nodes (400 Gbit/s)."""
    latency: float = 10e-6
    """Seconds of a collective for each device of its ring."""
    storage: float = 20 * GB
    """Storage gives and takes, all together."""
    storage_node: float = 2 * GB
    """A node reads or writes of it."""
    worker_write: float = 0.5 * GB
    """A worker writes and hashes of its part, whatever the storage takes."""
    request: float = 0.05
    """Seconds before the first byte of a read."""
    host: float = 20 * GB
    """A device copies to its host."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a training step."""

    computing: float
    gathering: float
    """Parameters of other shards."""
    reducing: float
    """Gradients into shards."""
    replicas: float
    """Gradients summed over replicas."""
    exposed: float
    """Of the traffic, what no computation can hide."""

    @property
    def traffic(self) -> float:
        return self.gathering + self.reducing + self.replicas

    @property
    def total(self) -> float:
        return max(self.computing, self.traffic - self.exposed) + self.exposed

    @property
    def efficiency(self) -> float:
        """Share of the step that is computation."""
        return self.computing / self.total


def collective_seconds(cluster: Cluster, received: float, size: int, stride: int = 1, count: float = 1) -> float:
    """Seconds of collectives in which each device receives some bytes.

    Args:
        received: bytes of a device, of all `count` collectives together.
        size: devices of a group.
        stride: distance of neighbours in a group, in devices: 1 for neighbours, the size of a replica for groups across replicas.
        count: how many collectives, one after the other.
    """
    if size <= 1:
        return 0.0
    waiting = count * (size - 1) * cluster.latency
    here = max(1, cluster.gpus_per_node // stride)  # devices of a group in one node
    if size <= here:
        return received / cluster.intra_node + waiting
    groups = max(1, min(stride, cluster.gpus_per_node))  # which share a node's connection
    crossing = received * groups / cluster.inter_node
    return max(crossing, received / cluster.intra_node if here > 1 else 0.0) + waiting


def step_time(step: Step, layout: Layout, replicas: int, computing: float, cluster: Cluster) -> StepTime:
    """The time of a step that computes for `computing` seconds."""
    traffic, shards = step_traffic(step, layout, replicas), layout.shards
    *layers, _ = step.units(shards)
    runs = gathers(step, layout)
    units = len(gathered_parts(layers, layout)) + 1
    gathering = collective_seconds(cluster, traffic.gathered, shards, count=runs)
    reducing = collective_seconds(cluster, traffic.reduced, shards, count=units)
    over_replicas = collective_seconds(cluster, traffic.all_reduced, replicas, shards, count=2 * units)
    exposed = gathering / runs + (reducing + over_replicas) / units
    return StepTime(computing=computing, gathering=gathering, reducing=reducing, replicas=over_replicas, exposed=exposed)


@dataclass(frozen=True, kw_only=True)
class CheckpointTime:
    """Seconds of a checkpoint."""

    blocked: float
    """Training stands still: the copy to the host."""
    writing: float
    """In the background."""
    loading: float


def checkpoint_time(size: float, workers: int, cluster: Cluster) -> CheckpointTime:
    """The time of a checkpoint of `size` bytes, of all workers together."""
    nodes = -(-workers // cluster.gpus_per_node)
    through = min(cluster.storage, nodes * cluster.storage_node)
    writing = max(size / through, size / workers / cluster.worker_write)
    return CheckpointTime(blocked=size / workers / cluster.host, writing=writing, loading=cluster.request + size / through)


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What training data takes of storage."""

    bytes_per_second: float
    requests_per_second: float
    share_of_storage: float
    """Of what it gives all machines together, or one of them, whichever is nearer to its limit."""


def reads(needed: float, ratio: float, block_bytes: float, workers: int, cluster: Cluster) -> Reads:
    """What is read.

    Args:
        needed: bytes a second of the rows that are trained on.
        ratio: rows read for each row needed.
        block_bytes: bytes of a row group, for each of which there is a request.
    """
    all_bytes, nodes = needed * ratio, -(-workers // cluster.gpus_per_node)
    used = max(all_bytes / cluster.storage, all_bytes / nodes / cluster.storage_node)
    return Reads(bytes_per_second=all_bytes, requests_per_second=all_bytes / block_bytes, share_of_storage=used)
