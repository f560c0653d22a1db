"""The gated delta rule in chunks, in plain torch (arXiv 2412.06464, section 3.3; arXiv 2406.06484).

Within a chunk the corrections u_t of all tokens solve one unit lower triangular system,
``u_t + beta_t sum_{j<t} e^(g_t-g_j) (k_t . k_j) u_j = beta_t v_t - beta_t e^(g_t) S_0^T k_t``,
with g the running sum of the log decay. It is linear in the chunk's first state S_0, so every chunk is
solved at once for both terms on the right, and only two small products a chunk are left to do in order.

Shapes: B sequences, T tokens, H heads, Dk key and Dv value features a head; N chunks of C tokens.
"""

from itertools import pairwise

import torch
from torch import Tensor

from fwpkm_bench.kernels.phases import phase

CHUNK = 64
SEGMENT = 1024  # tokens in flight, all sequences together: their matrices stay in the cache


def segment_length(batch: int) -> int:
    """Tokens of each of ``batch`` sequences to take at a time: whole chunks."""
    return max(1, SEGMENT // (CHUNK * batch)) * CHUNK


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Whole chunks in segments of at most `SEGMENT` tokens, then what is left as one shorter chunk."""
    seq = q.shape[1]
    if seq == 1:
        return _step(q, k, v, beta, log_decay, state)
    whole = seq - seq % CHUNK
    cuts = [*range(0, whole, segment_length(q.shape[0])), whole, seq]
    outputs = []
    for start, stop in pairwise(cuts):
        if start < stop:
            at = slice(start, stop)
            inputs = q[:, at], k[:, at], v[:, at], beta[:, at], log_decay[:, at]
            output, state = _segment(inputs, state, min(CHUNK, stop - start))
            outputs.append(output)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state


def _step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, as decoding needs it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, 1, D]
    state = log_decay[:, 0, :, None, None].exp() * state
    correction = beta[:, 0, :, None, None] * (v - k @ state)
    state = state + k.transpose(-1, -2) * correction
    return ((q @ state) * q.shape[-1] ** -0.5).transpose(1, 2), state


def _segment(inputs: tuple[Tensor, ...], state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """N whole chunks of ``inputs`` q, k, v, beta and log decay."""
    q, k, v, beta, log_decay = inputs
    batch, seq, heads, key_dim = q.shape
    value_dim = v.shape[-1]

    def in_chunks(x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, chunk)).movedim(3, 1).movedim(2, 0)  # [N, B, H, C, ...]
        return x.reshape(seq // chunk, batch * heads, chunk, *x.shape[4:])

    q, k, v, beta, log_decay = (in_chunks(x) for x in (q * key_dim**-0.5, k, v, beta, log_decay))
    total = log_decay.cumsum(-1)  # [N, BH, C]
    # Masked before the exponential: above the diagonal the difference is positive and may overflow.
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    from_start = total.exp().unsqueeze(-1)
    to_end = (total[..., -1:] - total).exp().unsqueeze(-1)
    beta = beta.unsqueeze(-1)

    system = (k @ k.transpose(-1, -2)) * decay * beta  # its diagonal is read as ones
    identity = torch.eye(chunk, dtype=q.dtype, device=q.device)
    inverse = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
    own, recall = inverse @ (v * beta), inverse @ (k * (beta * from_start))

    memory = state.flatten(0, 1)
    starts, corrections = [], []
    steps = (own, recall, (k * to_end).transpose(-1, -2), from_start[..., -1:, :])
    with phase("state"):
        for own_n, recall_n, keys_n, decay_n in zip(*(x.unbind(0) for x in steps), strict=True):
            starts.append(memory)
            corrections.append(torch.baddbmm(own_n, recall_n, memory, alpha=-1))
            memory = torch.baddbmm(decay_n * memory, keys_n, corrections[-1])

    attention = (q @ k.transpose(-1, -2)) * decay
    output = (q * from_start) @ torch.stack(starts) + attention @ torch.stack(corrections)
    output = output.view(-1, batch, heads, chunk, value_dim).permute(1, 0, 3, 2, 4)
    return output.reshape(batch, seq, heads, value_dim), memory.view_as(state)
