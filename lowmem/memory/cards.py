"""What a GPU holds, by its name or its size, and whether a run fits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowmem.errors import RecipeError
from lowmem.recipe.suggest import closest_answer

CONTEXT_BYTES = 6 * 2**30 // 10
"""What the CUDA context takes beside the allocator, taken high."""

CUBLAS_BYTES = 32 * 2**20
"""cuBLAS's workspace, allocated by the first matrix product through PyTorch's allocator and kept: an allowance."""

USABLE = 0.97
"""The part of a card that a process gets: drivers keep a little of the nominal size."""

LARGEST_BYTES = 2**40
"""More than any GPU has: a larger size is a slip."""

_NAMES_BY_GIB = {
    3: "GTX 1060",
    4: "GTX 1650, RTX 3050 Laptop, RTX 3050 Ti Laptop",
    6: "GTX 1060, GTX 1660, GTX 1660 Super, GTX 1660 Ti, RTX 2060, RTX 2060 Laptop, RTX 3050, "
    "RTX 3050 Laptop, RTX 3060 Laptop, RTX 4050 Laptop, RTX A2000",
    8: "GTX 1070, GTX 1070 Ti, GTX 1080, RTX 2060 Super, RTX 2070, RTX 2070 Super, RTX 2080, RTX 2080 Super, "
    "RTX 3050, RTX 3060, RTX 3060 Ti, RTX 3070, RTX 3070 Laptop, RTX 3070 Ti, RTX 3070 Ti Laptop, "
    "RTX 3080 Laptop, RTX 4060, RTX 4060 Laptop, RTX 4060 Ti, RTX 4070 Laptop, RTX 5050, RTX 5050 Laptop, "
    "RTX 5060, RTX 5060 Laptop, RTX 5060 Ti, RTX 5070 Laptop, Quadro RTX 4000",
    10: "RTX 3080",
    11: "GTX 1080 Ti, RTX 2080 Ti",
    12: "Titan V, Titan Xp, RTX 2060, RTX 3060, RTX 3080, RTX 3080 Ti, RTX 4070, RTX 4070 Super, RTX 4070 Ti, "
    "RTX 4080 Laptop, RTX 5070, RTX 5070 Ti Laptop, RTX A2000",
    16: "RTX 3080 Laptop, RTX 3080 Ti Laptop, RTX 4060 Ti, RTX 4070 Ti Super, RTX 4080, RTX 4080 Super, "
    "RTX 4090 Laptop, RTX 5060 Ti, RTX 5070 Ti, RTX 5080, RTX 5080 Laptop, Quadro RTX 5000, RTX A4000, "
    "RTX 2000 Ada, RTX PRO 2000, P100, V100",
    20: "RTX A4500, RTX 4000 Ada",
    24: "Titan RTX, RTX 3090, RTX 3090 Ti, RTX 4090, RTX 4090 D, RTX 5090 Laptop, Quadro RTX 6000, RTX A5000, "
    "RTX A5500, RTX 4500 Ada, RTX PRO 4000, A30",
    32: "RTX 5090, RTX 5000 Ada, RTX PRO 4500, V100",
    40: "A100",
    48: "Quadro RTX 8000, RTX A6000, RTX 6000 Ada, RTX PRO 5000",
    72: "RTX PRO 5000",
    80: "A100, H100",
    94: "H100 NVL",
    96: "RTX PRO 6000",
    141: "H200, H200 NVL",
    180: "B200",
}

_NAMES_WITH_ECC_BY_GIB = {8: "P4", 16: "T4, A2, A16", 24: "P40, A10, A10G, L4", 48: "A40, L40, L40S"}
"""Data-centre cards with GDDR memory: error correction is on as they are delivered and takes a sixteenth."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_UNITS = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmg", start=1)},
    **{letter + end: 1024**power for power, letter in enumerate("kmg", start=1) for end in ("", "i", "ib")},
}
_SAYS_NO_SIZE = re.compile(
    r"nvidia|geforce|tesla|generation|gpu|graphics|blackwell|pcie|dgxs|fhhl|\bcard\b|sxm\d?\b|hbm\d?e?\b"
    r"|(?:max-?q )?workstation edition|server edition"
)


@dataclass(frozen=True)
class Card:
    """A GPU as far as memory goes: all it offers, of which USABLE less CONTEXT_BYTES are for tensors."""

    name: str
    memory_bytes: int


