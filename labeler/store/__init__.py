"""The label store: score maps and their encoding, atomic shards, reading and checking."""
