"""Load the torch network of a release."""

from __future__ import annotations

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from roadseg.errors import ArchiveError
from roadseg.model.deeplab import Architecture, DeepLabV3Plus, build
from roadseg.release.archive import Release
from roadseg.release.graph import WEIGHTS


def load_network(release: Release) -> DeepLabV3Plus:
    """The network in eval mode on the CPU. Raises ArchiveError if weights and architecture don't fit."""
    where = f"release {release.digest[:12]}"
    network = build(Architecture.from_json(release.model["architecture"]), seed=0)
    try:
        network.load_state_dict(load_tensors(release.members[WEIGHTS]))
    except (SafetensorError, RuntimeError) as e:
        raise ArchiveError(f"{WEIGHTS} does not fit the architecture ({str(e).splitlines()[0]})", where=where) from e
    return network.eval()
