"""Random crops, flips, RandAugment, erasing and mixing: drawn on the host, applied on the device."""
