"""Preprocessing by several processes: text, jsonl and parquet files become a folder of tokens.

``spec`` identifies a corpus, ``shards`` splits and reads its text, and ``worker`` tokenizes a shard. ``prepare`` merges
the results, and runs these steps in order.
"""
