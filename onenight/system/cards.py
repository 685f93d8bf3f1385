"""Graphics cards that a plan can be made for, and how fast they are."""

from dataclasses import dataclass

# How fast training is, relative to what it would be at a card's rated speeds. nanochat's d12 was
# reported to train 55,700 tokens/s on an RTX 4070; the products and the bytes of its compiled
# kernels (benchmarks/LOG.md) would allow 49,700 at the rated 58.3 TFLOP/s and 504 GB/s. A card
# clocks higher than rated, and some of the bytes never leave its L2 cache of 36 MB.
REACHED_PER_RATED = 1.12


@dataclass(frozen=True)
class Speed:
    """The two speeds that bound training."""

    tflops: float  # of matrix products
    gb_per_s: float  # read and written together


@dataclass(frozen=True)
class Card:
    """A card as NVIDIA rates it."""

    name: str
    memory_gb: float  # its GiB, taken for GB: the rest is for the driver and the desktop
    tflops: float  # dense products in bfloat16 that sum in float32
    gb_per_s: float

    @property
    def speed(self) -> Speed:
        """The speed that training is expected to reach."""
        return Speed(REACHED_PER_RATED * self.tflops, REACHED_PER_RATED * self.gb_per_s)


# From NVIDIA's white papers on the architectures (Ampere GA102, Ada, RTX Blackwell). Cards that
# they leave out have twice their float32 TFLOP/s, as all others: 4 x cores x boost clock.
CARDS = (
    Card("RTX 3060", 12, 25.5, 360),
    Card("RTX 3090", 24, 71.2, 936),
    Card("RTX 4060 Ti 16 GB", 16, 44.1, 288),
    Card("RTX 4070", 12, 58.3, 504),
    Card("RTX 4070 Ti SUPER", 16, 88.2, 672),
    Card("RTX 4080", 16, 97.5, 717),
    Card("RTX 4090", 24, 165.2, 1008),
    Card("RTX 5060 Ti 16 GB", 16, 47.4, 448),
    Card("RTX 5070", 12, 61.7, 672),
    Card("RTX 5080", 16, 112.6, 960),
    Card("RTX 5090", 32, 209.5, 1792),
)


def find_card(name: str) -> Card:
    """Return the card of that name. Case, spaces and "NVIDIA GeForce" do not matter.

    Raises ValueError if it is not listed.
    """
    for card in CARDS:
        if simplified(card.name) == simplified(name):
            return card
    listed = ", ".join(card.name for card in CARDS)
    raise ValueError(
        f"plan_card={name!r} is not one of {listed}; for another card, give --plan_vram_gb and "
        "--plan_tflops"
    )


def simplified(name: str) -> str:
    """Return the name of a card as names are compared."""
    name = name.lower()
    for word in ("nvidia", "geforce", " "):
        name = name.replace(word, "")
    return name
