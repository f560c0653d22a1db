"""`verify` finds what is wrong, under whichever settings, and outlives what it checks."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from fwpkm_bench import parity
from fwpkm_bench.cli import main
from fwpkm_bench.layers.linear import core
from fwpkm_bench.verify import verify

BROKEN = Path(__file__).parent / "broken_layers.py"
VARIANTS = ("plain", "narrow", "many-subkeys")


def outcomes(layer: str) -> dict[str, set[tuple[str, str]]]:
    """Status and reason of the checks of each variant of a layer of ``broken_layers.py``."""
    found: dict[str, set[tuple[str, str]]] = {}
    for check in verify((f"{BROKEN}:{layer}",), (), "cpu", 7, VARIANTS):
        found.setdefault(check.variant, set()).add((check.status, check.reason))
    return found


OK = {("ok", "")}


def test_a_layer_that_is_right() -> None:
    assert outcomes("Slots") == dict.fromkeys(VARIANTS, OK)


def test_wrong_under_one_variant_alone() -> None:
    found = outcomes("WrongWhenNarrow")
    assert (found["plain"], found["many-subkeys"]) == (OK, OK)
    assert {status for status, _ in found["narrow"]} == {"wrong"}
    assert all(
        reason.startswith("second draw; the first was off by 1.0e-03") for _, reason in found["narrow"]
    )


def test_right_in_a_second_draw_is_told() -> None:
    told = {("ok", "second draw; the first was off by 1.0e-03")}
    assert outcomes("WrongForASeed") == dict.fromkeys(VARIANTS, told)


def test_a_process_that_dies() -> None:
    found = outcomes("DiesWhenNarrow")
    ((status, reason),) = found.pop("narrow")
    assert status == "failed"
    assert "the process was ended by SIGSEGV" in reason
    assert found == {"plain": OK, "many-subkeys": OK}


def test_a_failure_spoils_no_later_check() -> None:
    assert outcomes("PoisonsItsProcess") == {
        "plain": OK,
        "narrow": {("failed", "RuntimeError: an illegal memory access was encountered")},
        "many-subkeys": OK,
    }


def test_a_process_that_does_not_end(monkeypatch) -> None:
    monkeypatch.setattr("fwpkm_bench.verify.LIMIT_S", 2.0)
    (check,) = verify((f"{BROKEN}:Sleeps",), (), "cpu", 7, ("plain",))
    assert (check.status, check.reason) == ("failed", "no result after 2 s")


def test_inputs_that_trouble_the_reference_are_not_taken(monkeypatch) -> None:
    """Seed 5 is one where the reference in float32 goes astray: the next one is taken, and no second draw."""
    right = core.IMPLEMENTATIONS["reference"]

    def astray(q, *rest):
        output, *state = right(q, *rest)
        off = q.dtype == torch.float32 and torch.initial_seed() == 5
        return output * (1.001 if off else 1), *state

    monkeypatch.setitem(core.IMPLEMENTATIONS, "reference", astray)
    monkeypatch.setattr(parity, "TOKENS", 20)
    monkeypatch.setattr(parity, "CUT", 7)
    checks = parity.check("linear", "eager", "cpu", 5, "plain")
    assert {(c.status, c.reason) for c in checks} == OK
    monkeypatch.setattr(parity, "INPUTS", 1)
    (check,) = parity.check("linear", "eager", "cpu", 5, "plain")
    assert (check.status, "the reference itself loses more" in check.reason) == ("failed", True)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["verify", *arguments])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (f"--layers {BROKEN}:Slots --seed 1", 0, "(--seed 1)"),
        (f"--layers {BROKEN}:WrongForASeed --seed 7", 0, "of the ok ones in a second draw (--seed 7)"),
        (f"--layers {BROKEN}:WrongWhenNarrow --variants all", 1, "9 ok, 3 wrong"),
        (f"--layers {BROKEN}:WrongWhenNarrow", 0, "ok"),
        (f"--layers {BROKEN}:DiesWhenNarrow --variants narrow", 1, "SIGSEGV"),
        ("--layers linear --backend fla", 4, "skipped: backend 'fla' runs on a CUDA device, not on cpu"),
        ("--layers linear --backend eager", 0, "gradient: key.weight"),
        ("--layers linaer", 2, "no layer is called"),
        ("--variants narow", 2, "did you mean 'narrow'?"),
    ],
)
def test_on_the_command_line(arguments: str, code: int, said: str) -> None:
    result = invoke(*arguments.split())
    assert result.exit_code == code, result.output
    assert said in result.output


def test_the_help_names_every_variant() -> None:
    said = " ".join(invoke("--help").output.split())
    assert all(variant.name in said for variant in parity.VARIANTS)
