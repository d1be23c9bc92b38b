"""`wina-calib recover`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from wina_calib.commands.calibrate import stoppable
from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import flags, folder_option, json_option
from wina_calib.commands.output import bars, emit
from wina_calib.recovery.options import RecoverOptions, make_options


@click.command("recover")
@click.argument("checkpoint", metavar="DIR")
@folder_option
@flags(RecoverOptions)
@json_option
def command(checkpoint: str, output: Path, as_json: bool, **options: Any) -> None:
    """Train the sparse checkpoint DIR for a short time, so that it predicts as its dense original does.

    \b
    Example:
      wina-calib recover demo-sparse -o demo-recovered --tokens 200000
    """
    make_options(options)  # what is wrong with them is told before libraries are loaded
    load_libraries()
    from wina_calib.recovery.run import recover

    with bars() as progress, stoppable():
        recovered = recover(checkpoint, output, progress=progress, **options)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one reports
        return
    emit(recovered.to_dict(), table(recovered), as_json=as_json)


def table(made: Any) -> str:
    """A finished recovery for people: rise, agreement and divergence before and after, by kind of text."""
    lines = [
        f"{made.folder}: {made.trained.steps} steps in {made.trained.seconds / 60:.1f} minutes; the weights of step "
        f"{made.trained.best} were kept"
        + (f", {made.trained.share:.0%} of the way there." if made.trained.share < 1 else "."),
        f"{'text':<20}{'sparsity':>9}{'rise before':>13}{'after':>9}{'same token':>12}{'after':>8}{'KL':>8}{'after':>8}",
    ]
    for kind, by in made.before.items():
        for sparsity, before in by.items():
            after = made.after[kind][sparsity]
            lines.append(
                f"{kind:<20}{sparsity:>9.0%}{before.rise:>13.1%}{after.rise:>9.1%}{before.top1_agreement:>12.3f}"
                f"{after.top1_agreement:>8.3f}{before.kl:>8.3f}{after.kl:>8.3f}"
            )
    if any(
        after.rise > before.rise and after.kl < before.kl
        for kind, by in made.before.items()
        for before, after in ((by[s], made.after[kind][s]) for s in by)
    ):
        lines.append(
            "Where the rise is higher after and the divergence (KL) lower, the model answers more like the dense one, which is "
            "what it is trained for, though a little less like this text."
        )
    lost = [
        kind
        for kind, by in made.before.items()
        if any(f"{made.after[kind][s].kl:.3f}" > f"{before.kl:.3f}" for s, before in by.items())
    ]
    if lost:
        lines.append(
            f"Text where the divergence (KL) is higher after: {', '.join(lost)}. There the checkpoint from before is the better "
            "one; more --tokens, or --data like it, train for it."
        )
    if made.tasks_before:
        lines += ["", f"{'task, share solved':<20}{'sparsity':>9}{'before':>13}{'after':>9}"]
    for task, solved in made.tasks_before.items():
        for sparsity, share in solved.items():
            lines.append(f"{task:<20}{sparsity:>9.0%}{share:>13.3f}{made.tasks_after[task][sparsity]:>9.3f}")
    return "\n".join(lines)
