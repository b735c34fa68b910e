"""Detectors of torchvision in small: (n, 3, 64, 64) -> boxes, labels of 3 classes and scores of each image."""

from __future__ import annotations

from torch import nn
from torchvision import ops
from torchvision.models import detection


class Backbone(nn.Sequential):
    """One map of features for a detector: (n, 3, 64, 64) -> {"0": (n, 32, 16, 16)}."""

    out_channels = 32

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 32, 3, 2, 1), nn.ReLU()
        )

    def forward(self, x):
        return {"0": super().forward(x)}


FEW_BOXES = {"min_size": 64, "max_size": 64, "detections_per_img": 4, "topk_candidates": 8, "score_thresh": 0.0}
ANCHORS = detection.anchor_utils.AnchorGenerator(((16, 32),), ((1.0,),))
DETECTORS = {
    "faster_rcnn": lambda: detection.FasterRCNN(
        Backbone(), None, 64, 64, rpn_anchor_generator=ANCHORS, box_roi_pool=ops.MultiScaleRoIAlign(["0"], 3, 2),
        box_head=detection.faster_rcnn.TwoMLPHead(288, 12),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(12, 3),
        box_score_thresh=0.0, box_detections_per_img=4, rpn_post_nms_top_n_test=8,
    ),
    "retinanet": lambda: detection.RetinaNet(Backbone(), 3, anchor_generator=ANCHORS, **FEW_BOXES),
    "fcos": lambda: detection.FCOS(
        Backbone(), 3, anchor_generator=detection.anchor_utils.AnchorGenerator(((4,),), ((1.0,),)), **FEW_BOXES
    ),
    "ssd": lambda: detection.ssd.SSD(
        Backbone(), detection.anchor_utils.DefaultBoxGenerator([[2]]), (64, 64), 3, score_thresh=0.0,
        detections_per_img=4, topk_candidates=8, head=detection.ssd.SSDHead([32], [4], 3),
    ),
}  # fmt: skip
