from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.errors import RecipeError
from lowmem.memory import cards
from lowmem.memory.cards import CONTEXT_BYTES, USABLE, Card, card, fits, margin_bytes

GIB = 2**30


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as error:
        card(text)
    assert error.value.exit_code == 2
    assert len(error.value.problems) == 1
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("12GiB", 12 * GIB),
        ("12 GiB", 12 * GIB),
        (" 12gib ", 12 * GIB),
        ("12g", 12 * GIB),
        ("12Gi", 12 * GIB),
        ("12GB", 12 * 10**9),
        ("12 gb", 12 * 10**9),
        ("24576MiB", 24 * GIB),
        ("24564 MiB", 24564 * 2**20),
        ("8000MB", 8 * 10**9),
        ("25165824k", 24 * GIB),
        ("11.5GiB", 23 * GIB // 2),
        (".5GiB", GIB // 2),
        ("1e2GiB", 100 * GIB),
        ("85899345920B", 80 * GIB),
        ("1024GiB", 1024 * GIB),
    ],
)
def test_a_size_is_what_its_unit_says(text, nbytes):
    assert card(text) == Card(text.strip(), nbytes)


@given(st.integers(1, 1024 * 1024))
def test_whole_mebibytes_are_exact(mebibytes):
    assert card(f"{mebibytes}MiB").memory_bytes == mebibytes * 2**20


@pytest.mark.parametrize(
    "text",
    [
        "0GiB",
        "-5GiB",
        "0.0MiB",
        "1e9GiB",
        "1025GiB",
        "1e999GiB",
        "1e-999GiB",
        "0.0000000001GiB",
        "9" * 5000 + "GiB",
    ],
)
def test_a_size_no_gpu_has_is_refused(text):
    assert "is not the size of a GPU; write one as 12GiB, above 0 and up to 1024GiB" in refusal(text)


@pytest.mark.parametrize("text", ["12potatoes", "12 TiB", "1TB"])
def test_a_unit_that_is_none_is_refused(text):
    assert refusal(text) == (
        f"{text} has a unit that is none of GiB, MiB and GB. Any card can be given by its size, as 12GiB"
    )


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        ("12", "write 12GiB"),
        ("16.5", "write 16.5GiB"),
        ("0", "write a size as 12GiB"),
        ("-12", "write a size as 12GiB"),
        ("12884901888", "write a size as 12GiB"),
        ("4090", "write rtx4090"),
        ("3080", "write rtx3080-10gb or rtx3080-12gb"),
    ],
)
def test_a_bare_number_is_refused_and_what_it_may_mean_is_named(text, mend):
    assert refusal(text) == f"{text} has no unit; {mend}"


