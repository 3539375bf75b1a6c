"""Linear maps, rows and means along the concept axis of a pack (METHOD.md "Packing").

`concept` [R] long says which concept each row of a batch belongs to. It is kept on the CPU:
looking at it then costs no wait for the accelerator.
"""

import torch
from torch.nn import functional as F


def concept_rows(n: int, items: int) -> torch.Tensor:
    """Give the `concept` of a concept-major batch: 0, 0, .., 1, 1, .. [n * items], on the CPU."""
    return torch.arange(n).repeat_interleave(items)


def block_size(concept: torch.Tensor, n: int) -> int | None:
    """Give B when `concept` is n concept-major blocks of B rows each, else None."""
    rows = concept.shape[0]
    if n < 1 or rows % n or rows == 0:
        return None
    return rows // n if torch.equal(concept.cpu(), concept_rows(n, rows // n)) else None


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    concept: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply each row's own linear map: `y[r] = x[r] @ weight[concept[r]].T + bias[concept[r]]`.

    Args:
        x: [R, ..., d].
        weight: [N, o, d], same type as x.
        concept: [R] long, values 0..N-1.
        bias: [N, o] or None.

    Returns:
        [R, ..., o].
    """
    n, width, d = weight.shape
    shape = (*x.shape[:-1], width)
    if n == 1:
        return F.linear(x, weight[0], None if bias is None else bias[0])
    block = block_size(concept, n)
    if block is not None:
        flat = x.reshape(n, -1, d)
        if x.is_cuda and weight.numel() > flat.numel():
            # So that the weight's gradient need not be turned around; the few values are, as fused
            # attention wants them.
            y = torch.bmm(weight, flat.transpose(1, 2)).transpose(1, 2).contiguous()
        else:
            y = torch.bmm(flat, weight.transpose(1, 2))
        return (y if bias is None else y + bias.unsqueeze(1)).reshape(shape)
    groups = [(c, (concept == c).nonzero().flatten()) for c in concept.unique().tolist()]
    parts = [
        F.linear(x[rows.to(x.device)], weight[c], None if bias is None else bias[c])
        for c, rows in groups
    ]
    back = torch.cat([rows for _, rows in groups]).argsort().to(x.device)
    return torch.cat(parts)[back]


def per_row(values: torch.Tensor, concept: torch.Tensor) -> torch.Tensor:
    """Give each row its concept's values: `values[concept[r]]`, [R, ...] of [N, ...]."""
    n = len(values)
    block = block_size(concept, n)
    if block is None:
        return values[concept.to(values.device)]
    return values.unsqueeze(1).expand(n, block, *values.shape[1:]).flatten(0, 1)


def per_concept_mean(values: torch.Tensor, concept: torch.Tensor, n: int) -> torch.Tensor:
    """Average per-row losses [R] over each concept's rows: [N].

    A concept with no row in the batch gets 0.
    """
    block = block_size(concept, n)
    if block is not None:
        return values.reshape(n, block).mean(dim=1)
    index = concept.to(values.device)
    zeros = torch.zeros(n, dtype=values.dtype, device=values.device)
    counts = zeros.index_add(0, index, torch.ones_like(values)).clamp_min(1)
    return zeros.index_add(0, index, values) / counts
