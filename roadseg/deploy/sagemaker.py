"""First deployment of a release to a SageMaker endpoint. Updating a running endpoint is refused.

Every resource name is derived from the release and the settings, and every step first checks whether its
resource exists: running again after an error continues where it stopped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from roadseg.aws import aws_client, aws_errors, aws_session, error_code
from roadseg.config.sections import Aws
from roadseg.errors import ConfigError, RoadsegError, StoreError
from roadseg.files import json_bytes, sha256_bytes, sha256_file
from roadseg.release.store.base import Store
from roadseg.release.store.s3 import S3Store

VARIANT = "AllTraffic"  # never change it: SageMaker shifts traffic only between variants of the same name
PACKAGE_ARN = "<the ModelPackageArn that create_model_package returns>"
ERRORS_A_MINUTE = 5  # alarm threshold of 5xx answers
LATENCY_S = 10  # alarm threshold of the 99th percentile; SageMaker times out at 60
CONCURRENT_REQUESTS = 4  # per instance, running or waiting; above it instances are added
_DESCRIBE = {
    "create_model_package_group": ("describe_model_package_group", "ModelPackageGroupName"),
    "create_model": ("describe_model", "ModelName"),
    "create_endpoint_config": ("describe_endpoint_config", "EndpointConfigName"),
    "create_endpoint": ("describe_endpoint", "EndpointName"),
}


@dataclass(frozen=True)
class Call:
    """One request to AWS. makes: description of the resource that it creates."""

    makes: str
    service: str
    operation: str
    parameters: dict[str, Any]


def deploy(
    release: str,
    store: Store,
    aws: Aws,
    *,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda text: None,
    connect: Callable[[str], Any] | None = None,
    poll_s: int = 30,
) -> None:
    """Put a release of an S3 store behind the endpoint `aws.endpoint_name`, with alarms and autoscaling.

    release: "champion", a digest, its prefix, or the path of an archive. Returns when the endpoint
    serves it (some minutes). With `dry_run` the requests are only printed, as one JSON list; the store
    is read if `release` is not a full digest. connect: returns the client of a service.

    Raises ConfigError that lists everything missing, StoreError when the store lacks the release,
    RoadsegError when the endpoint exists with another configuration, and when AWS refuses a step (with a
    list of what was created).
    """
    _check(store, aws)
    assert isinstance(store, S3Store)
    digest = _digest(release, store)
    calls = first_deployment(digest, store.archive_url(digest), f"{store.address}/capture", aws)
    if dry_run:
        say(json.dumps([asdict(call) for call in calls], indent=2))
        return
    if digest not in store.releases():
        raise StoreError(f"no release {digest}", where=store.address, todo="push it to this store first")
    connect = connect or partial(aws_client, region=aws.region, endpoint_url=aws.endpoint_url)
    clients = {call.service: connect(call.service) for call in calls}
    with aws_errors("SageMaker", RoadsegError):
        _check_endpoint(clients["sagemaker"], calls)
    made: list[str] = []
    try:
        with aws_errors("SageMaker", RoadsegError):
            _make(calls, clients, made, say, poll_s)
    except RoadsegError as e:
        kept = f"created so far: {', '.join(made)}; " if made else "nothing was created; "
        again = "then run `roadseg deploy` again, which continues from there"
        raise RoadsegError(e.found, where=e.where, todo=f"{kept}{e.todo or 'fix the cause'}, {again}") from e
    say(f"endpoint {aws.endpoint_name} serves release {digest}")


def _digest(release: str, store: S3Store) -> str:
    if re.fullmatch(r"[0-9a-f]{64}", release):
        return release
    if release == "champion":
        champion = store.champion()
        if champion is None:
            raise StoreError("there is no champion yet", where=store.address, todo="run `roadseg push` first")
        return champion.digest
    if Path(release).is_file():
        return sha256_file(Path(release))
    matches = [d for d in store.releases() if d.startswith(release)] if len(release) >= 8 else []
    if len(matches) != 1:
        raise StoreError(
            f"{len(matches)} releases match {release!r}", where=store.address, todo="see `roadseg releases`"
        )
    return matches[0]


def first_deployment(digest: str, archive_url: str, capture_url: str, aws: Aws) -> list[Call]:
    """The requests, in order. The model package's ARN is not known in advance; PACKAGE_ARN stands for it."""
    settings = aws.model_dump(mode="json", exclude={"region", "endpoint_url", "max_instance_count"})
    unique = sha256_bytes(json_bytes([digest, archive_url, capture_url, settings]))
    name = f"{aws.endpoint_name}-{digest[:12]}-{unique[:8]}"
    group = {
        "ModelPackageGroupName": aws.endpoint_name,
        "ModelPackageGroupDescription": "Road scene segmentation, released by roadseg",
    }
    approval = {"ModelPackageArn": PACKAGE_ARN, "ModelApprovalStatus": "Approved"}
    model = {
        "ModelName": name,
        "PrimaryContainer": {"ModelPackageName": PACKAGE_ARN},
        "ExecutionRoleArn": aws.role_arn,
        "EnableNetworkIsolation": True,  # the container holds everything that the server needs
    }
    config = _endpoint_config(name, capture_url, aws)
    endpoint = {"EndpointName": aws.endpoint_name, "EndpointConfigName": name}
    steps: list[tuple[str, str, dict[str, Any]]] = [
        (f"model package group {aws.endpoint_name}", "create_model_package_group", group),
        (f"model package of release {digest[:12]}", "create_model_package", _package(digest, archive_url, aws)),
        ("its approval", "update_model_package", approval),
        (f"model {name}", "create_model", model),
        (f"endpoint configuration {name}", "create_endpoint_config", config),
        (f"endpoint {aws.endpoint_name}", "create_endpoint", endpoint),
    ]
    deployment = [Call(makes, "sagemaker", operation, parameters) for makes, operation, parameters in steps]
    return deployment + _alarms(aws.endpoint_name) + _scaling(aws)


