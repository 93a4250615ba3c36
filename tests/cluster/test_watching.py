"""Prometheus, with the configuration of cluster/, beside a running training: the numbers of the metrics file arrive, and each
query of the Grafana dashboard finds something. On a host of its own, where /tmp/ray is the cluster's as on a real head."""

import json
import subprocess
from pathlib import Path
from urllib.parse import urlencode

import pytest

from perceiver.runs import Run
from ray_jobs.metrics_export import GAUGES
from tests.cluster.test_hosts import install, wait_for
from tests.conftest import ROOT
from tests.support import hosts as machines
from tests.support.hosts import Host, Hosts

pytestmark = pytest.mark.long

RAY = [
    "ray", "start", "--head", "--port=6379", "--dashboard-host=127.0.0.1", "--dashboard-port=8265", "--metrics-export-port=8080",
    "--num-cpus=3", "--object-store-memory=200000000", "--disable-usage-stats",
]  # fmt: skip
PROMETHEUS = [
    "prometheus", f"--config.file={ROOT}/cluster/prometheus.yml", "--storage.tsdb.path=/tmp/prometheus",
    "--web.listen-address=127.0.0.1:9090",
]  # fmt: skip
TRAINING = [
    "quickstart", "--name", "watched", "--training.max-epochs", "None", "--training.max-steps", "100000", "--run.log-every", "10",
]  # fmt: skip
DASHBOARD, METRICS = "http://127.0.0.1:8265", "http://127.0.0.1:9090/api/v1"
OF_GPUS = ("ray_perceiver_mfu", "ray_node_gpus_utilization", "ray_node_gram_used")
"""Metrics that there are only with GPUs: their peak FLOP/s is known, and they are what is measured."""
GET = (
    "import sys, urllib.request as r; "
    "print(r.urlopen(r.Request(sys.argv[1], headers={'Authorization': 'Bearer ' + sys.argv[2]})).read().decode())"
)


@pytest.fixture
def hosts(tmp_path):
    """One host, and the training in progress on it."""
    if reason := machines.why_not():
        pytest.skip(reason)
    if not machines.find("prometheus"):
        pytest.skip("needs the Debian package prometheus")
    made = Hosts(tmp_path, 1)
    try:
        watch(made, TRAINING)
        yield made
    finally:
        made.close()


def watch(hosts: Hosts, training: list[str]) -> None:
    """Starts Ray, Prometheus, and a training that is called "watched"."""
    (head,) = hosts.hosts
    install(head)
    do(hosts, "ray", "get-auth-token", "--generate")
    do(hosts, *RAY)
    with open(head.tmp / "prometheus.txt", "w") as log:
        subprocess.Popen(head.inside(*PROMETHEUS), env=hosts.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    do(hosts, "python", "-m", "ray_jobs.submit", "--id", "watched", "--no-wait", "train", *training)


def do(hosts: Hosts, *command: str) -> str:
    """What a command prints on the host."""
    (head,) = hosts.hosts
    environment = hosts.environment | {"PERCEIVER_HOME": "/mnt/perceiver"}
    done = subprocess.run(head.inside(*command), env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def get(hosts: Hosts, address: str) -> dict | list:
    """What is at an address of the host, asked with the cluster's token."""
    return json.loads(do(hosts, "python", "-c", GET, address, token(hosts.hosts[0])))


def token(host: Host) -> str:
    return (host.home / ".ray" / "auth_token").read_text().strip()


def ask(hosts: Hosts, query: str) -> list[dict]:
    """The series that Prometheus answers a query with."""
    return get(hosts, f"{METRICS}/query?{urlencode({'query': query})}")["data"]["result"]


def scraped(hosts: Hosts) -> dict[float, dict[str, float]]:
    """Time of a scrape -> what it found of the training, by the names of the metrics file."""
    names = {f"ray_{gauge}": name for name, (gauge, _) in GAUGES.items()}
    found: dict[float, dict[str, float]] = {}
    for series in ask(hosts, '{__name__=~"ray_perceiver_.*", run="watched"}[10m]'):
        for moment, value in series["values"]:
            found.setdefault(moment, {})[names[series["metric"]["__name__"]]] = float(value)
    return {moment: values for moment, values in found.items() if values.keys() >= GAUGES.keys() - {"mfu"}}


def steps(hosts: Hosts) -> list[float]:
    return sorted({values["step"] for values in scraped(hosts).values()})


def test_prometheus_has_the_numbers_of_the_metrics_file_and_an_answer_to_every_query_of_the_dashboard(hosts):
    wait_for(lambda: len(steps(hosts)) >= 2, "scrapes of two steps", 240, hosts)
    agree(hosts, hosts.shared / "runs" / "watched")

    board = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    queries = [target["expr"].replace("$run", ".*") for panel in board["panels"] for target in panel["targets"]]
    unanswered = {query for query in queries if not ask(hosts, query)}
    assert len(queries) == 16 and all(any(name in query for name in OF_GPUS) for query in unanswered), unanswered
    runs = f"{METRICS}/label/run/values?{urlencode({'match[]': 'ray_perceiver_step'})}"  # the list to choose from
    assert get(hosts, runs)["data"] == ["watched"]

    (job,) = get(hosts, f"{DASHBOARD}/api/jobs/")
    metadata = job["metadata"]
    assert (job["submission_id"], job["status"]) == ("watched", "RUNNING")
    assert (metadata["job_name"], metadata["experiment"]) == ("watched", "quickstart") and metadata["git"]


def agree(hosts: Hosts, run: Path) -> None:
    """What was scraped at the time of a step is what the metrics file has of that step.

    Or of the line of the log before it: a scrape may fall between the setting of two gauges.
    """
    found = scraped(hosts)
    records = [record for record in Run(run).metrics() if "loss" in record]
    line = {record["step"]: number for number, record in enumerate(records)}
    for values in found.values():
        number = line[int(values["step"])]
        for name, value in values.items():
            around = records[max(number - 1, 0) : number + 1]
            assert value in [record[name] for record in around], (name, values, around)
        print(values)
