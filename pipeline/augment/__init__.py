"""What is random about a batch: crops, flips, RandAugment, erasing, mixing; drawn on the host, done on the device."""
