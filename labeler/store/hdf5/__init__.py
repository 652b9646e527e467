"""A store's files as HDF5 (see FORMAT.md): the only room that imports h5py."""

import os

# A file can name any filter plug-in; "::" makes libhdf5 load none. The variable is read when HDF5 starts.
os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")

VIEW_FILE = "labels.h5"
