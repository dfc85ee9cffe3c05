"""Bytes of one element of each kind, and of a GiB."""

FP32, BF16, INT64 = 4, 2, 8
GIB = 2**30
