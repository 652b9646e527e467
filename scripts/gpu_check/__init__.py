"""The check of a GPU: every kernel and path beside a plain twin, and how fast each is."""
