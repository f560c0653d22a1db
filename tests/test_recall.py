"""The recall workload measures what it says: known memories get their known scores."""

import pytest
import torch

from fwpkm_bench.kernels.slots import slot_use
from fwpkm_bench.spec import Sweep, cases
from fwpkm_bench.workloads import recall


def measure(layer: str, seq: int, **settings) -> dict:
    swept = {f"{'fwpkm' if n in ('n_subkeys', 'topk') else 'recall'}.{n}": (v,) for n, v in settings.items()}
    (case,) = cases(Sweep(seq=(seq,), layers=(layer,), workloads=("recall",), settings=swept))
    return recall.run(case).columns


def test_softmax_recalls_all_and_pkm_nothing() -> None:
    assert measure("softmax", 2000)["recall"] == 1.0
    control = measure("pkm", 2000)
    assert control["recall_lo"] <= 1 / 2000 <= control["recall_hi"]


@pytest.mark.parametrize("seq", [256, 1024, 4096])
def test_the_delta_rule_holds_as_many_as_its_key_has_features(seq: int) -> None:
    """The newest key_dim pairs or so; interference lets some of those go and some others be met."""
    columns = measure("gdn", seq)
    assert 0.5 * 128 / seq < columns["recall"] < 1.5 * 128 / seq
    assert columns["recall_age_10"] < 0.5 * columns["recall_age_1"]


def test_a_full_memory_forgets_and_a_second_reading_helps() -> None:
    """Twice as many pairs as slots: what goes is old, and reading again brings back some of it."""
    once, again = (measure("fwpkm", 8192, passes=n, n_subkeys=64) for n in (1, 3))
    assert once["recall_age_10"] < 0.5 < 0.95 < once["recall_age_1"]
    assert again["recall_lo"] > once["recall_hi"]
    assert once["coverage"] > 0.9
    assert once["collision_ratio"] > 0.9


def test_noise_costs_recall() -> None:
    assert measure("softmax", 1000, noise=3.0)["recall"] < 0.9


@pytest.mark.parametrize("layer", ["softmax", "linear", "gdn", "pkm", "fwpkm"])
def test_both_backends_recall_the_same(layer: str) -> None:
    found = []
    for backend in ("reference", "eager"):
        (case,) = cases(
            Sweep(
                seq=(300,),
                layers=(layer,),
                workloads=("recall",),
                backend=(backend,),
                settings={"fwpkm.n_subkeys": (32,)} if layer == "fwpkm" else {},
            )
        )
        found.append(recall.run(case).columns)
    assert found[0]["recall"] == found[1]["recall"]
    assert found[0]["cosine"] == pytest.approx(found[1]["cosine"], abs=1e-5)


def test_questions_are_spread_evenly_and_scored_against_all() -> None:
    asked = recall.spread_over_age(1000, 11)
    assert asked.tolist() == [round(i * 99.9) for i in range(11)]
    assert recall.spread_over_age(5, 1024).tolist() == [0, 1, 2, 3, 4]
    values = torch.eye(4)
    right, cosine = recall.score(
        torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 0.5]]), values, torch.tensor([0, 3])
    )
    assert right.tolist() == [True, False]
    assert cosine.tolist() == pytest.approx([1.0, 0.5 / 1.25**0.5])


def test_slot_use_is_counted() -> None:
    even = slot_use(torch.ones(8, dtype=torch.int64))
    assert even == pytest.approx({"coverage": 1.0, "collision_ratio": 0.0, "slot_kl": 0.0})
    one = slot_use(torch.tensor([8, 0, 0, 0]))
    assert one == pytest.approx(
        {"coverage": 0.25, "collision_ratio": 7 / 8, "slot_kl": float(torch.tensor(4.0).log())}
    )
    assert slot_use(torch.zeros(4, dtype=torch.int64)) == {}
