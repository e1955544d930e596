"""The table that `invert --method auto` picks by, from results of `evaluate inversion` on the default model.

    for steps in 10 25 50; do for guidance in 1 7.5; do
        smooth-rt evaluate inversion --data scenes --method all --num-inference-steps $steps \
            --guidance-scale $guidance --output tables/$steps-$guidance
    done; done
    python docs/experiments/inversions.py tables/*/inversion.json --output smooth_rt/assets/inversions.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

KEPT = {"psnr": 2, "noise_std": 2, "evaluations": 1, "gradient_evaluations": 1}  # decimals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--variant", default="smooth", help="base or smooth")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    rows, images = [], set()
    for path in options.results:
        result = json.loads(path.read_text(encoding="utf-8"))
        images.add(result["images"])
        for row in result["results"]:
            if row["variant"] == options.variant:
                figures = {key: round(row[key], decimals) for key, decimals in KEPT.items()}
                settings = {"method": row["method"], "steps": result["steps"], "guidance_scale": row["guidance_scale"]}
                rows.append({**settings, **figures})
    rows.sort(key=lambda row: (row["guidance_scale"], row["method"], row["steps"]))
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    head = json.dumps({"model": "default", "variant": options.variant, "images": sorted(images)})[1:-1]
    options.output.write_text(f'{{{head}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
