"""VERSION of the train stage, in a module of its own so that keys are computed without torch."""

VERSION = 7
