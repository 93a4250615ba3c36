"""The KubeRay manifests: the operator's schemas, and what those do not look at.

Each check is a function that lists problems, so that it can also be shown to find them in a spoilt file.
"""

import gzip
import importlib
import json
import re

import jsonschema
import pytest
import yaml

from perceiver.presets import PRESETS
from tests.support.cluster_files import CLUSTER, JOBS, MANIFESTS, RAY, ROOT, manifest, replaced


def schema_errors(document: dict) -> list[str]:
    path = ROOT / f"tests/support/files/kuberay/{document['kind'].lower()}.schema.json.gz"
    schema = json.loads(gzip.decompress(path.read_bytes()))
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(document)]


def ray_spec(document: dict) -> dict:
    spec = document["spec"]
    return {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig")}[document["kind"]]


def manifest_problems(document: dict) -> list[str]:
    problems = []
    spec = ray_spec(document)
    if spec.get("authOptions", {}).get("mode") != "token" or not spec["authOptions"].get("secretName"):
        problems.append("token authentication is off")
    if spec["rayVersion"] != RAY:
        problems.append(f"rayVersion is not {RAY}")
    idle = spec["autoscalerOptions"].get("idleTimeoutSeconds", 0)
    if not spec.get("enableInTreeAutoscaling") or not 0 < idle <= 1800:
        problems.append("idle workers stay")
    if spec["headGroupSpec"].get("serviceType") != "ClusterIP" or spec["headGroupSpec"].get("enableIngress"):
        problems.append("the head is open to the outside")
    for group in spec["workerGroupSpecs"]:
        if group["minReplicas"] != 0 or not 0 < group["maxReplicas"] <= 64:
            problems.append(f"{group['groupName']}: does not scale from zero to a limit")
        if group["template"]["spec"].get("automountServiceAccountToken") is not False:
            problems.append(f"{group['groupName']}: has Kubernetes' token")
    pods = [spec["headGroupSpec"]["template"]["spec"], *(g["template"]["spec"] for g in spec["workerGroupSpecs"])]
    problems += [p for pod in pods for p in pod_problems(pod, on_ray=True)]
    problems += confinement_problems("autoscaler", spec["autoscalerOptions"])
    if document["kind"] == "RayJob":
        job = document["spec"]
        problems += pod_problems(job["submitterPodTemplate"]["spec"], on_ray=False)
        if not (job.get("shutdownAfterJobFinishes") and job.get("activeDeadlineSeconds")):
            problems.append("the cluster may outlive its job")
    return problems


def pod_problems(pod: dict, on_ray: bool) -> list[str]:
    problems = []
    if pod.get("securityContext", {}).get("runAsNonRoot") is not True or not pod["securityContext"].get("runAsUser"):
        problems.append("pod may run as root")
    volumes = pod.get("volumes", [])
    if any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")) or any("hostPath" in v for v in volumes):
        problems.append("pod sees the host")
    claims = {v["name"] for v in volumes if "persistentVolumeClaim" in v}
    for container in pod["containers"]:
        name = container["name"]
        problems += confinement_problems(name, container)
        if not container["image"].endswith(f"-ray{RAY}"):
            problems.append(f"{name}: image {container['image']} is not of Ray {RAY}")
        for variable in container.get("env", []):
            if re.search("TOKEN|SECRET|PASSWORD|KEY", variable["name"]) and "value" in variable:
                problems.append(f"{name}: {variable['name']} stands in the file")
        home = [v.get("value") for v in container.get("env", []) if v["name"] == "PERCEIVER_HOME"]
        mounts = [m["mountPath"] for m in container.get("volumeMounts", []) if m["name"] in claims]
        if on_ray and (not home or home != mounts):
            problems.append(f"{name}: PERCEIVER_HOME is not the shared storage")
    return problems


def confinement_problems(name: str, container: dict) -> list[str]:
    problems = []
    context, resources = container.get("securityContext", {}), container.get("resources", {})
    wanted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    if {key: context.get(key) for key in wanted} != wanted or context.get("privileged"):
        problems.append(f"{name}: has privileges")
    if context.get("runAsNonRoot") is not True:
        problems.append(f"{name}: may run as root")
    if not all({"cpu", "memory"} <= resources.get(kind, {}).keys() for kind in ("requests", "limits")):
        problems.append(f"{name}: has no requests and limits")
    return problems


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_passes_the_operators_schema_and_our_checks(name):
    assert schema_errors(manifest(name)) == []
    assert manifest_problems(manifest(name)) == []


TRAIN = "rayjob-train-clm-wikitext.yaml"
SPOILT = [  # what the check says, text, what it is replaced by
    ("token authentication is off", '"token"', '"disabled"'),
    ("rayVersion", f'"rayVersion": "{RAY}"', '"rayVersion": "2.9.0"'),
    ("is not of Ray", f"-ray{RAY}", ""),
    ("idle workers stay", '"idleTimeoutSeconds": 300', '"idleTimeoutSeconds": 86400'),
    ("open to the outside", "ClusterIP", "LoadBalancer"),
    ("does not scale from zero", '"minReplicas": 0', '"minReplicas": 1'),
    ("to a limit", '"maxReplicas": 2', '"maxReplicas": 1000'),
    ("Kubernetes' token", '"automountServiceAccountToken": false', '"automountServiceAccountToken": true'),
    ("pod may run as root", '"runAsUser": 1000', '"runAsUser": 0'),
    ("ray-worker: may run as root", '"runAsNonRoot": true', '"runAsNonRoot": false'),
    ("submitter: has privileges", '"drop": ["ALL"]', '"drop": []'),
    ("autoscaler: has privileges", '"allowPrivilegeEscalation": false', '"privileged": true'),
    ("no requests and limits", '"memory"', '"storage"'),
    ("sees the host", '"restartPolicy"', '"hostNetwork": true, "restartPolicy"'),
    ("stands in the file", '"RAY_USAGE_STATS_ENABLED"', '"RAY_AUTH_TOKEN"'),
    ("shared storage", '"value": "/mnt/perceiver"', '"value": "/tmp"'),
    ("outlive", '"shutdownAfterJobFinishes": true', '"shutdownAfterJobFinishes": false'),
]


@pytest.mark.parametrize(("problem", "old", "new"), SPOILT)
def test_check_finds_spoilt_manifest(problem, old, new):
    assert any(problem in found for found in manifest_problems(replaced(manifest(TRAIN), old, new)))


@pytest.mark.parametrize(("old", "new"), [('"maxReplicas"', '"maxReplica"'), ('"mode": "token"', '"mode": "tokens"')])
def test_operators_schema_refuses_misspelt_manifest(old, new):
    assert schema_errors(replaced(manifest(TRAIN), old, new))


def test_manifests_agree_in_what_they_share():
    first = ray_spec(manifest(MANIFESTS[0]))
    for name in MANIFESTS[1:]:
        spec = ray_spec(manifest(name))
        assert {key: spec[key] for key in spec if key != "workerGroupSpecs"} == {
            key: first[key] for key in first if key != "workerGroupSpecs"
        }
        for group in spec["workerGroupSpecs"] if manifest(name)["kind"] != "RayService" else []:  # whose workers have a token besides
            same = [g for g in first["workerGroupSpecs"] if g["groupName"] == group["groupName"]]
            assert [g["template"] for g in same] == [group["template"]]


def test_network_policy_lets_only_named_pods_in():
    claim, policy = yaml.safe_load_all((CLUSTER / "kuberay" / "base.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    volumes = ray_spec(manifest("raycluster.yaml"))["headGroupSpec"]["template"]["spec"]["volumes"]
    assert volumes[0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    for rule in policy["spec"]["ingress"]:
        assert rule["from"] and all(peer[kind]["matchLabels"] for peer in rule["from"] for kind in peer)
    peers = [p.get("podSelector", {}).get("matchLabels") for rule in policy["spec"]["ingress"] for p in rule["from"]]
    for name in JOBS:
        assert manifest(name)["spec"]["submitterPodTemplate"]["metadata"]["labels"] in peers


@pytest.mark.parametrize("name", JOBS)
def test_job_runs_a_module_and_preset_that_exist_and_its_cluster_has_the_gpus(name):
    document = manifest(name)
    words = document["spec"]["entrypoint"].split()
    assert words[:2] == ["python", "-m"] and words[3] in PRESETS
    gpus = 0
    for group in ray_spec(document)["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus += group["maxReplicas"] * int(limits.get("nvidia.com/gpu", 0))
    if "--workers" in words:
        assert gpus == int(words[words.index("--workers") + 1])
    # The cluster begins with its head alone: a training that does not wait would be refused at once.
    assert ("--parallel.wait-minutes" in words) == (words[2] != "ray_jobs.preprocess")
    if not (ROOT / f"{words[2].replace('.', '/')}.py").exists():
        pytest.skip(f"{words[2]} is not written yet")


def test_service_is_an_application_that_ray_serve_takes_and_its_workers_have_the_token():
    from ray.serve.schema import ServeDeploySchema

    document = manifest("rayservice.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(document["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    (group,) = ray_spec(document)["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = group["maxReplicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert application.args["replicas"] == gpus and application.args["device"] == "cuda"
    tokens = [v["valueFrom"]["secretKeyRef"] for v in container["env"] if v["name"] == "PERCEIVER_SERVE_TOKEN"]
    assert tokens == [{"name": "perceiver-serve", "key": "token"}]
    assert config.http_options.port in [port["containerPort"] for port in container["ports"]]
