"""Files behind URLs: read in ranges, written whole, kept in a cache of limited size. Nothing else knows fsspec."""
