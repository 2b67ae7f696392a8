"""The page of ``vtr explore``, in Gradio, and its server."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from vtr.errors import VtrError, missing
from vtr.explore import export, page
from vtr.explore.compute import attention, compare
from vtr.explore.guard import PathGuard
from vtr.explore.limits import UploadLimits, read_upload
from vtr.explore.media import SAMPLES, Shown, sample
from vtr.explore.subjects import Subjects, question_of

# Before gradio is imported, which reads it: nothing is reported to anyone.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
try:
    import gradio as gr
except ImportError as error:
    raise missing("gradio", "ui", "the web explorer") from error

FIRST = {
    "digits-vit": ("evit", "tome", "random"),
    "digits-llava": ("fastv", "visionzip", "random"),
    "digits-chat": ("fastv", "visionzip"),
    "digits-video": ("evs", "dycoke", "random"),
    "digits-long": ("zipvl", "random-blocks"),
    "digits-wan": ("topk-sparse", "random-sparse"),
}
"""Methods that are chosen at first."""
KEEP = 0.3
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
WAITING = 32
"""Requests that may wait; more are told that the server is busy."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HINT = "up to three"


class _Page:
    """The functions behind the page's controls; each session has its own state, and models are shared."""

    def __init__(self, subjects: Subjects, limits: UploadLimits) -> None:
        self.subjects, self.limits = subjects, limits

    def start(self, name: str) -> tuple[Any, ...]:
        """Show a model: its samples, its methods, and those that it refuses."""
        with _told():
            subject = self.subjects.get(name)
            shown = sample(name)
        methods = [m for m in FIRST.get(name, ()) if m in subject.offered]
        generator = subject.kind == "generator"
        return (
            gr.update(value="1"),
            shown,
            page.shown_html(shown),
            gr.update(
                value=shown.text or ("" if subject.kind == "encoder" else question_of(subject)),
                label="Prompt" if generator else "Question",
                visible=subject.kind != "encoder",
            ),
            gr.update(
                choices=list(subject.offered),
                value=methods or list(subject.offered[:1]),
                info=f"{HINT}; {len(subject.offered)} work on this model",
            ),
            gr.update(visible=not generator),
            gr.update(visible=not generator),
            page.refused_html(subject),
        )

    def sampled(self, name: str, number: str) -> tuple[Any, ...]:
        """Take a sample."""
        with _told():
            shown = sample(name, int(number) - 1)
        return shown, page.shown_html(shown), shown.text

    def uploaded(self, files: list[str] | None, shown: Shown) -> tuple[Any, ...]:
        """Take what was uploaded, and free the field for the next upload."""
        if not files:
            return None, shown, page.shown_html(shown)
        with _told():
            new = read_upload(files, self.limits)
            return None, new, page.shown_html(new)

    def run(
        self, name: str, shown: Shown, methods: list[str], keep: float, text: str, measure: bool
    ) -> tuple[Any, ...]:
        """Compare, and write what reproduces it."""
        with _told():
            subject = self.subjects.get(name)
            text = self.limits.check_text(text) if subject.kind != "encoder" else ""
            found = compare(subject, shown, methods, float(keep), text, measure=measure)
            plan = export.plan_json(found.methods, subject)
            lines = export.python_lines(subject, shown, found.methods, text)
        return page.comparison_html(found, shown), plan, lines

    def attend(self, name: str, shown: Shown, text: str) -> str:
        """Draw the attention of the dense model."""
        with _told():
            subject = self.subjects.get(name)
            text = self.limits.check_text(text) if subject.kind != "encoder" else ""
            return page.maps_html(attention(subject, shown, text))


@contextmanager
def _told() -> Iterator[None]:
    """Show an error that says what to do as a message on the page."""
    try:
        yield
    except (VtrError, ValueError, OSError) as error:
        raise gr.Error(
            escape(" ".join(str(error).split())), title="", print_exception=False
        ) from error


