"""BabyAI: two evals, of a model and of its twin that learned actions only, as one report.

Usage: python benchmarks/babyai.py PAR.json TWIN.json OUT.json [COMMIT]

Both files are what `blockloom eval --simulator` wrote. The random players are the same in both, so
they are taken from the first. COMMIT is the code that played, where it is not the working tree's.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RANDOM = ("random", "random_as_often_as_in_training")


def joined(par: dict[str, Any], twin: dict[str, Any], code: str) -> dict[str, Any]:
    """Put the players of both evals side by side, split by split.

    Raises:
        ValueError: The evals are of other episodes.
    """
    report: dict[str, Any] = {"simulator": par["simulator"], "splits": {}}
    for split, ours in par["splits"].items():
        other = twin["splits"][split]
        if any(ours[name] != other[name] for name in ("episodes", *RANDOM)):
            raise ValueError(f"split {split}: the two evals played other episodes")
        report["splits"][split] = {
            "episodes": ours["episodes"],
            "first_frames_as_recorded": ours["first_frames_as_recorded"],
            "par": ours["model"],
            "par_greedy": ours["model_greedy"],
            "action_only_twin": other["model"],
            "action_only_twin_greedy": other["model_greedy"],
            **{name: ours[name] for name in RANDOM},
            "imagined_frames": ours["imagined_frames"],
        }
    about = {name: par[name] for name in ("recipe", "parameters", "seed", "torch")}
    return {"commit": code} | about | report


def commit() -> str:
    """Name the commit of the working tree."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[1]), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    first, second = (json.loads(Path(name).read_text()) for name in sys.argv[1:3])
    code = sys.argv[4] if len(sys.argv) > 4 else commit()
    Path(sys.argv[3]).write_text(json.dumps(joined(first, second, code), indent=2) + "\n")
