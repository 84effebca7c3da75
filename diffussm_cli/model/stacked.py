"""A Linear that is several Linears of the same input."""

from torch import nn


class StackedLinear(nn.Linear):
    """`parts` Linears in one product: x (..., in) -> (..., parts out), their outputs one after the
    other.

    The matrices lie one below the other in `weight`, as queries, keys and values do, or shifts and
    scales. An optimiser that treats a matrix as a whole, as Muon does, must know where one ends.
    """

    def __init__(self, d_in: int, d_out: int, parts: int):
        super().__init__(d_in, parts * d_out)
        self.parts = parts
