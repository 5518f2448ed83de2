"""What tests of attention need, shipped so that every package checks its mechanisms in the same way."""