def _package(digest: str, archive_url: str, aws: Aws) -> dict[str, Any]:
    package = {
        "ModelPackageGroupName": aws.endpoint_name,
        "ModelPackageDescription": f"roadseg release {digest}",
        "ModelApprovalStatus": "PendingManualApproval",
        "InferenceSpecification": {
            "Containers": [{"Image": aws.image_uri, "ModelDataUrl": archive_url}],
            "SupportedContentTypes": ["image/jpeg", "image/png"],
            "SupportedResponseMIMETypes": ["image/png"],
            "SupportedRealtimeInferenceInstanceTypes": [aws.instance_type],
        },
    }
    return {**package, "ClientToken": sha256_bytes(json_bytes(package))[:36]}


def _endpoint_config(name: str, capture_url: str, aws: Aws) -> dict[str, Any]:
    variant = {
        "VariantName": VARIANT,
        "ModelName": name,
        "InstanceType": aws.instance_type,
        "InitialInstanceCount": aws.instance_count,
        "InitialVariantWeight": 1.0,
    }
    config: dict[str, Any] = {"EndpointConfigName": name, "ProductionVariants": [variant]}
    if aws.capture_percent:
        config["DataCaptureConfig"] = {
            "EnableCapture": True,
            "InitialSamplingPercentage": aws.capture_percent,
            "DestinationS3Uri": capture_url,
            "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
        }
    return config


