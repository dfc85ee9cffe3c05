"""Colors that the figures of a report share."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by the colour-blind (Okabe and Ito, Color Universal Design, 2008), without their yellow."""
GREY = "#595959"
