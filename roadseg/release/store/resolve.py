"""Resolve a release reference (champion, digest, path, s3://) to a local archive."""

from __future__ import annotations

from pathlib import Path

from roadseg.config.sections import Config
from roadseg.errors import ReleaseNotFound
from roadseg.release.store.base import FolderStore, Store

CACHE = "cache"  # below the workspace: archives fetched from a remote store


def store_of(config: Config, workspace: Path) -> Store:
    a = config.aws
    return open_store(config.store.url, workspace / "store", region=a.region, endpoint_url=a.endpoint_url)


def find_release(config: Config, workspace: Path, reference: str) -> Path:
    """The local archive of `champion`, a digest, its prefix, a path, or s3://.../releases/DIGEST/model.tar.gz."""
    if reference.startswith("s3://"):
        url, _, rest = reference.partition("/releases/")
        config = config.model_copy(update={"store": config.store.model_copy(update={"url": url})})
        reference = rest.split("/")[0] or "champion"
    return resolve(reference, store_of(config, workspace), workspace / CACHE)


def open_store(url: str, default: Path, *, region: str = "", endpoint_url: str = "") -> Store:
    """The store at a folder or s3://bucket/prefix; `default` when `url` is empty."""
    if url.startswith("s3://"):
        from roadseg.release.store.s3 import S3Store  # boto3 is an extra

        return S3Store(url, region=region, endpoint_url=endpoint_url)
    return FolderStore(Path(url) if url else default)


def resolve(reference: str, store: Store, cache: Path) -> Path:
    """The local archive of `champion`, a digest or its prefix (8 characters at least), or a path."""
    if reference == "champion":
        champion = store.champion()
        if champion is None:
            raise ReleaseNotFound("there is no champion yet", where=store.address, todo="run `roadseg run` first")
        return store.fetch(champion.digest, cache)
    if Path(reference).exists():
        return Path(reference)
    if "/" in reference or reference.endswith(".tar.gz"):
        raise ReleaseNotFound(f"there is no file {reference!r}", todo="check the path")
    matches = [d for d in store.releases() if d.startswith(reference)] if len(reference) >= 8 else []
    if len(matches) != 1:
        raise ReleaseNotFound(
            f"{len(matches)} releases match {reference!r}",
            expected="champion, a digest, 8 or more of its first characters, or the path of a model.tar.gz",
            where=store.address,
            todo="see `roadseg releases`",
        )
    return store.fetch(matches[0], cache)
