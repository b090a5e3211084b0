"""Windows of segmentation proposals: their size, and the object that each is to find.

Lin et al. 2017, Sec. 6 and appendix. An MLP slides over every level. At each position it predicts
one mask, of a region of the image around that position: at the level of stride s, a window of 5x5
cells is for objects 8 s pixels long and its mask covers 10 s pixels, a quarter more. A window of
7x7 cells, 7 being about 5 times the square root of 2, is for the half octaves in between.

    level  stride  object of 5x5, px  mask of 5x5, px  object of 7x7, px  mask of 7x7, px
    p2          4                 32               40               45.3             56.6
    p3          8                 64               80               90.5            113.1
    p4         16                128              160              181.0            226.3
    p5         32                256              320              362.0            452.5
    p6         64                512              640              724.1            905.1

Boxes are XYXY in pixels of the network input, in which the first pixel spans 0 to 1.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

OBJECT_CELLS = 8  # length of the objects that a window of 5x5 cells is for, in cells
OF_WINDOW = {5: 1.0, 7: math.sqrt(2)}  # that of others, in comparison, by their side in cells
PADDING = 1.25  # the mask's region is this many times as long as the object

NO_OBJECT = -1  # a window that is to find nothing: a negative
OUTSIDE = -2  # a window centred in the padding of a batch: neither positive nor negative


class WindowGrid(NamedTuple):
    """The windows of one size on one level: one around each cell of the map, row by row.

    Attributes:
        stride: of the map, in pixels.
        window: side of the window in cells, 5 or 7.
        height: of the map, in cells.
        width: of the map, in cells.
        object_cells: length of the objects that a window of 5x5 cells is for, in cells.

    >>> p4 = WindowGrid(stride=16, window=5, height=50, width=84)
    >>> p4.scale, p4.side
    (128.0, 160.0)
    """

    stride: int
    window: int
    height: int
    width: int
    object_cells: int = OBJECT_CELLS

    @property
    def scale(self) -> float:
        """Length of the objects that the windows are for, in pixels."""
        return self.object_cells * OF_WINDOW[self.window] * self.stride

    @property
    def side(self) -> float:
        """Side of the square that each window's mask covers, in pixels."""
        return PADDING * self.scale

    @property
    def num_windows(self) -> int:
        return self.height * self.width

    def centres(self, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(H,) y and (W,) x of the middles of the cells, float32 pixels.

        The paper does not say where in the image a position lies; these are the points that
        RoIAlign and nearest-neighbour upsampling take a cell to be at.
        """
        rows = torch.arange(self.height, device=device, dtype=torch.float32)
        columns = torch.arange(self.width, device=device, dtype=torch.float32)
        return (rows + 0.5) * self.stride, (columns + 0.5) * self.stride

    def regions(self, device: torch.device | None = None) -> torch.Tensor:
        """(H W, 4) squares that the masks cover, XYXY; they may reach beyond the image."""
        y, x = (grid.flatten() for grid in torch.meshgrid(*self.centres(device), indexing="ij"))
        half = self.side / 2
        return torch.stack((x - half, y - half, x + half, y + half), dim=1)


def nearest_scale(boxes: torch.Tensor, scales: Sequence[float]) -> torch.Tensor:
    """Which of several scales is nearest to each object's, in log space.

    The scale of an object is the longer side of its box. Objects smaller or larger than all scales
    belong to the first or last, as the nearest.

    Args:
        boxes: (M, 4) XYXY boxes of the masks.
        scales: ascending, in pixels.

    Returns:
        (M,) int64 indices of ``scales``; the smaller one where two are equally near.

    >>> sides = torch.tensor([20.0, 45.0, 46.0, 127.0, 900.0])
    >>> boxes = torch.stack([0 * sides, 0 * sides, sides, sides / 3], dim=1)
    >>> nearest_scale(boxes, [32, 64, 128]).tolist()  # 45.25 px is half-way from 32 to 64
    [0, 0, 1, 2, 2]
    """
    longer = (boxes[:, 2:] - boxes[:, :2]).max(dim=1).values
    distance = (longer.log2()[:, None] - longer.new_tensor(scales).log2()).abs()
    return distance.argmin(dim=1)


def match_windows(
    boxes: torch.Tensor, grids: Sequence[WindowGrid], image_size: tuple[int, int]
) -> torch.Tensor:
    """The object that each window is to find.

    An object belongs to the grid of the nearest scale (:func:`nearest_scale`). There it is to be
    found by the windows whose centre is at most one cell from the object's, horizontally and
    vertically; all others find nothing (paper, appendix). Where several objects are as near, the
    paper does not say which; here it is the one whose centre is nearest. As in the paper no window
    is left out for being nearly right.

    Args:
        boxes: (M, 4) XYXY boxes of the masks.
        grids: by ascending scale.
        image_size: height and width of the image in the batch, without padding.

    Returns:
        (T,) int64 for the windows of all grids, one grid after the other: index of the object;
        ``NO_OBJECT``; or ``OUTSIDE`` for one centred in the padding.
    """
    own_grid = nearest_scale(boxes, [grid.scale for grid in grids])
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    matches = []
    for number, grid in enumerate(grids):
        y, x = grid.centres(boxes.device)
        match = torch.full((grid.height, grid.width), NO_OBJECT, device=boxes.device)
        (objects,) = torch.nonzero(own_grid == number, as_tuple=True)
        if len(objects):
            across = _distance(middles[objects, 0], x, grid.stride)  # (m, W)
            down = _distance(middles[objects, 1], y, grid.stride)  # (m, H)
            distance, nearest = torch.hypot(down[:, :, None], across[:, None, :]).min(dim=0)
            match = torch.where(distance.isfinite(), objects[nearest], match)
        inside = (y < image_size[0])[:, None] & (x < image_size[1])
        matches.append(torch.where(inside, match, OUTSIDE).flatten())
    return torch.cat(matches)


def _distance(middles: torch.Tensor, places: torch.Tensor, limit: float) -> torch.Tensor:
    """(m,) and (p,) coordinates -> (m, p) distances, infinite above a limit."""
    distance = (middles[:, None] - places).abs()
    return torch.where(distance <= limit, distance, math.inf)