def _alarms(endpoint: str) -> list[Call]:
    shared = {
        "Namespace": "AWS/SageMaker",
        "Dimensions": [{"Name": "EndpointName", "Value": endpoint}, {"Name": "VariantName", "Value": VARIANT}],
        "Period": 60,
        "TreatMissingData": "notBreaching",  # no requests is not a failure
    }
    errors = {
        "AlarmName": f"{endpoint}-errors",
        "AlarmDescription": f"{ERRORS_A_MINUTE} or more answers with 5xx in a minute",
        "MetricName": "Invocation5XXErrors",
        "Statistic": "Sum",
        "EvaluationPeriods": 1,
        "Threshold": ERRORS_A_MINUTE,
        "ComparisonOperator": "GreaterThanOrEqualToThreshold",
        **shared,
    }
    latency = {
        "AlarmName": f"{endpoint}-latency",
        "AlarmDescription": f"99th percentile above {LATENCY_S} s for 3 minutes",
        "MetricName": "ModelLatency",
        "ExtendedStatistic": "p99",
        "EvaluationPeriods": 3,
        "Threshold": LATENCY_S * 1_000_000,  # the metric is in microseconds
        "ComparisonOperator": "GreaterThanThreshold",
        **shared,
    }
    return [Call(f"alarm {a['AlarmName']}", "cloudwatch", "put_metric_alarm", a) for a in (errors, latency)]


def _scaling(aws: Aws) -> list[Call]:
    target = {
        "ServiceNamespace": "sagemaker",
        "ResourceId": f"endpoint/{aws.endpoint_name}/variant/{VARIANT}",
        "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
    }
    limits = {"MinCapacity": aws.instance_count, "MaxCapacity": aws.max_instance_count}
    policy = {
        "PolicyName": f"{aws.endpoint_name}-concurrency",
        "PolicyType": "TargetTrackingScaling",
        "TargetTrackingScalingPolicyConfiguration": {
            "TargetValue": float(CONCURRENT_REQUESTS),
            "PredefinedMetricSpecification": {
                "PredefinedMetricType": "SageMakerVariantConcurrentRequestsPerModelHighResolution"
            },
            "ScaleOutCooldown": 60,
            "ScaleInCooldown": 300,
        },
    }
    service = "application-autoscaling"
    return [
        Call("scalable target", service, "register_scalable_target", {**target, **limits}),
        Call("scaling policy", service, "put_scaling_policy", {**target, **policy}),
    ]


def _check(store: Store, aws: Aws) -> None:
    wrong = []
    if not isinstance(store, S3Store):
        wrong.append(f"store.url: SageMaker reads releases from S3 only (found {store.address}); expected s3://...")
    if not aws.region and not aws_session().region_name:
        wrong.append("aws.region: missing, here and in the environment")
    if not re.fullmatch(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+", aws.role_arn):
        wrong.append(f"aws.role_arn: expected arn:aws:iam::<account>:role/<name> (found {aws.role_arn!r})")
    if not re.fullmatch(r"\S{1,255}", aws.image_uri):
        wrong.append(f"aws.image_uri: expected an image in ECR (found {aws.image_uri!r})")
    if not re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,40}", aws.endpoint_name):
        wrong.append(f"aws.endpoint_name: expected 1..41 letters, digits and dashes (found {aws.endpoint_name!r})")
    if not aws.instance_type.startswith("ml."):
        wrong.append(f"aws.instance_type: expected one such as ml.c7i.xlarge (found {aws.instance_type!r})")
    if aws.max_instance_count < aws.instance_count:
        wrong.append(f"aws.max_instance_count: {aws.max_instance_count} is below aws.instance_count")
    if wrong:
        count = f"{len(wrong)} wrong value{'s' if len(wrong) > 1 else ''}"
        raise ConfigError("\n  ".join([f"{count} for the deployment:", *wrong]))


def _described(client: Any, call: Call) -> dict[str, Any] | None:
    """The description of the resource that a create call would make; None if it does not exist."""
    from botocore.exceptions import ClientError  # type: ignore[import-untyped]

    operation, key = _DESCRIBE[call.operation]
    try:
        return dict(getattr(client, operation)(**{key: call.parameters[key]}))
    except ClientError as e:
        # Our names are valid (see _check), so a ValidationException from these four means that none exists.
        if error_code(e) in ("ValidationException", "ResourceNotFound", "ResourceNotFoundException"):
            return None
        raise


