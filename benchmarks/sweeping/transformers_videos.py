"""Transformers models that track objects in a video: one call processes one frame; a session holds the memory.

In: such a model. Out: a module that processes a short video in one call, so that attention in a frame reads the memory
of earlier frames. Its inputs are tensors, and calls share no state.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sweeping.transformers_inputs import Inputs, noise

_SESSIONS = {
    "edgetam_video": "EdgeTamVideoInferenceSession",
    "sam2_video": "Sam2VideoInferenceSession",
    "sam3_tracker_video": "Sam3TrackerVideoInferenceSession",
    "sam3_video": "Sam3VideoInferenceSession",
}
PICTURES = 2


def follows_objects(config: Any) -> bool:
    """Whether a model with this configuration needs a session."""
    return config.model_type in _SESSIONS


def video(config: Any) -> Inputs:
    """Frames, and an object given by a text prompt or two points."""
    named = hasattr(config, "detector_config")
    side = (config.tracker_config if named else config).image_size
    pictures = {"pictures": noise(PICTURES, 3, side, side)}
    if named:
        return pictures | {"tokens": torch.arange(1, 8)[None]}
    points = torch.tensor([[[[0.25, 0.25], [0.5, 0.75]]]]) * side
    return pictures | {"points": points, "labels": torch.ones(1, 1, 2, dtype=torch.int32)}


class Tracking(nn.Module):
    """Runs an object-tracking model on a video.

    Arguments:
        model: A model with a forward that takes an `inference_session` and a frame index.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config
        for part in model.modules():
            if "inference_session" in inspect.signature(part.forward).parameters:
                # Remove the inference mode decorator, because the proof needs gradients.
                part.forward = types.MethodType(inspect.unwrap(type(part).forward), part)

    def forward(self, pictures: Tensor, **shown: Tensor) -> list[Any]:
        """The output of the model for each frame."""
        make = getattr(inspect.getmodule(type(self.model)), _SESSIONS[self.config.model_type])
        places = {f"{what}_device": pictures.device for what in ("inference", "inference_state", "video_storage")}
        height, width = pictures.shape[-2:]
        session = make(pictures, video_height=height, video_width=width, dtype=pictures.dtype, **places)
        _show(session, **shown)
        return [self.model(session, frame_idx=number) for number in range(len(pictures))]


def _show(
    session: Any, points: Tensor | None = None, labels: Tensor | None = None, tokens: Tensor | None = None
) -> None:
    """Add the object to track to a session, as the processors of these models do."""
    if tokens is not None:
        prompt = session.add_prompt("object")
        session.prompt_input_ids[prompt] = tokens
        session.prompt_attention_masks[prompt] = torch.ones_like(tokens)
    else:
        session.add_point_inputs(session.obj_id_to_idx(1), 0, {"point_coords": points, "point_labels": labels})
        session.obj_with_new_inputs = [1]
