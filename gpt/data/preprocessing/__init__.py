"""Preprocessing: text, jsonl and parquet files to a folder of tokens, by several processes.

``spec`` identifies a corpus, ``shards`` splits its text, ``worker`` tokenizes a shard, ``merge`` joins the results, and
``prepare`` runs these steps in order.
"""
