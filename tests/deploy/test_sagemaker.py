"""Against moto over HTTP on loopback; every request is also held against AWS's own service model."""

from __future__ import annotations

import functools
import json
import re
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.model import Shape
from moto.server import ThreadedMotoServer

from roadseg.aws import aws_client
from roadseg.config.sections import Aws
from roadseg.deploy.sagemaker import PACKAGE_ARN, VARIANT, deploy
from roadseg.errors import ConfigError, RoadsegError, StoreError
from roadseg.release.store.base import Champion, FolderStore
from roadseg.release.store.s3 import S3Store

pytestmark = pytest.mark.aws
REGION = "us-east-1"
CHANGING = ("create_", "update_", "put_", "register_")


# ── what AWS would refuse and neither botocore nor moto does ─────────────────────────────────────


def violations(shape: Shape, value: Any, where: str) -> list[str]:
    """Every breach of the service model: unknown and missing keys, type, enum, pattern, min and max."""
    if shape.type_name == "structure":
        members = shape.members
        found = [f"{where}.{key}: unknown" for key in value if key not in members]
        found += [f"{where}.{key}: missing" for key in shape.required_members if key not in value]
        return found + [v for k, x in value.items() if k in members for v in violations(members[k], x, f"{where}.{k}")]
    if shape.type_name == "list":
        inner = [v for i, x in enumerate(value) for v in violations(shape.member, x, f"{where}[{i}]")]
        return inner + _outside(shape, len(value), where)
    if shape.type_name == "map":
        inner = [v for k, x in value.items() for v in violations(shape.value, x, f"{where}.{k}")]
        return inner + _outside(shape, len(value), where)
    if shape.type_name == "string":
        if not isinstance(value, str):
            return [f"{where}: {value!r} is no string"]
        found = _outside(shape, len(value), where)
        if shape.enum and value not in shape.enum:
            found.append(f"{where}: {value!r} is none of {shape.enum[:5]}...")
        pattern = shape.metadata.get("pattern", "")
        if pattern and not any(x in pattern for x in _ONLY_JAVA) and not re.fullmatch(pattern, value):
            found.append(f"{where}: {value!r} does not match {pattern}")
        return found
    if shape.type_name == "boolean":
        return [] if isinstance(value, bool) else [f"{where}: {value!r} is no boolean"]
    if isinstance(value, bool) or not isinstance(value, int if shape.type_name in ("integer", "long") else int | float):
        return [f"{where}: {value!r} is no {shape.type_name}"]
    return _outside(shape, value, where)


_ONLY_JAVA = ("\\p{", "\\uD800")  # what Python's re doesn't take


def _outside(shape: Shape, size: float, where: str) -> list[str]:
    low, high = shape.metadata.get("min", size), shape.metadata.get("max", size)
    return [] if low <= size <= high else [f"{where}: {size} is outside {low}..{high}"]


@functools.cache
def inspecting(service: str, endpoint: str = "") -> Any:
    """A client of the test's own; botocore takes a second to read SageMaker's model."""
    return aws_client(service, region=REGION, endpoint_url=endpoint)


def parameters_of(service: str, operation: str) -> Shape:
    client = inspecting(service)
    return client.meta.service_model.operation_model(client.meta.method_to_api_mapping[operation]).input_shape


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"EndpointName": "a"}, "EndpointConfigName: missing"),
        ({"EndpointName": "a", "EndpointConfigName": "-"}, "does not match"),
        ({"EndpointName": "a" * 64, "EndpointConfigName": "b"}, "outside"),
        ({"EndpointName": "a", "EndpointConfigName": "b", "Nonsense": 1}, "Nonsense: unknown"),
        ({"EndpointName": "a", "EndpointConfigName": 1}, "is no string"),
        ({"EndpointName": "a", "EndpointConfigName": "b", "Tags": [{"Key": "", "Value": ""}]}, "outside"),
    ],
)
def test_the_validator_finds(parameters: dict[str, Any], said: str) -> None:
    assert any(said in v for v in violations(parameters_of("sagemaker", "create_endpoint"), parameters, ""))


