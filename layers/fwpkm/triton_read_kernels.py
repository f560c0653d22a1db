"""How FwPKM's memory reads, and how a read is undone; formulas as in ``eager_backward.py``.

Shapes: B sequences, S memories (B, or fewer that sequences share), A tokens addressed in a call, L of them
in a chunk, its own C last, the P first of which are written; H heads, k = top-k, R = H*k reads a token,
n sub-keys per half of h features, d value features.
"""

import triton
import triton.language as tl

PLACES = [  # of a chunk in a call: Triton would compile again for each that is 1 or a multiple of 16
    "first",
    "length",
    "new",
    "pairs",
    "peeks",
    "first_new",
    "first_pair",
    "first_peek",
    "first_query",
    "first_target",
    "addressed",
    "tokens",
    "targets",
    "queries",
    "all_pairs",
    "all_peeks",
]


@triton.jit(do_not_specialize=PLACES)
def read_kernel(
    rows,
    initial,
    row,
    slots,
    weights,
    target,
    gate,
    retrieved,
    difference,
    losses,
    peeked,
    first,
    length,
    new,
    pairs,
    peeks,
    first_new,
    first_pair,
    first_peek,
    first_query,
    first_target,
    addressed,
    tokens,
    targets,
    queries,
    all_pairs,
    all_peeks,
    reads,
    features,
    RECORD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``v_hat = sum_r w_r V[row_r]`` for one token; where its target came, ``v_hat - target`` and the loss.

    ``row`` is of the overlay, or negative where the ``initial`` table is read.
    """
    token = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    read = tl.arange(0, BLOCK_R)
    inside = read < reads
    place = (sequence * addressed + first + token) * reads + read
    at = tl.load(row + place, inside, -1).to(tl.int64)
    slot = tl.load(slots + place, inside, 0)
    weight = tl.load(weights + place, inside, 0.0)
    kind = weights.dtype.element_ty
    is_new, is_pair = token >= length - new, token < pairs
    out = retrieved + (sequence * tokens + first_new + token - (length - new)) * features
    wanted = target + (sequence * targets + first_target + token) * features
    error = difference + (sequence * all_pairs + first_pair + token) * features
    peek = peeked + ((sequence * all_peeks + first_peek + token - pairs) * reads + read)[:, None] * features
    loss = tl.zeros([BLOCK_D], kind)
    for start in range(0, features, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        valid = column < features
        mask = inside[:, None] & valid[None, :]
        theirs = tl.load(rows + at[:, None] * features + column[None, :], mask & (at >= 0)[:, None], 0.0)
        ours = tl.load(initial + slot[:, None] * features + column[None, :], mask & (at < 0)[:, None], 0.0)
        value = tl.where((at >= 0)[:, None], theirs, ours.to(kind))
        v_hat = tl.sum(weight[:, None] * value, axis=0)
        tl.store(out + column, v_hat, valid & is_new)
        if RECORD:
            tl.store(peek + column[None, :], value, mask & (token >= pairs))
        gap = v_hat - tl.load(wanted + column, valid & is_pair, 0.0)
        tl.store(error + column, gap, valid & is_pair)
        loss += tl.where(valid & is_pair, gap * gap, 0.0)
    share = tl.load(gate + sequence * queries + first_query + token)
    tl.store(losses + sequence * all_pairs + first_pair + token, share * tl.sum(loss) / features, is_pair)


@triton.jit(do_not_specialize=PLACES)
def unread_kernel(
    drows,
    before,
    peeked,
    row,
    group,
    rate,
    weights,
    gate,
    difference,
    grad_retrieved,
    grad_weights,
    grad_losses,
    dv_hat,
    dsums,
    dgate,
    dtarget,
    first,
    length,
    new,
    pairs,
    peeks,
    first_new,
    first_pair,
    first_peek,
    first_query,
    first_target,
    addressed,
    tokens,
    targets,
    queries,
    all_pairs,
    all_peeks,
    reads,
    features,
    RULE: tl.constexpr,
    FROM_RETRIEVED: tl.constexpr,
    FROM_WEIGHTS: tl.constexpr,
    FROM_LOSSES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token: with ``D_r = -r_r dV[r]`` and ``e = g (v_hat - target)``, ``de = sum_r c_r D_r`` and
    ``dc_r = <D_r, e>``; from these ``dv_hat``, the gradients to gate and target and, as ``dsums``, to the
    scores of the token's slots.
    """
    token = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    read = tl.arange(0, BLOCK_R)
    inside = read < reads
    is_new, is_pair = token >= length - new, token < pairs
    place = (sequence * addressed + first + token) * reads + read
    pair = sequence * all_pairs + first_pair + token
    out_token = sequence * tokens + first_new + token - (length - new)
    weight = tl.load(weights + place, inside, 0.0)
    kind = weights.dtype.element_ty
    at = tl.load(row + place, inside, 0).to(tl.int64)
    written = inside & is_pair
    member = tl.load(group + pair * reads + read, written, 0).to(tl.int64)
    step = tl.load(rate + member, written, 0.0)
    share = tl.load(gate + sequence * queries + first_query + token)
    squares = tl.sum(weight * weight)
    coefficient = weight
    if RULE == "authors":
        coefficient = weight * reads
    if RULE == "projected":
        coefficient = weight / squares
    slope = tl.zeros([1], kind)
    if FROM_LOSSES:
        slope += tl.load(grad_losses + pair, is_pair, 0.0)
    peek = peeked + ((sequence * all_peeks + first_peek + token - pairs) * reads + read)[:, None] * features
    dots, dweight = tl.zeros([BLOCK_R], kind), tl.zeros([BLOCK_R], kind)
    gated, square = tl.zeros([BLOCK_D], kind), tl.zeros([BLOCK_D], kind)
    for start in range(0, features, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        valid = column < features
        mask = inside[:, None] & valid[None, :]
        gap = tl.load(difference + pair * features + column, valid & is_pair, 0.0)
        after = tl.load(drows + at[:, None] * features + column[None, :], mask & is_pair, 0.0)
        derror = tl.sum((step * coefficient)[:, None] * after, axis=0)
        dots += tl.sum(after * (share * gap)[None, :], axis=1)
        gated += gap * derror
        square += gap * gap
        dgap = share * (derror + slope * gap * 2 / features)
        wanted = (sequence * targets + first_target + token) * features + column
        tl.store(dtarget + wanted, -dgap, valid & is_pair)
        if FROM_RETRIEVED:
            dgap += tl.load(grad_retrieved + out_token * features + column, valid & is_new, 0.0).to(kind)
        tl.store(dv_hat + (sequence * addressed + first + token) * features + column, dgap, valid)
        value = tl.load(before + member[:, None] * features + column[None, :], mask & is_pair, 0.0)
        value += tl.load(peek + column[None, :], mask & (token >= pairs), 0.0)
        dweight += tl.sum(value * dgap[None, :], axis=1)
    total = tl.sum(gated) + tl.sum(slope) * tl.sum(square) / features
    tl.store(dgate + sequence * queries + first_query + token, total, is_pair)
    dcoefficient = step * dots
    if RULE == "paper":
        dweight += dcoefficient
    if RULE == "authors":
        dweight += dcoefficient * reads
    if RULE == "projected":
        dweight += dcoefficient / squares
        dweight -= 2 * weight * tl.sum(dcoefficient * weight) / (squares * squares)
    if FROM_WEIGHTS:
        dweight += tl.load(grad_weights + out_token * reads + read, inside & is_new, 0.0).to(kind)
    tl.store(dsums + place, weight * (dweight - tl.sum(weight * dweight)), inside)
