"""Images: keys, folders and lists; how they are decoded; the names of classes."""
