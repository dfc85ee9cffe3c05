"""Flat buckets in which ZeRO-1 reduce-scatters gradients: their size, which the engine keeps and the plan counts."""

BUCKET_BYTES = 32 * 2**20
"""Most bytes of a bucket of several gradients: larger ones hide the latency better, and the last one hides less."""

BUCKETS_IN_FLIGHT = 2
"""Buckets on their way at a time: one is reduced while the backward pass fills the next."""
