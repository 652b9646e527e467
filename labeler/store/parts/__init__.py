"""Stores that grow: a store may have parts below its folder, and several stores can be read, or become, one."""
