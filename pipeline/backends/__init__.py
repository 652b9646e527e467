"""The ways to decode, crop and augment the images of batches: DALI, this process's threads, and PIL, their readable twin."""
