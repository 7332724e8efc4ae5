"""Run the benchmarks and write one JSON report.

From the repository's root: `python benchmarks/run.py --out report.json`. See benchmarks/README.md.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import b1_blocks
import b2_world
import b4_autoregressive
import b5_masked
import b12_memory
import common
import motion_stream
import p4_cache
import p5_slices
import scaling
import startup

BENCHES = {
    "startup": startup.run,
    "p5": p5_slices.run,
    "b4": b4_autoregressive.run,
    "b5": b5_masked.run,
    "b1": b1_blocks.run,
    "p4": p4_cache.run,
    "b2": b2_world.run,
    "b12": b12_memory.run,
    "motion": motion_stream.run,
    "scaling": scaling.run,
}


def main(argv: list[str] | None = None) -> int:
    """Run, print a line per row, write the report.

    Returns:
        0 when every row with a pass line passed, else 1.
    """
    parser = argparse.ArgumentParser(description="Blockloom's benchmarks")
    parser.add_argument("--only", nargs="*", choices=list(BENCHES), default=list(BENCHES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--repeats", type=int, help="turns that count, for every bench")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    warnings.filterwarnings("ignore", module="transformers")
    settings = {} if args.repeats is None else {"repeats": args.repeats}
    rows: list[common.Row] = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name in args.only:
            for row in BENCHES[name](device, **settings):
                rows.append(row)
                verdict = {None: "-", True: "pass", False: "FAIL"}[row.passed]
                line = f"{row.pass_line:.2f}" if row.pass_line is not None else "-"
                print(
                    f"{row.name:16} {row.threads} thr  {row.ratio:7.2f}  line {line:>5}  {verdict}"
                    f"  wall {row.wall_ratio or 0:.2f}  {row.what} vs {row.peer}",
                    flush=True,
                )
                if args.out is not None:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    report = common.as_json(rows, repeats=args.repeats)
                    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row.passed is not False for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
