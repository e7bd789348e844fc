"""Connect to AWS and turn its errors into plain messages.

boto3 is an optional dependency and is imported on first use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from roadseg.errors import ConfigError, RoadsegError, StoreError

_NOT_VALID = (
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
)


def aws_session() -> Any:
    """A new boto3 session: the shared default session is not thread-safe."""
    try:
        import boto3  # type: ignore[import-untyped]
    except ImportError:
        raise _not_installed() from None
    with aws_errors("AWS"):
        return boto3.session.Session()


def _not_installed() -> RoadsegError:
    return RoadsegError("AWS needs the package boto3", todo="pip install 'roadseg[aws]'")


def aws_client(service: str, *, region: str = "", endpoint_url: str = "") -> Any:
    """A boto3 client that gives up within seconds if the server does not respond."""
    session = aws_session()
    from botocore.config import Config  # type: ignore[import-untyped]

    config = Config(
        connect_timeout=2,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 3},
        s3={"addressing_style": "path" if endpoint_url else "auto"},
    )
    with aws_errors(f"AWS {service}"):
        try:
            return session.client(service, region_name=region or None, endpoint_url=endpoint_url or None, config=config)
        except ValueError:  # botocore raises it for an address that it can't parse
            raise ConfigError("not an address", expected="http(s)://host", where="aws.endpoint_url") from None


@contextmanager
def aws_errors(where: str, error: type[RoadsegError] = StoreError) -> Iterator[None]:
    """Turn botocore's errors into `error`, without secrets, signatures or request ids."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]
    except ImportError:
        raise _not_installed() from None
    try:
        yield
    except (BotoCoreError, ClientError) as e:
        found, todo = _explain(e)
        raise error(found, where=where, todo=todo) from None


def error_code(e: Any) -> str:
    """The error code of a ClientError; for HEAD requests, which have no body, the HTTP status."""
    return str(e.response.get("Error", {}).get("Code", ""))


def _explain(e: Exception) -> tuple[str, str]:
    from botocore import exceptions as b  # type: ignore[import-untyped]

    signing_in = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws sso login`"
    if isinstance(e, b.ClientError):
        return _explain_client_error(e, signing_in)
    if isinstance(e, b.NoCredentialsError | b.PartialCredentialsError):
        return "no AWS credentials were found", signing_in
    if isinstance(e, b.ProfileNotFound | b.CredentialRetrievalError):
        return "the profile has no usable AWS credentials", "check AWS_PROFILE and ~/.aws/config"
    if isinstance(e, b.SSOError | b.TokenRetrievalError):
        return "the AWS sign-in has expired", "run `aws sso login`"
    if isinstance(e, b.NoRegionError):
        return "no AWS region is set", "set aws.region or AWS_REGION"
    if isinstance(e, b.ConnectionError | b.HTTPClientError | b.IncompleteReadError):
        return f"AWS could not be reached ({type(e).__name__})", "check the network, aws.region and aws.endpoint_url"
    return f"the request failed ({type(e).__name__}: {e})", ""


def _explain_client_error(e: Any, signing_in: str) -> tuple[str, str]:
    code, operation = error_code(e), e.operation_name
    if "Expired" in code:
        return "the AWS credentials have expired", signing_in
    if code in _NOT_VALID:
        return "the AWS credentials are not valid", signing_in
    if code == "NoSuchBucket":
        return "the bucket does not exist", "create it, or correct its name in store.url or transform.shards"
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "301", "IllegalLocationConstraintException"):
        return "the bucket is in another region", "set aws.region to the bucket's"
    if code in ("SlowDown", "Throttling", "ThrottlingException", "TooManyRequestsException", "503"):
        return f"AWS asks to slow down ({operation})", "run again in a minute"
    message = str(e.response.get("Error", {}).get("Message", ""))[:500]
    if "AccessDenied" in code or code in ("403", "Forbidden", "AllAccessDisabled"):
        return f"access denied to {operation} ({message})", "give this identity the permissions of docs/deploy.md"
    return f"{operation} failed ({code}: {message})", ""
