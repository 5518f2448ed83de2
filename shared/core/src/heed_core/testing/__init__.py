"""What tests of attention need, shipped so that every package checks in the same way."""
