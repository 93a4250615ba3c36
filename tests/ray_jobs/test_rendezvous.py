"""Which interface workers of several machines meet on."""

import os

import pytest

from ray_jobs.rendezvous import choose_interface, interface_of


def test_an_interface_is_found_by_its_address():
    assert interface_of("127.0.0.1") == "lo" and interface_of("203.0.113.77") is None


@pytest.mark.parametrize(("before", "after"), [(None, "lo"), ("eth7", "eth7")])
def test_the_interface_is_that_of_the_node_unless_the_user_says_another(monkeypatch, before, after):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(os, "environ", {} if before is None else {"GLOO_SOCKET_IFNAME": before})
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == after
