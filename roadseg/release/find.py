"""Which release is meant, and where it is: the store of a config, what a reference names."""

from __future__ import annotations

from pathlib import Path

from roadseg.config import Config
from roadseg.release.store import Store, open_store, resolve

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
