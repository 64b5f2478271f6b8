"""Models: from a name, a file or a module to a model that is ready to be probed.

```python
import vitprobe as vp

vp.models.register("ours_vit_b", "runs/ours.pth", arch="vit_base_patch16_224", paradigm="MIM")
model = vp.load_model("ours_vit_b")
```
"""

from __future__ import annotations

from vitprobe.models.registered import register

__all__ = ["register"]
