"""`PERCEIVER_TEST_HOSTS=1 python -m tests.support.screenshots`: the pictures of docs/ that show a training in progress.

Ray, Prometheus and the browser run on a host of their own. Needs what tests/support/hosts.py needs, prometheus and chromium.
"""

import base64
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from PIL import Image

from tests.cluster.test_watching import DASHBOARD, TRAINING, steps, token, watch
from tests.conftest import ROOT
from tests.support import hosts as machines
from tests.support.hosts import Host, Hosts

GRAPHS = {"avg by (run) (ray_perceiver_loss)": 0, "max by (run) (ray_perceiver_step)": 1}
"""Query -> whether it is shown as a table."""
OPEN = "[...document.querySelectorAll('button')].find(b => b.closest('div').innerText.includes('git')).click()"
"""Opens the job's metadata."""
SCRAPES = 8
"""How often Prometheus has seen another step when the pictures are taken."""


class Browser:
    """Chromium on a host, driven over a pipe (its DevTools protocol)."""

    def __init__(self, host: Host, environment: dict[str, str], log: Path) -> None:
        command = [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
            "--user-data-dir=/tmp/chromium",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            host.inside("bash", "-c", 'exec "$@" 3<&0 4>&1 1>&2', "bash", *command), env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=log.open("w"),
        )  # fmt: skip
        self._number, self._session = 0, {}
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]}

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while (answer := self._read()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        text = b""
        while not text.endswith(b"\0"):
            more = self._process.stdout.read1(1)
            assert more, "the browser has ended"
            text += more
        return json.loads(text[:-1])

    def picture(self, url: str, height: int, script: str | None = None) -> Image.Image:
        """What a page looks like, some seconds after it was opened, and after a script."""
        self.call("Emulation.setDeviceMetricsOverride", width=1400, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=url)
        time.sleep(12)
        if script:
            assert "exceptionDetails" not in self.call("Runtime.evaluate", expression=script)
            time.sleep(2)
        return Image.open(io.BytesIO(base64.b64decode(self.call("Page.captureScreenshot")["data"])))


def main(target: Path) -> None:
    if reason := machines.why_not():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        hosts = Hosts(Path(folder), 1)
        try:
            take(hosts, target)
        finally:
            hosts.close()


def take(hosts: Hosts, target: Path) -> None:
    (head,) = hosts.hosts
    watch(hosts, TRAINING)
    browser = Browser(head, hosts.environment, hosts.shared / "chromium.txt")
    browser.call("Network.setCookie", name="ray-authentication-token", value=token(head), url=DASHBOARD)
    while len(steps(hosts)) < SCRAPES:
        time.sleep(2)
    save(browser.picture(f"{DASHBOARD}/#/jobs", 620), target / "dashboard-jobs.png")
    save(browser.picture(f"{DASHBOARD}/#/jobs/watched", 860, OPEN), target / "dashboard-job.png")
    graphs = {f"g{i}.{key}": value for i, (query, table) in enumerate(GRAPHS.items())
              for key, value in {"expr": query, "tab": table, "range_input": "2m"}.items()}  # fmt: skip
    save(browser.picture(f"http://127.0.0.1:9090/graph?{urlencode(graphs)}", 1090), target / "prometheus.png")


def save(picture: Image.Image, path: Path) -> None:
    picture.convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
