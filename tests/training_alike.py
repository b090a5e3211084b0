"""One training step of two models that are equal up to rounding."""

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage


def assert_trains_alike(model, other):
    """The same losses and the same gradients, on an image of 96 x 112 with two objects."""
    boxes = Boxes(torch.tensor([[5.0, 5, 60, 70], [30, 20, 90, 60]]))
    objects = Instances((96, 112), gt_boxes=boxes, gt_classes=torch.tensor([1, 3]))
    batch = [{"image": torch.rand(3, 96, 112) * 255, "instances": objects}]
    found = []
    for one in (model, other):
        torch.manual_seed(1)
        with EventStorage():
            losses = one.train()(batch)
        sum(losses.values()).backward()
        found.append((losses, [p.grad for p in one.parameters()]))
    (losses, gradients), (other_losses, other_gradients) = found
    for name, loss in losses.items():
        torch.testing.assert_close(other_losses[name], loss, rtol=1e-4, atol=1e-6)
    assert any(gradient is not None for gradient in gradients)
    for expected, gradient in zip(gradients, other_gradients, strict=True):
        assert (expected is None) == (gradient is None)
        if expected is not None:
            # Far down, rounding has moved some numbers past the corner of a ReLU.
            atol = 1e-2 * expected.abs().max().item() + 1e-7
            torch.testing.assert_close(gradient, expected, rtol=0, atol=atol)
