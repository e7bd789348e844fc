"""The network: backbone, ASPP, selective kernel fusion, decoder."""

from roadseg.model.deeplab import Architecture, DeepLabV3Plus, TrainingOutput, build

__all__ = ["Architecture", "DeepLabV3Plus", "TrainingOutput", "build"]
