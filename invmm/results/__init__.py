"""What a run leaves on disk: a manifest, one record per image, one table."""
