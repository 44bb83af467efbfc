"""Which options mean something to which task: one that would be ignored is refused, with a line that says why."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any

from lance_mlx.errors import LanceError
from lance_mlx.requests.request import Question, Renorm, Request, Task
from lance_mlx.requests.rewriting import REWRITABLE

OPTIONS = {"num_steps": "steps", "guidance_scale": "guidance", "max_new_tokens": "max_tokens", "temperature": "temp"}
"""Parameters of the commands that are not called as the request's fields."""
_NUMBERS = [
    value.name
    for kind in (Request, Question)
    for value in fields(kind)
    if value.type in (int, float, int | None, tuple[float, float])
]
_NAMED = "|".join([*_NUMBERS, "low_ram"])
EDITING = (Task.IMAGE_EDIT, Task.VIDEO_EDIT)
_SIZED = (Task.T2I, Task.T2V, Task.SUBJECT)
_OF_FRAMES = (Task.T2V, Task.I2V, Task.SUBJECT)
_GUIDANCE = "guidance_interval guidance_renorm guidance_renorm_min negative_prompt".split()


def _looks(task: Task) -> bool:
    """Whether the ViT is used."""
    return task.takes is not None and task is not Task.I2V


_TASKS: dict[str, Callable[[Task], bool]] = {
    **dict.fromkeys(
        """prompt prompts_file steps guidance timestep_shift guidance_interval guidance_renorm guidance_renorm_min
        text_template noise negative_prompt scheduler stepwise_output_dir batch_size num_images
        vae_tiling""".split(),
        lambda task: not task.answers,
    ),
    **dict.fromkeys("question instruction max_tokens temp top_p".split(), lambda task: task.answers),
    **dict.fromkeys(("width", "height"), lambda task: task in _SIZED),
    **dict.fromkeys(("vit_resolution", "vit_source"), _looks),
    "num_frames": lambda task: task in _OF_FRAMES,
    "fps": lambda task: task in (*_OF_FRAMES, Task.VIDEO_EDIT),
    **dict.fromkeys(("resolution", "as_upstream"), lambda task: task.takes is not None),
    "vae_resolution": lambda task: task.takes is not None and not task.answers,
    **dict.fromkeys(("reencode", "strength"), lambda task: task in EDITING),
    "rewrite": lambda task: task in REWRITABLE,
}
"""The tasks of each option that is not for all."""
_INSTEAD = {
    **dict.fromkeys(
        ("width", "height"),
        (lambda task: task.size_from_source, "it takes its size from the source, about as large as --resolution says"),
    ),
    **dict.fromkeys(("prompt", "prompts_file"), (lambda task: task.answers, "give --question")),
    **dict.fromkeys(("question", "instruction"), (lambda task: not task.answers, "give --prompt")),
    "num_frames": (lambda task: task is Task.VIDEO_EDIT, "it takes its frames from the source; leave it out"),
    "rewrite": (lambda task: True, f"it is for {' and '.join(REWRITABLE)}; leave it out"),
}
"""What to do, and why, where there is more to say than to leave it out."""


def means(name: str, task: Task) -> bool:
    """Whether an option, by the name of its parameter, means something to a task."""
    return _TASKS.get(name, lambda task: True)(task)


def check_options(given: Collection[str], values: Mapping[str, Any], task: Task) -> None:
    """Raise LanceError for the first option that would be ignored, rather than leave the user to find out.

    Args:
        given: parameters that stand on the command line.
        values: those of all parameters.
    """
    for name in given:
        if not means(name, task):
            applies, instead = _INSTEAD.get(name, (lambda task: False, ""))
            remedy = instead if applies(task) else "leave it out"
            raise LanceError(f"{spelt(name)} means nothing to task {task}: {remedy}")
    one_frame = task is Task.SUBJECT and (values["num_frames"] or 1) == 1
    greedy = task.answers and values["temp"] == 0
    refusals = {
        "fps": (one_frame, "is for a video: give --num-frames"),
        "reencode": (len(values["prompt"] or ()) < 2, "is between turns: give a further --prompt"),
        "top_p": (greedy, "is for answers that are drawn: give a --temp above 0"),
        "seed": (greedy, "is for answers that are drawn: give a --temp above 0"),
        "auto_seeds": (greedy, "is for answers that are drawn: give a --temp above 0"),
    }
    if not task.answers:
        unguided, no_renorm = values["guidance"] <= 1, values["guidance_renorm"] is Renorm.NONE
        refusals |= dict.fromkeys(_GUIDANCE, (unguided, "acts through guidance: give a --guidance above 1"))
        if not unguided:
            refusals["guidance_renorm_min"] = no_renorm, "is for a renorm: leave --guidance-renorm none out"
    for name in given:
        ignored, why = refusals.get(name, (False, ""))
        if ignored:
            raise LanceError(f"{spelt(name)} {why}")


def refuse(given: Collection[str], options: Collection[str], why: str) -> None:
    """Raise LanceError for the first of some options that is given."""
    refused = next((name for name in given if name in options), None)
    if refused is not None:
        raise LanceError(f"{spelt(refused)} {why}")


def spelt(name: str) -> str:
    """A parameter, or a field of a request, as the command line spells it."""
    return f"--{OPTIONS.get(name, name).replace('_', '-')}"


def in_options(message: str) -> str:
    """An error about a field of a request or a parameter, as one about the option that sets it."""
    message = message.replace("ask for variant ", f"ask for {spelt('variant')} ")
    return re.sub(rf"(^|: )({_NAMED}) ", lambda found: f"{found[1]}{spelt(found[2])} ", message)
