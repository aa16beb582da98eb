"""torch.hub entrypoints: ``torch.hub.load(<this repository>, "nvidia_ssd")``."""

dependencies = ["torch", "torchvision", "numpy", "PIL", "skimage", "safetensors", "filelock", "tqdm"]

from ssd.hub import nvidia_ssd, nvidia_ssd_processing_utils  # noqa: E402, F401
