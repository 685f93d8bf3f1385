"""From parquet files to windows of tokens."""
