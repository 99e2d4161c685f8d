"""The largest attention logit of every head, read while the model trains.

In: a model and its layout. Out: for each step the largest logits of its forward passes, by attention and query head.

    watch.py   the module hooks that see a forward pass, and what they have read since the last step
    rows.py    the largest logit of every query, of a softmax or of scaled_dot_product_attention
    heads.py   which axis of those counts the heads, proved by gradients

The logit is what goes into the softmax: scale, softcap, additive bias and mask are in it. Positions that a mask takes
out have values that no other falls below, and so do not count.
"""

from quack_fx.train.logits.watch import MaxLogits

__all__ = ["MaxLogits"]
