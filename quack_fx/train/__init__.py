"""USER: from a layout to a training step.

program/    the step written down for one model
"""
