"""The order in which a block reads the positions of an image.

B batch   D width   H x W grid of tokens   M tokens per position
J = HW/M positions in a grid of H x W/M

The orders have no parameters. Only positions are permuted: the M tokens of a position, which are
neighbours in a row, stay together and keep their order from left to right. Thus a column is M
tokens wide, and in the sequence a token is M places before the token below it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scan:
    """An order of positions: row by row, or with `columns` column by column; with `snake` every
    second line runs backwards.

    In all methods `grid` is (H, W/M), and `dim` is the dimension of x that holds the J positions.
    `apply` and `undo` leave text positions, which stand in equal number before and behind those of
    the image, in their places.
    """

    columns: bool = False
    snake: bool = False

    def apply(self, x: Tensor, grid: tuple[int, int] | None, dim: int = 1) -> Tensor:
        """Raster order -> this order, (..., J, ...)."""
        return self._of_image(self._apply, x, grid, dim)

    def undo(self, x: Tensor, grid: tuple[int, int] | None, dim: int = 1) -> Tensor:
        """This order -> raster order, (..., J, ...)."""
        return self._of_image(self._undo, x, grid, dim)

    def to_image(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens in this order -> the image that they form: u (B, D, J, M) -> (B, D, H, W)."""
        return self.undo(u, grid, dim=2).unflatten(2, grid).flatten(3)

    def to_sequence(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """The inverse of `to_image`: (B, D, H, W) -> (B, D, J, M)."""
        return self.apply(image.unflatten(3, (grid[1], -1)).flatten(2, 3), grid, dim=2)

    def _apply(self, x: Tensor, grid, dim: int) -> Tensor:
        x = _transposed(x, grid, dim) if self.columns else x
        return _snaked(x, self._lines(grid), dim) if self.snake else x

    def _undo(self, x: Tensor, grid, dim: int) -> Tensor:
        x = _snaked(x, self._lines(grid), dim) if self.snake else x
        return _transposed(x, self._lines(grid), dim) if self.columns else x

    def _of_image(self, reorder, x: Tensor, grid, dim: int) -> Tensor:
        words = 0 if self == RASTER else (x.shape[dim] - grid[0] * grid[1]) // 2
        if not words:
            return reorder(x, grid, dim)
        before, image, behind = x.split([words, x.shape[dim] - 2 * words, words], dim)
        return torch.cat([before, reorder(image, grid, dim), behind], dim)

    def _lines(self, grid):
        return grid[::-1] if self.columns else grid  # (lines, positions in a line)


def _transposed(x: Tensor, grid, dim: int) -> Tensor:
    return x.unflatten(dim, grid).transpose(dim, dim + 1).flatten(dim, dim + 1)  # (..., W/M H, ...)


def _snaked(x: Tensor, grid, dim: int) -> Tensor:
    """Every second line reversed, which is its own inverse."""
    lines = x.unflatten(dim, grid)  # (..., lines, positions, ...)
    odd = torch.arange(grid[0], device=x.device).view(-1, *[1] * (x.ndim - dim)) % 2 == 1
    return torch.where(odd, lines.flip(dim + 1), lines).flatten(dim, dim + 1)


RASTER = Scan()
# The orders by name; the blocks take them in turn. DiG (arXiv 2405.18428) also takes four in turn:
# rows, columns, and the same two reversed. Our mixers read in both directions, so reversing an
# order would only exchange the parameters of the two directions. Instead, two of our four turn at
# the end of a line, so that consecutive positions are neighbours.
SCANS = {
    "raster": (RASTER,),
    "alternate": (RASTER, Scan(columns=True)),
    "four": (RASTER, Scan(columns=True), Scan(snake=True), Scan(columns=True, snake=True)),
}
