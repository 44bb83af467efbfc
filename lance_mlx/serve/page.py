"""The page: every task with its settings, what becomes of it, and what was made before."""

import os
from pathlib import Path
from typing import Any

# Before Gradio is imported, which otherwise tells its makers of every start.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr  # noqa: E402
from fastapi import FastAPI  # noqa: E402

from lance_mlx.media.preprocess import RESOLUTIONS  # noqa: E402
from lance_mlx.requests.request import Task, VisualKind  # noqa: E402
from lance_mlx.serve.bounds import BOUNDS  # noqa: E402
from lance_mlx.serve.page_jobs import PageJobs, label_of  # noqa: E402
from lance_mlx.serve.service import Service  # noqa: E402
from lance_mlx.serve.sizes import ASPECTS, size_of  # noqa: E402

TASKS = {
    Task.T2I: "Text to image",
    Task.IMAGE_EDIT: "Edit an image",
    Task.SUBJECT: "Draw the subject of images",
    Task.X2T_IMAGE: "Ask about images",
    Task.T2V: "Text to video",
    Task.I2V: "Animate an image",
    Task.VIDEO_EDIT: "Edit a video",
    Task.X2T_VIDEO: "Ask about a video",
}
_KEPT_SECONDS = 3600
_CSS = """
.gradio-container { width: 100%; max-width: 1200px !important; margin: 0 auto !important; }
#status progress { width: 100%; height: 0.8rem; appearance: none; border: 0; background: var(--neutral-300); }
#status ::-webkit-progress-bar { background: var(--neutral-300); }
#status ::-webkit-progress-value { background: var(--color-accent); }
#status ::-moz-progress-bar { background: var(--color-accent); }
#status p { margin: 0 0 0.25rem; overflow-wrap: anywhere; }
#history input { padding-right: 2rem; text-overflow: ellipsis; }
/* It would fetch what it cuts with from elsewhere. */
#source button[aria-label^="Trim"] { display: none; }
/* On a phone what is made comes before the settings. */
@media (max-width: 700px) {
  #left { display: contents; }
  #left > *, #right { flex: 1 1 100%; }
  #right { order: 1; }
  #settings { order: 2; }
}
"""


def mount_page(app: FastAPI, service: Service, uploads: Path) -> None:
    """Put the page at / of an app; `uploads` is where its files are kept, as GRADIO_TEMP_DIR says."""
    gr.mount_gradio_app(
        app,
        build_page(PageJobs(service, uploads)),
        "/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=BOUNDS.upload_bytes,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=_theme(),
        css=_CSS,
    )


def _theme() -> gr.themes.Base:
    """Gradio's own, with fonts of the machine and with enough contrast."""
    theme = gr.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return theme.set(
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        slider_color="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
    )


def build_page(jobs: PageJobs) -> gr.Blocks:
    """The page's fields, and what they do."""
    with gr.Blocks(title="Lance", analytics_enabled=False, delete_cache=(600, _KEPT_SECONDS)) as page:
        gr.Markdown("# Lance")
        past = gr.State([], time_to_live=_KEPT_SECONDS, delete_callback=jobs.forget)
        with gr.Row():
            with gr.Column(min_width=300, elem_id="left"):
                fields = _given()
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id="go", min_width=120)
                    stop = gr.Button("Cancel", elem_id="cancel", min_width=120)
                status = gr.HTML("<p role='status'>Ready.</p>", elem_id="status")
                with gr.Column(elem_id="settings"):
                    fields |= _settings()
            with gr.Column(min_width=300, elem_id="right"):
                outputs = {"status": status} | _outputs()
                history = gr.Dropdown([], label="History", info="What was made on this page", elem_id="history")
                with gr.Row():
                    show = gr.Button("Show again", min_width=120, elem_id="show")
                    replay = gr.Button("Use settings", min_width=120, elem_id="replay")

        made = [*outputs.values(), past, history]

        async def run(data: dict[Any, Any], request: gr.Request):
            settings = {name: data[field] for name, field in fields.items()}
            async for state, entries in jobs.run(settings, data[past], request.session_hash):
                yield {outputs[name]: update for name, update in state.items()} | _listed(entries, past, history)

        def show_again(entries: list[dict[str, Any]], index: int | None) -> dict[Any, Any]:
            return {outputs[name]: update for name, update in jobs.show(entries, index).items()}

        def replay_settings(entries: list[dict[str, Any]], index: int | None) -> dict[Any, Any]:
            if index is None or index >= len(entries):
                return {}
            settings = entries[index]["settings"]
            updates = _shown(settings["task"], settings["resolution"])
            return {
                field: gr.update(**(updates.get(name, {}) | {"value": settings[name]}))
                for name, field in fields.items()
            }

        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        go.click(run, {*fields.values(), past}, made, concurrency_limit=None, **quiet)
        fields["prompt"].submit(run, {*fields.values(), past}, made, concurrency_limit=None, **quiet)
        stop.click(jobs.cancel, None, outputs["status"], **quiet)
        page.unload(jobs.leave)
        show.click(show_again, [past, history], list(outputs.values()), **quiet)
        replay.click(replay_settings, [past, history], list(fields.values()), **quiet)

        names = list(fields)
        task, resolution = fields["task"], fields["resolution"]
        task.input(lambda task: _updates(names, _shown(task, None)), task, list(fields.values()), **quiet)
        resolution.input(_aspects, resolution, fields["aspect"], **quiet)
    return page.queue(max_size=BOUNDS.waiting * 4, default_concurrency_limit=None)


