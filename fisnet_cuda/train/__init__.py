"""Training on Lightning: the module, its callbacks, and how a run is read back; needs the extra ``train``."""
