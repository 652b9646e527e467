"""The two ways to decode, crop and augment the images of batches: DALI, and PIL as its readable twin."""
