"""How many tensors live in this process, and their bytes."""

import gc

import torch


def live_tensors() -> tuple[int, int]:
    """Tensors, and the bytes of their storages, once garbage is collected."""
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)  # no traced ones that another test left
    tensors = [t for t in gc.get_objects() if type(t) in plain and not torch._is_functional_tensor(t)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.layout == torch.strided}
    return len(tensors), sum(storages.values())
