"""The MLP of segmentation proposals (Lin et al. 2017, Sec. 6 and appendix)."""

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import nn


class WindowMLP(nn.Module):
    """The MLP on windows of one size: a hidden layer, then a mask and a score.

    Fully connected layers on a window are a convolution as large as the window and 1x1
    convolutions, so that it runs on a whole map as on single windows.

    Args:
        in_channels: of the maps.
        window: side of the windows in cells, odd.
        hidden: units of the hidden layer.
        mask_size: side of the predicted mask in cells.
    """

    def __init__(self, in_channels: int, window: int, hidden: int = 512, mask_size: int = 14):
        super().__init__()
        self.window = window
        self.mask_size = mask_size
        self.hidden = Conv2d(in_channels, hidden, window, activation=F.relu)
        self.mask = Conv2d(hidden, mask_size**2, 1)
        self.score = Conv2d(hidden, 1, 1)
        # The paper is silent on these: He's for a layer before a ReLU, the RPN head's for the rest.
        weight_init.c2_msra_fill(self.hidden)
        for layer in (self.mask, self.score):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The hidden layer, for every window of a map.

        Args:
            x: (N, C, H, W); it is padded with zeros, so that there is a window around each cell.

        Returns:
            (N, hidden, H, W).
        """
        hidden: torch.Tensor = self.hidden(self._padded(x))
        return hidden

    def at(
        self, x: torch.Tensor, image: torch.Tensor, row: torch.Tensor, column: torch.Tensor
    ) -> torch.Tensor:
        """The windows of a map around some of its cells, R in number.

        Args:
            x: (N, C, H, W).
            image, row, column: (R,) int64.

        Returns:
            (R, C, window, window), which :meth:`hidden` turns into (R, hidden, 1, 1): what
            :meth:`forward` has there.
        """
        steps = torch.arange(self.window, device=x.device)
        rows, columns = row[:, None, None] + steps[:, None], column[:, None, None] + steps
        channels_last = self._padded(x).permute(0, 2, 3, 1)
        return channels_last[image[:, None, None], rows, columns].permute(0, 3, 1, 2)

    def masks(self, hidden: torch.Tensor) -> torch.Tensor:
        """(R, hidden, 1, 1) -> (R, mask_size, mask_size) logits of the pixels, row by row."""
        logits: torch.Tensor = self.mask(hidden)
        return logits.view(-1, self.mask_size, self.mask_size)

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, [self.window // 2] * 4)
