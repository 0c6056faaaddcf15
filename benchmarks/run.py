"""All speed measurements on this machine: prints a table, writes benchmarks/results.json.

python benchmarks/run.py           everything, about half an hour on 2 cores, most of it CLIP
python benchmarks/run.py --quick   without the steps through ViT-B/16 (about 5 minutes)
python benchmarks/run.py starts    that part anew, on the processor of the rows that stay
"""

import argparse
import json
import logging
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import bank_step
import evaluation
import frozen
import growth
import loader
import pandas as pd
import starts
import step
import student
import tokens_step
import torch
from common import cpu_name

RESULTS = Path(__file__).parent / "results.json"
THROUGH_CLIP = ("student", "step", "step_cub", "tokens_step")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="which, by name; default all")
    parser.add_argument("--quick", action="store_true", help="leave out the steps through ViT-B/16")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)  # open_clip says that weights are random
    parts = {
        "evaluation": evaluation.measure,
        "loader": lambda: loader.measure(workers=args.threads),
        "bank_step": bank_step.measure,
        "student_small": student.measure_small,
        "starts": starts.measure,
        "student": student.measure,
        "step": step.measure,
        "step_cub": lambda: step.measure("cub", 312, 1.2),
        "tokens_step": tokens_step.measure,
        "frozen": frozen.measure,
        "growth": growth.measure,
    }
    if unknown := set(args.parts) - set(parts):
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(parts)}")
    kept = json.loads(RESULTS.read_text()) if args.parts else None
    if kept and kept["about"]["device"] != cpu_name():
        parser.error(f"{RESULTS.name} is of another processor, {kept['about']['device']}: measure all parts")
    chosen = args.parts or [name for name in parts if not (args.quick and name in THROUGH_CLIP)]
    device, measured = cpu_name(), {}
    for name in chosen:
        torch.set_num_threads(args.threads)  # a part may have changed it
        measured[name] = parts[name]()
        print(json.dumps(measured[name][-1]), file=sys.stderr, flush=True)
    if grown := measured.pop("growth", None):
        growth.draw(grown)
    rows = [row for part in measured.values() for row in part]
    if kept:
        anew = {row["what"]: row for row in rows}
        rows = [anew.pop(row["what"], row) for row in kept["rows"]] + list(anew.values())
    print(pd.DataFrame(rows).astype(object).fillna("").to_string(index=False))
    commands = [kept["about"]["command"]] if kept else []
    commands.append(" ".join(["python benchmarks/run.py", *sys.argv[1:]]))
    about = dict(device=device, command=", then ".join(commands), torch=torch.__version__)
    about |= dict(python=platform.python_version(), date=datetime.now(UTC).date().isoformat())
    about["load"] = [round(v, 1) for v in os.getloadavg()]
    RESULTS.write_text(json.dumps(dict(about=about, rows=rows, growth=grown or kept["growth"]), indent=1) + "\n")


if __name__ == "__main__":
    main()
