"""Text, jsonl and parquet files -> a folder of tokens, by several processes."""
