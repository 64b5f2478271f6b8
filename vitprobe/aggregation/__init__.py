"""Aggregation: every way of making one vector an image of a block's tokens, and the weights it gives the patches.

```python
from vitprobe import aggregation

ep = aggregation.create("ep(queries=16)", dim=768)
vectors = ep(aggregation.TokenBatch(tokens, layout))  # (B, 768)
```
"""

from __future__ import annotations

from vitprobe.aggregation.base import Aggregator
from vitprobe.aggregation.batch import TokenBatch
from vitprobe.aggregation.registering import register
from vitprobe.aggregation.registry import create, names

__all__ = ["Aggregator", "TokenBatch", "create", "names", "register"]
