"""Random crops, flips, RandAugment, erasing and mixing: drawn on the host, applied on the device.

`policy.OPERATIONS` lists the operations, `draws` draws all of a batch, `kernels` carries them out.
"""
