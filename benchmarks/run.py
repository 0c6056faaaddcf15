"""All speed measurements on this machine: prints a table, writes benchmarks/results.json.

python benchmarks/run.py           everything, about a quarter of an hour on 2 cores, most of it CLIP
python benchmarks/run.py --quick   without the steps through ViT-B/16 (about 5 minutes)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the steps through ViT-B/16")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)  # open_clip says that weights are random
    parts = [evaluation.measure, lambda: loader.measure(workers=args.threads), bank_step.measure, student.measure_small]
    parts += [starts.measure, frozen.measure]
    if not args.quick:
        parts += [student.measure, step.measure, lambda: step.measure("cub", 312, 1.2), tokens_step.measure]
    rows = []
    for part in parts:
        rows += part()
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    grown = growth.measure()
    growth.draw(grown)
    print(pd.DataFrame(rows).astype(object).fillna("").to_string(index=False))
    about = dict(
        device=cpu_name(), command="python benchmarks/run.py " + " ".join(sys.argv[1:]), torch=torch.__version__
    )
    about |= dict(python=platform.python_version(), date=datetime.now(UTC).date().isoformat())
    about["load"] = [round(v, 1) for v in os.getloadavg()]
    RESULTS.write_text(json.dumps(dict(about=about, rows=rows, growth=grown), indent=1) + "\n")


if __name__ == "__main__":
    main()
