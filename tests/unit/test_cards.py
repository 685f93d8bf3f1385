"""cards.py: the graphics cards that a plan can be made for."""

import pytest

from configurator import UserError, configure
from onenight.system.cards import CARDS, find_card
from onenight.training.settings import TrainConfig

# CUDA cores and boost clock in MHz, GB, and the memory's bits and Gbit/s, as NVIDIA gives them.
SPECIFICATIONS = {
    "RTX 3060": (3584, 1777, 12, 192, 15),
    "RTX 3090": (10496, 1695, 24, 384, 19.5),
    "RTX 4060 Ti 16 GB": (4352, 2535, 16, 128, 18),
    "RTX 4070": (5888, 2475, 12, 192, 21),
    "RTX 4070 Ti SUPER": (8448, 2610, 16, 256, 21),
    "RTX 4080": (9728, 2505, 16, 256, 22.4),
    "RTX 4090": (16384, 2520, 24, 384, 21),
    "RTX 5060 Ti 16 GB": (4608, 2572, 16, 128, 28),
    "RTX 5070": (6144, 2512, 12, 192, 28),
    "RTX 5080": (10752, 2617, 16, 256, 30),
    "RTX 5090": (21760, 2407, 32, 512, 28),
}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_ratings_follow_from_the_specifications(card):
    """A core does two FLOPs each clock in float32, and tensor cores do twice that."""
    cores, mhz, memory_gb, bits, gbit_per_s = SPECIFICATIONS[card.name]
    assert card.tflops == pytest.approx(4 * cores * mhz / 1e6, rel=0.005)
    assert card.gb_per_s == pytest.approx(bits / 8 * gbit_per_s, rel=0.005)
    assert card.memory_gb == memory_gb


@pytest.mark.parametrize(
    "name",
    ["RTX 4060 Ti 16 GB", "NVIDIA GeForce RTX 4060 Ti 16GB", " rtx4060ti 16gb ", "Rtx 4060TI16 Gb"],
)
def test_a_card_is_found_however_its_name_is_written(name):
    assert find_card(name).name == "RTX 4060 Ti 16 GB"


@pytest.mark.parametrize("name", ["RTX 4060 Ti", "RTX 407", "RTX 40700", "RTX", "  "])
def test_an_unknown_card_is_refused_with_the_list(name):
    with pytest.raises(UserError) as refusal:
        configure(TrainConfig, [f"--plan_card={name}"], "")
    message = str(refusal.value)
    assert message.startswith(f"plan_card={name!r} is not one of RTX 3060, RTX 3090, ")
    assert message.endswith(", RTX 5090; for another card, give --plan_vram_gb and --plan_tflops")
    assert message.count("\n") == 0


@pytest.mark.parametrize("flag", ["--plan_vram_gb=12", "--plan_tflops=49"])
def test_a_listed_card_has_its_own_memory_and_speed(flag):
    with pytest.raises(UserError, match="leave out plan_vram_gb and plan_tflops"):
        configure(TrainConfig, ["--plan_card=RTX 4090", flag], "")
