"""`latte-data`: clips and captions to the shards that the trainer streams. README.md lists every file."""
