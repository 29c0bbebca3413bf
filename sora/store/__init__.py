"""Shards of clips with an index, and the batches that training reads from them."""
