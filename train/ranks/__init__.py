"""Ranks, the processes that train together: starting, joining and stopping them."""
