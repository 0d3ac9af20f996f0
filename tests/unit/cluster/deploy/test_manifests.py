"""The manifests: pods against the schema of Kubernetes, and what KubeRay's fields mean for a driver.

KubeRay's own schema is in no package: its fields are held to the list below, which `kubectl apply` checks in full.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

DEPLOY = Path(__file__).parents[4] / "cluster" / "deploy"
CLUSTER_FIELDS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD_FIELDS = {"rayStartParams", "template"}
WORKER_FIELDS = HEAD_FIELDS | {"groupName", "replicas", "minReplicas", "maxReplicas"}
JOB_FIELDS = {
    "jobId",
    "entrypoint",
    "backoffLimit",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "rayClusterSpec",
}


def documents(name):
    return {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / name).read_text())}


def clusters():
    return {
        "raycluster.yaml": documents("raycluster.yaml")["RayCluster"]["spec"],
        "rayjob.yaml": documents("rayjob.yaml")["RayJob"]["spec"]["rayClusterSpec"],
    }


CLUSTERS = clusters()
TEMPLATES = {
    (name, group.get("groupName", "head")): group["template"]
    for name, cluster in CLUSTERS.items()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
}
PODS = [pytest.param(template, id=f"{name}-{group}") for (name, group), template in TEMPLATES.items()]
HEADS = [cluster["headGroupSpec"]["template"]["spec"]["containers"][0] for cluster in CLUSTERS.values()]


def validate(document):
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("template", PODS)
def test_pods_are_what_kubernetes_takes(template):
    validate({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": template})


def test_kubernetes_would_refuse_a_field_it_does_not_know():
    template = {"spec": {"containers": [{"name": "a", "image": "b", "enviroment": []}]}}
    with pytest.raises(kubernetes_validate.ValidationError, match="enviroment"):
        validate({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": template})


@pytest.mark.parametrize("name", CLUSTERS)
def test_config_maps_are_what_kubernetes_takes(name):
    validate(documents(name)["ConfigMap"])


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_have_the_fields_of_kuberay(name):
    cluster = CLUSTERS[name]
    assert cluster.keys() == CLUSTER_FIELDS
    assert cluster["headGroupSpec"].keys() == HEAD_FIELDS
    assert all(group.keys() == WORKER_FIELDS for group in cluster["workerGroupSpecs"])
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    values = [value for group in groups for value in group["rayStartParams"].values()]
    assert all(isinstance(value, str) for value in values), "KubeRay takes strings alone"
    assert all(each["apiVersion"] == "ray.io/v1" for kind, each in documents(name).items() if kind.startswith("Ray"))


def test_jobs_have_the_fields_of_kuberay():
    job = documents("rayjob.yaml")["RayJob"]["spec"]
    assert job.keys() == JOB_FIELDS
    assert job["backoffLimit"] == 0, "a batch in which jobs failed would be run once more"
    assert job["shutdownAfterJobFinishes"] is True


def test_both_start_the_same_cluster():
    first, second = CLUSTERS.values()
    assert first == second
    assert documents("raycluster.yaml")["ConfigMap"] == documents("rayjob.yaml")["ConfigMap"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_asks_for_its_token(name):
    assert CLUSTERS[name]["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", CLUSTERS)
def test_there_are_workers_on_gpus_and_beside_them(name):
    """As many as there will be: a driver counts them once, when it starts."""
    groups = {group["groupName"]: group for group in CLUSTERS[name]["workerGroupSpecs"]}
    gpus = {
        group: each["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        for group, each in groups.items()
    }
    assert gpus == {"gpu": "1", "cpu": None}
    assert all(each["minReplicas"] == each["replicas"] == each["maxReplicas"] for each in groups.values())
    assert CLUSTERS[name]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("template", PODS)
def test_kubernetes_sets_no_variables_of_its_own(template):
    """For a service called mergefleet-… it would set MERGEFLEET_…, which is refused as an unknown setting."""
    assert template["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize("template", PODS)
def test_pods_are_closed(template):
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False
    (container,) = spec["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()


@pytest.mark.parametrize("template", PODS)
def test_pods_wait_for_the_driver_to_stop(template):
    (container,) = template["spec"]["containers"]
    assert container["lifecycle"]["preStop"]["exec"]["command"]
    for head in HEADS:
        waits = {each["name"]: each["value"] for each in head["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
        assert template["spec"]["terminationGracePeriodSeconds"] >= int(waits) + 30


@pytest.mark.parametrize("head", HEADS)
def test_the_hook_of_the_head_stops_the_job_that_was_submitted(head):
    submission_id = head["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert documents("rayjob.yaml")["RayJob"]["spec"]["jobId"] == submission_id
    assert f"${{SUBMISSION_ID:-{submission_id}}}" in (DEPLOY / "submit-job.sh").read_text()


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_ledger_is_known_to_the_driver_alone(name):
    """Workers have the credentials of the stores instead; both are in secrets."""
    groups = {group: template for (where, group), template in TEMPLATES.items() if where == name}
    secrets = {
        group: {
            each["secretRef"]["name"] for each in template["spec"]["containers"][0]["envFrom"] if "secretRef" in each
        }
        for group, template in groups.items()
    }
    assert secrets == {
        "head": {"mergefleet-store"},
        "gpu": {"mergefleet-credentials"},
        "cpu": {"mergefleet-credentials"},
    }


def ray_says(program, *words):
    """Run a program that imports Ray, in a process of its own: this one imports none."""
    result = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_rays_launcher_takes_its_file():
    """By what `ray up` does first: defaults, the schema of Ray, and one node for each address."""
    program = (
        "import json, sys, yaml\n"
        "from ray.autoscaler._private.util import prepare_config, validate_config\n"
        "config = prepare_config(yaml.safe_load(open(sys.argv[1])))\n"
        "validate_config(config)\n"
        "print(json.dumps(config))\n"
    )
    config = ray_says(program, DEPLOY / "ray-cluster.yaml")
    (node,) = config["available_node_types"].values()
    assert node["min_workers"] == len(config["provider"]["worker_ips"]) == node["max_workers"]
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]


@pytest.mark.parametrize("role", ["head", "worker"])
def test_ray_start_takes_the_options_of_the_launchers_file(role):
    program = (
        "import json, sys\n"
        "from ray.scripts.scripts import start\n"
        "with start.make_context('start', sys.argv[1:]) as context:\n"
        "    print(json.dumps([context.params[name] for name in ('head', 'object_store_memory')]))\n"
    )
    config = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    words = shlex.split(config[f"{role}_start_ray_commands"][-1].split("ray start", 1)[1])
    assert ray_says(program, *words) == [role == "head", 100 * 1024**2]
