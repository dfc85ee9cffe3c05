"""Submitted runs: how they are submitted, followed, shown, stopped and moved."""
