"""A run folder with a checkpoint as `fisnet-cuda fit` writes it, of an untrained small net: made in no time."""

import torch

from fisnet_cuda.data.spec import InputSpec
from fisnet_cuda.train.module import ISNetModule


def save(folder, classes=("disc", "square"), size=(24, 32), channels=3, name="best.ckpt", **options):
    """``folder/best.ckpt``; returns the folder and the module in eval mode."""
    spec = InputSpec(size, channels, classes, mean=(0.5,), std=(0.25,), **options.pop("spec", {}))
    module = ISNetModule(spec, **{"backbone": "fisnet_cuda.nets.small", "variant": "selective", **options}).eval()
    with torch.no_grad():  # statistics and biases that are not their own defaults
        generator = torch.Generator().manual_seed(1)
        for key, value in module.net.model.state_dict().items():
            if key.endswith(("bias", "running_mean")):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / name)
    return folder, module
