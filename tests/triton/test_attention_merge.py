"""The merge of attention's parts in the interpreter: TRITON_INTERPRET=1 pytest tests/triton"""

import pytest
import torch

from dit_ops import _library as lib
from dit_ops.ops import _attention_dense as dense

if not lib.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("D", [8, 20])
def test_kernel_writes_what_the_plain_merge_writes(count, D):
    """Into slices of larger tensors, of weights from nearly 0 to nearly 1; nothing around them is touched."""
    B, n, N = 2, 37, 3
    parts = [(torch.randn(B, n, N, D), 20 * torch.randn(B, N, n)) for _ in range(count)]
    outs = [(torch.zeros(B, 50, N, D), torch.zeros(B, N, 50)) for _ in range(2)]
    (want, want_lse), (got, got_lse) = outs
    dense.merge(parts, want[:, 5 : 5 + n], want_lse[:, :, 5 : 5 + n])
    lib.kernel("triton", "_attention_merge", "attention_merge_parts")(parts, got[:, 5 : 5 + n], got_lse[:, :, 5 : 5 + n])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_lse, want_lse)
