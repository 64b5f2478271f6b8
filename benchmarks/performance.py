"""The tables of docs/performance.md, from the JSON files that `vitprobe bench --out` wrote.

vitprobe bench --model vit_base_patch16_224 --batch-size 8 --out 224.json
vitprobe bench --model vit_base_patch16_224 --img-size 448 --batch-size 2 --out 448.json
vitprobe bench --model vit_small_patch16_224 --img-size 1024 --batch-size 1 --out 1024.json
python -m benchmarks.performance 224.json 448.json 1024.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vitprobe.bench import WORDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    print("| model, pixels, batch | way | time | range | peak memory | plain pass, s |\n|---|---|---|---|---|---|")
    machines = []
    for path in parser.parse_args().files:
        found = json.loads(path.read_text())
        setting = found["setting"]
        name = f"`{setting['model']}`, {setting['img_size'] or 'its own'}, {setting['batch_size']}"
        for cost in found["costs"]:
            memory = "–" if cost["memory_ratio"] is None else f"{cost['memory_ratio']:.2f}×"
            print(
                f"| {name} | {WORDS[cost['way']]} | **{cost['ratio']:.2f}×** | {cost['lowest']:.2f} to "
                f"{cost['highest']:.2f} | {memory} | {cost['plain_seconds']:.2f} |"
            )
        machines.append(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    print("\n" + "\n".join(dict.fromkeys(machines)))


if __name__ == "__main__":
    main()
