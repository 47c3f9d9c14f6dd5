"""A backbone that is used in training and never trained."""

from __future__ import annotations

from typing import Any

import l2c
from l2c.identity import Identity


class Frozen:
    """Holds a backbone outside of the LightningModule's registry.

    So it is in no checkpoint, no optimizer and no averaged copy: copies of the holder share it.
    Its parameters need no gradient and it stays in eval mode.

    Args:
        path: What `l2c.load` takes.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.model: Any = l2c.load(path)
        self.identity = Identity.of(self.model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return self
