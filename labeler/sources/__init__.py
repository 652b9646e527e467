"""Images: keys, folders, lists, tar shards, parquet files, and class names. Their decoding has a room of its own."""
