"""Parts of one's own for the GPT: norm, positions, attention, feed-forward layer, optimizer and data source."""
