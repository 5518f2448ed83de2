"""The back-ends of `heed_core.attend`: `reference` is the specification, the others are fast."""
