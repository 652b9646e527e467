"""Ranks: the processes that train together; how they are started, joined and stopped."""
