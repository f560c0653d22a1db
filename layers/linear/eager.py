"""Linear attention in chunks, in plain torch.

A token reads its own chunk through a triangular product of queries and keys, and all chunks before it
through their running sum, so nothing is left to do token by token.

Shapes: B sequences, T tokens, H heads, Dk key and Dv value features a head; N chunks of C tokens.
"""

from itertools import pairwise

import torch
from torch import Tensor

from fwpkm_bench.kernels.phases import in_phase

CHUNK = 64
SEGMENT = 2048  # tokens in flight, all sequences together: their matrices stay in the cache


def segment_length(batch: int) -> int:
    """Tokens of each of ``batch`` sequences to take at a time: whole chunks."""
    return max(1, SEGMENT // (CHUNK * batch)) * CHUNK


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, memory: Tensor, normaliser: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole chunks in segments of at most `SEGMENT` tokens, then what is left as one shorter chunk."""
    seq = q.shape[1]
    if seq == 1:
        return _step(q, k, v, memory, normaliser)
    whole = seq - seq % CHUNK
    cuts = [*range(0, whole, segment_length(q.shape[0])), whole, seq]
    outputs = []
    for start, stop in pairwise(cuts):
        if start < stop:
            inputs = q[:, start:stop], k[:, start:stop], v[:, start:stop]
            output, memory, normaliser = _segment(inputs, memory, normaliser, min(CHUNK, stop - start))
            outputs.append(output)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), memory, normaliser


def _step(
    q: Tensor, k: Tensor, v: Tensor, memory: Tensor, normaliser: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One token, as decoding needs it."""
    normaliser = normaliser + k[:, 0]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, 1, D]
    memory = memory + k.transpose(-1, -2) * v
    output = (q @ memory) / (q @ normaliser.unsqueeze(-1))
    return output.transpose(1, 2), memory, normaliser


def _segment(
    inputs: tuple[Tensor, Tensor, Tensor], memory: Tensor, normaliser: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """N whole chunks of ``inputs`` q, k and v."""
    q, k, v = inputs
    batch, seq, heads, _ = q.shape

    def in_chunks(x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4)
        return x.reshape(seq // chunk, batch * heads, chunk, x.shape[-1])

    q, k, v = (in_chunks(x) for x in (q, k, v))
    memories = _running(memory.flatten(0, 1), k.transpose(-1, -2) @ v)
    normalisers = _running(normaliser.flatten(0, 1), k.sum(-2))

    attention = (q @ k.transpose(-1, -2)).tril()
    weight = attention.sum(-1, keepdim=True) + q @ normalisers[:-1].unsqueeze(-1)
    output = (attention @ v + q @ memories[:-1]) / weight
    output = output.view(-1, batch, heads, chunk, v.shape[-1]).permute(1, 0, 3, 2, 4)
    last = memories[-1].view_as(memory).clone(), normalisers[-1].view_as(normaliser).clone()
    return output.reshape(batch, seq, heads, v.shape[-1]), *last


@in_phase("state")
def _running(first: Tensor, added: Tensor) -> Tensor:
    """``first [...]`` and the running sums after each of ``added [N, ...]``: ``[N + 1, ...]``."""
    sums = [first]
    for more in added.unbind(0):
        sums.append(sums[-1] + more)
    return torch.stack(sums)
