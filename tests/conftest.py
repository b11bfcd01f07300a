"""Test-wide settings: one thread (tensors are small, and tests may run side by side), hypothesis without a deadline."""

import hypothesis
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("fisnet", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fisnet")