def card(text: str) -> Card:
    """The GPU that `text` means: a size (12GiB, 24576MiB, 12GB for 12 * 10^9 bytes) or the name of a card.

    Names are found in any spelling, the driver's included ("NVIDIA A100-SXM4-80GB"), and give the nominal
    size in GiB; drivers keep a little of it, which USABLE covers. Error correction takes more than that, so
    it is taken off the cards that are delivered with it on (a T4 has 15 GiB). Raises RecipeError for names
    that are not known or come with several sizes, for sizes without a unit and for those no GPU has.
    """
    shown = " ".join(text.split())[:60] or "an empty name"
    variants = _VARIANTS.get(_plain(text), {})
    size = re.fullmatch(rf"({_NUMBER})\s*([a-z]*)", text.strip().lower(), re.ASCII)
    if size is not None and size[2] in ("", *_UNITS):
        return Card(shown, _bytes_of(shown, size[1], size[2], list(variants)))
    if len(variants) == 1:
        return next(iter(variants.values()))
    if variants:
        raise RecipeError(f"{shown} can mean several cards; write {' or '.join(variants)}")
    found = (
        "has a unit that is none of GiB, MiB and GB" if size else "is neither a card known here nor a size"
    )
    without_size = re.sub(r"\d{2}gb$", "", _plain(text))  # of a size that this card is not sold with
    near = _SPELLINGS.get(without_size) or closest_answer(_plain(text), _SPELLINGS, cutoff=0.7)
    mend = f"Did you mean {near}? " if near else ""
    raise RecipeError(f"{shown} {found}. {mend}Any card can be given by its size, as 12GiB")


def fits(reserved_bytes: int, card_bytes: int) -> bool:
    """Whether a card of `card_bytes` holds what the allocator reserves and the CUDA context."""
    return margin_bytes(reserved_bytes, card_bytes) >= 0


def margin_bytes(reserved_bytes: int, card_bytes: int) -> int:
    """What stays free of the usable part of the card; negative where it does not fit, by what is missing."""
    return int(USABLE * card_bytes) - CONTEXT_BYTES - reserved_bytes


def _bytes_of(shown: str, number: str, unit: str, cards: list[str]) -> int:
    """`cards` are those that the number alone may mean: 4090 was hardly meant in GiB."""
    nbytes = float(number) * _UNITS[unit or "gib"]
    is_gpu_size = 1 <= nbytes <= LARGEST_BYTES
    if not unit:
        meant = " or ".join(cards) or (f"{number}GiB" if is_gpu_size else "a size as 12GiB")
        raise RecipeError(f"{shown} has no unit; write {meant}")
    if not is_gpu_size:
        raise RecipeError(f"{shown} is not the size of a GPU; write one as 12GiB, above 0 and up to 1024GiB")
    return int(nbytes)


def _plain(name: str) -> str:
    """Of a name what tells cards apart: rtx4060ti16gb for NVIDIA GeForce RTX 4060 Ti (16 GiB)."""
    told = _SAYS_NO_SIZE.sub("", name.lower()).replace("mobile", "laptop")
    return re.sub(r"(?<=\d)gib", "gb", re.sub(r"[^a-z0-9]", "", told))


def _variants() -> dict[str, dict[str, Card]]:
    """Plain names, with and without the size: the cards each may mean, by the spelling that is exact."""
    sold: dict[str, dict[int, int]] = {}
    for names_by_gib, sixteenths in ((_NAMES_BY_GIB, 16), (_NAMES_WITH_ECC_BY_GIB, 15)):
        for gib, names in names_by_gib.items():
            for name in names.split(", "):
                sold.setdefault(name, {})[gib] = gib * 2**30 * sixteenths // 16
    variants: dict[str, dict[str, Card]] = {}
    short: dict[str, dict[str, Card]] = {}
    for name, sizes in sold.items():
        family = re.sub(r"^Quadro | PRO| Ada$", "", name)
        for gib, memory_bytes in sizes.items():
            exact = _plain(name) if len(sizes) == 1 else f"{_plain(name)}-{gib}gb"
            one = Card(name if len(sizes) == 1 else f"{name} {gib}GB", memory_bytes)
            for said in (name, f"{name} {gib}GB"):
                variants.setdefault(_plain(said), {})[exact] = one
            for said in (family, re.sub("^[RG]TX ", "", family)):
                short.setdefault(_plain(said), {})[exact] = one
                short.setdefault(_plain(f"{said} {gib}GB"), {})[exact] = one
    return short | variants


_VARIANTS = _variants()
_SPELLINGS = {
    plain: " or ".join(cards)
    for plain, cards in _VARIANTS.items()
    if plain in map(_plain, cards) or len(cards) > 1
}