def build(subjects: Subjects, limits: UploadLimits = UploadLimits()) -> gr.Blocks:  # noqa: B008
    """Build the page.

    Args:
        subjects: the models.
        limits: of uploads.
    """
    made = _Page(subjects, limits)
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(
        title="vtr explore", analytics_enabled=False, delete_cache=(60, 600), fill_width=True
    ) as blocks:
        shown = gr.State(Shown(), time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=1, min_width=290):
                model = gr.Dropdown(
                    list(subjects.names), value=subjects.names[0], label="Model",
                    allow_custom_value=subjects.typed, elem_id="model",
                )  # fmt: skip
                number = gr.Radio(
                    [str(n + 1) for n in range(SAMPLES)],
                    value="1",
                    label="Sample",
                    elem_id="sample",
                )
                upload = gr.File(
                    file_count="multiple", file_types=["image", "video"], height=150,
                    label="or drop pictures or a clip", elem_id="upload",
                )  # fmt: skip
                seen = gr.HTML(elem_id="seen")
                text = gr.Textbox(label="Question", max_lines=3, visible=False, elem_id="text")
                methods = gr.Dropdown(
                    [],
                    multiselect=True,
                    max_choices=3,
                    label="Methods",
                    info=HINT,
                    elem_id="methods",
                )
                keep = gr.Slider(
                    0.05, 1.0, value=KEEP, step=0.05, label="keep", elem_id="keep",
                    info="share of the tokens, or of their pairs",
                )  # fmt: skip
                measure = gr.Checkbox(True, label="measure time", elem_id="measure")
                go = gr.Button("Run", variant="primary", elem_id="run")
            with gr.Column(scale=4, min_width=480), gr.Tabs():
                with gr.Tab("Tokens"):
                    result = gr.HTML(elem_id="result")
                with gr.Tab("Attention"):
                    maps = gr.HTML(elem_id="maps")
                with gr.Tab("Export"):
                    lines = gr.Code(label="Python", language="python", elem_id="lines")
                    plan = gr.Code(label="Plan", language="json", elem_id="plan")
                with gr.Tab("Refused methods"):
                    refused = gr.HTML(elem_id="refused")
        asked = [model, shown, methods, keep, text, measure]
        ran: dict[str, Any] = {
            "fn": made.run, "inputs": asked, "outputs": [result, plan, lines], "api_visibility": "private",
            "trigger_mode": "always_last", "concurrency_id": "model", "concurrency_limit": 4,
        }  # fmt: skip
        attended: dict[str, Any] = {
            "fn": made.attend, "inputs": [model, shown, text], "outputs": maps,
            "api_visibility": "private", "trigger_mode": "always_last", "concurrency_id": "model",
        }  # fmt: skip
        begin: dict[str, Any] = {
            "fn": made.start, "inputs": model,
            "outputs": [number, shown, seen, text, methods, measure, upload, refused],
            "concurrency_id": "model", **quiet,
        }  # fmt: skip
        for event in (blocks.load(**begin), model.change(**begin)):
            event.success(**ran).success(**attended)
        took = number.input(made.sampled, [model, number], [shown, seen, text], **quiet)
        took.success(**ran).success(**attended)
        read = upload.upload(made.uploaded, [upload, shown], [upload, shown, seen], **quiet)
        read.success(**ran).success(**attended)
        for change in (go.click, keep.change, methods.input, measure.input):
            change(**ran)
        text.submit(**ran).success(**attended)
    return blocks


class ExplorerServer:
    """A running explorer.

    Attributes:
        url: of the page.
    """

    def __init__(self, blocks: gr.Blocks, url: str, folder: str) -> None:
        self.url, self._blocks, self._folder = url, blocks, folder

    def close(self) -> None:
        """Stop answering, and delete uploads."""
        self._blocks.close(verbose=False)
        shutil.rmtree(self._folder, ignore_errors=True)


def serve(
    subjects: Subjects,
    limits: UploadLimits = UploadLimits(),  # noqa: B008
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
) -> ExplorerServer:
    """Start the explorer in this process, and return at once.

    Nothing of the machine can be read through it: no path is served, uploads are kept in a folder of this
    server and read only by the session that made them, and no address is fetched. On a loopback address, requests
    that name another host are refused, so that no other web site can reach it through the browser.

    Args:
        subjects: the models.
        limits: of uploads.
        host: address to listen on.
        port: None is the first free one from 7860 on.

    Raises:
        OSError: the port is taken.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    folder = tempfile.mkdtemp(prefix="vtr-explore-")
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ.pop("GRADIO_ALLOWED_PATHS", None)
    # A whole upload is as large as one clip with the headers of its part, or as several small pictures.
    guards = [Middleware(PathGuard, upload=2 * limits.bytes)]
    if host in LOOPBACK:
        guards.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"]))
    blocks = build(subjects, limits)
    blocks.queue(max_size=WAITING, default_concurrency_limit=4)
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", radius_size="md", font=FONTS, font_mono=MONO
    )
    try:
        _, url, _ = blocks.launch(
            server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True,
            inbrowser=False, show_error=False, allowed_paths=[], max_file_size=limits.bytes,
            state_session_capacity=64, enable_monitoring=False, ssr_mode=False, pwa=False,
            mcp_server=False, run_history=False, footer_links=[], theme=theme, css=page.STYLE,
            app_kwargs={"middleware": guards, "docs_url": None, "redoc_url": None},
        )  # fmt: skip
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return ExplorerServer(blocks, url, folder)