def _check_endpoint(client: Any, calls: list[Call]) -> None:
    """Raises RoadsegError when the endpoint exists and does not belong to this deployment."""
    call = next(c for c in calls if c.operation == "create_endpoint")
    found = _described(client, call)
    if found is None or found["EndpointConfigName"] == call.parameters["EndpointConfigName"]:
        return
    name, status = found["EndpointName"], found["EndpointStatus"]
    remove = f"remove it with `aws sagemaker delete-endpoint --endpoint-name {name}`"
    raise RoadsegError(
        f"endpoint {name} exists already, {status}, with the configuration {found['EndpointConfigName']}",
        expected="a first deployment",
        todo=f"nothing was changed: {'' if status == 'Failed' else 'choose another aws.endpoint_name, or '}{remove}",
    )


def _make(calls: list[Call], clients: dict[str, Any], made: list[str], say: Callable[[str], None], poll_s: int) -> None:
    arn = ""
    for call in calls:
        client = clients[call.service]
        found: Any = None
        if call.operation in _DESCRIBE:
            found = _described(client, call)
        elif call.operation == "create_model_package":
            found = arn = _existing_package(client, call)
        if not found:
            answer = getattr(client, call.operation)(**_with_arn(call.parameters, arn))
            arn = answer.get("ModelPackageArn", arn)
        made.append(call.makes)
        say(f"{call.makes}: {'exists' if found else 'created'}")
        if call.operation == "create_endpoint":
            say("waiting until the endpoint is in service, which takes some minutes")
            _wait(client, call.parameters["EndpointName"], call.parameters["EndpointConfigName"], poll_s)


def _with_arn(value: Any, arn: str) -> Any:
    if isinstance(value, dict):
        return {k: _with_arn(v, arn) for k, v in value.items()}
    return arn if value == PACKAGE_ARN else value


def _existing_package(client: Any, call: Call) -> str:
    """The ARN of the group's package of the same archive and image; "" if there is none.

    AWS forgets a ClientToken after a while, so the token alone does not prevent a second package.
    """
    wanted = call.parameters["InferenceSpecification"]["Containers"][0]
    group = call.parameters["ModelPackageGroupName"]
    pages = client.get_paginator("list_model_packages").paginate(ModelPackageGroupName=group)
    for summary in (s for page in pages for s in page["ModelPackageSummaryList"]):
        package = client.describe_model_package(ModelPackageName=summary["ModelPackageArn"])
        containers = package.get("InferenceSpecification", {}).get("Containers", [{}])
        if any(containers[0].get(key) != value for key, value in wanted.items()):
            continue
        if package["ModelApprovalStatus"] == "Rejected":
            raise RoadsegError(
                f"model package {package['ModelPackageArn']} of this release was rejected",
                todo="deploy another release, or approve it in the model registry",
            )
        return str(package["ModelPackageArn"])
    return ""


def _wait(client: Any, name: str, config_name: str, poll_s: int) -> None:
    """Wait until the endpoint is in service with our configuration, which the waiter alone does not check."""
    from botocore.exceptions import WaiterError

    with suppress(WaiterError):  # describe_endpoint below returns the reason
        waiter = client.get_waiter("endpoint_in_service")
        waiter.wait(EndpointName=name, WaiterConfig={"Delay": poll_s, "MaxAttempts": 120})
    found = client.describe_endpoint(EndpointName=name)
    if found["EndpointStatus"] == "Failed":
        raise RoadsegError(
            f"endpoint {name} failed: {found.get('FailureReason', 'no reason given')}",
            todo=f"see its log in CloudWatch, remove it with `aws sagemaker delete-endpoint --endpoint-name {name}`",
        )
    if found["EndpointStatus"] != "InService" or found["EndpointConfigName"] != config_name:
        raise RoadsegError(
            f"endpoint {name} is {found['EndpointStatus']} with the configuration {found['EndpointConfigName']}",
            expected=f"InService with {config_name}",
        )