# ── the account ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        _set_environment(monkeypatch, tmp_path_factory.mktemp("no-config"))
        yield


def _set_environment(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


class Account:
    """The clients a deployment gets: each request is validated and noted, and may be answered by the test."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.clients: dict[str, Any] = {}
        self.clear()
        self.aws = Aws(
            region=REGION,
            endpoint_url=endpoint,
            role_arn="arn:aws:iam::123456789012:role/roadseg-endpoint",
            image_uri="123456789012.dkr.ecr.us-east-1.amazonaws.com/roadseg:0.1.0",
            instance_type="ml.c5.xlarge",  # the newest of this kind that moto knows
            capture_percent=20,
        )

    def clear(self) -> None:
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.answers: dict[str, Callable[[], dict[str, Any] | str | None]] = {}
        reset = urllib.request.Request(f"{self.endpoint}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset, timeout=10).close()

    def connect(self, service: str) -> Any:
        if service not in self.clients:
            self.clients[service] = self._connect(service)
        return self.clients[service]

    def _connect(self, service: str) -> Any:
        client = aws_client(service, region=REGION, endpoint_url=self.endpoint)
        names = {api: method for method, api in client.meta.method_to_api_mapping.items()}

        def check(params: dict[str, Any], model: Any, **_: Any) -> None:
            assert violations(model.input_shape, params, model.name) == []
            self.asked.append((service, names[model.name], params))

        def instead(model: Any, **_: Any) -> tuple[Any, dict[str, Any]] | None:
            answer = self.answers.get(names[model.name], lambda: None)()
            if isinstance(answer, str):
                error = {"Code": answer, "Message": "you may not"}
                return SimpleNamespace(status_code=403), {"Error": error, "ResponseMetadata": {}}
            return None if answer is None else (SimpleNamespace(status_code=200), answer)

        client.meta.events.register("before-parameter-build", check)
        client.meta.events.register("before-call", instead)
        return client

    def client(self, service: str = "sagemaker") -> Any:
        return inspecting(service, self.endpoint)

    def packages(self) -> list[dict[str, Any]]:
        s = self.client()
        groups = [g["ModelPackageGroupName"] for g in s.list_model_package_groups()["ModelPackageGroupSummaryList"]]
        return [p for g in groups for p in s.list_model_packages(ModelPackageGroupName=g)["ModelPackageSummaryList"]]

    def changes(self) -> list[tuple[str, str, dict[str, Any]]]:
        return [asked for asked in self.asked if asked[1].startswith(CHANGING)]

    def contents(self) -> dict[str, int]:
        """How many of each thing there are."""
        s, scaling = self.client(), self.client("application-autoscaling")
        return {
            "groups": len(s.list_model_package_groups()["ModelPackageGroupSummaryList"]),
            "packages": len(self.packages()),
            "models": len(s.list_models()["Models"]),
            "configs": len(s.list_endpoint_configs()["EndpointConfigs"]),
            "endpoints": len(s.list_endpoints()["Endpoints"]),
            "alarms": len(self.client("cloudwatch").describe_alarms()["MetricAlarms"]),
            "targets": len(scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]),
            "policies": len(scaling.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]),
        }


ONE_DEPLOYMENT = {
    "groups": 1,
    "packages": 1,
    "models": 1,
    "configs": 1,
    "endpoints": 1,
    "alarms": 2,
    "targets": 1,
    "policies": 1,
}


@pytest.fixture(scope="module")
def one_account(endpoint: str) -> Account:
    return Account(endpoint)


@pytest.fixture
def account(one_account: Account) -> Account:
    one_account.clear()
    return one_account


@pytest.fixture
def store(account: Account) -> S3Store:
    store = S3Store("s3://models/team/a", region=REGION, endpoint_url=account.endpoint)
    store.client.create_bucket(Bucket="models")
    return store


@pytest.fixture
def digest(store: S3Store, tmp_path: Path) -> str:
    archive = tmp_path / "model.tar.gz"
    archive.write_bytes(b"an archive")
    return store.publish(archive, {})


# ── the first deployment ────────────────────────────────────────────────────────────────────────


def test_the_first_deployment(account: Account, store: S3Store, digest: str) -> None:
    said: list[str] = []
    deploy(digest, store, account.aws, say=said.append, connect=account.connect, poll_s=1)
    assert said[-1] == f"endpoint roadseg serves release {digest}"
    assert account.contents() == ONE_DEPLOYMENT

    s = account.client()
    found = s.describe_endpoint(EndpointName="roadseg")
    assert found["EndpointStatus"] == "InService"
    config = s.describe_endpoint_config(EndpointConfigName=found["EndpointConfigName"])
    (variant,) = config["ProductionVariants"]
    assert (variant["VariantName"], variant["InstanceType"], variant["InitialInstanceCount"]) == (
        VARIANT,
        "ml.c5.xlarge",
        1,
    )
    assert config["DataCaptureConfig"]["DestinationS3Uri"] == "s3://models/team/a/capture"
    assert config["DataCaptureConfig"]["InitialSamplingPercentage"] == 20
    model = s.describe_model(ModelName=variant["ModelName"])
    package = s.describe_model_package(ModelPackageName=model["PrimaryContainer"]["ModelPackageName"])
    assert package["ModelApprovalStatus"] == "Approved"
    (container,) = package["InferenceSpecification"]["Containers"]
    assert container["ModelDataUrl"] == f"s3://models/team/a/releases/{digest}/model.tar.gz"
    assert container["Image"] == account.aws.image_uri
    body = store.client.get_object(Bucket="models", Key=container["ModelDataUrl"].removeprefix("s3://models/"))
    assert body["Body"].read() == b"an archive"

    alarms = account.client("cloudwatch").describe_alarms()["MetricAlarms"]
    dimensions = [{"Name": "EndpointName", "Value": "roadseg"}, {"Name": "VariantName", "Value": VARIANT}]
    assert {a["MetricName"] for a in alarms} == {"Invocation5XXErrors", "ModelLatency"}
    assert all(a["Dimensions"] == dimensions and a["TreatMissingData"] == "notBreaching" for a in alarms)
    scaling = account.client("application-autoscaling")
    (target,) = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    assert (target["ResourceId"], target["MinCapacity"], target["MaxCapacity"]) == (
        f"endpoint/roadseg/variant/{VARIANT}",
        1,
        4,
    )


def test_the_steps_come_in_order(account: Account, store: S3Store, digest: str) -> None:
    deploy(digest, store, account.aws, connect=account.connect, poll_s=1)
    assert [operation for _, operation, _ in account.changes()] == [
        "create_model_package_group",
        "create_model_package",
        "update_model_package",
        "create_model",
        "create_endpoint_config",
        "create_endpoint",
        "put_metric_alarm",
        "put_metric_alarm",
        "register_scalable_target",
        "put_scaling_policy",
    ]
    statuses = [p["ModelApprovalStatus"] for _, _, p in account.changes() if "ModelApprovalStatus" in p]
    assert statuses == ["PendingManualApproval", "Approved"]


def test_a_dry_run_says_exactly_what_a_run_sends_and_sends_nothing(
    account: Account, store: S3Store, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with monkeypatch.context() as m:

        def connect(*_: Any) -> None:
            pytest.fail("something was sent")

        m.setattr(socket.socket, "connect", connect)
        fresh = S3Store(store.address, region=REGION, endpoint_url=account.endpoint)
        deploy(digest, fresh, account.aws, dry_run=True, say=said.append)
    assert set(account.contents().values()) == {0}

    deploy(digest, store, account.aws, connect=account.connect, poll_s=1)
    arn = next(p["ModelPackageArn"] for _, operation, p in account.changes() if operation == "update_model_package")
    printed = json.loads(said[0].replace(PACKAGE_ARN, arn))
    assert [(c["service"], c["operation"], c["parameters"]) for c in printed] == account.changes()
    for call in printed:
        assert violations(parameters_of(call["service"], call["operation"]), call["parameters"], "") == []


def test_the_default_instance_type_is_one_of_aws(account: Account, store: S3Store) -> None:
    settings = Aws(region=REGION, role_arn=account.aws.role_arn, image_uri=account.aws.image_uri)
    said: list[str] = []
    deploy("a" * 64, store, settings, dry_run=True, say=said.append)
    assert PACKAGE_ARN in said[0] and "DataCaptureConfig" not in said[0]
    for call in json.loads(said[0].replace(PACKAGE_ARN, "arn:aws:sagemaker:us-east-1:123456789012:model-package/a/1")):
        assert violations(parameters_of(call["service"], call["operation"]), call["parameters"], "") == []


def test_a_release_by_any_of_its_names(account: Account, store: S3Store, digest: str, tmp_path: Path) -> None:
    def said(release: str) -> str:
        lines: list[str] = []
        deploy(release, store, account.aws, dry_run=True, say=lines.append)
        return lines[0]

    with pytest.raises(StoreError, match="no champion yet"):
        said("champion")
    store.promote(Champion(digest, 0.5, "fingerprint", 1), None)
    assert said("champion") == said(digest[:8]) == said(str(tmp_path / "model.tar.gz")) == said(digest)
    with pytest.raises(StoreError, match="0 releases match 'ffffffff'"):
        said("ffffffff")


def test_names_differ_when_release_or_settings_do(account: Account, store: S3Store) -> None:
    def name(digest: str, **changes: Any) -> str:
        said: list[str] = []
        deploy(digest, store, account.aws.model_copy(update=changes), dry_run=True, say=said.append)
        (config,) = (c for c in json.loads(said[0]) if c["operation"] == "create_endpoint_config")
        return config["parameters"]["EndpointConfigName"]

    one = name("a" * 64)
    assert one == name("a" * 64)
    changes: list[dict[str, Any]] = [{"instance_type": "ml.c5.large"}, {"capture_percent": 5}, {"image_uri": "other"}]
    assert len({one, name("b" * 64), *(name("a" * 64, **c) for c in changes)}) == 5
    longest = name("a" * 64, endpoint_name="e" * 41)
    assert len(longest) == 63


def test_the_documented_policy_allows_every_request(account: Account, store: S3Store, digest: str) -> None:
    deploy(digest, store, account.aws, connect=account.connect, poll_s=1)
    text = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    policies = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    assert len(policies) == 2
    actions = [
        a for s in policies[0]["Statement"] for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])
    ]
    sent = {f"{service}:{inspecting(service).meta.method_to_api_mapping[name]}" for service, name, _ in account.asked}
    assert len(sent) > 12 and sent <= set(actions)


# ── what can go wrong ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("broken", "made"),
    [
        ("create_model_package_group", "nothing was created"),
        ("list_model_packages", "created so far: model package group roadseg;"),
        ("create_model_package", "created so far: model package group roadseg;"),
        ("update_model_package", "model package of release"),
        ("create_model", "its approval;"),
        ("create_endpoint_config", "model roadseg-"),
        ("create_endpoint", "endpoint configuration roadseg-"),
        ("put_metric_alarm", "endpoint roadseg;"),
        ("register_scalable_target", "alarm roadseg-latency;"),
        ("put_scaling_policy", "scalable target;"),
    ],
)
def test_after_a_failed_step_running_again_goes_on(
    account: Account, store: S3Store, digest: str, broken: str, made: str
) -> None:
    account.answers[broken] = lambda: "AccessDeniedException"
    with pytest.raises(RoadsegError, match="access denied to .*you may not") as e:
        deploy(digest, store, account.aws, connect=account.connect, poll_s=1)
    assert made in e.value.todo and "run `roadseg deploy` again" in e.value.todo
    assert "docs/deploy.md" in e.value.todo

    account.answers.clear()
    deploy(digest, store, account.aws, connect=account.connect, poll_s=1)
    assert account.contents() == ONE_DEPLOYMENT


def test_running_again_makes_nothing_twice(account: Account, store: S3Store, digest: str) -> None:
    deploy(digest, store, account.aws, connect=account.connect, poll_s=1)
    account.asked.clear()
    said: list[str] = []
    deploy(digest, store, account.aws, say=said.append, connect=account.connect, poll_s=1)
    assert not [operation for _, operation, _ in account.changes() if operation.startswith("create_")]
    assert account.contents() == ONE_DEPLOYMENT
    assert "endpoint roadseg: exists" in said


def test_an_endpoint_of_another_release_is_not_touched(
    account: Account, store: S3Store, digest: str, tmp_path: Path
) -> None:
    deploy(digest, store, account.aws, connect=account.connect, poll_s=1)
    (tmp_path / "other").write_bytes(b"another archive")
    other = store.publish(tmp_path / "other", {})
    account.asked.clear()
    with pytest.raises(RoadsegError, match="endpoint roadseg exists already, InService.*nothing was changed"):
        deploy(other, store, account.aws, connect=account.connect, poll_s=1)
    assert account.changes() == [] and account.contents() == ONE_DEPLOYMENT


def described(account: Account, **changes: str) -> Callable[[], dict[str, Any] | None]:
    """describe_endpoint as moto answers it, with changes, once the endpoint is there."""

    def answer() -> dict[str, Any] | None:
        if not account.client().list_endpoints()["Endpoints"]:
            return None
        return {**account.client().describe_endpoint(EndpointName="roadseg"), **changes}

    return answer


def test_an_endpoint_that_fails(account: Account, store: S3Store, digest: str) -> None:
    account.answers["describe_endpoint"] = described(
        account, EndpointStatus="Failed", FailureReason="the container did not pass the ping health check"
    )
    with pytest.raises(RoadsegError, match="endpoint roadseg failed: the container did not pass") as e:
        deploy(digest, store, account.aws, connect=account.connect, poll_s=1)
    assert "delete-endpoint --endpoint-name roadseg" in e.value.todo and "created so far: " in e.value.todo
    assert account.contents()["alarms"] == 0


def test_in_service_with_another_configuration_is_no_success(account: Account, store: S3Store, digest: str) -> None:
    account.answers["describe_endpoint"] = described(account, EndpointConfigName="rolled-back")
    with pytest.raises(RoadsegError, match="is InService with the configuration rolled-back"):
        deploy(digest, store, account.aws, connect=account.connect, poll_s=1)


def test_a_rejected_package_is_not_approved(account: Account, store: S3Store, digest: str) -> None:
    account.answers["create_model"] = lambda: "AccessDeniedException"
    with pytest.raises(RoadsegError):
        deploy(digest, store, account.aws, connect=account.connect, poll_s=1)
    (package,) = account.packages()
    account.client().update_model_package(ModelPackageArn=package["ModelPackageArn"], ModelApprovalStatus="Rejected")
    with pytest.raises(RoadsegError, match="was rejected"):
        deploy(digest, store, account.aws, connect=account.connect, poll_s=1)


def test_everything_missing_is_listed_at_once(account: Account, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        deploy("a" * 64, FolderStore(tmp_path), Aws(endpoint_name="-", instance_count=9), dry_run=True)
    keys = re.findall(r"^  ([\w.]+):", str(e.value), re.MULTILINE)
    assert keys == [
        "store.url",
        "aws.region",
        "aws.role_arn",
        "aws.image_uri",
        "aws.endpoint_name",
        "aws.max_instance_count",
    ]
    assert str(e.value).startswith("6 wrong values")


def test_the_environments_region_will_do(account: Account, store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = account.aws.model_copy(update={"region": ""})
    with pytest.raises(ConfigError, match="aws.region: missing"):
        deploy("a" * 64, store, settings, dry_run=True)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    deploy("a" * 64, store, settings, dry_run=True)


def test_a_release_that_is_not_in_the_store(account: Account, store: S3Store) -> None:
    with pytest.raises(StoreError, match="no release aaaa"):
        deploy("a" * 64, store, account.aws, connect=account.connect, poll_s=1)
    assert account.asked == []
