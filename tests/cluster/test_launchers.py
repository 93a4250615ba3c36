"""The `ray up` files: Ray's own schema check, and what that does not look at.

Each check is a function that lists problems, so that it can also be shown to find them in a spoilt file.
"""

import copy
import json
import re

import jsonschema
import pytest

from tests.support.cluster_files import CLUSTER, LAUNCHERS, RAY, ROOT, launcher, replaced, without


def prepared(config: dict) -> dict:
    """The configuration with Ray's defaults, as `ray up` sees it; an error where Ray's schema refuses it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


def launcher_problems(config: dict) -> list[str]:
    problems = []
    full, provider = prepared(config), config["provider"]["type"]
    types, head = full["available_node_types"], full["head_node_type"]
    most = full["max_workers"]
    problems += [f"{name}: max_workers above the cluster's" for name, t in types.items() if t["max_workers"] > most]
    if not 0 < full["idle_timeout_minutes"] <= 30:
        problems.append("idle machines stay too long")
    if re.search(r"0\.0\.0\.0|::/0", json.dumps(full)):
        problems.append("open to the world")
    if full["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        problems.append("the token does not reach the nodes")
    for local in full["file_mounts"].values():
        if not local.startswith("~") and not (ROOT / local).exists():
            problems.append(f"{local} does not exist")
    if image := full.get("docker", {}).get("image"):
        if f":{RAY}" not in image:
            problems.append(f"image {image} is not of Ray {RAY}")
    problems += start_problems(full)
    if provider != "local":
        problems += [p for name, t in types.items() for p in cloud_node_problems(name, t, name == head, provider)]
        if config["provider"].get("cache_stopped_nodes") is not False:
            problems.append("stopped machines keep their disks")
        if "security_group" in config["provider"]:
            problems.append("Ray opens SSH to the world in groups that it manages")
        if not any(t["resources"].get("GPU") for t in types.values()):
            problems.append("no GPU workers")
    return problems


def start_problems(config: dict) -> list[str]:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    problems = []
    for kind in ("head", "worker"):
        commands = [c for c in config[f"{kind}_start_ray_commands"] if "ray start" in c]
        if len(commands) != 1:
            problems.append(f"{kind}: one start command is needed")
            continue
        settings, _, arguments = commands[0].partition("ray start")
        if not re.search(r"export [^;]*RAY_AUTH_MODE=token\b", settings):
            problems.append(f"{kind}: token authentication is off")
        if "unset OMP_NUM_THREADS" not in settings:
            problems.append(f"{kind}: one thread per worker")
        problems += [f"{kind}: ray start has no {o}" for o in re.findall(r"--[\w-]+", arguments) if o not in known]
        if "--metrics-export-port=8080" not in arguments:
            problems.append(f"{kind}: metrics port is not fixed")
        if kind == "head" and "--dashboard-host=127.0.0.1" not in arguments:
            problems.append("head: the dashboard is not on loopback")
    return problems


def cloud_node_problems(name: str, node_type: dict, is_head: bool, provider: str) -> list[str]:
    problems = []
    node = node_type["node_config"]
    if provider == "aws":
        spot = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        private = bool(node.get("SecurityGroupIds")) or all(card.get("Groups") for card in node.get("NetworkInterfaces", [{}]))
        if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
            problems.append(f"{name}: instance metadata without a session token")
        if node.get("IamInstanceProfile") != {"Name": f"perceiver-ray-{'head' if is_head else 'worker'}"}:
            problems.append(f"{name}: not its least role")
    else:
        spot = any(s.get("provisioningModel") == "SPOT" for s in node.get("scheduling", []))
        networks = [n.get("subnetwork", "default") for n in node.get("networkInterfaces", [])]
        private = bool(networks) and not any(n.endswith("default") for n in networks)
        if not is_head and not node.get("serviceAccounts"):
            problems.append(f"{name}: not its least role")
    if not private:
        problems.append(f"{name}: a network that Ray or the cloud opens to the world")
    if spot == is_head:
        problems.append(f"{name}: {'the head must not' if is_head else 'workers should'} be spot")
    if node_type["min_workers"] != 0 or (is_head and node_type["max_workers"] != 0):
        problems.append(f"{name}: does not scale from zero")
    return problems


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_file_passes_rays_schema_and_our_checks(name):
    assert launcher_problems(launcher(name)) == []


def with_efa() -> dict:
    """aws.yaml with the node type of aws-efa.yaml, as the guide puts them together."""
    whole, efa = launcher("aws.yaml"), launcher("aws-efa.yaml")
    whole["available_node_types"] |= efa.pop("available_node_types")
    return whole | {"max_workers": whole["max_workers"] + 7} | efa


def test_nodes_with_several_network_cards_pass_the_same_checks():
    config = with_efa()
    assert launcher_problems(config) == []
    node = config["available_node_types"]["gpu8"]["node_config"]
    cards = node["NetworkInterfaces"]
    assert [card["NetworkCardIndex"] for card in cards] == [0, 1, 2, 3] and {card["InterfaceType"] for card in cards} == {"efa"}
    # Ray refuses a subnet or group beside the cards, and a card without one.
    assert not node.keys() & {"SubnetId", "SubnetIds", "SecurityGroupIds"}
    assert all(card["SubnetId"] and card["Groups"] for card in cards)
    group = f"placement-group/{node['Placement']['GroupName']}"
    statements = json.loads((CLUSTER / "aws-head-policy.json").read_text())["Statement"]
    assert any(group in resource for statement in statements for resource in statement["Resource"])


def test_rays_checks_refuse_a_misspelt_key_and_an_unknown_head_type():
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        prepared(launcher("aws.yaml") | {"idle_timeout_minuts": 5})
    with pytest.raises(ValueError, match="must be one of"):
        prepared(launcher("gcp.yaml") | {"head_node_type": "boss"})


SPOILT_TEXT = [  # what the check says, file, text, what it is replaced by
    ("max_workers above", "gcp.yaml", '"max_workers": 13', '"max_workers": 5'),
    ("idle machines", "onprem.yaml", '"idle_timeout_minutes": 10', '"idle_timeout_minutes": 600'),
    ("open to the world", "onprem.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
    ("not on loopback", "gcp.yaml", " --dashboard-host=127.0.0.1", ""),
    ("head: token authentication is off", "aws.yaml", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
    ("worker: token authentication is off", "onprem.yaml", "export RAY_AUTH_MODE=token", "export"),
    ("worker: one start command", "gcp.yaml", "ray start --address", "ray begin --address"),
    ("ray start has no --dashbord-port", "aws.yaml", "--dashboard-port", "--dashbord-port"),
    ("does not exist", "aws.yaml", "cluster/node", "cluster/nod"),
    ("is not of Ray", "aws.yaml", '"auth"', '"docker": {"image": "ray:2.9.0", "container_name": "ray"}, "auth"'),
    ("one thread per worker", "aws.yaml", "unset OMP_NUM_THREADS; ", ""),
    ("metrics port", "gcp.yaml", " --metrics-export-port=8080", ""),
    ("head: a network", "gcp.yaml", "subnetworks/perceiver-ray", "subnetworks/default"),
    ("groups that it manages", "aws.yaml", '"type": "aws"', '"type": "aws", "security_group": {}'),
    ("workers should be spot", "gcp.yaml", '"SPOT"', '"STANDARD"'),
    ("head must not be spot", "aws.yaml", '"ImageId"', '"InstanceMarketOptions": {"MarketType": "spot"}, "ImageId"'),
    ("session token", "aws.yaml", '"required"', '"optional"'),
    ("cpu: not its least role", "aws.yaml", "perceiver-ray-worker", "perceiver-ray-head"),
    ("scale from zero", "aws.yaml", '"min_workers": 0', '"min_workers": 1'),
    ("no GPU workers", "gcp.yaml", '"GPU"', '"XPU"'),
]
SPOILT_BY_OMISSION = [  # what the check says, file, path of what is left out
    ("does not reach", "aws.yaml", ("file_mounts", "~/.ray/auth_token")),
    ("gpu: a network", "aws.yaml", ("available_node_types", "gpu", "node_config", "SecurityGroupIds")),
    ("gpu: not its least role", "gcp.yaml", ("available_node_types", "gpu", "node_config", "serviceAccounts")),
    ("gpu8: workers should", "aws.yaml", ("available_node_types", "gpu8", "node_config", "InstanceMarketOptions")),
    ("keep their disks", "gcp.yaml", ("provider", "cache_stopped_nodes")),
]


@pytest.mark.parametrize(("problem", "name", "old", "new"), SPOILT_TEXT)
def test_check_finds_spoilt_launcher_file(problem, name, old, new):
    assert any(problem in found for found in launcher_problems(replaced(launcher(name), old, new)))


@pytest.mark.parametrize(("problem", "name", "path"), SPOILT_BY_OMISSION)
def test_check_finds_what_a_launcher_file_lacks(problem, name, path):
    assert any(problem in found for found in launcher_problems(without(launcher(name), *path)))


def test_aws_policies_allow_no_more_than_the_cluster_file_uses():
    node_types = launcher("aws.yaml")["available_node_types"]
    workers = {t["node_config"]["InstanceType"] for name, t in node_types.items() if name != "head"}
    for kind in ("head", "worker"):
        for statement in json.loads((CLUSTER / f"aws-{kind}-policy.json").read_text())["Statement"]:
            actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
            assert not any("*" in action for action in actions)
            assert kind == "head" or all(action.startswith("s3:") for action in actions)
            assert statement["Resource"] != "*" or all(action.startswith("ec2:Describe") for action in actions)
            if allowed := statement.get("Condition", {}).get("StringEquals", {}).get("ec2:InstanceType"):
                assert set(allowed) == workers
