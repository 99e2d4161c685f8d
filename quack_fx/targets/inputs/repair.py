"""stub"""
from typing import Any
def retry(model: Any, candidate: Any, error: Any) -> list[Any]:
    return []
