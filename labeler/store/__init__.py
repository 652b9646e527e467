"""The label store: score maps and their code, shards that are whole or absent, reading and checking."""
