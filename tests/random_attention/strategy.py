"""Hypothesis's side of the generator.

In: nothing. Out: strategies of `Choices`; hypothesis shrinks the numbers drawn, and the plainest option is always 0.
"""

from __future__ import annotations

from hypothesis import strategies as st

from .choices import Choices


@st.composite
def all_choices(draw: st.DrawFn) -> Choices:
    """Decisions that hypothesis makes, one by one."""
    return Choices(lambda n: draw(st.integers(0, n - 1)))
