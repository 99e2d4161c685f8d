"""Reads the largest attention logit of every head during training.

In: a model and its layout. Out: the largest logits in the forward passes of each step, by attention and query head.

    watch.py   module hooks that observe forward passes and collect the logits of a step
    rows.py    the largest logit of every query, for a softmax or scaled_dot_product_attention
    heads.py   finds the head axis of the logits, proved by gradients

The logit is the input of the softmax: it includes scale, softcap, additive bias and mask. Masked positions have values
below all others, so they do not affect the maximum.
"""

from quack_fx.train.logits.watch import MaxLogits

__all__ = ["MaxLogits"]
