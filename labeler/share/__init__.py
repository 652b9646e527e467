"""Label stores that travel: `push_store`, `pull_store`, and the card that says what a store is."""
