"""Our own rules for what runs in a cluster: functions from manifests to what breaks them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from ray._private import ray_constants

from tests.manifests.kustomize import Manifest
from tests.manifests.rendered import containers, pod_templates

Rule = Callable[[list[Manifest]], list[str]]

RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
# Secrets are made by the commands of infra/README.md, never from a file that git has.
SECRETS = {
    "echodistill-postgres": {"password"},
    "echodistill-redis": {"password"},
    "echodistill-ray": {"auth_token"},
    "echodistill-s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    "echodistill-mlflow": {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"},
    "echodistill-api-keys": {"api-keys"},
    "echodistill-scrape": {"key"},
}
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "m": 1e-3, "": 1.0}


def amount(text: str) -> float:
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * _UNITS[unit]


def images_are_pinned(manifests: list[Manifest]) -> list[str]:
    found = []
    for manifest in manifests:
        for where, container in containers(manifest):
            image = container["image"]
            tag = image.rpartition("/")[2].partition(":")[2]
            if "@sha256:" not in image and (not tag or tag == "latest"):
                found.append(f"{where}: {image}")
    return found


def secrets_are_elsewhere(manifests: list[Manifest]) -> list[str]:
    found = []
    for manifest in manifests:
        if manifest["kind"] == "Secret":
            found.append(f"Secret/{manifest['metadata']['name']} is in a file")
        for where, text in strings(manifest, manifest["kind"]):
            if re.search(r"://[^/\s:@]+:(?!\$\()[^/\s@]+@", text):
                found.append(f"{where} holds a password: {text}")
        for where, container in containers(manifest):
            for item in container.get("env", ()):
                secret = re.search(r"PASSWORD|SECRET|TOKEN|(ACCESS|API)_KEY", item["name"])
                if secret and "value" in item and not item["name"].endswith("_FILE"):
                    found.append(f"{where}: {item['name']} has a value")
    return found


def secrets_are_known(manifests: list[Manifest]) -> list[str]:
    """Every secret that is referred to is one that the guide tells how to make."""
    found = []
    for manifest in manifests:
        for where, name, key in secret_references(manifest, manifest["kind"]):
            if name not in SECRETS or (key and key not in SECRETS[name]):
                found.append(f"{where} wants the secret {name} ({key})")
    return found


def resources_are_bounded(manifests: list[Manifest]) -> list[str]:
    found = []
    for manifest in manifests:
        for where, container in containers(manifest):
            resources = container.get("resources", {})
            for side in ("requests", "limits"):
                for name in ("cpu", "memory"):
                    if name not in resources.get(side, {}):
                        found.append(f"{where} has no {name} in {side}")
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            for name in requests.keys() & limits.keys():
                if amount(requests[name]) > amount(limits[name]):
                    found.append(f"{where} requests more {name} than its limit")
            if requests.get("nvidia.com/gpu") != limits.get("nvidia.com/gpu"):
                found.append(f"{where}: GPUs in requests and limits differ")
    return found


def pods_are_restricted(manifests: list[Manifest]) -> list[str]:
    found = []
    for manifest in manifests:
        for where, template in pod_templates(manifest):
            spec = template["spec"]
            context = spec.get("securityContext", {})
            if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
                found.append(f"{where} may run as root")
            if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
                found.append(f"{where} has no seccomp profile")
            if set(spec) & {"hostNetwork", "hostPID", "hostIPC"}:
                found.append(f"{where} shares something with its node")
            if any("hostPath" in volume for volume in spec.get("volumes", ())):
                found.append(f"{where} mounts a folder of its node")
        for where, container in containers(manifest):
            if container.get("securityContext") != RESTRICTED:
                found.append(f"{where}: {container.get('securityContext')}")
            if "/tmp" not in {mount["mountPath"] for mount in container.get("volumeMounts", ())}:
                found.append(f"{where} has a read-only root and nowhere to write")
        for where, ray in ray_clusters(manifest):
            if ray["autoscalerOptions"].get("securityContext") != RESTRICTED:
                found.append(f"{where}: the autoscaler's securityContext")
    return found


def tokens_are_held_by_who_needs_them(manifests: list[Manifest]) -> list[str]:
    found = []
    for manifest in manifests:
        for where, template in pod_templates(manifest):
            head = ".headGroupSpec." in where
            if template["spec"].get("automountServiceAccountToken") is not head:
                found.append(where)
    return found


def rights_are_least(manifests: list[Manifest]) -> list[str]:
    found = []
    for manifest in manifests:
        if manifest["kind"] in ("ClusterRole", "ClusterRoleBinding"):
            found.append(f"{manifest['kind']}/{manifest['metadata']['name']} is cluster-wide")
        for rule in manifest.get("rules", ()):
            words = [word for values in rule.values() for word in values]
            if "*" in words or set(words) & {"secrets", "pods/exec", "escalate", "impersonate"}:
                found.append(f"{manifest['kind']}/{manifest['metadata']['name']}: {rule}")
    return found


def services_are_probed(manifests: list[Manifest]) -> list[str]:
    found = []
    for manifest in manifests:
        if manifest["kind"] == "Job":
            continue
        for where, container in containers(manifest):
            if ".initContainers." in where or "submitterPodTemplate" in where:
                continue
            ports = {port["name"] for port in container.get("ports", ())}
            for probe in ("livenessProbe", "readinessProbe"):
                if probe not in container:
                    found.append(f"{where} has no {probe}")
                    continue
                port = container[probe].get("httpGet", {}).get("port", 0)
                if isinstance(port, str) and port not in ports:
                    found.append(f"{where}.{probe} asks the port {port}")
    return found


def volumes_are_whole(manifests: list[Manifest]) -> list[str]:
    found = []
    claims = {one["metadata"]["name"] for one in manifests if "Claim" in one["kind"]}
    for manifest in manifests:
        own = {item["metadata"]["name"] for item in _claim_templates(manifest)}
        for where, template in pod_templates(manifest):
            spec = template["spec"]
            there = {volume["name"]: volume for volume in spec.get("volumes", ())}
            mounted = {
                mount["name"]
                for key in ("initContainers", "containers")
                for container in spec.get(key, ())
                for mount in container.get("volumeMounts", ())
            }
            if mounted != set(there) | own:
                found.append(f"{where}: {sorted(mounted ^ (set(there) | own))}")
            memory = sum(
                amount(one["resources"]["limits"]["memory"])
                for one in spec["containers"]
                if "memory" in one.get("resources", {}).get("limits", {})
            )
            for name, volume in there.items():
                empty, claim = volume.get("emptyDir"), volume.get("persistentVolumeClaim")
                if empty is not None and "sizeLimit" not in empty:
                    found.append(f"{where}.{name} may fill its node")
                elif empty and empty.get("medium") and amount(empty["sizeLimit"]) > memory / 2:
                    found.append(f"{where}.{name} takes more than half of the pod's memory")
                if claim and claim["claimName"] not in claims:
                    found.append(f"{where}.{name}: there is no claim {claim['claimName']}")
    return found


def names_are_there(manifests: list[Manifest]) -> list[str]:
    """Accounts, config maps and selected pods exist."""
    found = []
    named = {(one["kind"], one["metadata"]["name"]) for one in manifests}
    labels = [
        template.get("metadata", {}).get("labels", {})
        for manifest in manifests
        for _, template in pod_templates(manifest)
    ]
    for manifest in manifests:
        for where, template in pod_templates(manifest):
            if ("ServiceAccount", template["spec"].get("serviceAccountName")) not in named:
                found.append(f"{where}: its service account")
        for where, container in containers(manifest):
            for item in container.get("envFrom", ()):
                wanted = item.get("configMapRef", {}).get("name")
                if wanted and ("ConfigMap", wanted) not in named:
                    found.append(f"{where}: {item}")
        if manifest["kind"] == "Service":
            selector = manifest["spec"]["selector"].items()
            if not any(selector <= item.items() for item in labels):
                found.append(f"Service/{manifest['metadata']['name']} selects nothing")
    return found


def ray_is_set_up_right(manifests: list[Manifest]) -> list[str]:
    found = []
    for manifest in manifests:
        for where, ray in ray_clusters(manifest):
            if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", manifest["metadata"]["name"]):
                found.append(f"{where}: its name")
            if ray["authOptions"]["mode"] != "token":
                found.append(f"{where} lets everybody in")
            if ray["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
                found.append(f"{where}: work would land on the head")
            groups = [ray["headGroupSpec"], *ray["workerGroupSpecs"]]
            for spec in (group["template"]["spec"] for group in groups):
                if spec.get("restartPolicy") != "Never":
                    found.append(f"{where}: autoscaler v2 wants restartPolicy Never")
                limits = spec["containers"][0]["resources"]["limits"]
                if shared_memory(spec) < object_store(spec):
                    found.append(f"{where}: Ray's object store does not fit into /dev/shm")
                tolerated = {item["key"] for item in spec.get("tolerations", ())}
                gpu_pool = spec.get("nodeSelector", {}).get("echodistill.dev/pool") == "gpu"
                if "nvidia.com/gpu" in limits and not ("nvidia.com/gpu" in tolerated and gpu_pool):
                    found.append(f"{where}: a GPU pod without toleration or node selection")
        if manifest["kind"] == "RayJob":
            spec = manifest["spec"]
            if not spec["shutdownAfterJobFinishes"] or "deletionStrategy" in spec:
                found.append("RayJob: Kueue wants shutdownAfterJobFinishes, and nothing beside it")
            if "kueue.x-k8s.io/queue-name" not in manifest["metadata"]["labels"]:
                found.append("RayJob: no queue")
    return found


def queues_have_room(manifests: list[Manifest]) -> list[str]:
    """One batch fits the queue at its largest, and the endpoint beside it fits the quota."""
    found = []
    (queue,) = (one for one in manifests if one["kind"] == "ClusterQueue")
    (job,) = (one for one in manifests if one["kind"] == "RayJob")
    (group,) = queue["spec"]["resourceGroups"]
    room: dict[str, float] = dict.fromkeys(group["coveredResources"], 0.0)
    for flavor in group["flavors"]:
        for item in flavor["resources"]:
            room[item["name"]] += amount(item["nominalQuota"])
    for name, value in needs(job["spec"]["rayClusterSpec"]).items():
        if name not in room:
            found.append(f"the queue does not cover {name}")
        elif value > room[name]:
            found.append(f"a batch may ask for {value:g} {name}, the queue has {room[name]:g}")
    for workers in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        # Kueue keeps a batch's workers on the flavor that its first got; no worker fits the first.
        if not workers["replicas"]:
            found.append(f"{workers['groupName']}: with no worker it gets the first flavor")
        if not any(_holds(flavor, workers) for flavor in group["flavors"]):
            found.append(f"{workers['groupName']}: no flavor has all that it may ask for")
    (quota,) = (one for one in manifests if one["kind"] == "ResourceQuota")
    (service,) = (one for one in manifests if one["kind"] == "RayService")
    twice = needs(service["spec"]["rayClusterConfig"])  # while an image is changed there are two
    for name, value in room.items():
        if amount(quota["spec"]["hard"][f"requests.{name}"]) < value + 2 * twice.get(name, 0.0):
            found.append(f"the namespace's quota of {name} is below the queue's and the endpoint's")
    return found


def _holds(flavor: dict[str, Any], workers: dict[str, Any]) -> bool:
    """Whether a flavor's quota is enough for a worker group at its largest."""
    quota = {item["name"]: amount(item["nominalQuota"]) for item in flavor["resources"]}
    requests = workers["template"]["spec"]["containers"][0]["resources"]["requests"]
    most = workers["maxReplicas"]
    return all(amount(text) * most <= quota[name] for name, text in requests.items())


