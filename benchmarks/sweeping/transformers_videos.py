"""Models of transformers that follow objects through a video: one call is one picture, the memory is a session.

In: such a model. Out: a module whose one call is a short video, so that the attention of a picture sees what those
before it have left in memory. Its inputs are tensors, and no call leaves anything behind for the next.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sweeping.transformers_inputs import Inputs, noise

_SESSIONS = {
    "edgetam_video": "EdgeTamVideoInferenceSession",
    "sam2_video": "Sam2VideoInferenceSession",
    "sam3_tracker_video": "Sam3TrackerVideoInferenceSession",
}
PICTURES = 2


def follows_objects(config: Any) -> bool:
    """Whether a model of this configuration wants a session."""
    return config.model_type in _SESSIONS


def video(config: Any) -> Inputs:
    """Pictures, and an object that two points show on the first of them."""
    side = config.image_size
    return {
        "pictures": noise(PICTURES, 3, side, side),
        "points": torch.tensor([[[[0.25, 0.25], [0.5, 0.75]]]]) * side,
        "labels": torch.ones(1, 1, 2, dtype=torch.int32),
    }


class Tracking(nn.Module):
    """A model that follows one object through a video.

    Arguments:
        model: A model whose forward takes an `inference_session` and the number of a picture.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config

    def forward(self, pictures: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        """Where the object is on each picture."""
        make = getattr(inspect.getmodule(type(self.model)), _SESSIONS[self.config.model_type])
        places = {f"{what}_device": pictures.device for what in ("inference", "inference_state", "video_storage")}
        height, width = pictures.shape[-2:]
        session = make(pictures, video_height=height, video_width=width, dtype=pictures.dtype, **places)
        session.add_point_inputs(session.obj_id_to_idx(1), 0, {"point_coords": points, "point_labels": labels})
        session.obj_with_new_inputs = [1]
        follow = inspect.unwrap(type(self.model).forward)  # out of inference mode: gradients are the proof
        return torch.cat([follow(self.model, session, frame_idx=i).pred_masks for i in range(len(pictures))])
