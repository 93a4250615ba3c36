"""The provider's notice for a spot machine reaches Ray, and from Ray the training."""

import http.server
import shutil
import subprocess
import threading
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from tests.support.small import heard

PAGES = {"aws": "/latest/meta-data/spot/instance-action", "gcp": "/computeMetadata/v1/instance/preempted"}


@pytest.fixture
def provider():
    """A metadata server that gives notice the second time it is asked; (address, pages asked for, in order)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self):
            self.answer(200, b"permit")

        def do_GET(self):
            first = self.path not in asked
            asked.append(self.path)
            if self.path == PAGES["aws"]:
                permitted = self.headers["X-aws-ec2-metadata-token"] == "permit"
                self.answer(404 if first else 200 if permitted else 401, b'{"action": "terminate"}')
            else:
                known = self.headers["Metadata-Flavor"] == "Google"
                self.answer(200 if known else 403, b"FALSE" if first else b"TRUE")

        def answer(self, status, text):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize(("name", "seconds"), [("aws", "110"), ("gcp", "25")])
def test_a_notice_drains_the_node_and_until_then_nothing_does(provider, tmp_path, name, seconds):
    address, asked = provider
    ray = tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/calls\n')
    ray.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NOTICE_URL": address}
    subprocess.run(["bash", ROOT / "cluster/node/notice.sh", name], env=environment, check=True, timeout=60)
    assert asked == [PAGES[name]] * 2
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"] and calls[-1] == seconds


def test_rays_command_takes_what_the_script_says():
    from ray.scripts.scripts import cli

    options = {option for parameter in cli.commands["drain-node"].params for option in parameter.opts}
    assert {"--reason", "--reason-message", "--deadline-remaining-seconds"} <= options


def test_a_training_hears_of_each_machine_once(monkeypatch):
    from ray_jobs.worker import Notice

    infos_given = [None, ["a"], ["a"], ["a", "b"], None]
    infos = iter([nodes and SimpleNamespace(preempted_node_ids=nodes) for nodes in infos_given])
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: next(infos))
    notice, saved = Notice(), []
    notice.training = SimpleNamespace(save=lambda: saved.append(step), world=SimpleNamespace(rank=0))
    with heard() as lines:
        for step in range(len(infos_given)):
            notice.on_meeting(step)
    assert saved == [1, 3] and len(lines) == 2


def test_all_workers_ask_only_where_a_node_is_drained_and_not_for_ever_where_it_is_none_of_theirs(monkeypatch):
    from ray_jobs import worker

    now, looks, asked, draining = [100.0], [], [], []
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(worker, "draining_nodes", lambda: looks.append(now[0]) or draining)
    notice = worker.Notice()
    notice.training = SimpleNamespace(meet=lambda: asked.append(now[0]), world=SimpleNamespace(rank=0))

    def steps(number):
        for step in range(number):
            now[0] += 0.5
            notice.after_step(step, None)

    steps(40)
    assert looks == [105.0, 110.0, 115.0, 120.0] and asked == []
    draining.append("of another job")
    steps(1000)
    assert asked[0] == 125.0 and asked[-1] < 125.0 + notice.LONG and len(asked) == 12
    draining.append("a")
    del asked[:]
    steps(10)
    assert len(asked) == 1
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: SimpleNamespace(preempted_node_ids=["a"]))
    notice.training.save = lambda: None
    notice.on_meeting(0)
    steps(20)
    assert len(asked) == 1  # it is known
