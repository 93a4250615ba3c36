"""Workers on several machines find each other: gloo listens on the network interface that Ray knows the machine by.

By itself gloo takes the address of the machine's own name, and Debian and Ubuntu install that as 127.0.1.1: workers of one
machine then meet and those of several never do. NCCL chooses well by itself.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig

SIOCGIFADDR = 0x8915
"""Linux's question for an interface's IPv4 address (netdevice(7))."""


@dataclass
class Network(TorchConfig):
    """TorchConfig whose process groups of several machines connect whatever a machine's own name means there."""

    @property
    def backend_cls(self) -> type:
        return _Backend


_TorchBackend: Any = TorchConfig().backend_cls


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Sets $GLOO_SOCKET_IFNAME to the interface with this node's address in Ray, unless it is set or there is none such."""
    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an IPv4 address as its first; None if none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # it has no address, or this is not Linux
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
