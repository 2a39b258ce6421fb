"""The global random generators. Our own numbers come from Draws; these are for third-party code (dropout) that uses them."""

import random

import numpy as np
import torch

from dit_ops.draws import Draws


def seed_all(draws: Draws) -> None:
    """Seeds Python's, numpy's and torch's generators, on every device, as one more draw: nothing of them needs to be saved."""
    seed = draws.key("global generators")
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
