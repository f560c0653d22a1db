"""How a memory uses its slots."""

from torch import Tensor


def slot_use(counts: Tensor) -> dict[str, float]:
    """What the uses ``counts [slots]`` of each slot say of a memory's health; nothing where none was used.

    Returns:
        ``coverage``, slots used / all slots; ``collision_ratio``, the share of uses that met a slot used
        before; ``slot_kl``, the KL divergence of slot use from uniform, in nats (0 is best).
    """
    total = int(counts.sum())
    if not total:
        return {}
    used = counts[counts > 0].double()
    share = used / total
    return {
        "coverage": len(used) / len(counts),
        "collision_ratio": 1 - len(used) / total,
        "slot_kl": float((share * (share * len(counts)).log()).sum()),
    }
