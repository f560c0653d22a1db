"""Hold every backend of every layer to its reference, each in a process of its own (see `parity`).

A process that fails a check, or dies of it, checks nothing more: the next one goes on with the variant after.
"""

from fwpkm_bench import catalog, parity
from fwpkm_bench.executors.child import Child, ChildDiedError
from fwpkm_bench.measurement import Check

LIMIT_S = 600.0  # for one variant, also interpreted


def verify(
    layers: tuple[str, ...],
    backends: tuple[str, ...],
    device: str,
    seed: int,
    variants: tuple[str, ...],
) -> list[Check]:
    """Check the ``backends`` (all if none is named) of ``layers`` on ``device``, under each variant."""
    found = []
    for layer in layers:
        names = parity.variants_of(layer, variants)
        for backend in catalog.load_layer(layer).backends:
            if backend != "reference" and (not backends or backend in backends):
                found += _verify_backend(layer, backend, device, seed, names)
    return found


def _verify_backend(layer: str, backend: str, device: str, seed: int, names: list[str]) -> list[Check]:
    found: list[Check] = []
    while names:
        child = Child(parity.work, layer, backend, device, seed, names)
        try:
            while names:
                checks = child.receive(LIMIT_S)
                found += checks
                names = names[1:]
                if checks[0].status == "skipped":  # it cannot run here, whatever the settings
                    return found
                if checks[0].status == "failed":
                    break
        except (ChildDiedError, TimeoutError) as error:
            reason = str(error) or f"no result after {LIMIT_S:g} s"
            found.append(Check(layer, backend, names[0], "", "", None, None, "failed", reason))
            names = names[1:]
        finally:
            child.stop()
    return found
