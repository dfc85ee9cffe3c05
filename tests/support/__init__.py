"""Helpers of the tests: commands, ranks, small models."""
