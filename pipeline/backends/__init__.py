"""The ways to decode, crop and augment the images of batches: DALI, threads of this process, and PIL, their twin."""
