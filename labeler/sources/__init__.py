"""Images: keys, folders and lists, decoding, and class names."""
