"""The demo's network: small, but with what makes real networks hard to explain (batch norm, a residual block)."""

from __future__ import annotations

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm around which the input is added: ``relu2(bn2(conv2(...)) + input)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        """Shape (batch, channels, height, width) to the same shape."""
        hidden = self.relu1(self.bn1(self.conv1(input)))
        output: Tensor = self.relu2(self.bn2(self.conv2(hidden)) + input)
        return output


class DigitNet(nn.Module):
    """Classifier of 32x32 grey images.

    Layers in order: ``conv1 bn1 relu1 pool1``, ``conv2 bn2 relu2 pool2``, ``block.{conv1 bn1 relu1 conv2 bn2 relu2}``,
    ``pool3 flatten fc``. Concepts are best looked at in `CONCEPT_LAYERS`.

    Parameters
    ----------
    width : int
        Channels after ``conv1``; twice as many from ``conv2`` on.
    classes : int
        Number of outputs.
    """

    #: Layers whose channels make good concepts, from input to output.
    CONCEPT_LAYERS = ("relu2", "block.relu1", "block.relu2")

    def __init__(self, width: int = 12, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.block = ResidualBlock(2 * width)
        self.pool3 = nn.AvgPool2d(2)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(2 * width * 16, classes)

    def forward(self, input: Tensor) -> Tensor:
        """Shape (batch, 1, 32, 32) in 0..1 to logits of shape (batch, classes)."""
        hidden = self.pool1(self.relu1(self.bn1(self.conv1(input))))
        hidden = self.pool2(self.relu2(self.bn2(self.conv2(hidden))))
        output: Tensor = self.fc(self.flatten(self.pool3(self.block(hidden))))
        return output
