"""Images, masks and labels from disk to batches; needs the extra ``train``."""