def budgets_are_reckoned(manifests: list[Manifest]) -> list[str]:
    """Kubernetes knows how many pods of a RayCluster may go, and one at least may, or none ever."""
    found = []
    for manifest in manifests:
        if manifest["kind"] != "PodDisruptionBudget":
            continue
        name, spec = manifest["metadata"]["name"], manifest["spec"]
        if "maxUnavailable" in spec or not isinstance(spec.get("minAvailable"), int):
            found.append(f"{name}: a RayCluster has no scale subresource: only minAvailable counts")
        elif spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            found.append(f"{name}: a pod that is not ready holds its node back")
        elif spec["selector"]["matchLabels"].get("ray.io/node-type") == "worker":
            (service,) = (one for one in manifests if one["kind"] == "RayService")
            (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
            if group["minReplicas"] <= spec["minAvailable"]:
                found.append(f"{name} lets no node of the endpoint go")
    return found


def jobs_can_be_applied_again(manifests: list[Manifest]) -> list[str]:
    return [
        f"Job/{one['metadata']['name']} stays when it is done, and a job cannot be changed"
        for one in manifests
        if one["kind"] == "Job" and "ttlSecondsAfterFinished" not in one["spec"]
    ]


def needs(ray: dict[str, Any]) -> dict[str, float]:
    """What a Ray cluster asks for at its largest."""
    found: dict[str, float] = {}
    groups = [(1, ray["headGroupSpec"]["template"])]
    groups += [(one["maxReplicas"], one["template"]) for one in ray["workerGroupSpecs"]]
    for count, template in groups:
        for name, text in template["spec"]["containers"][0]["resources"]["requests"].items():
            found[name] = found.get(name, 0.0) + count * amount(text)
    return found


def shared_memory(pod: dict[str, Any]) -> float:
    """Bytes of a Ray pod's /dev/shm."""
    for volume in pod["volumes"]:
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            return amount(volume["emptyDir"]["sizeLimit"])
    return 0.0


def object_store(pod: dict[str, Any]) -> float:
    """Bytes of the object store that Ray makes by itself; more than /dev/shm goes to the disk."""
    memory = amount(pod["containers"][0]["resources"]["limits"]["memory"])
    share = ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION * memory
    return min(share, max(ray_constants.REQUIRE_SHM_SIZE_THRESHOLD, 0.95 * shared_memory(pod)))


def strings(node: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield where, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from strings(value, f"{where}.{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from strings(value, f"{where}[{number}]")


def secret_references(node: Any, where: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(node, list):
        for number, value in enumerate(node):
            yield from secret_references(value, f"{where}[{number}]")
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("secretKeyRef", "credentials"):
                yield where, value["name"], value["key"]
            elif key == "secretRef":
                yield where, value["name"], ""
            elif key == "secret":
                items = value.get("items", [{"key": ""}])
                yield from ((where, value["secretName"], item["key"]) for item in items)
            elif key == "authOptions":
                yield where, value["secretName"], "auth_token"
            else:
                yield from secret_references(value, f"{where}.{key}")


def ray_clusters(manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    for key in ("rayClusterSpec", "rayClusterConfig"):
        if key in manifest.get("spec", {}):
            yield f"{manifest['kind']}/{manifest['metadata']['name']}", manifest["spec"][key]


def _claim_templates(manifest: Manifest) -> list[Manifest]:
    return manifest.get("spec", {}).get("volumeClaimTemplates", [])
