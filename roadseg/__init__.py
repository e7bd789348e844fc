"""From a folder of road scenes to a segmentation model in production that you can trust."""

__version__ = "0.1.0"
