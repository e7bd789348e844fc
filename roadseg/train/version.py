"""VERSION of the train stage, apart from it: a key is made without loading torch."""

VERSION = 7