@pytest.mark.parametrize(
    ("texts", "name", "gib"),
    [
        (
            [
                "rtx4070",
                "RTX 4070",
                "rtx_4070",
                "NVIDIA GeForce RTX 4070",
                "nvidiageforcertx4070",
                "RTX4070-12GB",
            ],
            "RTX 4070",
            12,
        ),
        (
            ["rtx4070tisuper", "nvidia geforce rtx 4070 ti super", "RTX 4070Ti SUPER", "4070 Ti Super"],
            "RTX 4070 Ti Super",
            16,
        ),
        (["rtx4060ti-16gb", "RTX 4060 Ti (16 GiB)", "rtx4060ti16gb", "4060 ti 16GB"], "RTX 4060 Ti 16GB", 16),
        (["rtx3090", "3090 24gb", "GeForce RTX 3090"], "RTX 3090", 24),
        (["NVIDIA GeForce RTX 4090 Laptop GPU", "rtx4090 mobile"], "RTX 4090 Laptop", 16),
        (["RTX 4090", "rtx-4090"], "RTX 4090", 24),
        (["RTX 4090 D", "rtx4090d"], "RTX 4090 D", 24),
        (["rtx5090", "RTX 5090 32GB"], "RTX 5090", 32),
        (["gtx1080ti", "GeForce GTX 1080 Ti"], "GTX 1080 Ti", 11),
        (["a6000", "RTX A6000", "NVIDIA RTX A6000"], "RTX A6000", 48),
        (["rtx6000ada", "NVIDIA RTX 6000 Ada Generation"], "RTX 6000 Ada", 48),
        (["Quadro RTX 6000"], "Quadro RTX 6000", 24),
        (
            [
                "rtxpro6000",
                "RTX PRO 6000 Blackwell",
                "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
                "NVIDIA RTX PRO 6000 Blackwell Server Edition",
            ],
            "RTX PRO 6000",
            96,
        ),
        (["v100-16gb", "Tesla V100-SXM2-16GB", "Tesla V100-PCIE-16GB"], "V100 16GB", 16),
        (["v100-32gb", "Tesla V100-DGXS-32GB"], "V100 32GB", 32),
        (["p100", "Tesla P100-PCIE-16GB"], "P100", 16),
        (["a100-40gb", "NVIDIA A100-PCIE-40GB"], "A100 40GB", 40),
        (["a100-80gb", "A100 80 GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"], "A100 80GB", 80),
        (["h100", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3", "h100 sxm 80gb", "H100-SXM5"], "H100", 80),
        (["NVIDIA H100 NVL"], "H100 NVL", 94),
        (["h200", "NVIDIA H200"], "H200", 141),
        (["b200", "NVIDIA B200"], "B200", 180),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_card_name_is_found_whatever_its_spelling(texts, name, gib):
    assert {card(text) for text in texts} == {Card(name, gib * GIB)}


@pytest.mark.parametrize(
    ("text", "reported_mib"),
    [
        # Total memory as nvidia-smi prints it, error correction on as delivered.
        ("Tesla T4", 15360),
        ("NVIDIA L4", 23034),
        ("NVIDIA A10", 23028),
        ("NVIDIA L40S", 46068),
        # And cards that lose nothing to it.
        ("NVIDIA GeForce RTX 4090", 24564),
        ("NVIDIA GeForce RTX 5070 Ti Laptop GPU", 12227),
        ("NVIDIA A100-SXM4-40GB", 40960),
        ("NVIDIA A100-SXM4-80GB", 81920),
        ("NVIDIA H100 80GB HBM3", 81559),
        ("NVIDIA B200", 183359),
    ],
)
def test_the_usable_part_of_a_card_is_really_there(text, reported_mib):
    memory_bytes = card(text).memory_bytes
    assert USABLE * memory_bytes <= reported_mib * 2**20
    assert memory_bytes == pytest.approx(reported_mib * 2**20, rel=0.03)


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("rtx3080", "rtx3080-10gb or rtx3080-12gb"),
        ("RTX 4060 Ti", "rtx4060ti-8gb or rtx4060ti-16gb"),
        ("NVIDIA GeForce RTX 3060", "rtx3060-8gb or rtx3060-12gb"),
        ("a100", "a100-40gb or a100-80gb"),
        ("Tesla V100", "v100-16gb or v100-32gb"),
        ("rtx 3080 laptop", "rtx3080laptop-8gb or rtx3080laptop-16gb"),
        ("rtx6000", "quadrortx6000 or rtx6000ada or rtxpro6000"),
    ],
)
def test_a_name_that_can_mean_several_cards_is_refused_with_spellings_that_work(text, choices):
    assert refusal(text) == f"{text} can mean several cards; write {choices}"
    assert len({card(choice) for choice in choices.split(" or ")}) == len(choices.split(" or "))


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("rtx407", "rtx4070"),
        ("RTX 3090 Tie", "rtx3090ti"),
        ("rtx4060ti-12gb", "rtx4060ti-8gb or rtx4060ti-16gb"),
        ("rtx4090-48gb", "rtx4090"),
        ("a100-64gb", "a100-40gb or a100-80gb"),
        ("gh200", "h200"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_one_and_the_way_out(text, near):
    assert refusal(text) == (
        f"{text} is neither a card known here nor a size. Did you mean {near}? "
        "Any card can be given by its size, as 12GiB"
    )


@pytest.mark.parametrize(
    "text", ["", "  \n ", "nvidia", "mi300x", "potato", "\u0661\u0662GiB", "12.5.5GiB", "nan", "inf"]
)
def test_what_resembles_no_card_is_refused_without_a_guess(text):
    said = " ".join(text.split()) or "an empty name"
    assert refusal(text) == (
        f"{said} is neither a card known here nor a size. Any card can be given by its size, as 12GiB"
    )


@given(st.text(max_size=80))
def test_any_text_gives_a_card_or_one_clear_refusal(text):
    try:
        found = card(text)
    except RecipeError as error:
        said = str(error)
    else:
        said = found.name
        assert found.memory_bytes >= 1
    assert 0 < len(said) < 250


def test_every_card_is_found_by_its_own_name_and_by_its_exact_spelling():
    known = {(spelling, one) for variants in cards._VARIANTS.values() for spelling, one in variants.items()}
    assert len(known) > 90
    assert len({spelling for spelling, _ in known}) == len({one.name for _, one in known}) == len(known)
    for spelling, one in known:
        assert card(spelling) == card(one.name) == card(f"NVIDIA {one.name.upper()}") == one


@given(st.integers(0, 200 * GIB), st.integers(1, 200 * GIB))
def test_a_card_fits_what_is_reserved_and_the_context_in_its_usable_part(reserved, total):
    assert fits(reserved, total) is (reserved + CONTEXT_BYTES <= USABLE * total)
    usable = Fraction(97, 100) * total
    assert abs(usable - (reserved + CONTEXT_BYTES + margin_bytes(reserved, total))) <= 1


def test_the_margin_is_what_is_left_or_missing():
    total = 10_000 * 2**20
    free = margin_bytes(0, total)
    assert free == 9_700 * 2**20 - CONTEXT_BYTES
    assert margin_bytes(free, total) == 0
    assert fits(free, total)
    assert margin_bytes(free + 1, total) == -1
    assert not fits(free + 1, total)