def _given() -> dict[str, Any]:
    """What a task is given, by the name of the setting, as the first task has it."""
    first = _shown(Task.T2I, None)
    return {
        "task": gr.Dropdown([(name, str(task)) for task, name in TASKS.items()], label="Task", elem_id="task"),
        "images": gr.Gallery(
            label="Images",
            type="filepath",
            file_types=["image"],
            columns=3,
            height=220,
            buttons=[],
            elem_id="images",
            interactive=True,
            **first["images"],
        ),
        "video": gr.Video(
            label="Video",
            sources=["upload"],
            height=220,
            buttons=[],
            elem_id="source",
            interactive=True,
            **first["video"],
        ),
        "prompt": gr.Textbox(lines=3, max_length=BOUNDS.prompt, elem_id="prompt", **first["prompt"]),
    }


def _settings() -> dict[str, Any]:
    """The other settings."""
    first = _shown(Task.T2I, None)
    return {
        "instruction": gr.Textbox(
            label="Instruction", info="Empty: the one that the model was trained with", **first["instruction"]
        ),
        "resolution": gr.Dropdown(label="Resolution", elem_id="resolution", **first["resolution"]),
        "aspect": gr.Dropdown(label="Aspect ratio and size", elem_id="aspect", **first["aspect"]),
        "seconds": gr.Slider(1, 10, 4, step=1, label="Duration in seconds", elem_id="seconds", **first["seconds"]),
        "seed": gr.Number(-1, label="Seed", info="-1: a new one every time", precision=0, minimum=-1, elem_id="seed"),
        "num_steps": gr.Slider(1, 100, 30, step=1, label="Steps", elem_id="steps", **first["num_steps"]),
        "guidance_scale": gr.Slider(1, 12, 4, step=0.1, label="Guidance", **first["guidance_scale"]),
        "timestep_shift": gr.Slider(0.5, 12, 3.5, step=0.1, label="Timestep shift", **first["timestep_shift"]),
        "max_tokens": gr.Slider(
            1, 1024, 256, step=1, label="Most tokens of the answer", elem_id="tokens", **first["max_tokens"]
        ),
        "temperature": gr.Slider(0, 2, 0, step=0.05, label="Temperature", **first["temperature"]),
    }


def _outputs() -> dict[str, Any]:
    hidden = {"interactive": False, "visible": False}
    return {
        "image": gr.Image(label="Image", format="png", buttons=["download", "fullscreen"], elem_id="image", **hidden),
        "video": gr.Video(label="Video", buttons=["download"], elem_id="video", **hidden),
        "answer": gr.Textbox(label="Answer", lines=6, buttons=["copy"], elem_id="answer", **hidden),
    }


def _shown(task: str, resolution: str | None) -> dict[str, dict[str, Any]]:
    """Which settings a task has, and what they can be."""
    task = Task(task)
    kind = "video" if task.is_for_video else "image"
    names = [(_called(name), name) for name in RESOLUTIONS if name.startswith(kind)]
    resolution = resolution or names[-1][1]
    draws, sized = not task.answers, not task.answers and not task.size_from_source
    return {
        "prompt": {"label": "Prompt" if draws else "Question"},
        "images": {"visible": task.takes is VisualKind.IMAGE},
        "video": {"visible": task.takes is VisualKind.VIDEO},
        "instruction": {"visible": task.answers},
        "resolution": {"choices": names, "value": resolution},
        "aspect": {**_choices(resolution), "value": "16:9" if kind == "video" else "1:1", "visible": sized},
        "seconds": {"visible": task in (Task.T2V, Task.I2V)},
        "num_steps": {"visible": draws},
        "guidance_scale": {"visible": draws},
        "timestep_shift": {"visible": draws},
        "max_tokens": {"visible": task.answers},
        "temperature": {"visible": task.answers},
    }


def _called(resolution: str) -> str:
    """Upstream's name for a resolution, without what goes without saying."""
    return resolution.partition("_")[2].replace("res", " px")


def _choices(resolution: str) -> dict[str, Any]:
    sizes = {aspect: size_of(aspect, RESOLUTIONS[resolution][0]) for aspect in ASPECTS}
    return {"choices": [(f"{aspect}, {width} x {height}", aspect) for aspect, (width, height) in sizes.items()]}


def _aspects(resolution: str) -> dict[str, Any]:
    return gr.update(**_choices(resolution))


def _updates(names: list[str], shown: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [gr.update(**shown.get(name, {})) for name in names]


def _listed(entries: list[dict[str, Any]] | None, past: gr.State, history: gr.Dropdown) -> dict[Any, Any]:
    """The history, where it has grown."""
    if entries is None:
        return {}
    choices = [(label_of(entry), index) for index, entry in enumerate(entries)]
    return {past: entries, history: gr.update(choices=choices, value=len(entries) - 1)}
