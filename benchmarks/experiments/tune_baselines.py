"""How strong should a method's loss be? Four values of each, chosen on validation digits whose square is wrong, never on test digits.

RRR's and Grad-CAM's strength and P of an ISNet get equally many trials on biased MNIST, with seeds (100, ...) that no experiment uses.

    python -m benchmarks.experiments.tune_baselines --data mnist.npz
"""

from __future__ import annotations

import sys

from .biased_mnist import DIGIT, MARKS, SIZE, load, render
from .command import in_one_line, parse, parser
from .fit import fit
from .jobs import Row, unfinished
from .measure import accuracy, share
from .systems import Setting, as_row
from .tables import by, mean_spread, table, write_page

SEED = 100
NAMES = {"rrr": "strength", "gradcam": "strength", "hirescam": "strength", "stochastic": "P"}
VALUES = {"rrr": (0.01, 0.1, 1, 10), "gradcam": (0.1, 1, 10, 100), "hirescam": (0.1, 1, 10, 100), "stochastic": (0.5, 0.7, 0.9, 0.97)}


NOTE = (
    "Validation digits: never trained on, drawn with the true square (biased), none (unbiased) and another class's (confounded). So "
    "data without the shortcut are used to choose a strength; no test digit is."
)


def one(job: Row, given: Row) -> Row:
    """Trains one setting; accuracy on the validation digits, cut out and drawn again with each kind of square, in percent."""
    task, edge, found = load(given["data"], *given["sizes"][:2]), (SIZE - DIGIT) // 2, {}
    val = task.val[slice(0, given["sizes"][2])]
    digits = val.images[:, 0, edge : edge + DIGIT, edge : edge + DIGIT]
    fitted = fit(Setting(**job), task.to(given["device"]))
    for marks in MARKS:
        images = render(digits, val.labels, marks, seed=SEED).to(given["device"]).floats()
        found[f"accuracy_val_{marks}"] = accuracy(fitted.system.logits(images.images, images.masks), images.labels)
    found["share"] = share(fitted.system, val[slice(0, 512)].to(given["device"]).floats())
    return {**found, "train_seconds": fitted.seconds, "diverged": fitted.diverged}


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    """The command."""
    p = parser(__doc__, seeds=1)
    p.add_argument("--data", required=True, help="MNIST's mnist.npz")
    options, run = parse(p, arguments)
    common = {"net": "convnet", "steps": run.pick(2, 1000, 4000), "batch": 32, "lr": 0.08}
    trials = [(system, NAMES[system], value) for system, values in VALUES.items() for value in values]
    settings = [Setting(s, seed=SEED + i, **{name: value}, **common) for i in range(run.seeds) for s, name, value in trials]
    given = {"data": options.data, "device": run.device, "sizes": run.pick((600, 60, 60), (20_000, 60, 2_000), (58_000, 60, 2_000))}
    path, jobs = run.path("tune_baselines", ".csv"), [as_row(s) for s in settings]
    if not run.draw:
        load(options.data, 600, 60)  # a wrong --data is told before processes start
    rows = run.rows(path, jobs, one, given, "tuning")
    columns = {"system": lambda g: "{}, {} = {}".format(g[0]["system"], NAMES[g[0]["system"]], g[0][NAMES[g[0]["system"]]])}
    columns |= {f"val, {m}": lambda g, m=m: mean_spread(g, f"accuracy_val_{m}") for m in MARKS}
    columns["background share"] = lambda g: mean_spread(g, "share")
    body, notes = table(columns, list(by(rows, "system", "strength", "P").values())), [NOTE, *unfinished(rows, jobs)]
    command = run.command("tune_baselines", "--data mnist.npz")
    print(write_page(path.with_suffix(".md"), "How strong should a method's loss be?", command, rows, body, notes).read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
