"""What colour, marker and dashes mean in every picture: how an optimizer keeps its gradients."""

from __future__ import annotations

from hf_efcp.factory import efcp_name

# Colour, marker, and the words of a legend. Okabe and Ito's colours: told apart by colour-blind eyes, and in grey.
FAMILIES = {
    "sparse": ("#0072B2", "o", "sparse window"),
    "lowrank": ("#D55E00", "s", "low-rank window"),
    "dense": ("#009E73", "^", "dense window"),
    "other": ("#CC79A7", "D", "other EFCP"),
    "stock": ("#333333", "X", "none of EFCP's"),
}
# What tells members of a family apart where each has a curve: marker and dashes.
MEMBERS = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."), ("X", (0, (6, 2, 1, 2, 1, 2))), ("v", (0, (1, 3))))


def family(optimizer: str) -> str:
    """How an optimizer keeps its gradients.

    Args:
        optimizer: its name.

    Returns:
        A key of `FAMILIES`: "stock" for one that is none of EFCP's.
    """
    name = efcp_name(optimizer)
    kind = (name or "").partition("_")[0]
    return kind if kind in ("sparse", "lowrank", "dense") else "other" if name else "stock"
